#include "device/cuda_stream.h"

#include <string>

namespace angelptm::device {

namespace {

constexpr int kSuccess = 0, kNotReady = 600;
constexpr int kMemcpyDefault = 4;           // the addresses tell the direction
constexpr unsigned kStreamNonBlocking = 1;  // not ordered with the default stream
constexpr unsigned kEventDisableTiming = 2;

}  // namespace

CudaStream::CudaStream(const CudaRuntime& runtime, int device) : runtime_(runtime), device_(device) {
  enter();
  expect(runtime_.stream_create(&stream_, kStreamNonBlocking), "cudaStreamCreateWithFlags");
}

CudaStream::~CudaStream() {
  // Nobody is left to tell what goes wrong here.
  (void)runtime_.set_device(device_);
  (void)runtime_.stream_synchronize(stream_);
  for (const auto& [mark, event] : computed_) (void)runtime_.event_destroy(event);
  for (const auto& [mark, event] : marks_) (void)runtime_.event_destroy(event);
  for (void* event : free_events_) (void)runtime_.event_destroy(event);
  (void)runtime_.stream_destroy(stream_);
}

void CudaStream::expect(int result, const char* call) const {
  if (result == kSuccess) return;
  const char* said = runtime_.error_string(result);
  throw DeviceError(std::string(call) + " on device " + std::to_string(device_) + ": " +
                    (said != nullptr ? said : "no description") + " (error " + std::to_string(result) + ")");
}

void CudaStream::enter() const { expect(runtime_.set_device(device_), "cudaSetDevice"); }

void* CudaStream::take_event() {
  {
    std::lock_guard lock(mutex_);
    if (!free_events_.empty()) {
      void* event = free_events_.back();
      free_events_.pop_back();
      return event;
    }
  }
  void* event = nullptr;
  expect(runtime_.event_create(&event, kEventDisableTiming), "cudaEventCreateWithFlags");
  return event;
}

void CudaStream::give_back(void* event) {
  std::lock_guard lock(mutex_);
  free_events_.push_back(event);
}

CopyStream::Mark CudaStream::computed(std::uint64_t stream) {
  enter();
  void* event = take_event();
  const int result = runtime_.event_record(event, reinterpret_cast<void*>(stream));
  if (result != kSuccess) give_back(event);
  expect(result, "cudaEventRecord");
  std::lock_guard lock(mutex_);
  computed_.emplace(++last_, event);
  return last_;
}

void CudaStream::wait_for(Mark computed) {
  if (computed == 0) return;
  void* event = nullptr;
  {
    std::lock_guard lock(mutex_);
    event = computed_.at(computed);
    computed_.erase(computed);
  }
  enter();
  const int result = runtime_.stream_wait_event(stream_, event, 0);
  give_back(event);  // the wait is for what the event had recorded by now
  expect(result, "cudaStreamWaitEvent");
}

void CudaStream::copy(std::byte* to, const std::byte* from, std::uint64_t bytes) {
  enter();
  if (from == nullptr)
    expect(runtime_.memset_async(to, 0, bytes, stream_), "cudaMemsetAsync");
  else
    expect(runtime_.memcpy_async(to, from, bytes, kMemcpyDefault, stream_), "cudaMemcpyAsync");
}

CopyStream::Mark CudaStream::mark() {
  enter();
  void* event = take_event();
  const int result = runtime_.event_record(event, stream_);
  if (result != kSuccess) give_back(event);
  expect(result, "cudaEventRecord");
  std::lock_guard lock(mutex_);
  marks_.emplace_back(++last_, event);
  return last_;
}

bool CudaStream::passed(Mark mark) {
  enter();
  while (true) {
    std::pair<Mark, void*> first;
    {
      std::lock_guard lock(mutex_);
      if (marks_.empty() || marks_.front().first > mark) return true;
      first = marks_.front();
    }
    const int result = runtime_.event_query(first.second);
    if (result == kNotReady) return false;
    expect(result, "cudaEventQuery");
    {
      std::lock_guard lock(mutex_);
      marks_.pop_front();
    }
    give_back(first.second);
  }
}

}  // namespace angelptm::device
