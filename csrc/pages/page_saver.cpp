#include "pages/page_saver.h"

#include <cstring>
#include <stdexcept>
#include <utility>

#include "pages/corrupt_page.h"
#include "pages/deadline.h"
#include "timeline/recorder.h"

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

// Seals the content and writes it to a fresh slot; returns the write's tag.
std::uint64_t PageSaver::submit(PageId page, std::uint64_t version, std::byte* address, std::uint32_t used_bytes) {
  const timeline::Scope scope(timeline::What::kSave, page, used_bytes);
  const std::uint32_t crc = seal(address, used_bytes);
  const Slot slot = table_.reserve_slot();
  const std::uint64_t tag = next_tag_++;
  const io::Transfer transfer{
      tag, io::Op::kWrite, static_cast<int>(slot.file), table_.ssd().offset(slot), address, transfer_bytes(used_bytes)};
  writes_.emplace(tag, Write{page, slot, crc, version, false, timeline::begin(), transfer.bytes});
  try {
    engine_->submit({&transfer, 1});
  } catch (const std::invalid_argument&) {
    writes_.erase(tag);
    table_.cancel_slot(slot);
    throw;
  } catch (...) {  // The engine holds the transfer all the same.
    writes_.at(tag).abandoned = true;
    throw;
  }
  return tag;
}

void PageSaver::reap_one(std::exception_ptr& error) {
  std::vector<io::Outcome> outcomes;
  const timeline::Scope scope(timeline::What::kWaitIo);
  try {
    engine_->reap(outcomes, 1, deadline_after(deadline_seconds_));
  } catch (...) {
    // The caller goes its way, and may change the content that the kernel still reads.
    for (auto& [tag, write] : writes_) write.abandoned = true;
    throw;
  }
  for (const io::Outcome& outcome : outcomes) {
    if (outcome.tag == io::Engine::kSyncTag) {
      if (outcome.error && !flush_error_) flush_error_ = outcome.error;
      continue;
    }
    const Write write = writes_.at(outcome.tag);
    writes_.erase(outcome.tag);
    timeline::end(timeline::What::kWrite, write.submitted, write.page, write.bytes);
    if (outcome.error || write.abandoned) {
      table_.cancel_slot(write.slot);
      if (!write.abandoned && !error) error = std::make_exception_ptr(io::IoError(*outcome.error));
    } else if (write.page != kNoPage) {
      table_.keep_saved(write.page, write.slot, write.crc, write.version);
    }
  }
}

// Every call begins with it: outcomes of a call that missed its deadline must not be taken for those of this one, nor
// may the staging frame be filled while the kernel still reads it.
void PageSaver::wait_for_abandoned() {
  std::exception_ptr told_before;
  while (engine_->unfinished() > 0) reap_one(told_before);
}

void PageSaver::save(const std::vector<PageId>& pages) {
  std::lock_guard lock(mutex_);
  wait_for_abandoned();
  std::exception_ptr error;
  for (const PageId page : pages) {
    while (!error && writes_.size() >= engine_->queue().depth()) reap_one(error);
    if (error) break;
    try {
      const PageInfo info = table_.info(page);
      if (info.home != Home::kHost) throw std::logic_error("PageSaver: only host pages need saving");
      submit(page, info.version, table_.address(info), info.used_bytes);
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
  wait_for_abandoned();
  std::byte* address = table_.host().address(frame_);
  std::memcpy(address, content, bytes);
  const Write write = writes_.at(submit(kNoPage, 0, address, bytes));
  std::exception_ptr error;
  while (!writes_.empty()) reap_one(error);
  if (error) std::rethrow_exception(error);
  crc = write.crc;
  return write.slot;
}

void PageSaver::flush() {
  std::lock_guard lock(mutex_);
  table_.expect_running();
  wait_for_abandoned();
  // Not Engine::sync: after a missed deadline it has forgotten what the files that did answer said.
  std::vector<io::Transfer> syncs;
  for (std::size_t file = 0; file < engine_->files().size(); ++file)
    syncs.push_back({io::Engine::kSyncTag, io::Op::kSync, static_cast<int>(file), 0, nullptr, 0});
  if (!flush_error_) engine_->submit(syncs);
  std::exception_ptr none;
  while (engine_->unfinished() > 0) reap_one(none);
  if (flush_error_) throw io::IoError(*flush_error_);
  table_.expect_running();
}

}  // namespace angelptm::pages
