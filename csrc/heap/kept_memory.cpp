#include "heap/kept_memory.h"

#include <fcntl.h>
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace angelptm::heap {

namespace {

constexpr std::size_t kMostBytes = std::size_t{32} << 20;  // glibc accepts no higher threshold
constexpr std::size_t kReturnAtLeast = std::size_t{1} << 20;

bool set_thresholds(std::size_t own_mapping, std::size_t top) {
  // Setting one of them also stops glibc from raising both by itself, up to 32 MiB, as blocks are freed.
  return mallopt(M_MMAP_THRESHOLD, static_cast<int>(std::min(own_mapping, kMostBytes))) == 1 &&
         mallopt(M_TRIM_THRESHOLD, static_cast<int>(std::min(top, std::size_t{1} << 30))) == 1;
}

}  // namespace

bool return_freed_blocks(std::size_t at_least_bytes) {
  const bool set = set_thresholds(at_least_bytes, at_least_bytes);
  malloc_trim(0);
  return set;
}

KeptMemory::KeptMemory(std::size_t allowance_bytes) : allowance_(static_cast<std::int64_t>(allowance_bytes)) {
  if (allowance_ == 0) {
    return_freed_blocks(kReturnAtLeast);
    return;
  }
  // Without /proc nobody would see what stays.
  statm_ = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
  if (statm_ < 0 || !set_thresholds(kMostBytes, allowance_bytes)) {
    allowance_ = 0;
    return_freed_blocks(kReturnAtLeast);
    return;
  }
  trim();
}

KeptMemory::~KeptMemory() {
  if (statm_ >= 0) close(statm_);
}

std::int64_t KeptMemory::unexplained() const {
  char text[128];
  const ssize_t length = pread(statm_, text, sizeof text - 1, 0);
  long size = 0, resident = 0;
  if (length > 0) text[length] = '\0';
  if (length <= 0 || std::sscanf(text, "%ld %ld", &size, &resident) != 2) return base_;
  const struct mallinfo2 now = mallinfo2();
  return static_cast<std::int64_t>(resident) * sysconf(_SC_PAGESIZE) -
         static_cast<std::int64_t>(now.uordblks + now.hblkhd);
}

bool KeptMemory::look() {
  if (allowance_ == 0 || unexplained() - base_ <= allowance_) return false;
  trim();
  return true;
}

void KeptMemory::trim() {
  malloc_trim(0);
  if (allowance_ == 0) return;
  base_ = unexplained();
  ++trims_;
}

}  // namespace angelptm::heap
