// An Engine that several threads may use: Python's threads, which cannot be
// told to take turns. Native users own an Engine each and need no lock.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "io/engine.h"

namespace angelptm::io {

class SharedEngine {
 public:
  SharedEngine(std::unique_ptr<Engine> engine, std::string chosen_because);
  ~SharedEngine() = default;

  void submit(std::span<const Transfer> transfers);
  // As Engine::reap and Engine::reap_some, except that at_least is cut to what is unfinished (other threads reap too),
  // and that outcomes found by a reap that then throws are kept for the next call.
  std::vector<Outcome> reap(std::size_t at_least, Clock::time_point deadline);
  std::vector<Outcome> reap_some(std::size_t at_least, Clock::time_point deadline);
  // As Engine::sync. Other threads wait for their turn until it ends: what they submitted meanwhile would not be
  // covered.
  void sync(Clock::time_point deadline);
  std::size_t unfinished();
  Counters counters();  // the last ones, after close
  // Ends the engine as ~Engine does; a second call does nothing. Every other call then throws std::invalid_argument.
  void close();
  bool closed();

  // Constant after construction, so they need no lock and outlive close.
  const std::string& name() const { return name_; }
  const std::string& notes() const { return notes_; }
  const std::string& chosen_because() const { return chosen_because_; }
  std::size_t depth() const { return depth_; }

 private:
  // Held while the engine is used. Whoever waits for it holds `next` meanwhile, so a thread that reaps in a loop cannot
  // take the engine again before the one that waits had its turn.
  struct Turn {
    explicit Turn(SharedEngine& shared);
    std::unique_lock<std::mutex> engine;
  };
  Engine& open_engine(const Turn& turn);
  void reap_into(std::vector<Outcome>& outcomes, std::size_t at_least, Clock::time_point deadline);

  std::mutex next_, engine_mutex_;
  std::unique_ptr<Engine> engine_;
  std::vector<Outcome> kept_;
  Counters last_counters_;
  std::string name_, notes_, chosen_because_;
  std::size_t depth_;
};

}  // namespace angelptm::io
