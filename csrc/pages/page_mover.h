// Moves whole pages between their homes and staging frames on behalf of one
// thread: reads ahead of the caller, writes behind it. Every page read is
// checked against the CRC32C of what was written.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "io/engine.h"
#include "pages/corrupt_page.h"
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

  // Reads. A load in progress must be finished (every page handed out) or ended before another begins. A call that
  // throws has ended it, unless the device does not answer (IoError kDeadline). Throws CorruptPage for what was read
  // wrong; the store is stopped then.
  void begin_load(std::vector<PageId> pages);
  std::optional<LoadedPage> next_loaded();  // in the order of arrival; empty when all were handed out
  Frame take_loaded();  // the frame of the page handed out last is the caller's now (SSD pages only)
  void end_load();      // gives up what is left, after waiting for reads in flight

  // Writes. The caller fills a staging frame and hands it over; the page shows the new content when its write is done,
  // and until then a load of the page waits for it. A page whose write failed keeps its former content; from then on
  // write_behind and drain throw that error, loads only if nobody was told before.
  Frame staging_frame();                     // throws TierCapacityError when none is free and none is being written
  std::optional<Frame> try_staging_frame();  // empty instead of throwing
  void release(Frame frame);
  void write_behind(PageId page, Frame frame);  // owns `frame` from here on, also when it throws
  void discard(PageId page);                    // PageTable::discard, after the page's reads and writes under way
  // PageTable::adopt, after the page's reads and writes under way: one of them would put its content over the adopted.
  void adopt(PageId page, Slot slot, std::uint32_t crc, std::uint64_t version);
  void drain();  // returns when every write behind is published; throws the first error
  void look();   // publishes the writes that are done, and so frees their frames; waits for nothing

  std::byte* address(Frame frame) const { return table_.host().address(frame); }
  io::Counters counters() const;
  double wait_seconds() const;

 private:
  struct Write {
    PageId page;
    Frame frame;
    Slot slot;
    std::uint32_t crc;
  };
  struct Read {
    std::size_t index;
    Frame frame;
    PageInfo info;                    // as it was when the read was submitted
    io::Clock::time_point submitted;  // while a timeline is recorded
  };

  struct Ready {
    std::size_t index;
    Frame frame;  // kNoFrame for a page that is read in place in its home frame
    std::uint32_t bytes;
  };

  void pump_reads();  // submits reads as far as frames allow
  void collect_reads(std::vector<io::Transfer>& transfers);
  void submit_write(PageId page, Frame frame, std::uint32_t used_bytes);
  void reap_one();
  void settle(const io::Outcome& outcome);
  void wait_until_quiet(PageId page);  // no read or write of the page is under way
  void throw_write_error();
  template <typename Action>
  void or_abandon(const Action& action);
  void abandon_load();
  std::optional<Frame> frame_now();
  void release_handed_out();

  PageTable& table_;
  std::unique_ptr<io::Engine> engine_;
  double deadline_seconds_;
  mutable std::mutex mutex_;
  std::uint64_t next_tag_ = 0;
  std::unordered_map<std::uint64_t, Write> writes_;
  std::unordered_map<std::uint64_t, Read> reads_;
  std::unordered_set<PageId> writing_;  // pages of writes_: one write of a page at a time
  std::vector<PageId> load_;
  std::size_t load_next_ = 0;        // first page of load_ that was not requested yet
  std::size_t load_handed_out_ = 0;  // pages of load_ returned so far
  std::deque<Ready> ready_;
  Frame handed_out_ = kNoFrame;
  std::exception_ptr read_error_;           // of the load in progress
  std::optional<io::IoError> write_error_;  // the first one, for good
  bool write_error_told_ = false;
  double wait_seconds_ = 0;
};

}  // namespace angelptm::pages
