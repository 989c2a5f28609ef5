// One updating thread's ring of spans in flight, and its I/O queue. Internal to the updater.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "update/updater.h"

namespace angelptm::update {

using pages::Frame;
using pages::PageInfo;
using pages::PageTable;
using pages::Slot;

struct Updater::Batch {
  Tickets tickets;  // swept: null
  std::vector<kernels::Hyper> hypers;
  std::uint32_t rank;
};

struct Updater::Task {
  std::shared_ptr<Batch> batch;  // null: there is none
  Work work;
  std::uint32_t gradients = 1;  // swept: how many it stands for

  void set_error(const std::exception_ptr& error, bool published) const;  // of parts that are not finished yet
};

// One ring slot: a span from its first read to its last write. Owns its staging frames for good. A span that is read
// ahead has no task until its gradients come.
struct Updater::Flight {
  struct Piece {
    PageId page;
    std::byte* address;  // home frame of a host page, staging frame of an SSD page
    std::uint32_t used_bytes;
    bool staged;  // lives on the SSD: read before, written after
    bool written_back;
    std::optional<Slot> slot;  // reserved for the new content, until it is published or given back
    std::uint32_t crc = 0;     // of the new content
    bool unchecked = false;    // was read from the SSD as `read_from` says, and not yet compared with its CRC32C
    PageInfo read_from{};
  };
  std::vector<Frame> frames;
  std::uint32_t span = 0;
  std::uint64_t claim = 0;  // ascends with the spans that this worker took up
  Task task;
  std::vector<Piece> pieces;  // state pages, gradient pages, parameter page
  std::size_t first_grad = 0, first_param = 0;
  std::size_t param_frame = 0;  // index into frames of the frame that receives the new parameters
  std::size_t taken_frame = 0;  // swept: of the first one that gets gradients out of an accumulator
  std::size_t transfers_left = 0;
  io::Clock::time_point submitted{};  // the first of these transfers, while a timeline is recorded
  std::uint64_t submitted_bytes = 0;  // of all of them
  enum class Stage : std::uint8_t { kIdle, kReading, kReady, kComputed, kWriting } stage = Stage::kIdle;
  bool lent = false;       // the fetcher may be reading the parameter frame
  bool published = false;  // the batch's `published` was told
  std::exception_ptr error;

  bool ahead() const { return stage != Stage::kIdle && !task.batch; }
};

class Updater::Worker {
 public:
  Worker(Updater& updater, std::uint32_t index, std::unique_ptr<io::Engine> engine)
      : updater_(updater),
        index_(index),
        table_(updater.table_),
        engine_(std::move(engine)),
        flights_(updater.options_.ring_depth) {}

  ~Worker() {
    const bool quiet = engine_->unfinished() == 0;
    engine_.reset();     // first: it waits until the kernel has let go of the frames
    if (!quiet) return;  // It may not have let go: frames that it still writes to must not be used again.
    for (const Flight& flight : flights_)
      for (const Frame frame : flight.frames) table_.host().release(frame);
  }

  // Not in the constructor: what was taken before the pool ran out goes back in the destructor.
  void take_frames(std::size_t per_slot) {
    for (Flight& flight : flights_) {
      flight.frames.reserve(per_slot);
      while (flight.frames.size() < per_slot) {
        const auto frame = table_.host().allocate();
        if (!frame) throw pages::TierCapacityError("host tier: too few frames for the updater's ring");
        flight.frames.push_back(*frame);
      }
    }
  }

  // Those that take `lock` need the updater's mutex, which they let go of and take again where they say so.
  using Lock = std::unique_lock<std::mutex>;
  void adopt(Task task, Lock&) { adopted_.push_back(std::move(task)); }
  bool has_tasks() const;  // in the ring
  bool waits_for_io() const { return engine_->unfinished() > 0; }
  bool has_something_to_do(Lock&) const;  // without anything's arriving
  bool take_work(Lock& lock);             // lets go of the lock; false when there was nothing to take
  bool compute_one();                     // false when nothing is ready
  void write_computed();                  // as many as may be written at once
  void wait_for_io();
  // The device does not answer: tells those who wait for what is in flight.
  void give_up(const std::exception_ptr& error);

 private:
  Flight* idle_flight();
  std::size_t ahead_count() const;
  bool may_compute(const Flight& flight) const;
  // Of those at a stage that have a task, the one that is needed soonest, and of these the one taken up first; or null.
  Flight* soonest(Flight::Stage stage);
  bool drop_ahead(Lock& lock);
  bool start_ahead(Flight& flight, Lock& lock);
  bool take_gradients(Flight& flight);
  void start(std::uint32_t span, Flight& flight);
  void attach(Flight& flight, Task task);
  void add_param(Flight& flight);
  void add_pieces(Flight& flight, const std::vector<PageId>& ids, bool written_back);
  void read(Flight& flight, std::size_t first);
  void write(Flight& flight);
  void submit(Flight& flight, const std::vector<io::Transfer>& transfers);
  std::uint64_t tag_of(const Flight& flight, std::size_t piece) const;
  void check_pages(Flight& flight);
  void compute(Flight& flight);
  void compute_run(const Flight& flight, const StateRun& run, const kernels::Hyper* hyper, std::uint64_t start,
                   std::uint64_t count);
  void publish_param(Flight& flight);
  void publish(Flight& flight);
  void finish(Flight& flight);
  void fail(Flight& flight, const std::exception_ptr& error);

  Updater& updater_;
  std::uint32_t index_;
  PageTable& table_;
  std::unique_ptr<io::Engine> engine_;
  std::vector<Flight> flights_;
  std::vector<Task> adopted_;  // for spans that are read ahead here; guarded by the updater's mutex
  std::size_t writing_ = 0;
  std::uint64_t claims_ = 0;
  Utilisation done_;     // since the last merge into the updater's totals
  io::Counters merged_;  // engine counters at that merge
};

}  // namespace angelptm::update
