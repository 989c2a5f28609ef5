#include "pages/page_saver.h"

#include <cstring>
#include <stdexcept>
#include <utility>

#include "pages/corrupt_page.h"
#include "pages/deadline.h"

namespace angelptm::pages {

PageSaver::PageSaver(PageTable& table, std::unique_ptr<io::Engine> engine, double deadline_seconds)
    : table_(table), engine_(std::move(engine)), deadline_seconds_(deadline_seconds) {
  const auto frame = table_.host().allocate();
  if (!frame) throw TierCapacityError("host tier: no frame is left for writing checkpoints");
  frame_ = *frame;
}

PageSaver::~PageSaver() {
  const bool quiet = engine_->unfinished() == 0;
  engine_.reset();  // first: it waits until the kernel has let go of the frames
  if (quiet) table_.host().release(frame_);
}

std::uint64_t PageSaver::written_bytes() const {
  std::lock_guard lock(mutex_);
  return engine_->counters().written_bytes;
}

void PageSaver::submit(std::uint64_t tag, const std::byte* address, Slot slot, std::uint32_t used_bytes) {
  const io::Transfer transfer{tag,
                              io::Op::kWrite,
                              static_cast<int>(slot.file),
                              table_.ssd().offset(slot),
                              const_cast<std::byte*>(address),
                              transfer_bytes(used_bytes)};
  engine_->submit({&transfer, 1});
}

void PageSaver::reap_one(std::exception_ptr& error) {
  std::vector<io::Outcome> outcomes;
  engine_->reap(outcomes, 1, deadline_after(deadline_seconds_));
  for (const io::Outcome& outcome : outcomes) {
    const Write write = writes_.at(outcome.tag);
    writes_.erase(outcome.tag);
    if (!outcome.error) {
      table_.keep_saved(write.page, write.slot, write.crc, write.version);
      continue;
    }
    table_.cancel_slot(write.slot);
    if (!error) error = std::make_exception_ptr(io::IoError(*outcome.error));
  }
}

void PageSaver::save(const std::vector<PageId>& pages) {
  std::lock_guard lock(mutex_);
  std::exception_ptr error;
  for (const PageId page : pages) {
    while (!error && writes_.size() >= engine_->queue().depth()) reap_one(error);
    if (error) break;
    const PageInfo info = table_.info(page);
    if (info.home != Home::kHost) throw std::logic_error("PageSaver: only host pages need saving");
    try {
      std::byte* address = table_.host().address(info.frame);
      const std::uint32_t crc = seal(address, info.used_bytes);
      const Slot slot = table_.reserve_slot();
      const std::uint64_t tag = next_tag_++;
      writes_.emplace(tag, Write{page, slot, crc, info.version});
      submit(tag, address, slot, info.used_bytes);
    } catch (...) {
      error = std::current_exception();
    }
  }
  while (!writes_.empty()) reap_one(error);
  if (error) std::rethrow_exception(error);
}

Slot PageSaver::save_bytes(const std::byte* content, std::uint32_t bytes, std::uint32_t& crc) {
  std::lock_guard lock(mutex_);
  if (bytes == 0 || bytes > table_.host().page_bytes())
    throw std::invalid_argument("a slot holds from 1 byte to a page of them, not " + std::to_string(bytes));
  std::byte* address = table_.host().address(frame_);
  std::memcpy(address, content, bytes);
  crc = seal(address, bytes);
  const Slot slot = table_.reserve_slot();
  submit(next_tag_++, address, slot, bytes);
  std::vector<io::Outcome> outcomes;
  engine_->reap(outcomes, 1, deadline_after(deadline_seconds_));
  if (!outcomes.front().error) return slot;
  table_.cancel_slot(slot);
  throw io::IoError(*outcomes.front().error);
}

void PageSaver::flush() {
  std::lock_guard lock(mutex_);
  engine_->sync(deadline_after(deadline_seconds_));
}

}  // namespace angelptm::pages
