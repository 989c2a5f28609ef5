#include "pages/page_table.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace angelptm::pages {

namespace {

// Checked in every build: the wrong kind of publish would hand a slot or a frame to a page that does not own it.
void expect_home(const PageInfo& page, Home home) {
  if (page.home != home) throw std::logic_error("PageTable: the page does not live in the tier it is published to");
}

}  // namespace

PageId PageTable::add(Home home, std::uint32_t used_bytes) {
  if (used_bytes == 0 || used_bytes > host_.page_bytes())
    throw std::invalid_argument("a page has from 1 to " + std::to_string(host_.page_bytes()) +
                                " bytes of content, not " + std::to_string(used_bytes));
  PageInfo page{home, used_bytes, 0, false, kNoFrame, Slot{0, 0}, 0, false, 0, nullptr, 0};
  if (home == Home::kHost) {
    const auto frame = host_.allocate();
    if (!frame) throw TierCapacityError("host tier: all " + std::to_string(host_.frame_count()) + " frames are taken");
    page.frame = *frame;
    std::memset(host_.address(page.frame), 0, host_.page_bytes());
  }
  std::lock_guard lock(mutex_);
  pages_.push_back(page);
  words_.emplace_back(0);
  show(static_cast<PageId>(pages_.size() - 1));
  return static_cast<PageId>(pages_.size() - 1);
}

PageId PageTable::add_at(std::byte* address, std::uint32_t used_bytes) {
  if (used_bytes == 0 || used_bytes > host_.page_bytes() || reinterpret_cast<std::uintptr_t>(address) % 4096 != 0)
    throw std::invalid_argument("a page at a fixed address has from 1 to " + std::to_string(host_.page_bytes()) +
                                " bytes of content, at a multiple of 4096");
  std::memset(address, 0, host_.page_bytes());
  std::lock_guard lock(mutex_);
  pages_.push_back({Home::kHost, used_bytes, 0, false, kNoFrame, Slot{0, 0}, 0, false, 0, address, 0});
  words_.emplace_back(0);
  return static_cast<PageId>(pages_.size() - 1);
}

PageInfo PageTable::info(PageId page) const {
  std::lock_guard lock(mutex_);
  return pages_.at(page);
}

std::size_t PageTable::page_count() const {
  std::lock_guard lock(mutex_);
  return pages_.size();
}

std::size_t PageTable::ssd_peak_count() const {
  std::lock_guard lock(mutex_);
  return ssd_peak_count_;
}

void PageTable::write_first(PageInfo& page) {
  if (page.home == Home::kSsd && !page.written) ssd_peak_count_ = std::max(ssd_peak_count_, ++ssd_count_);
  page.written = true;
}

Frame PageTable::publish_frame(PageId page, Frame frame) {
  std::lock_guard lock(mutex_);
  PageInfo& entry = pages_.at(page);
  expect_home(entry, Home::kHost);
  if (entry.fixed != nullptr) throw std::logic_error("PageTable: a page at a fixed address keeps it");
  const Frame former = entry.frame;
  entry.frame = frame;
  entry.written = true;
  ++entry.version;
  show(page);
  return former;
}

void PageTable::exchange_frames(PageId one, PageId other) {
  std::lock_guard lock(mutex_);
  for (const PageId page : {one, other}) {
    expect_home(pages_.at(page), Home::kHost);
    if (pages_[page].fixed != nullptr) throw std::logic_error("PageTable: a page at a fixed address keeps it");
  }
  std::swap(pages_[one].frame, pages_[other].frame);
  for (const PageId page : {one, other}) {
    pages_[page].written = true;
    ++pages_[page].version;
    show(page);
  }
}

void PageTable::show(PageId page) {
  const PageInfo& entry = pages_[page];
  if (entry.home == Home::kHost && entry.fixed == nullptr)
    words_[page].store(std::uint64_t{entry.frame} << 32 | static_cast<std::uint32_t>(entry.version));
}

HeldFrame PageTable::hold(PageId page) {
  std::atomic<std::uint64_t>& shown = words_.at(page);
  while (true) {
    const std::uint64_t word = shown.load();
    const auto frame = static_cast<Frame>(word >> 32);
    host_.retain_reader(frame);
    if (shown.load() == word) return {frame, static_cast<std::uint32_t>(word)};
    host_.release_reader(frame);  // published meanwhile, and perhaps written to by now
  }
}

void PageTable::publish_in_place(PageId page) {
  std::lock_guard lock(mutex_);
  PageInfo& entry = pages_.at(page);
  expect_home(entry, Home::kHost);
  entry.written = true;
  ++entry.version;
  show(page);
}

void PageTable::expect_publish(PageId page) {
  std::lock_guard lock(mutex_);
  PageInfo& entry = pages_.at(page);
  entry.expected = entry.version + 1;
}

void PageTable::give_up_publish(PageId page) {
  std::lock_guard lock(mutex_);
  PageInfo& entry = pages_.at(page);
  entry.expected = entry.version;
}

std::optional<Slot> PageTable::try_reserve_slot() {
  expect_running();
  return ssd_.allocate();
}

Slot PageTable::reserve_slot() {
  const auto slot = try_reserve_slot();
  if (!slot) throw TierCapacityError("ssd tier: all " + std::to_string(ssd_.slot_count()) + " slots are taken");
  return *slot;
}

void PageTable::publish_slot(PageId page, Slot slot, std::uint32_t crc) {
  Slot former{};
  bool had_former = false;
  {
    std::lock_guard lock(mutex_);
    PageInfo& entry = pages_.at(page);
    expect_home(entry, Home::kSsd);
    former = entry.slot;
    had_former = entry.written;
    entry.slot = slot;
    entry.crc = crc;
    write_first(entry);
    ++entry.version;
  }
  if (had_former) ssd_.release(former);
}

void PageTable::cancel_slot(Slot slot) { ssd_.release(slot); }

void PageTable::discard(PageId page) {
  Slot former{};
  {
    std::lock_guard lock(mutex_);
    PageInfo& entry = pages_.at(page);
    if (entry.home == Home::kHost || !entry.written) return;
    former = entry.slot;
    entry.written = false;
    --ssd_count_;
  }
  ssd_.release(former);
}

std::vector<Captured> PageTable::capture(const std::vector<PageId>& pages) {
  std::lock_guard lock(mutex_);
  for (const PageId page : pages) (void)pages_.at(page);  // before the first reference is taken
  std::vector<Captured> captured;
  captured.reserve(pages.size());
  for (const PageId page : pages) {
    const PageInfo& entry = pages_[page];
    Captured now{Captured::State::kInSlot, entry.slot, entry.crc, entry.version};
    if (!entry.written)
      now.state = Captured::State::kZeros;
    else if (entry.home == Home::kHost && !(entry.saved && entry.saved_version == entry.version))
      now.state = Captured::State::kUnsaved;
    else
      ssd_.retain(entry.slot);
    captured.push_back(now);
  }
  return captured;
}

void PageTable::keep_saved(PageId page, Slot slot, std::uint32_t crc, std::uint64_t version) {
  std::optional<Slot> former;
  {
    std::lock_guard lock(mutex_);
    PageInfo& entry = pages_.at(page);
    expect_home(entry, Home::kHost);
    if (entry.saved) former = entry.slot;
    entry.slot = slot;
    entry.crc = crc;
    entry.saved = true;
    entry.saved_version = version;
  }
  if (former) ssd_.release(*former);
}

void PageTable::adopt(PageId page, Slot slot, std::uint32_t crc, std::uint64_t version) {
  std::optional<Slot> former;
  {
    std::lock_guard lock(mutex_);
    PageInfo& entry = pages_.at(page);
    ssd_.retain(slot);
    if (entry.home == Home::kHost ? entry.saved : entry.written) former = entry.slot;
    entry.slot = slot;
    entry.crc = crc;
    entry.version = version;
    write_first(entry);
    entry.saved = entry.home == Home::kHost;
    entry.saved_version = version;
    entry.expected = version;
    show(page);
  }
  if (former) ssd_.release(*former);
}

void PageTable::expect_running() const {
  std::lock_guard lock(mutex_);
  if (!stopped_because_.empty()) throw StoppedError("nothing is written any more, since " + stopped_because_);
}

void PageTable::stop(const std::string& reason) {
  std::lock_guard lock(mutex_);
  if (stopped_because_.empty()) stopped_because_ = reason;
}

}  // namespace angelptm::pages
