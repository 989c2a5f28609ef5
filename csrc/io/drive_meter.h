// What a drive gave to all engines that share it: bytes and time, apart for
// reads alone, writes alone, and both at once.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "io/queue.h"

namespace angelptm::io {

// Seconds with transfers under way, and bytes: half of a transfer's where it began, and half where it ended, since
// others may have come and gone meanwhile.
struct DriveUse {
  double seconds = 0;
  std::uint64_t bytes = 0;
};

// Thread-safe. A transfer is under way from when its engine hands it to the queue until its answer is reaped, so an
// owner that is busy elsewhere makes the drive look slower: this is the rate that its users have, not its own.
class DriveMeter {
 public:
  void begin(Op op, std::uint64_t bytes);
  void end(Op op, std::uint64_t bytes);
  // Since the meter was made: reads alone, writes alone, both.
  std::array<DriveUse, 3> totals() const;

 private:
  enum Use : std::size_t { kReads, kWrites, kBoth, kIdle };
  Use use() const;
  void pass(Clock::time_point now);

  mutable std::mutex mutex_;
  std::size_t reads_ = 0, writes_ = 0;
  Clock::time_point since_{};
  std::array<DriveUse, 3> totals_{};
};

}  // namespace angelptm::io
