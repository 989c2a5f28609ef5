// The process's own heap: what becomes of memory that is freed. For the whole process, as glibc has one heap.
#pragma once

#include <cstddef>
#include <cstdint>

namespace angelptm::heap {

// From now on freed blocks of `at_least_bytes` (32 MiB at most) and more go back to the system at once, and what is
// free now does too. False where the C library does not do that.
bool return_freed_blocks(std::size_t at_least_bytes);

// Lets freed blocks stay for those who allocate next, which spares the system clearing fresh memory for them, as long
// as what stays is not more than an allowance. Between blocks of different sizes glibc leaves holes: in a training step
// up to half of what it uses. They are given back as soon as they exceed the allowance, without moving anything.
// One thread uses it.
class KeptMemory {
 public:
  // 0 keeps nothing: look() then does nothing. Gives back what is free now.
  explicit KeptMemory(std::size_t allowance_bytes);
  ~KeptMemory();
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;

  // Gives everything free back if that is more than the allowance; says whether it did. To be called often: what is
  // freed between two calls comes on top. Costs some ten microseconds.
  bool look();
  // Gives everything free back.
  void trim();
  std::uint64_t trims() const { return trims_; }

 private:
  // Resident memory that no block in use explains.
  std::int64_t unexplained() const;

  std::int64_t allowance_;
  std::int64_t base_ = 0;  // of `unexplained`: program, arena and pools; what the heap kept is the rest
  std::uint64_t trims_ = 0;
  int statm_ = -1;
};

}  // namespace angelptm::heap
