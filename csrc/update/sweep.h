// The state of a sweep: which span is next, how far its published parameters
// are behind the gradients that were handed over, and frames for parameters
// that are published while others still read the former ones.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "pages/page_table.h"
#include "update/accumulators.h"
#include "update/script.h"
#include "update/span.h"

namespace angelptm::update {

// Which of the spans whose gradients wait is taken up next. kRoundRobin: the next one after the last. kMostGradients:
// the one for which most wait. kNextNeeded: the one that the computing thread needs soonest.
enum class Order : std::uint8_t { kRoundRobin, kMostGradients, kNextNeeded };

struct SweepOptions {
  Order order = Order::kRoundRobin;
  Combine combine = Combine::kMean;
  std::size_t spare_frames = 1;      // for former parameters that are still read
  std::vector<std::uint32_t> ranks;  // of each span: its place in the order in which the computing thread needs them
  int niceness = 0;                  // of the updating threads, above the process's own
};

// Sums over spans, in gradients: produced = taken + waiting, and taken = applied once the threads are idle.
struct GradientCounts {
  std::uint64_t produced = 0, taken = 0, published = 0, applied = 0;
};

class Sweep {
 public:
  // Takes the spare frames from the host pool and keeps them; throws TierCapacityError where it has too few.
  Sweep(pages::PageTable& table, const std::vector<Span>& spans, SweepOptions options, std::uint64_t grad_page_elements,
        double deadline_seconds);
  ~Sweep();

  Accumulators& accumulators() { return accumulators_; }
  const SweepOptions& options() const { return options_; }

  // The computing thread's side. Each throws the first error of an update, from then on, and std::invalid_argument for
  // a span that is not there.

  void open(const std::vector<std::uint32_t>& spans);
  // Waits until no gradient is waiting there, and takes the boxes then.
  void open_empty(const std::vector<std::uint32_t>& spans, const std::string& what);
  void put_back(const std::vector<std::uint32_t>& spans);
  struct Piece {
    std::uint32_t span;
    std::vector<Segment> segments;
  };
  // From boxes that are held, or (`from_step`) from the spans' step_grad pages.
  void hand_over(const std::vector<Piece>& pieces, const std::vector<kernels::Hyper>& hypers, bool from_step);
  // Returns when the published parameters of the spans lack at most `most_behind` of the gradients handed over.
  void wait_published(const std::vector<std::uint32_t>& spans, std::uint32_t most_behind, const std::string& what);
  // Returns when they lack none, or after so many seconds, and says whether they lack none.
  bool wait_all_published(const std::vector<std::uint32_t>& spans, double seconds);
  // Returns when so many gradients of each are applied and the states written. Any thread.
  void wait_applied(const std::vector<std::uint32_t>& spans, const std::vector<std::uint64_t>& counts,
                    const std::string& what);
  bool are_applied(const std::vector<std::uint32_t>& spans, const std::vector<std::uint64_t>& counts) const;
  std::uint64_t produced(std::uint32_t span) const;
  std::uint64_t published(std::uint32_t span) const;
  GradientCounts counts() const;
  // What happened is noted from here on.
  void record();
  Script recorded() const;  // so far
  // What happens from here on is what was recorded: the same gradients in each update, the same parameters in each use.
  // Needs rings of more spans than there are threads. Before the first gradient.
  void replay(Script script);
  // The computing thread is about to use the parameters of the spans, and has held them: `publishes` of each so far.
  void used(const std::vector<std::uint32_t>& spans, const std::vector<std::uint32_t>& publishes);
  // Replayed: returns when the parameters that the recorded use had are published, and no later ones; they stay the
  // newest until `used`.
  void await_use(const std::vector<std::uint32_t>& spans, const std::string& what);
  void end_replay();  // what is left of the script is forgotten
  bool replays() const { return player_ != nullptr; }
  // Where the computing thread is, for kNextNeeded.
  void set_position(std::uint32_t rank) { position_.store(rank); }
  void rethrow_failure() const;

  // The updating threads' side.

  // The span to take up next, of those that `is_free`; none where no gradient waits.
  std::optional<std::uint32_t> next(const std::function<bool(std::uint32_t)>& is_free);
  bool take(std::uint32_t span, pages::Frame* frames, Taken& taken);
  // Whether what is waiting may be taken, or what was taken may be computed and published: always, but in a replay.
  bool may_take(std::uint32_t span) const;
  bool may_publish(std::uint32_t span) const;
  // Publishes parameters that have `gradients` more in them; `frame` is one that nobody reads then, for the next ones.
  void publish(std::uint32_t span, pages::Frame& frame, std::uint32_t gradients);
  void applied(std::uint32_t span, std::uint32_t gradients);
  void fail(const std::exception_ptr& error);  // tells those who wait
  std::function<void()> on_gradients;          // called after gradients were handed over
  std::function<void(bool)> on_waiting;  // called when somebody begins to wait for the threads, and when nobody does

 private:
  struct Tally {
    std::atomic<std::uint64_t> produced{0}, taken{0}, published{0}, applied{0};
  };
  void expect_known(std::uint32_t span) const;
  void expect_known(const std::vector<std::uint32_t>& spans) const;
  template <typename One>
  void open_all(const std::vector<std::uint32_t>& spans, const One& open_one);
  void progressed();
  void await_whole_taken(const std::vector<std::uint32_t>& spans);
  bool are_published(const std::vector<std::uint32_t>& spans, std::uint32_t most_behind) const;
  template <typename Done>
  bool wait_within(double seconds, const Done& done);
  template <typename Done>
  void wait(const Done& done, const std::string& what);
  pages::Frame unread(pages::Frame frame);

  pages::PageTable& table_;
  const std::vector<Span>& spans_;
  SweepOptions options_;
  double deadline_seconds_;
  Accumulators accumulators_;
  std::unique_ptr<Tally[]> tallies_;
  std::uint32_t cursor_ = 0;  // guarded by whoever calls next
  std::atomic<std::uint32_t> position_{0};
  mutable std::mutex mutex_;
  std::uint32_t waiting_ = 0;  // guarded by mutex_
  std::condition_variable progress_;
  std::exception_ptr failed_;  // guarded by mutex_
  std::unique_ptr<Recorder> recorder_;
  std::unique_ptr<Player> player_;
  std::mutex frames_mutex_;
  std::vector<pages::Frame> retired_;  // perhaps still read; guarded by frames_mutex_
};

}  // namespace angelptm::update
