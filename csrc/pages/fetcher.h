// Brings pages to the device ahead of their use, on a thread of its own: reads
// them from the SSD into staging frames, checks them, copies them to where the
// model computes. New parameters are taken out of the updater's hands while it
// still writes them, so that they need not be read back.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "device/copy_stream.h"
#include "io/engine.h"
#include "pages/page_mover.h"
#include "pages/page_table.h"
#include "pages/ticket.h"

namespace angelptm::pages {

// A page, and where its content shall be. Nobody else touches `to` while the ticket is open.
struct FetchItem {
  PageId page;
  std::byte* to;
  Frame held = kNoFrame;  // what to copy, of which the caller has a reference (PageTable::hold); else the newest
  bool release_held =
      false;  // the reference goes over to the fetcher, which releases it when the copy is made or fails
};

struct FetchTotals {
  std::uint64_t copied_bytes = 0;       // to the device
  std::uint64_t handed_over_bytes = 0;  // of them: taken from the updater, or kept from it, and not read from the SSD
  double copy_seconds = 0;              // checking and copying
  io::Counters io;
};

// Thread-safe. A fetch waits for the version that an update under way will publish (PageInfo::expected); those behind
// it go on meanwhile. Holds at most `most_frames` staging frames, and needs one to make progress.
class Fetcher {
 public:
  // `mover`, which lives longer, is asked to free the frames of writes that are done when no other frame is left.
  // `stream`: what copies to a device that works on its own time; null where the thread copies itself.
  Fetcher(PageTable& table, std::unique_ptr<io::Engine> engine, PageMover* mover, std::size_t most_frames,
          double deadline_seconds, std::shared_ptr<device::CopyStream> stream = nullptr);
  // What is queued fails; waits (bounded) for the kernel and the device to let go of the frames.
  ~Fetcher();

  // Queues the copy of pages. `after`: the update that publishes them, or null; its error becomes the fetch's. `urgent`
  // goes before what is queued. `computed`: the stream's mark of the work that may still read what lies there now. The
  // ticket's errors: CorruptPage, IoError, DeviceError, the update's.
  std::shared_ptr<Ticket> fetch(std::string what, std::vector<FetchItem> items, std::shared_ptr<Ticket> after,
                                bool urgent, device::CopyStream::Mark computed = 0);
  // Reads pages into free staging frames, in this order, for fetches to come. A hint: what no frame is left for, or an
  // update replaces, is dropped. Replaces what the last call asked for and is not begun.
  void read_ahead(const std::vector<PageId>& pages);
  // Gives back the staging frames that hold what nobody has asked for: others need them. Those that are being read to
  // follow when the read is over.
  void let_go();

  // The updater's side. An update has failed, and its ticket says so: those who wait for it are told.
  void look_for_errors();
  // Lends the page's new content of `version`, to be read until take_back returns.
  void lend(PageId page, std::uint64_t version, const std::byte* address);
  // Ends the loan. Returns the caller's frame; or another one, where the content that was `published` stays in a
  // staging frame for a fetch to come. The lower its `rank`, the sooner the page is needed: it may displace a higher
  // one.
  Frame take_back(PageId page, Frame frame, bool published, std::uint32_t rank);
  FetchTotals totals() const;
  std::size_t most_frames() const { return most_frames_; }

 private:
  struct Request {
    std::shared_ptr<Ticket> ticket, after;
    std::vector<FetchItem> items;           // that are still to be copied
    device::CopyStream::Mark computed = 0;  // that the stream has not been told to wait for
  };
  struct Copying {  // on the stream
    std::shared_ptr<Ticket> ticket;
    FetchItem item;
    bool lent, from_frame;  // what the source is, and so who is told of the end
    device::CopyStream::Mark mark;
    io::Clock::time_point began;
    io::Clock::time_point recorded;  // while a timeline is
  };
  struct Held {  // content of an SSD page in a staging frame, being read or there
    Frame frame;
    PageInfo info;
    bool reading, checked, in_use;
    std::uint32_t rank;
    io::Clock::time_point submitted{};  // while a timeline is recorded
  };
  struct Loan {
    const std::byte* address;
    std::uint64_t version;
    std::uint32_t readers;
  };
  using Lock = std::unique_lock<std::mutex>;
  using Requests = std::list<Request>;

  void run();
  bool drop_failed(Lock& lock);
  bool start_reads(Lock& lock);  // whether something waits for a frame
  bool begin_read(PageId page, const PageInfo& info, bool evict, Lock& lock);
  std::optional<Frame> frame_now(bool evict, Lock& lock);
  bool copy_one(Lock& lock);
  void copy(Requests::iterator request, std::size_t index, Lock& lock);
  void give_back_source(const FetchItem& item, bool lent, bool from_frame, Lock& lock);
  void settle_copies(Lock& lock);
  void wait_for_copies(Lock& lock);
  void reap(Lock& lock);
  void settle(const io::Outcome& outcome, Lock& lock);
  void reap_all();
  void break_down(std::exception_ptr error, Lock& lock);
  std::optional<Frame> keep(PageId page, Frame frame, std::uint32_t rank, Lock& lock);
  bool wanted(PageId page, Lock& lock) const;
  void drop(PageId page, Lock& lock);
  void let_go_of(const FetchItem& item);
  void fail(Requests::iterator request, const std::exception_ptr& error, Lock& lock);
  static bool is_current(const PageInfo& held, const PageInfo& now);

  PageTable& table_;
  std::unique_ptr<io::Engine> engine_;  // used by the thread alone
  PageMover* mover_;
  std::size_t most_frames_;
  double deadline_seconds_;
  mutable std::mutex mutex_;
  std::condition_variable wake_, returned_;
  std::uint64_t changes_ = 0;  // whatever may let the thread go on counts it up
  bool stopping_ = false;
  bool letting_go_ = false;  // of what is being read ahead, as soon as it is there
  Requests requests_;
  std::deque<PageId> ahead_;
  std::unordered_map<PageId, Held> held_;
  std::unordered_map<PageId, Loan> loans_;
  std::shared_ptr<device::CopyStream> stream_;
  std::deque<Copying> copying_;
  io::Clock::time_point last_answer_;
  io::Clock::time_point waiting_since_{};  // for a read, with nothing else to do; while a timeline is recorded
  std::exception_ptr broken_;              // the device does not answer
  FetchTotals totals_;
  std::thread thread_;
};

}  // namespace angelptm::pages
