// Where every page is. The one place that knows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
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
  std::uint64_t version;     // publishes so far
  bool written;
  Frame frame;  // Home::kHost
  Slot slot;    // Home::kSsd, valid when written
};

struct TierCapacityError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Thread-safe; one mutex, taken for some tens of nanoseconds a page of megabytes.
class PageTable {
 public:
  PageTable(HostPool& host, SlotMap& ssd) : host_(host), ssd_(ssd) {}

  // Adds a page; a host page gets its frame now, zeroed. Throws TierCapacityError when the pool is out of frames.
  PageId add(Home home, std::uint32_t used_bytes);
  PageInfo info(PageId page) const;
  std::size_t page_count() const;

  // Host pages: exchanges the page's frame for `frame`, which holds the new content; returns the former frame, now the
  // caller's.
  Frame publish_frame(PageId page, Frame frame);
  // Host pages written in place by their only writer: counts the version.
  void publish_in_place(PageId page);
  // SSD pages: a slot to write the next content to. Throws TierCapacityError when all slots are taken.
  Slot reserve_slot();
  // Makes the fully written slot current and gives the former one back.
  void publish_slot(PageId page, Slot slot);
  void cancel_slot(Slot slot);
  // The content is no longer needed (a taken gradient): an SSD page gives its slot back and reads as zeros again.
  void discard(PageId page);

  HostPool& host() const { return host_; }
  SlotMap& ssd() const { return ssd_; }

 private:
  HostPool& host_;
  SlotMap& ssd_;
  mutable std::mutex mutex_;
  std::vector<PageInfo> pages_;
};

}  // namespace angelptm::pages
