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
  std::shared_ptr<Ticket> ticket;
  std::vector<kernels::Hyper> hypers;
};

struct Updater::Task {
  std::shared_ptr<Batch> batch;
  Work work;
};

// One ring slot: a span between its first read and its last write. Owns its staging frames for good.
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
  Task task;
  std::vector<Piece> pieces;  // master pages, exp_avg pages, exp_avg_sq pages, gradient pages, parameter page
  std::size_t first_exp_avg = 0, first_exp_avg_sq = 0, first_grad = 0, first_param = 0;
  std::size_t param_frame = 0;  // index into frames of the frame that receives the new parameters
  std::size_t transfers_left = 0;
  enum class Stage : std::uint8_t { kIdle, kReading, kReady, kWriting } stage = Stage::kIdle;
  std::exception_ptr error;
};

class Updater::Worker {
 public:
  Worker(Updater& updater, std::unique_ptr<io::Engine> engine)
      : updater_(updater), table_(updater.table_), engine_(std::move(engine)), flights_(updater.options_.ring_depth) {}

  ~Worker() {
    const bool quiet = active_ == 0;
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

  bool idle() const { return active_ == 0; }
  bool full() const { return active_ == flights_.size(); }
  void start(Task task);
  bool compute_one();  // false when nothing is ready
  void wait_for_io();
  // The device does not answer: tells those who wait for what is in flight.
  void give_up(const std::exception_ptr& error);

 private:
  void add_pieces(Flight& flight, const std::vector<PageId>& ids, bool written_back);
  void submit(Flight& flight, io::Op op);
  void check_pages(Flight& flight);
  void compute(Flight& flight);
  void publish(Flight& flight);
  void finish(Flight& flight);
  void fail(Flight& flight, std::exception_ptr error);

  Updater& updater_;
  PageTable& table_;
  std::unique_ptr<io::Engine> engine_;
  std::vector<Flight> flights_;
  std::size_t active_ = 0;
  Utilisation done_;     // since the last merge into the updater's totals
  io::Counters merged_;  // engine counters at that merge
};

}  // namespace angelptm::update
