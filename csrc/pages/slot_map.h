// The SSD tier: page-sized slots of preallocated files.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "io/file.h"

namespace angelptm::pages {

// A slot is named by its file and its index in it.
struct Slot {
  std::uint32_t file;
  std::uint32_t index;
  bool operator==(const Slot&) const = default;
};

struct SlotFile {
  std::shared_ptr<const io::File> file;
  std::uint32_t slot_count;
  double weight;  // share of new slots, relative to the other files: its measured bandwidth
};

// Thread-safe. Slots are dealt to the files in proportion to their weights (smooth weighted round robin), so that
// consecutive pages of a sweep lie on different drives; a full file passes its turn on.
//
// A slot has as many owners as hold a reference to its content: the page table for what is current, and each commit
// that names it. It is free again when the last one releases it.
class SlotMap {
 public:
  SlotMap(std::uint64_t page_bytes, std::vector<SlotFile> files);

  std::optional<Slot> allocate();  // with one reference; empty when every slot is taken
  void retain(Slot slot);          // one reference more; std::logic_error for a free slot
  void release(Slot slot);         // one reference less; std::logic_error for a free slot
  // At start: one reference for each slot of the list, free or not, which may name a slot several times. Throws
  // std::invalid_argument, with nothing changed, for a slot that does not exist.
  void claim(const std::vector<Slot>& slots);

  std::uint64_t offset(Slot slot) const { return std::uint64_t{slot.index} * page_bytes_; }
  const std::vector<SlotFile>& files() const { return files_; }
  std::uint64_t slot_count() const { return slot_count_; }
  std::uint64_t used_count() const;
  std::uint64_t peak_count() const;
  std::uint32_t reference_count(Slot slot) const;  // 0: free

 private:
  struct Free {
    std::vector<std::uint32_t> indices;
    std::vector<std::uint32_t> references;
    double credit = 0;
  };
  std::uint32_t& references(Slot slot);  // std::logic_error for a slot that does not exist
  std::uint64_t page_bytes_;
  std::vector<SlotFile> files_;
  std::uint64_t slot_count_ = 0;
  mutable std::mutex mutex_;
  std::vector<Free> free_;
  std::uint64_t used_count_ = 0, peak_count_ = 0;
};

}  // namespace angelptm::pages
