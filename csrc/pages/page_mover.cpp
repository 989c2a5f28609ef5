#include "pages/page_mover.h"

#include <cstring>
#include <stdexcept>
#include <utility>

namespace angelptm::pages {

namespace {

io::Clock::time_point after(double seconds) {
  return io::Clock::now() + std::chrono::duration_cast<io::Clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace

PageMover::PageMover(PageTable& table, std::unique_ptr<io::Engine> engine, double deadline_seconds)
    : table_(table), engine_(std::move(engine)), deadline_seconds_(deadline_seconds) {}

// The engine's destructor waits for the kernel; the frames go back with the pool itself.
PageMover::~PageMover() = default;

io::Counters PageMover::counters() const {
  std::lock_guard lock(mutex_);
  return engine_->counters();
}

void PageMover::reap(std::size_t at_least) {
  const auto start = io::Clock::now();
  std::vector<io::Outcome> outcomes;
  engine_->reap(outcomes, at_least, after(deadline_seconds_));
  wait_seconds_ += std::chrono::duration<double>(io::Clock::now() - start).count();
  for (const io::Outcome& outcome : outcomes) {
    if (outcome.error && !error_) error_ = outcome.error;
    if (const auto found = writes_.find(outcome.tag); found != writes_.end()) {
      const Write write = found->second;
      writes_.erase(found);
      if (outcome.error) {
        table_.cancel_slot(write.slot);
      } else {
        table_.publish_slot(write.page, write.slot);
      }
      if (const auto latest = writing_.find(write.page); latest != writing_.end() && latest->second == outcome.tag)
        writing_.erase(latest);
      table_.host().release(write.frame);
    } else if (const auto read = reads_.find(outcome.tag); read != reads_.end()) {
      const Read entry = read->second;
      reads_.erase(read);
      ready_.push_back({entry.index, address(entry.frame), entry.bytes});
      ready_frames_.push_back(entry.frame);
    }
  }
}

std::optional<Frame> PageMover::frame_now() {
  while (true) {
    if (const auto frame = table_.host().allocate()) return frame;
    if (writes_.empty()) return std::nullopt;
    reap(1);
  }
}

void PageMover::pump_reads() {
  std::vector<io::Transfer> transfers;
  while (load_next_ < load_.size()) {
    const PageId page = load_[load_next_];
    while (writing_.contains(page)) reap(1);
    const PageInfo info = table_.info(page);
    if (info.home == Home::kHost) {
      ready_.push_back({load_next_++, table_.host().address(info.frame), info.used_bytes});
      ready_frames_.push_back(kNoFrame);
      continue;
    }
    auto frame = table_.host().allocate();
    if (!frame && reads_.empty() && ready_.empty() && transfers.empty()) frame = frame_now();
    if (!frame) {
      if (reads_.empty() && ready_.empty() && transfers.empty())
        throw TierCapacityError("host tier: no staging frame is left to read a page from the SSD");
      break;  // The frames of pages handed out later will carry the rest.
    }
    if (!info.written) {
      std::memset(address(*frame), 0, info.used_bytes);
      ready_.push_back({load_next_++, address(*frame), info.used_bytes});
      ready_frames_.push_back(*frame);
      continue;
    }
    const std::uint64_t tag = next_tag_++;
    reads_.emplace(tag, Read{load_next_++, *frame, info.used_bytes});
    transfers.push_back({tag, io::Op::kRead, static_cast<int>(info.slot.file), table_.ssd().offset(info.slot),
                         address(*frame), transfer_bytes(info.used_bytes)});
  }
  if (!transfers.empty()) engine_->submit(transfers);
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
  pump_reads();
}

std::optional<LoadedPage> PageMover::next_loaded() {
  std::lock_guard lock(mutex_);
  release_handed_out();
  if (load_handed_out_ == load_.size()) return std::nullopt;
  pump_reads();
  while (ready_.empty()) {
    reap(1);
    if (error_) throw io::IoError(*error_);
  }
  if (error_) throw io::IoError(*error_);
  const LoadedPage page = ready_.front();
  handed_out_ = ready_frames_.front();
  ready_.pop_front();
  ready_frames_.pop_front();
  ++load_handed_out_;
  return page;
}

Frame PageMover::take_loaded() {
  std::lock_guard lock(mutex_);
  if (handed_out_ == kNoFrame) throw std::logic_error("PageMover: the page handed out last has no staging frame to take");
  return std::exchange(handed_out_, kNoFrame);
}

void PageMover::end_load() {
  std::lock_guard lock(mutex_);
  while (!reads_.empty()) reap(1);
  release_handed_out();
  for (const Frame frame : ready_frames_)
    if (frame != kNoFrame) table_.host().release(frame);
  ready_.clear();
  ready_frames_.clear();
  load_.clear();
  load_next_ = load_handed_out_ = 0;
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
  const PageInfo info = table_.info(page);
  if (info.home == Home::kHost) {
    table_.host().release(table_.publish_frame(page, frame));
    return;
  }
  // Two writes of one page must be published in order, so the second waits for the first.
  while (writing_.contains(page)) reap(1);
  if (error_) throw io::IoError(*error_);
  const Slot slot = table_.reserve_slot();
  const std::uint64_t tag = next_tag_++;
  writes_.emplace(tag, Write{page, frame, slot});
  writing_[page] = tag;
  const io::Transfer transfer{tag, io::Op::kWrite, static_cast<int>(slot.file), table_.ssd().offset(slot), address(frame),
                              transfer_bytes(info.used_bytes)};
  engine_->submit({&transfer, 1});
  if (engine_->unfinished() >= engine_->queue().depth()) reap(1);
}

void PageMover::drain() {
  std::lock_guard lock(mutex_);
  while (!writes_.empty()) reap(1);
  if (error_) throw io::IoError(*error_);
}

}  // namespace angelptm::pages
