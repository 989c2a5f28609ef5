// How fast a store's drive is with transfers of a page, measured on slots that
// are free: what the plan is made with.
#pragma once

#include <cstdint>
#include <optional>

#include "pages/store.h"

namespace angelptm::pages {

struct DriveRates {
  double read_bytes_per_s = 0, write_bytes_per_s = 0;
  double mixed_bytes_per_s = 0;  // both directions together, as much of one as of the other
  double latency_seconds = 0;    // of one read of a sector, with nothing else under way
  std::uint64_t slots = 0;       // that were borrowed at once
  std::uint64_t moved_bytes = 0;
};

// Borrows a frame and as many free slots as a queue is deep, and gives them back: no page's content is touched. Takes
// about `seconds`, more only where the drive takes longer for one transfer of each slot, and moves few bytes where the
// store is small. Empty when there is no slot or no frame to borrow. Throws IoError. To be called while the store is
// idle; faults that tests inject spare it.
std::optional<DriveRates> probe_drive(Store& store, double seconds);

}  // namespace angelptm::pages
