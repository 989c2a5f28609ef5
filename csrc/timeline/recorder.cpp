#include "timeline/recorder.h"

#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace angelptm::timeline {

namespace detail {
std::atomic<bool> recording{false};
}

namespace {

// Shared by its thread and the registry, so that either may go first. Lock order: registry, then lane.
struct Lane {
  std::mutex mutex;
  std::string name;           // this and all below are guarded by mutex
  std::vector<Event> events;  // never grows beyond capacity
  std::size_t capacity = 0;
  std::uint64_t dropped = 0;

  bool empty() const { return events.empty() && dropped == 0; }
};

struct Registry {
  std::mutex mutex;
  std::vector<std::shared_ptr<Lane>> lanes;  // this and all below are guarded by mutex
  std::size_t capacity = 0;
  std::uint64_t threads = 0;                           // that ever had a lane
  std::atomic<std::uint64_t> dropped_without_lane{0};  // a counter by itself, hence relaxed

  // Forgets threads that have ended and left nothing to tell.
  void prune() {
    std::erase_if(lanes, [](const std::shared_ptr<Lane>& lane) {
      if (lane.use_count() > 1) return false;  // the thread has the other reference
      std::lock_guard lock(lane->mutex);
      return lane->empty();
    });
  }
};

// Never destroyed: threads may record until the process is gone.
Registry& registry() {
  static auto* the = new Registry;
  return *the;
}

// The calling thread's lane; null when there are too many, and asked for again at its next event.
Lane* my_lane() {
  static thread_local std::shared_ptr<Lane> mine;
  if (mine) return mine.get();
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  if (all.lanes.size() >= kMostLanes) all.prune();
  if (all.lanes.size() >= kMostLanes) return nullptr;
  auto lane = std::make_shared<Lane>();
  lane->name = "thread " + std::to_string(all.threads++);
  lane->capacity = all.capacity;
  all.lanes.push_back(lane);
  mine = std::move(lane);
  return mine.get();
}

}  // namespace

const char* what_name(What what) {
  switch (what) {
    case What::kRead:
      return "read";
    case What::kWrite:
      return "write";
    case What::kCheck:
      return "check";
    case What::kUpdate:
      return "update";
    case What::kCopy:
      return "copy";
    case What::kGradient:
      return "gradient";
    case What::kWaitIo:
      return "wait_io";
    case What::kWaitWork:
      return "wait_work";
    case What::kFetch:
      return "fetch";
    case What::kEvict:
      return "evict";
    case What::kPublish:
      return "publish";
    case What::kSave:
      return "save";
    case What::kSync:
      return "sync";
    case What::kCount:
      break;
  }
  return "unknown";
}

void name_lane(std::string name) {
  Lane* lane = my_lane();
  if (lane == nullptr) return;
  std::lock_guard lock(lane->mutex);
  lane->name = std::move(name);
}

void record(What what, Clock::time_point start, Clock::time_point end, std::uint32_t id, std::uint64_t bytes) {
  if (!recording()) return;
  Lane* lane = my_lane();
  if (lane == nullptr) {
    registry().dropped_without_lane.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  std::lock_guard lock(lane->mutex);
  if (!recording()) return;  // stop() has locked every lane once since, so that nothing follows it
  if (lane->events.size() >= lane->capacity) {
    ++lane->dropped;
    return;
  }
  if (lane->events.capacity() < lane->capacity) lane->events.reserve(lane->capacity);
  lane->events.push_back(Event{start, end, bytes, id, what});
}

void start(std::size_t capacity) {
  if (capacity == 0 || capacity > kMostCapacity)
    throw std::invalid_argument("a lane holds from 1 to " + std::to_string(kMostCapacity) + " events, not " +
                                std::to_string(capacity));
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  all.capacity = capacity;
  all.dropped_without_lane.store(0, std::memory_order_relaxed);
  for (const auto& lane : all.lanes) {
    std::lock_guard lane_lock(lane->mutex);
    lane->events = {};
    lane->capacity = capacity;
    lane->dropped = 0;
  }
  all.prune();
  detail::recording.store(true, std::memory_order_relaxed);
}

void stop() {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  detail::recording.store(false, std::memory_order_relaxed);
  // A record() under way ends before, one that comes after it sees the flag: the lane's lock orders the two.
  for (const auto& lane : all.lanes) std::lock_guard lane_lock(lane->mutex);
}

Taken take() {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  Taken taken;
  taken.dropped_without_lane = all.dropped_without_lane.exchange(0, std::memory_order_relaxed);
  for (const auto& lane : all.lanes) {
    LaneEvents out;
    std::lock_guard lane_lock(lane->mutex);
    if (lane->empty()) continue;
    out.name = lane->name;
    out.events = std::exchange(lane->events, {});  // the thread allocates anew at its next event, if there is one
    out.dropped = std::exchange(lane->dropped, 0);
    taken.lanes.push_back(std::move(out));
  }
  all.prune();
  return taken;
}

}  // namespace angelptm::timeline
