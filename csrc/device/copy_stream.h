// Copies between host memory and a device that works on its own time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace angelptm::device {

// The device, or its runtime, refused; or it was found to touch memory in an order that nobody saw to.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Copies run one after the other, after the call that asked for them. computed() belongs to the thread that gives the
// device its work; the other calls belong to one thread at a time, which may be another.
class CopyStream {
 public:
  using Mark = std::uint64_t;  // counted up; 0 is nothing at all
  virtual ~CopyStream() = default;

  // All work that the computing stream has been given so far. `stream` is the runtime's handle of it.
  virtual Mark computed(std::uint64_t stream) = 0;
  // Copies that are asked for from here on run when that work is done. A mark of computed() is used up by it.
  virtual void wait_for(Mark computed) = 0;
  // No `from`: zeros. `from` stays as it is, and nobody looks at `to`, until a mark made afterwards has passed.
  virtual void copy(std::byte* to, const std::byte* from, std::uint64_t bytes) = 0;
  // All copies that were asked for so far.
  virtual Mark mark() = 0;
  virtual bool passed(Mark mark) = 0;
};

}  // namespace angelptm::device
