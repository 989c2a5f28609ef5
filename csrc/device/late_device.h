// A device for tests: host memory, with the manners of a GPU. Copies run late, on a thread of its own, those of
// different streams in any order that the engine's waits allow; and what no wait puts in order is found and named.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "device/copy_stream.h"

namespace angelptm::device {

class LateStream;

// Computing runs at once, but what it has been given counts as done only a while later. A range of the arena is *in
// use* from begin_use to end_use; what the kernels of that time read is safe to write to when a mark of computed() that
// was made after end_use has passed. Found are: use of a range that a copy is still to be made to; a copy to a range
// that is in use, or may be read by kernels whose end the copy's stream does not wait for; a copy whose source changed
// before it ran, having been freed or written to. Each is thrown, as DeviceError, by the next call of the stream or the
// device.
class LateDevice {
 public:
  // Copies and computing take up to `most_delay_us` longer than asked for, as the seed has it.
  LateDevice(std::uint64_t seed, std::uint32_t most_delay_us);
  ~LateDevice();  // runs what is left
  LateDevice(const LateDevice&) = delete;
  LateDevice& operator=(const LateDevice&) = delete;

  std::shared_ptr<CopyStream> add_stream(std::string name);
  void begin_use(const std::byte* start, std::uint64_t bytes, const std::string& what);
  void end_use(const std::byte* start, std::uint64_t bytes);

 private:
  friend class LateStream;
  using Clock = std::chrono::steady_clock;
  struct Copy {
    std::byte* to;
    const std::byte* from;
    std::uint64_t bytes;
    std::uint32_t crc;
    std::uint64_t after;  // ticks of computing that have to be over
    CopyStream::Mark number;
  };
  struct Computed {
    std::uint64_t ticks;
    Clock::time_point done;
  };
  struct Queue {
    std::string name;
    std::deque<Copy> copies;
    std::uint64_t after = 0;  // of the next copies
    CopyStream::Mark asked = 0, ran = 0;
    Clock::time_point next;  // when the first may run
  };
  struct Use {
    std::uint64_t bytes;
    std::uint32_t open;
    std::uint64_t ended;  // tick
    std::string what;
  };

  void run();
  Clock::time_point later();
  void throw_if_wrong();
  void expect_free(const Queue& queue, const Copy& copy);
  void wrong(const std::string& what);

  std::mutex mutex_;
  std::condition_variable wake_;
  std::mt19937_64 random_;
  std::uint32_t most_delay_us_;
  std::vector<std::shared_ptr<Queue>> queues_;
  std::map<const std::byte*, Use> uses_;  // by start; each range has one owner at a time
  std::map<CopyStream::Mark, Computed> computed_;
  CopyStream::Mark last_computed_ = 0;
  std::uint64_t ticks_ = 0;       // of computing: counted up with every end of a use
  std::uint64_t done_ticks_ = 0;  // that are over
  std::deque<Computed> running_;  // in order
  std::string wrong_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace angelptm::device
