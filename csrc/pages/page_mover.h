// Moves whole pages between their homes and staging frames on behalf of one
// thread: reads ahead of the caller, writes behind it.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "io/engine.h"
#include "pages/page_table.h"

namespace angelptm::pages {

struct LoadedPage {
  std::size_t index;         // position in the list given to begin_load
  const std::byte* address;  // the page's content; valid until the next call of next_loaded, begin_load or end_load
  std::uint32_t bytes;       // content bytes
};

// Thread-safe by one mutex that is held while waiting: meant for one thread,
// merely tolerant of a second one (autograd's). Staging frames come from what the
// pool has left; when none is left, writes behind are reaped until one is.
class PageMover {
 public:
  PageMover(PageTable& table, std::unique_ptr<io::Engine> engine, double deadline_seconds);
  ~PageMover();  // waits (bounded) for the kernel to let go of the frames

  // Reads. A load in progress must be finished (next_loaded returned empty) or ended before another begins.
  void begin_load(std::vector<PageId> pages);
  std::optional<LoadedPage> next_loaded();  // in the order of arrival; empty when all were handed out
  Frame take_loaded();                       // the frame of the page handed out last is the caller's now (SSD pages only)
  void end_load();                           // gives up what is left, after waiting for reads in flight

  // Writes. The caller fills a staging frame and hands it over; the page shows the new content when its write is done,
  // and until then a load of the page waits for it.
  Frame staging_frame();                     // throws TierCapacityError when none is free and none is being written
  std::optional<Frame> try_staging_frame();  // empty instead of throwing
  void release(Frame frame);
  void write_behind(PageId page, Frame frame);  // owns `frame` from here on
  void drain();                                 // returns when every write behind is published; throws the first error

  std::byte* address(Frame frame) const { return table_.host().address(frame); }
  io::Counters counters() const;
  double wait_seconds() const { return wait_seconds_; }

 private:
  struct Write {
    PageId page;
    Frame frame;
    Slot slot;
  };
  struct Read {
    std::size_t index;
    Frame frame;
    std::uint32_t bytes;
  };

  void pump_reads();             // submits reads as far as frames allow
  void reap(std::size_t at_least);
  std::optional<Frame> frame_now();
  void release_handed_out();

  PageTable& table_;
  std::unique_ptr<io::Engine> engine_;
  double deadline_seconds_;
  mutable std::mutex mutex_;
  std::uint64_t next_tag_ = 0;
  std::unordered_map<std::uint64_t, Write> writes_;
  std::unordered_map<std::uint64_t, Read> reads_;
  std::unordered_map<PageId, std::uint64_t> writing_;  // page → tag of its latest write behind
  std::vector<PageId> load_;
  std::size_t load_next_ = 0;        // first page of load_ that was not requested yet
  std::size_t load_handed_out_ = 0;  // pages of load_ returned so far
  std::deque<LoadedPage> ready_;
  std::deque<Frame> ready_frames_;   // beside ready_; kNoFrame for a page read in place from its home frame
  Frame handed_out_ = kNoFrame;
  std::optional<io::IoError> error_;
  double wait_seconds_ = 0;
};

// Bytes that travel for a page with `used` content bytes: whole sectors of 4096.
constexpr std::uint64_t transfer_bytes(std::uint32_t used) { return (std::uint64_t{used} + 4095) / 4096 * 4096; }

}  // namespace angelptm::pages
