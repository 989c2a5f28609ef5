#include "pages/page_mover.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "pages/deadline.h"
#include "timeline/recorder.h"

namespace angelptm::pages {

PageMover::PageMover(PageTable& table, std::unique_ptr<io::Engine> engine, double deadline_seconds)
    : table_(table), engine_(std::move(engine)), deadline_seconds_(deadline_seconds) {}

// The engine's destructor waits for the kernel; the frames go back with the pool itself.
PageMover::~PageMover() = default;

io::Counters PageMover::counters() const {
  std::lock_guard lock(mutex_);
  return engine_->counters();
}

double PageMover::wait_seconds() const {
  std::lock_guard lock(mutex_);
  return wait_seconds_;
}

void PageMover::reap_one() {
  const auto start = io::Clock::now();
  std::vector<io::Outcome> outcomes;
  std::exception_ptr stuck;
  try {
    engine_->reap(outcomes, 1, deadline_after(deadline_seconds_));
  } catch (...) {
    stuck = std::current_exception();
  }
  wait_seconds_ += std::chrono::duration<double>(io::Clock::now() - start).count();
  if (timeline::recording()) timeline::record(timeline::What::kWaitIo, start, io::Clock::now(), 0, 0);
  for (const io::Outcome& outcome : outcomes) settle(outcome);
  if (stuck) std::rethrow_exception(stuck);
}

void PageMover::settle(const io::Outcome& outcome) {
  if (const auto found = writes_.find(outcome.tag); found != writes_.end()) {
    const Write write = found->second;
    writes_.erase(found);
    writing_.erase(write.page);
    if (outcome.error) {
      if (!write_error_) write_error_ = outcome.error;
      table_.cancel_slot(write.slot);
    } else {
      table_.publish_slot(write.page, write.slot, write.crc);
    }
    table_.host().release(write.frame);
  } else if (const auto found = reads_.find(outcome.tag); found != reads_.end()) {
    const Read read = found->second;
    timeline::end(timeline::What::kRead, read.submitted, load_[read.index], transfer_bytes(read.info.used_bytes));
    reads_.erase(found);
    try {
      if (outcome.error) throw io::IoError(*outcome.error);
      check(table_, load_[read.index], read.info, address(read.frame));
      ready_.push_back({read.index, read.frame, read.info.used_bytes});
    } catch (...) {
      if (!read_error_) read_error_ = std::current_exception();
      table_.host().release(read.frame);
    }
  }
}

void PageMover::throw_write_error() {
  if (!write_error_) return;
  write_error_told_ = true;
  throw io::IoError(*write_error_);
}

void PageMover::wait_until_quiet(PageId page) {
  const auto reading = [&] {
    return std::any_of(reads_.begin(), reads_.end(),
                       [&](const auto& read) { return load_[read.second.index] == page; });
  };
  while (writing_.contains(page) || reading()) reap_one();
}

std::optional<Frame> PageMover::frame_now() {
  while (true) {
    if (const auto frame = table_.host().allocate()) return frame;
    if (writes_.empty()) return std::nullopt;
    reap_one();
  }
}

void PageMover::pump_reads() {
  std::vector<io::Transfer> transfers;
  const auto drop = [&] {  // The engine has none of them: their frames are ours still.
    for (const io::Transfer& transfer : transfers) {
      const auto read = reads_.find(transfer.tag);
      table_.host().release(read->second.frame);
      reads_.erase(read);
    }
  };
  try {
    collect_reads(transfers);
  } catch (...) {
    drop();
    throw;
  }
  if (transfers.empty()) return;
  try {
    engine_->submit(transfers);
  } catch (const std::invalid_argument&) {
    drop();
    throw;
  }
}

void PageMover::collect_reads(std::vector<io::Transfer>& transfers) {
  while (load_next_ < load_.size()) {
    const PageId page = load_[load_next_];
    while (writing_.contains(page)) reap_one();
    const PageInfo info = table_.info(page);
    if (info.home == Home::kHost) {
      ready_.push_back({load_next_++, kNoFrame, info.used_bytes});
      continue;
    }
    auto frame = table_.host().allocate();
    if (!frame && reads_.empty() && ready_.empty()) frame = frame_now();
    if (!frame) {
      if (reads_.empty() && ready_.empty())
        throw TierCapacityError("host tier: no staging frame is left to read a page from the SSD");
      break;  // The frames of pages handed out later will carry the rest.
    }
    if (!info.written) {
      std::memset(address(*frame), 0, info.used_bytes);
      ready_.push_back({load_next_++, *frame, info.used_bytes});
      continue;
    }
    const std::uint64_t tag = next_tag_++;
    reads_.emplace(tag, Read{load_next_++, *frame, info, timeline::begin()});
    transfers.push_back({tag, io::Op::kRead, static_cast<int>(info.slot.file), table_.ssd().offset(info.slot),
                         address(*frame), transfer_bytes(info.used_bytes)});
  }
}

void PageMover::release_handed_out() {
  if (handed_out_ != kNoFrame) table_.host().release(handed_out_);
  handed_out_ = kNoFrame;
}

void PageMover::begin_load(std::vector<PageId> pages) {
  std::lock_guard lock(mutex_);
  if (load_handed_out_ != load_.size()) throw std::logic_error("PageMover: begin_load while a load is unfinished");
  release_handed_out();
  load_ = std::move(pages);
  load_next_ = load_handed_out_ = 0;
  or_abandon([this] { pump_reads(); });
}

std::optional<LoadedPage> PageMover::next_loaded() {
  std::lock_guard lock(mutex_);
  release_handed_out();
  if (load_handed_out_ == load_.size()) return std::nullopt;
  or_abandon([this] {
    pump_reads();
    while (ready_.empty() && !read_error_) reap_one();
    // Before a page that shows its former content is handed out, somebody must have been told that a write was lost.
    if (!write_error_told_) throw_write_error();
    if (read_error_) std::rethrow_exception(read_error_);
  });
  const Ready page = ready_.front();
  ready_.pop_front();
  ++load_handed_out_;
  handed_out_ = page.frame;
  // A host page is looked up now: its frame may have been exchanged since the load began.
  const std::byte* content =
      page.frame != kNoFrame ? address(page.frame) : table_.address(table_.info(load_[page.index]));
  return LoadedPage{page.index, content, page.bytes};
}

template <typename Action>
void PageMover::or_abandon(const Action& action) {
  try {
    action();
  } catch (const io::IoError& error) {
    // A device that does not answer would only be waited for once more: the frames stay with the kernel, the load open.
    if (error.error != io::kDeadline) abandon_load();
    throw;
  } catch (...) {
    abandon_load();
    throw;
  }
}

void PageMover::abandon_load() {
  while (!reads_.empty()) reap_one();
  release_handed_out();
  for (const Ready& page : ready_)
    if (page.frame != kNoFrame) table_.host().release(page.frame);
  ready_.clear();
  load_.clear();
  load_next_ = load_handed_out_ = 0;
  read_error_ = nullptr;
}

Frame PageMover::take_loaded() {
  std::lock_guard lock(mutex_);
  if (handed_out_ == kNoFrame)
    throw std::logic_error("PageMover: the page handed out last has no staging frame to take");
  return std::exchange(handed_out_, kNoFrame);
}

void PageMover::end_load() {
  std::lock_guard lock(mutex_);
  abandon_load();
}

std::optional<Frame> PageMover::try_staging_frame() {
  std::lock_guard lock(mutex_);
  return frame_now();
}

Frame PageMover::staging_frame() {
  if (const auto frame = try_staging_frame()) return *frame;
  throw TierCapacityError("host tier: no staging frame is left, and no write is under way that would free one");
}

void PageMover::release(Frame frame) { table_.host().release(frame); }

void PageMover::write_behind(PageId page, Frame frame) {
  std::lock_guard lock(mutex_);
  try {
    const PageInfo info = table_.info(page);
    if (info.home == Home::kHost) {
      frame = table_.publish_frame(page, frame);
      table_.host().release(frame);
      return;
    }
    // Two writes of one page must be published in order, so the second waits for the first. A read of it must be over
    // before publishing frees the slot that is read from.
    wait_until_quiet(page);
    throw_write_error();
    submit_write(page, frame, info.used_bytes);
  } catch (...) {
    table_.host().release(frame);
    throw;
  }
  if (engine_->unfinished() >= engine_->queue().depth()) reap_one();
}

void PageMover::submit_write(PageId page, Frame frame, std::uint32_t used_bytes) {
  // Each write that is published gives the page's former slot back.
  auto slot = table_.try_reserve_slot();
  while (!slot && !writes_.empty()) {
    reap_one();
    slot = table_.try_reserve_slot();
  }
  if (!slot) slot = table_.reserve_slot();
  const std::uint64_t tag = next_tag_++;
  const io::Transfer transfer{tag,
                              io::Op::kWrite,
                              static_cast<int>(slot->file),
                              table_.ssd().offset(*slot),
                              address(frame),
                              transfer_bytes(used_bytes)};
  writes_.emplace(tag, Write{page, frame, *slot, seal(address(frame), used_bytes)});
  writing_.insert(page);
  // Its submission alone: its outcome may be looked at long after it is there.
  const timeline::Scope scope(timeline::What::kWrite, page, transfer.bytes);
  try {
    engine_->submit({&transfer, 1});
  } catch (const std::invalid_argument&) {
    writes_.erase(tag);
    writing_.erase(page);
    table_.cancel_slot(*slot);
    throw;
  } catch (const io::IoError& error) {
    // The engine holds the transfer all the same, so frame and slot stay with it; the caller learns of the error now.
    if (!write_error_) write_error_ = error;
  }
}

void PageMover::discard(PageId page) {
  std::lock_guard lock(mutex_);
  wait_until_quiet(page);
  table_.discard(page);
}

void PageMover::adopt(PageId page, Slot slot, std::uint32_t crc, std::uint64_t version) {
  std::lock_guard lock(mutex_);
  wait_until_quiet(page);
  table_.adopt(page, slot, crc, version);
}

void PageMover::look() {
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || writes_.empty()) return;  // whoever has the lock will look
  std::vector<io::Outcome> outcomes;
  engine_->reap_some(outcomes, 0, io::Clock::now());
  for (const io::Outcome& outcome : outcomes) settle(outcome);
}

void PageMover::drain() {
  std::lock_guard lock(mutex_);
  while (!writes_.empty()) reap_one();
  throw_write_error();
}

}  // namespace angelptm::pages
