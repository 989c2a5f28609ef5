#include "pages/slot_map.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace angelptm::pages {

SlotMap::SlotMap(std::uint64_t page_bytes, std::vector<SlotFile> files)
    : page_bytes_(page_bytes), files_(std::move(files)), free_(files_.size()) {
  for (std::size_t i = 0; i < files_.size(); ++i) {
    const std::uint32_t count = files_[i].slot_count;
    slot_count_ += count;
    free_[i].references.assign(count, 0);
    free_[i].indices.reserve(count);
    for (std::uint32_t index = count; index-- > 0;) free_[i].indices.push_back(index);
  }
}

std::optional<Slot> SlotMap::allocate() {
  std::lock_guard lock(mutex_);
  double total = 0;
  for (std::size_t i = 0; i < free_.size(); ++i)
    if (!free_[i].indices.empty()) total += files_[i].weight;
  std::optional<std::uint32_t> chosen;
  for (std::uint32_t i = 0; i < free_.size(); ++i) {
    if (free_[i].indices.empty()) continue;
    free_[i].credit += files_[i].weight;
    if (!chosen || free_[i].credit > free_[*chosen].credit) chosen = i;
  }
  if (!chosen) return std::nullopt;
  Free& free = free_[*chosen];
  free.credit -= total;
  const std::uint32_t index = free.indices.back();
  free.indices.pop_back();
  free.references[index] = 1;
  peak_count_ = std::max(peak_count_, ++used_count_);
  return Slot{*chosen, index};
}

std::uint32_t& SlotMap::references(Slot slot) {
  if (slot.file >= free_.size() || slot.index >= free_[slot.file].references.size())
    throw std::logic_error("SlotMap: no such slot");
  return free_[slot.file].references[slot.index];
}

void SlotMap::retain(Slot slot) {
  std::lock_guard lock(mutex_);
  std::uint32_t& count = references(slot);
  if (count == 0) throw std::logic_error("SlotMap: retain of a slot that is not taken");
  ++count;
}

void SlotMap::release(Slot slot) {
  std::lock_guard lock(mutex_);
  std::uint32_t& count = references(slot);
  if (count == 0) throw std::logic_error("SlotMap: release of a slot that is not taken");
  if (--count > 0) return;
  free_[slot.file].indices.push_back(slot.index);
  --used_count_;
}

void SlotMap::claim(const std::vector<Slot>& slots) {
  std::lock_guard lock(mutex_);
  for (const Slot slot : slots)
    if (slot.file >= free_.size() || slot.index >= free_[slot.file].references.size())
      throw std::invalid_argument("no slot " + std::to_string(slot.index) + " in file " + std::to_string(slot.file));
  const std::uint64_t used_before = used_count_;
  for (const Slot slot : slots)
    if (free_[slot.file].references[slot.index]++ == 0) ++used_count_;
  if (used_count_ == used_before) return;  // no free slot among them: no walk over all that are free
  for (Free& free : free_) std::erase_if(free.indices, [&](std::uint32_t index) { return free.references[index] > 0; });
  peak_count_ = std::max(peak_count_, used_count_);
}

std::uint32_t SlotMap::reference_count(Slot slot) const {
  std::lock_guard lock(mutex_);
  return const_cast<SlotMap*>(this)->references(slot);
}

std::uint64_t SlotMap::used_count() const {
  std::lock_guard lock(mutex_);
  return used_count_;
}

std::uint64_t SlotMap::peak_count() const {
  std::lock_guard lock(mutex_);
  return peak_count_;
}

}  // namespace angelptm::pages
