// A CUDA stream for copies. The functions of the runtime come by address, from the library that torch has loaded: this
// module links none of it, and works where there is none.
#pragma once

#include <deque>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "device/copy_stream.h"

namespace angelptm::device {

// As cuda_runtime_api.h declares them, handles as void*.
struct CudaRuntime {
  int (*set_device)(int);
  int (*memcpy_async)(void*, const void*, std::size_t, int, void*);
  int (*memset_async)(void*, int, std::size_t, void*);
  int (*stream_create)(void**, unsigned);
  int (*stream_destroy)(void*);
  int (*stream_synchronize)(void*);
  int (*stream_wait_event)(void*, void*, unsigned);
  int (*event_create)(void**, unsigned);
  int (*event_record)(void*, void*);
  int (*event_query)(void*);
  int (*event_destroy)(void*);
  const char* (*error_string)(int);
};

class CudaStream : public CopyStream {
 public:
  // Throws DeviceError when the runtime has no stream for us.
  CudaStream(const CudaRuntime& runtime, int device);
  ~CudaStream() override;  // waits for the copies
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  Mark computed(std::uint64_t stream) override;
  void wait_for(Mark computed) override;
  void copy(std::byte* to, const std::byte* from, std::uint64_t bytes) override;
  Mark mark() override;
  bool passed(Mark mark) override;

 private:
  void expect(int result, const char* call) const;
  void enter() const;  // the runtime's current device is each thread's own
  void* take_event();
  void give_back(void* event);

  CudaRuntime runtime_;
  int device_;
  void* stream_ = nullptr;
  std::mutex mutex_;
  std::vector<void*> free_events_;
  std::unordered_map<Mark, void*> computed_;
  std::deque<std::pair<Mark, void*>> marks_;  // that have not passed, as far as is known
  Mark last_ = 0;
};

}  // namespace angelptm::device
