#include "pages/drive_probe.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "pages/corrupt_page.h"
#include "pages/deadline.h"

namespace angelptm::pages {

namespace {

constexpr std::size_t kRounds = 3;  // the median of so many bursts
constexpr std::uint64_t kSector = 4096;
constexpr std::uint64_t kMostBytesInFlight = std::uint64_t{32} << 20;
constexpr std::uint64_t kMostBurstBytes = std::uint64_t{96} << 20;

double seconds_since(io::Clock::time_point start) {
  return std::chrono::duration<double>(io::Clock::now() - start).count();
}

double median(std::array<double, kRounds> values) {
  std::sort(values.begin(), values.end());
  return values[kRounds / 2];
}

// Slots and a frame that go back whatever happens; the engine, which goes first, has let go of them by then.
class Loan {
 public:
  explicit Loan(Store& store) : store_(store) {}
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;
  ~Loan() {
    for (const Slot slot : slots) store_.slots().release(slot);
    if (frame) store_.host().release(*frame);
  }
  bool take(std::size_t most) {
    frame = store_.host().allocate();
    while (frame && slots.size() < most) {
      const auto slot = store_.table().try_reserve_slot();
      if (!slot) break;
      slots.push_back(*slot);
    }
    return !slots.empty();
  }
  std::vector<Slot> slots;
  std::optional<Frame> frame;

 private:
  Store& store_;
};

class Probe {
 public:
  Probe(Store& store, const Loan& loan, io::Engine& engine)
      : store_(store), loan_(loan), engine_(engine), deadline_seconds_(store.options().deadline_seconds) {}

  // One transfer after the other of `bytes` each on all slots, until `seconds` or `most_bytes` are over; in which
  // direction `reads` and `writes` say, both in turn where both are set. Returns bytes per second.
  double burst(bool reads, bool writes, double seconds, std::uint64_t most_bytes) {
    const std::uint64_t bytes = store_.host().page_bytes();
    const auto start = io::Clock::now();
    std::uint64_t submitted = 0;
    bool write = writes;
    const auto submit = [&](std::size_t place) {
      transfer(place, write, bytes);
      submitted += bytes;
      if (reads && writes) write = !write;
    };
    for (std::size_t place = 0; place < loan_.slots.size(); ++place) submit(place);
    while (engine_.unfinished() > 0)
      for (const std::size_t place : reap())
        if (seconds_since(start) < seconds && submitted < most_bytes) submit(place);
    moved_ += submitted;
    return static_cast<double>(submitted) / std::max(seconds_since(start), 1e-9);
  }

  double latency() {
    std::array<double, kRounds> found{};
    for (double& seconds : found) {
      const auto start = io::Clock::now();
      transfer(0, false, kSector);
      reap();
      seconds = seconds_since(start);
    }
    return median(found);
  }

  std::uint64_t moved() const { return moved_; }

 private:
  // All share one frame: what it holds is nobody's.
  void transfer(std::size_t place, bool write, std::uint64_t bytes) {
    const Slot slot = loan_.slots[place];
    const io::Transfer one{place,
                           write ? io::Op::kWrite : io::Op::kRead,
                           static_cast<int>(slot.file),
                           store_.slots().offset(slot),
                           store_.host().address(*loan_.frame),
                           bytes};
    engine_.submit({&one, 1});
  }

  std::vector<std::size_t> reap() {
    std::vector<io::Outcome> outcomes;
    engine_.reap(outcomes, 1, deadline_after(deadline_seconds_));
    std::vector<std::size_t> places;
    for (const io::Outcome& outcome : outcomes) {
      if (outcome.error) throw io::IoError(*outcome.error);
      places.push_back(static_cast<std::size_t>(outcome.tag));
    }
    return places;
  }

  Store& store_;
  const Loan& loan_;
  io::Engine& engine_;
  double deadline_seconds_;
  std::uint64_t moved_ = 0;
};

}  // namespace

std::optional<DriveRates> probe_drive(Store& store, double seconds) {
  const std::uint64_t page = store.host().page_bytes();
  const std::uint64_t in_flight = std::max<std::uint64_t>(2, kMostBytesInFlight / page);
  Loan loan(store);
  if (!loan.take(std::min<std::uint64_t>(store.options().queue_depth, in_flight))) return std::nullopt;
  const std::uint64_t once = page * loan.slots.size();
  const std::uint64_t most = std::min(kMostBurstBytes, std::max(2 * once, store.slots().slot_count() * page / 8));
  const auto engine = store.make_engine(Store::Use::kProbe);
  Probe probe(store, loan, *engine);
  const double each = seconds / (3 * kRounds);
  std::array<double, kRounds> read{}, write{}, mixed{};
  probe.burst(false, true, 0, once);  // a slot that was never written is read without the drive
  for (std::size_t round = 0; round < kRounds; ++round) {
    write[round] = probe.burst(false, true, each, most);
    read[round] = probe.burst(true, false, each, most);
    mixed[round] = probe.burst(true, true, each, most);
  }
  DriveRates rates{median(read), median(write), median(mixed), probe.latency(), loan.slots.size(), 0};
  rates.moved_bytes = probe.moved();
  return rates;
}

}  // namespace angelptm::pages
