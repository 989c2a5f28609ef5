// Whole transfers over a Queue: every answer is read, a short one is resumed
// at the right offset, EINTR and EAGAIN are retried with a bound, anything
// else becomes the transfer's error.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "io/drive_meter.h"
#include "io/queue.h"

namespace angelptm::io {

// kSync flushes the file to stable storage: offset 0, bytes 0, no buffer. It covers the writes whose outcomes were
// reaped before it was submitted, and no other. Its EIO means that some write since the last sync of the file may be
// lost, whoever wrote it: the kernel tells it once and then forgets, so a second sync that succeeds proves nothing.
struct Transfer {
  std::uint64_t tag;  // the caller's; returned in the Outcome
  Op op;
  int file;
  std::uint64_t offset;
  std::byte* buffer;  // borrowed until the outcome is reaped
  std::uint64_t bytes;
};

struct Outcome {
  std::uint64_t tag;
  std::optional<IoError> error;  // empty: all bytes were transferred
};

struct Counters {
  std::uint64_t read_bytes = 0, written_bytes = 0;  // of completed attempts, resumed ones included once
  std::uint64_t read_count = 0, write_count = 0;    // completed transfers
  std::uint64_t resumed_count = 0, retried_count = 0, failed_count = 0;
  std::uint64_t sync_count = 0;  // completed
};

// One thread at a time; its owner serializes. Transfers beyond the queue's depth wait in the engine in order.
class Engine {
 public:
  // close_seconds: how long the destructor may wait. `meter`: told of every attempt, or null.
  Engine(std::vector<std::shared_ptr<const File>> files, std::unique_ptr<Queue> queue, double close_seconds = 30,
         std::shared_ptr<DriveMeter> meter = nullptr);
  // Drops what was not yet handed to the queue and waits for what was, since the kernel still owns those buffers. If
  // close_seconds pass first, the queue is leaked (the kernel may still write through it), which standard error tells.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Checks alignment and length of each transfer first (std::invalid_argument: a programmer's error), then queues all
  // and submits what fits, in one batch. Never waits.
  void submit(std::span<const Transfer> transfers);
  // Appends finished outcomes, waiting until at least `at_least` are there. Throws IoError(kDeadline) naming the oldest
  // unfinished transfer when the deadline passes first; what had finished by then has been appended.
  std::size_t reap(std::vector<Outcome>& outcomes, std::size_t at_least, Clock::time_point deadline);
  // As reap, but a deadline that passes first is no error: fewer than at_least were appended.
  std::size_t reap_some(std::vector<Outcome>& outcomes, std::size_t at_least, Clock::time_point deadline);
  // Both refuse an at_least above unfinished() (std::invalid_argument): nothing would ever end that wait.
  std::size_t unfinished() const;  // submitted and not yet reaped

  // Syncs every file and waits for all of them; then everything written through this engine is on stable storage.
  // Throws std::logic_error unless unfinished() is 0, since what is under way would not be covered; the first file's
  // error; or IoError(kDeadline), after which the unfinished syncs are still to be reaped, tagged kSyncTag.
  void sync(Clock::time_point deadline);
  static constexpr std::uint64_t kSyncTag = ~std::uint64_t{0};

  const Counters& counters() const { return counters_; }
  const Queue& queue() const { return *queue_; }
  const std::vector<std::shared_ptr<const File>>& files() const { return files_; }

 private:
  struct State;
  void pump();
  void settle(std::uint64_t slot, std::int32_t result);  // one answer of the queue
  std::vector<std::shared_ptr<const File>> files_;
  std::unique_ptr<Queue> queue_;
  double close_seconds_;
  std::shared_ptr<DriveMeter> meter_;
  Counters counters_;
  std::unique_ptr<State> state_;
};

enum class Backend { kAuto, kUring, kThreads };
// kAuto: uring where it works here, else threads; `chosen_because` gets one sentence that says which and why.
std::unique_ptr<Engine> make_engine(Backend backend, std::vector<std::shared_ptr<const File>> files,
                                    std::vector<Region> regions, std::size_t depth, const FaultPlan* faults = nullptr,
                                    std::string* chosen_because = nullptr, double close_seconds = 30,
                                    std::shared_ptr<DriveMeter> meter = nullptr);

}  // namespace angelptm::io
