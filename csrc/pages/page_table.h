// Where every page is. The one place that knows.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "pages/host_pool.h"
#include "pages/slot_map.h"

namespace angelptm::pages {

using PageId = std::uint32_t;
constexpr PageId kNoPage = 0xffffffffu;

enum class Home : std::uint8_t {
  kHost,  // the table owns one frame for the page's whole life; publish() may exchange it for another
  kSsd,   // the table owns the current slot, none before the first publish; slots are never overwritten in place
};

// A page that was never written reads as zeros: optimizer states start that way without a byte of traffic.
struct PageInfo {
  Home home;
  std::uint32_t used_bytes;  // content; the rest of the frame is padding and does not travel
  std::uint64_t version;     // publishes so far, of former runs that this one resumed too
  bool written;
  Frame frame;        // Home::kHost; kNoFrame for a page at a fixed address
  Slot slot;          // Home::kSsd: current content, valid when written. Home::kHost: its saved copy, valid when saved
  std::uint32_t crc;  // CRC32C of the slot's transfer_bytes(used_bytes)
  bool saved;         // Home::kHost: the slot has the content of saved_version
  std::uint64_t saved_version;
  std::byte* fixed;        // Home::kHost: in memory that is not the pool's, or null
  std::uint64_t expected;  // the version that an update under way will publish; at most `version` when there is none
};

// Whether a page's content is the one that it had. The version alone does not say so: a commit that is loaded brings
// its own, and a page that is discarded keeps it.
inline bool same_content(const PageInfo& former, const PageInfo& now) {
  return former.version == now.version && former.written == now.written && former.crc == now.crc &&
         former.slot == now.slot;
}

// The content of a page at one moment, for a commit.
struct Captured {
  enum class State : std::uint8_t {
    kZeros,    // never written
    kInSlot,   // in `slot`, on which the caller has a reference now
    kUnsaved,  // in a host frame alone: PageSaver writes it to a slot
  } state;
  Slot slot;
  std::uint32_t crc;
  std::uint64_t version;
};

// What a reader of a host page holds: the frame keeps its content until `release` of the table.
struct HeldFrame {
  Frame frame;
  std::uint32_t version;  // the lower half of the page's
};

struct TierCapacityError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The store was stopped, since a page turned out to be corrupt: nothing is written any more.
struct StoppedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Thread-safe; one mutex, taken for some tens of nanoseconds a page of megabytes.
class PageTable {
 public:
  PageTable(HostPool& host, SlotMap& ssd) : host_(host), ssd_(ssd) {}

  // Adds a page; a host page gets its frame now, zeroed. Throws TierCapacityError when the pool is out of frames.
  PageId add(Home home, std::uint32_t used_bytes);
  // Adds a host page whose content stays at an address that somebody else owns (the device's arena, where the CPU can
  // reach it): zeroed now, written in place like any other host page, and never exchanged.
  PageId add_at(std::byte* address, std::uint32_t used_bytes);
  PageInfo info(PageId page) const;
  // Where a host page's content is.
  std::byte* address(const PageInfo& page) const {
    return page.fixed != nullptr ? page.fixed : host_.address(page.frame);
  }
  std::size_t page_count() const;
  // Most SSD pages that had content at once: with one slot each, which is what the tier holds but for writes in flight
  // and for what only commits name.
  std::size_t ssd_peak_count() const;

  // Host pages: exchanges the page's frame for `frame`, which holds the new content; returns the former frame, now the
  // caller's.
  Frame publish_frame(PageId page, Frame frame);
  // Host pages: exchanges the frames of two of them.
  void exchange_frames(PageId one, PageId other);
  // Host pages: the newest content, for as long as the caller likes, while others are published. Takes no lock, and
  // waits for nobody. Whoever publishes owns the former frame, and writes to it when it has no readers (HostPool).
  HeldFrame hold(PageId page);
  void release(const HeldFrame& held) { host_.release_reader(held.frame); }
  // Host pages written in place by their only writer: counts the version.
  void publish_in_place(PageId page);
  // An update of the page begins: who reads it next shall wait for the version that it will publish ...
  void expect_publish(PageId page);
  // ... and it failed: nothing will come.
  void give_up_publish(PageId page);
  // A slot to write a page's next content to. Throws TierCapacityError when all slots are taken, StoppedError after
  // stop(). try_ returns empty instead of the former.
  Slot reserve_slot();
  std::optional<Slot> try_reserve_slot();
  // SSD pages: makes the fully written slot current and gives the former one back.
  void publish_slot(PageId page, Slot slot, std::uint32_t crc);
  void cancel_slot(Slot slot);
  // The content is no longer needed (a taken gradient): an SSD page gives its slot back and reads as zeros again.
  void discard(PageId page);

  // The pages' content as it is now; each kInSlot is a reference of the caller's, to be released by ssd().release. No
  // page may be written to meanwhile: its update is done, or not yet begun.
  std::vector<Captured> capture(const std::vector<PageId>& pages);
  // Host pages: `slot`, a reference that the table owns from here on, has the page's content of `version`.
  void keep_saved(PageId page, Slot slot, std::uint32_t crc, std::uint64_t version);
  // The page's content is what a former run wrote to `slot`: takes a reference of its own. A host page's frame has been
  // filled with it already.
  void adopt(PageId page, Slot slot, std::uint32_t crc, std::uint64_t version);
  // From here on no slot is given out.
  void stop(const std::string& reason);
  void expect_running() const;  // throws StoppedError after stop()

  HostPool& host() const { return host_; }
  SlotMap& ssd() const { return ssd_; }

 private:
  void write_first(PageInfo& page);  // gets content; with the mutex held
  void show(PageId page);            // to those who take no lock; with the mutex held

  HostPool& host_;
  SlotMap& ssd_;
  mutable std::mutex mutex_;
  std::vector<PageInfo> pages_;
  // Frame and version of each host page in one word, so that a reader gets both of one publish. Seq_cst throughout, as
  // are the counts of readers: a reader counts itself and then looks at the word again, a publisher changes the word
  // and then looks at the count, so one of them sees the other.
  std::deque<std::atomic<std::uint64_t>> words_;
  std::size_t ssd_count_ = 0, ssd_peak_count_ = 0;  // SSD pages with content
  std::string stopped_because_;                     // empty while the store may be written to
};

}  // namespace angelptm::pages
