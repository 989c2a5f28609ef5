// What native threads did, and when: for the timeline of a step. Off until
// start(); then each thread that records has a lane of its own, which holds a
// fixed number of events. What does not fit is counted, never silent.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace angelptm::timeline {

// CLOCK_MONOTONIC, as Python's time.perf_counter_ns.
using Clock = std::chrono::steady_clock;

// New members go before kCount, each with its name in what_name.
enum class What : std::uint8_t {
  kRead,      // a transfer from a file, from its submission to its outcome
  kWrite,     // a transfer to a file, likewise
  kCheck,     // forming or comparing a page's CRC32C
  kUpdate,    // the optimizer's kernel
  kCopy,      // bytes from memory to memory
  kGradient,  // adding a gradient into its pages
  kWaitIo,    // nothing to do until a transfer ends
  kWaitWork,  // nothing to do until something is asked for
  kFetch,     // a unit's pages on their way to the device
  kEvict,     // a unit's pages on their way from the device
  kPublish,   // making new parameters current
  kSave,      // writing a page for a commit
  kSync,      // fsync
  kCount,
};

// "read", "wait_io", ...
const char* what_name(What what);

struct Event {
  Clock::time_point start, end;
  std::uint64_t bytes;
  std::uint32_t id;  // of whatever the lane works on: a span, a page, a unit
  What what;
};

// The events of one thread, in the order in which they were recorded, which is that of their ends.
struct LaneEvents {
  std::string name;
  std::vector<Event> events;
  std::uint64_t dropped = 0;  // events that found the lane full
};

struct Taken {
  std::vector<LaneEvents> lanes;  // those that have something to tell, in the order in which the threads appeared
  std::uint64_t dropped_without_lane = 0;  // events of threads beyond the most lanes that there may be
};

namespace detail {
extern std::atomic<bool> recording;
}

constexpr std::size_t kMostLanes = 1024;
constexpr std::size_t kMostCapacity = std::size_t{1} << 24;

// Whether events are kept at present. Relaxed, and nothing is ordered by it: a thread may see start and stop late, and
// what it records meanwhile is kept or dropped under its lane's lock.
inline bool recording() { return detail::recording.load(std::memory_order_relaxed); }

// Names the calling thread's lane: "updater 0", "fetcher", "commit". A thread without a name is "thread 3".
void name_lane(std::string name);

// Adds to the calling thread's lane, or drops the event if recording is off. Takes a lock that only start, stop and
// take contend for; the lane's room is allocated at the thread's first event after start.
void record(What what, Clock::time_point start, Clock::time_point end, std::uint32_t id, std::uint64_t bytes);

// Begins anew, with room for `capacity` events in each lane: what was not taken is gone. std::invalid_argument for a
// capacity of zero or above kMostCapacity.
void start(std::size_t capacity);

// Nothing is recorded from here on; what was recorded waits for take().
void stop();

// Gives out what was recorded since start() or the last take(), and makes room again. While recording goes on, too.
Taken take();

// The time now if events are kept, else no time: for what begins in one place and ends in another.
inline Clock::time_point begin() { return recording() ? Clock::now() : Clock::time_point{}; }

// Ends what begin() began; nothing where recording was off then.
inline void end(What what, Clock::time_point start, std::uint32_t id, std::uint64_t bytes) {
  if (start != Clock::time_point{}) record(what, start, Clock::now(), id, bytes);
}

// Records the time between its construction and destruction, if recording was on at both.
class Scope {
 public:
  explicit Scope(What what, std::uint32_t id = 0, std::uint64_t bytes = 0)
      : bytes_(bytes), id_(id), what_(what), active_(recording()) {
    if (active_) start_ = Clock::now();
  }
  ~Scope() {
    if (active_) record(what_, start_, Clock::now(), id_, bytes_);
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

  void add_bytes(std::uint64_t bytes) { bytes_ += bytes; }

 private:
  Clock::time_point start_{};
  std::uint64_t bytes_;
  std::uint32_t id_;
  What what_;
  bool active_;
};

}  // namespace angelptm::timeline
