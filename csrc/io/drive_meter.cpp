#include "io/drive_meter.h"

namespace angelptm::io {

DriveMeter::Use DriveMeter::use() const {
  if (reads_ > 0) return writes_ > 0 ? kBoth : kReads;
  return writes_ > 0 ? kWrites : kIdle;
}

void DriveMeter::pass(Clock::time_point now) {
  if (const Use was = use(); was != kIdle) totals_[was].seconds += std::chrono::duration<double>(now - since_).count();
  since_ = now;
}

void DriveMeter::begin(Op op, std::uint64_t bytes) {
  if (op == Op::kSync) return;
  const Clock::time_point now = Clock::now();
  std::lock_guard lock(mutex_);
  pass(now);
  ++(op == Op::kRead ? reads_ : writes_);
  totals_[use()].bytes += bytes / 2;
}

void DriveMeter::end(Op op, std::uint64_t bytes) {
  if (op == Op::kSync) return;
  const Clock::time_point now = Clock::now();
  std::lock_guard lock(mutex_);
  pass(now);
  totals_[use()].bytes += bytes - bytes / 2;
  --(op == Op::kRead ? reads_ : writes_);
}

std::array<DriveUse, 3> DriveMeter::totals() const {
  std::lock_guard lock(mutex_);
  return totals_;
}

}  // namespace angelptm::io
