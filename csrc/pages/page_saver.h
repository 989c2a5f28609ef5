// Writes to slots what lives elsewhere: host pages, and bytes that are no page
// (buffers, parameters on the device). For the thread that makes commits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "io/engine.h"
#include "pages/page_table.h"

namespace angelptm::pages {

class PageSaver {
 public:
  // Takes one staging frame from the host pool for good; throws TierCapacityError when there is none.
  PageSaver(PageTable& table, std::unique_ptr<io::Engine> engine, double deadline_seconds);
  ~PageSaver();
  PageSaver(const PageSaver&) = delete;
  PageSaver& operator=(const PageSaver&) = delete;

  // Writes host pages straight from their frames, several at once, and enters the slots as their saved copies. Nobody
  // may write to the pages meanwhile. Throws the first error after the writes under way are over: pages saved by then
  // stay saved, the others keep their former copy. When the device does not answer (IoError kDeadline) the writes under
  // way are abandoned: no page gets them, and their slots are free again once a later call has met their end.
  void save(const std::vector<PageId>& pages);
  // Writes up to a page of bytes through the staging frame. The slot is the caller's; its CRC32C comes in `crc`.
  Slot save_bytes(const std::byte* content, std::uint32_t bytes, std::uint32_t& crc);
  // Returns when everything that was written to the store's files before the call survives a power cut, whoever wrote
  // it: pages published by then, and what was saved here. Throws StoppedError when the store was stopped meanwhile, so
  // that no commit appears that may name a corrupt page. After a flush that the drive refused every later one throws
  // that error too: the kernel tells it once and then forgets, so a flush that succeeds would prove nothing.
  void flush();

  std::uint64_t written_bytes() const;

 private:
  struct Write {
    PageId page;  // kNoPage: bytes that are no page; the slot is the caller's
    Slot slot;
    std::uint32_t crc;
    std::uint64_t version;
    bool abandoned = false;             // whoever wanted it was told that it failed
    io::Clock::time_point submitted{};  // while a timeline is recorded
    std::uint64_t bytes = 0;
  };
  std::uint64_t submit(PageId page, std::uint64_t version, std::byte* address, std::uint32_t used_bytes);
  void reap_one(std::exception_ptr& error);
  void wait_for_abandoned();

  PageTable& table_;
  std::unique_ptr<io::Engine> engine_;
  double deadline_seconds_;
  Frame frame_;
  mutable std::mutex mutex_;
  std::unordered_map<std::uint64_t, Write> writes_;
  std::uint64_t next_tag_ = 0;
  std::optional<io::IoError> flush_error_;  // the first one, for good
};

}  // namespace angelptm::pages
