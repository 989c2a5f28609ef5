// The host tier: page-sized frames cut from one anonymous mapping of exactly the budgeted size.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace angelptm::pages {

using Frame = std::uint32_t;
constexpr Frame kNoFrame = 0xffffffffu;

// Thread-safe. Frames need no contiguity, so the pool is a plain free list; it never grows.
class HostPool {
 public:
  // Throws std::bad_alloc when the mapping is refused. The memory is committed by use, not here.
  HostPool(std::uint64_t page_bytes, std::uint32_t frame_count);
  ~HostPool();
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  std::optional<Frame> allocate();  // empty when all frames are taken; the content is undefined
  void release(Frame frame);

  // A frame whose content others may be reading is not written to: whoever wants to looks at `readers` first.
  // Lock-free.
  void retain_reader(Frame frame) { readers_[frame].fetch_add(1); }
  void release_reader(Frame frame) { readers_[frame].fetch_sub(1); }
  std::uint32_t readers(Frame frame) const { return readers_[frame].load(); }

  std::byte* address(Frame frame) const { return base_ + std::uint64_t{frame} * page_bytes_; }
  std::byte* base() const { return base_; }
  std::uint64_t page_bytes() const { return page_bytes_; }
  std::uint32_t frame_count() const { return frame_count_; }
  std::uint32_t used_count() const;
  std::uint32_t peak_count() const;

 private:
  std::uint64_t page_bytes_;
  std::uint32_t frame_count_;
  std::byte* base_ = nullptr;
  mutable std::mutex mutex_;
  std::vector<Frame> free_;  // last in, first out: a warm frame is used again first
  std::vector<bool> taken_;  // catches a double release
  std::uint32_t peak_count_ = 0;
  std::unique_ptr<std::atomic<std::uint32_t>[]> readers_;
};

}  // namespace angelptm::pages
