#include "device/late_device.h"

#include <algorithm>
#include <cstring>

#include "io/crc32c.h"

namespace angelptm::device {

class LateStream : public CopyStream {
 public:
  LateStream(LateDevice& device, std::shared_ptr<LateDevice::Queue> queue)
      : device_(device), queue_(std::move(queue)) {}

  Mark computed(std::uint64_t /*stream*/) override {
    std::lock_guard lock(device_.mutex_);
    device_.throw_if_wrong();
    const auto after = device_.running_.empty() ? LateDevice::Clock::time_point{} : device_.running_.back().done;
    const LateDevice::Computed now{device_.ticks_, std::max(after, device_.later())};
    device_.running_.push_back(now);
    device_.computed_.emplace(++device_.last_computed_, now);
    device_.wake_.notify_all();
    return device_.last_computed_;
  }

  void wait_for(Mark computed) override {
    if (computed == 0) return;
    std::lock_guard lock(device_.mutex_);
    queue_->after = std::max(queue_->after, device_.computed_.at(computed).ticks);
    device_.computed_.erase(computed);
  }

  void copy(std::byte* to, const std::byte* from, std::uint64_t bytes) override {
    const std::uint32_t crc = from != nullptr ? io::crc32c(from, bytes) : 0;
    std::lock_guard lock(device_.mutex_);
    device_.throw_if_wrong();
    const LateDevice::Copy asked{to, from, bytes, crc, queue_->after, ++queue_->asked};
    device_.expect_free(*queue_, asked);
    device_.throw_if_wrong();
    if (queue_->copies.empty()) queue_->next = device_.later();
    queue_->copies.push_back(asked);
    device_.wake_.notify_all();
  }

  Mark mark() override {
    std::lock_guard lock(device_.mutex_);
    return queue_->asked;
  }

  bool passed(Mark mark) override {
    std::lock_guard lock(device_.mutex_);
    device_.throw_if_wrong();
    return queue_->ran >= mark;
  }

 private:
  LateDevice& device_;
  std::shared_ptr<LateDevice::Queue> queue_;
};

LateDevice::LateDevice(std::uint64_t seed, std::uint32_t most_delay_us) : random_(seed), most_delay_us_(most_delay_us) {
  thread_ = std::thread([this] { run(); });
}

LateDevice::~LateDevice() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

std::shared_ptr<CopyStream> LateDevice::add_stream(std::string name) {
  std::lock_guard lock(mutex_);
  auto queue = std::make_shared<Queue>();
  queue->name = std::move(name);
  queues_.push_back(queue);
  return std::make_shared<LateStream>(*this, queue);
}

LateDevice::Clock::time_point LateDevice::later() {
  return Clock::now() +
         std::chrono::microseconds(std::uniform_int_distribution<std::uint32_t>(0, most_delay_us_)(random_));
}

void LateDevice::wrong(const std::string& what) {
  if (wrong_.empty()) wrong_ = what;
}

void LateDevice::throw_if_wrong() {
  if (!wrong_.empty()) throw DeviceError(wrong_);
}

void LateDevice::begin_use(const std::byte* start, std::uint64_t bytes, const std::string& what) {
  std::lock_guard lock(mutex_);
  throw_if_wrong();
  for (const auto& queue : queues_)
    for (const Copy& copy : queue->copies)
      if (copy.to < start + bytes && start < copy.to + copy.bytes)
        throw DeviceError(what + " is used while the copy to it by stream " + queue->name + " has not run");
  // What had these frames before has left them.
  for (auto use = uses_.begin(); use != uses_.end();) {
    const auto here = use++;
    const bool same = here->first == start && here->second.bytes == bytes && here->second.what == what;
    if (same || here->second.open > 0 || here->first >= start + bytes || start >= here->first + here->second.bytes)
      continue;
    uses_.erase(here);
  }
  Use& use = uses_[start];
  use.bytes = bytes;
  use.what = what;
  ++use.open;
}

void LateDevice::end_use(const std::byte* start, std::uint64_t bytes) {
  std::lock_guard lock(mutex_);
  const auto use = uses_.find(start);
  if (use == uses_.end() || use->second.open == 0 || use->second.bytes != bytes)
    throw DeviceError("the end of a use that has not begun");
  --use->second.open;
  use->second.ended = ++ticks_;
}

void LateDevice::expect_free(const Queue& queue, const Copy& copy) {
  for (const auto& [start, use] : uses_) {
    if (start >= copy.to + copy.bytes || copy.to >= start + use.bytes) continue;
    if (use.open > 0) wrong("stream " + queue.name + " copies to the frames of " + use.what + ", which is in use");
    if (use.ended > copy.after)
      wrong("stream " + queue.name + " copies to the former frames of " + use.what +
            " without waiting for the kernels that may still read them");
  }
}

void LateDevice::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    const auto now = Clock::now();
    while (!running_.empty() && (running_.front().done <= now || stopping_)) {
      done_ticks_ = std::max(done_ticks_, running_.front().ticks);
      running_.pop_front();
    }
    std::vector<Queue*> ready;
    for (const auto& queue : queues_)
      if (!queue->copies.empty() && (queue->next <= now || stopping_) && queue->copies.front().after <= done_ticks_)
        ready.push_back(queue.get());
    if (ready.empty()) {
      if (stopping_) return;
      wake_.wait_for(lock, std::chrono::microseconds(most_delay_us_ / 4 + 50));
      continue;
    }
    Queue& queue = *ready[std::uniform_int_distribution<std::size_t>(0, ready.size() - 1)(random_)];
    const Copy copy = queue.copies.front();
    expect_free(queue, copy);
    if (copy.from == nullptr)
      std::memset(copy.to, 0, copy.bytes);
    else {
      std::memcpy(copy.to, copy.from, copy.bytes);
      if (io::crc32c(copy.to, copy.bytes) != copy.crc)
        wrong("what stream " + queue.name + " was to copy changed before the copy ran");
    }
    queue.copies.pop_front();
    queue.ran = copy.number;
    queue.next = later();
  }
}

}  // namespace angelptm::device
