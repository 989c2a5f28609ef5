#include "pages/host_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <stdexcept>

namespace angelptm::pages {

HostPool::HostPool(std::uint64_t page_bytes, std::uint32_t frame_count)
    : page_bytes_(page_bytes),
      frame_count_(frame_count),
      taken_(frame_count, false),
      readers_(std::make_unique<std::atomic<std::uint32_t>[]>(frame_count)) {
  if (frame_count == 0) return;
  if (page_bytes > SIZE_MAX / frame_count) throw std::bad_alloc();
  void* mapping = mmap(nullptr, page_bytes * frame_count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<std::byte*>(mapping);
  // Large pages spare the TLB in the update kernels; where the host has none the advice is void, so its result is not
  // read.
  (void)madvise(mapping, page_bytes * frame_count, MADV_HUGEPAGE);
  free_.reserve(frame_count);
  for (Frame frame = frame_count; frame-- > 0;) free_.push_back(frame);
}

HostPool::~HostPool() {
  if (base_ != nullptr) munmap(base_, page_bytes_ * frame_count_);
}

std::optional<Frame> HostPool::allocate() {
  std::lock_guard lock(mutex_);
  if (free_.empty()) return std::nullopt;
  const Frame frame = free_.back();
  free_.pop_back();
  taken_[frame] = true;
  peak_count_ = std::max(peak_count_, frame_count_ - static_cast<std::uint32_t>(free_.size()));
  return frame;
}

void HostPool::release(Frame frame) {
  std::lock_guard lock(mutex_);
  if (frame >= frame_count_ || !taken_[frame]) throw std::logic_error("HostPool: release of a frame that is not taken");
  taken_[frame] = false;
  free_.push_back(frame);
}

std::uint32_t HostPool::used_count() const {
  std::lock_guard lock(mutex_);
  return frame_count_ - static_cast<std::uint32_t>(free_.size());
}

std::uint32_t HostPool::peak_count() const {
  std::lock_guard lock(mutex_);
  return peak_count_;
}

}  // namespace angelptm::pages
