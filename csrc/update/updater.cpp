#include "update/updater.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "pages/deadline.h"
#include "pages/page_mover.h"

namespace angelptm::update {

using pages::Frame;
using pages::Home;
using pages::PageInfo;
using pages::PageTable;
using pages::Slot;

namespace {

double seconds_since(io::Clock::time_point start) {
  return std::chrono::duration<double>(io::Clock::now() - start).count();
}

// Content of the pages `ids` of one kind for `elements` elements, or an error that names the kind.
void expect_pages(const PageTable& table, const char* kind, const std::vector<PageId>& ids, std::uint64_t elements,
                  std::uint64_t item_bytes) {
  const std::uint64_t page_bytes = table.host().page_bytes();
  const std::uint64_t bytes = elements * item_bytes;
  if (ids.size() != (bytes + page_bytes - 1) / page_bytes)
    throw std::invalid_argument("a span of " + std::to_string(elements) + " elements cannot have " +
                                std::to_string(ids.size()) + " " + kind + " pages");
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (table.info(ids[i]).used_bytes < std::min(page_bytes, bytes - i * page_bytes))
      throw std::invalid_argument(std::string("a ") + kind + " page is too short for its span");
}

// Workers index pages by element without looking back, so what does not fit is refused here.
void expect_valid(const PageTable& table, const Span& span, const UpdaterOptions& options) {
  const std::uint64_t page_bytes = table.host().page_bytes();
  if (span.elements == 0 || span.elements > page_bytes / itemsize(options.param_dtype))
    throw std::invalid_argument("a span has from 1 element to a PARAM page of them, not " +
                                std::to_string(span.elements));
  const int moments = kernels::moment_count(options.rule);
  expect_pages(table, "MASTER", span.master, span.elements, sizeof(float));
  expect_pages(table, "EXP_AVG", span.exp_avg, moments >= 1 ? span.elements : 0, sizeof(float));
  expect_pages(table, "EXP_AVG_SQ", span.exp_avg_sq, moments >= 2 ? span.elements : 0, sizeof(float));
  expect_pages(table, "GRAD", span.grad, span.elements, itemsize(options.grad_dtype));
  if ((span.param != pages::kNoPage) == (span.device_param != nullptr))
    throw std::invalid_argument("a span's parameters are on one page or at one device address");
  if (span.param != pages::kNoPage)
    expect_pages(table, "PARAM", {span.param}, span.elements, itemsize(options.param_dtype));
}

void expect_valid(const Work& work, const std::vector<Span>& spans, const std::vector<kernels::Hyper>& hypers) {
  if (work.span >= spans.size()) throw std::invalid_argument("no span " + std::to_string(work.span));
  const std::uint64_t elements = spans[work.span].elements;
  std::uint64_t next = 0;
  for (const Segment& segment : work.segments) {
    if (segment.start < next || segment.start > elements || segment.count > elements - segment.start)
      throw std::invalid_argument("segments ascend, do not overlap, and end within their span of " +
                                  std::to_string(elements) + " elements");
    if (segment.hyper >= hypers.size())
      throw std::invalid_argument("no hyperparameters " + std::to_string(segment.hyper));
    next = segment.start + segment.count;
  }
}

// Elements that no segment updates keep their master, and so their parameter is that master, rounded again.
void republish(const float* master, void* param, DType dtype, std::uint64_t start, std::uint64_t count) {
  if (dtype == DType::kF32) {
    std::memcpy(static_cast<float*>(param) + start, master, count * sizeof(float));
    return;
  }
  auto* out = static_cast<std::uint16_t*>(param) + start;
  for (std::uint64_t i = 0; i < count; ++i) out[i] = f32_to_bf16(master[i]);
}

}  // namespace

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
  void give_up(
      const std::exception_ptr& error);  // the device does not answer: tells those who wait for what is in flight

 private:
  void add_pieces(Flight& flight, const std::vector<PageId>& ids, bool written_back);
  void submit(Flight& flight, io::Op op);
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

void Updater::Worker::add_pieces(Flight& flight, const std::vector<PageId>& ids, bool written_back) {
  for (const PageId page : ids) {
    const PageInfo info = table_.info(page);
    const bool staged = info.home == Home::kSsd;
    std::size_t next = 0;
    for (const auto& piece : flight.pieces) next += piece.staged;
    std::byte* address = table_.host().address(staged ? flight.frames.at(next) : info.frame);
    flight.pieces.push_back({page, address, info.used_bytes, staged, staged && written_back, std::nullopt});
  }
}

void Updater::Worker::start(Task task) {
  const auto found = std::find_if(flights_.begin(), flights_.end(),
                                  [](const Flight& flight) { return flight.stage == Flight::Stage::kIdle; });
  Flight& flight = *found;
  ++active_;
  flight.task = std::move(task);
  flight.error = nullptr;
  flight.pieces.clear();
  const Span& span = updater_.spans_[flight.task.work.span];
  try {
    add_pieces(flight, span.master, true);
    flight.first_exp_avg = flight.pieces.size();
    add_pieces(flight, span.exp_avg, true);
    flight.first_exp_avg_sq = flight.pieces.size();
    add_pieces(flight, span.exp_avg_sq, true);
    flight.first_grad = flight.pieces.size();
    add_pieces(flight, span.grad, false);
    flight.first_param = flight.pieces.size();
    flight.param_frame = flight.frames.empty() ? 0 : flight.frames.size() - 1;
    if (span.param != pages::kNoPage) {
      const PageInfo info = table_.info(span.param);
      // The new content goes to a frame of our own in either case; publishing writes it out or exchanges the frames.
      flight.pieces.push_back({span.param, table_.host().address(flight.frames.at(flight.param_frame)), info.used_bytes,
                               false, info.home == Home::kSsd, std::nullopt});
    }
    submit(flight, io::Op::kRead);
  } catch (...) {
    fail(flight, std::current_exception());
  }
}

// Reads every staged page that has content, or writes every page that goes back to a fresh slot.
void Updater::Worker::submit(Flight& flight, io::Op op) {
  std::vector<io::Transfer> transfers;
  const auto flight_index = static_cast<std::uint64_t>(&flight - flights_.data());
  for (std::size_t i = 0; i < flight.pieces.size(); ++i) {
    Flight::Piece& piece = flight.pieces[i];
    if (op == io::Op::kRead ? !piece.staged : !piece.written_back) continue;
    Slot slot;
    if (op == io::Op::kRead) {
      const PageInfo info = table_.info(piece.page);
      if (!info.written) {
        std::memset(piece.address, 0, piece.used_bytes);
        continue;
      }
      slot = info.slot;
    } else {
      slot = table_.reserve_slot();
      piece.slot = slot;
    }
    transfers.push_back({flight_index << 32 | i, op, static_cast<int>(slot.file), table_.ssd().offset(slot),
                         piece.address, pages::transfer_bytes(piece.used_bytes)});
  }
  flight.transfers_left = transfers.size();
  flight.stage = op == io::Op::kRead ? Flight::Stage::kReading : Flight::Stage::kWriting;
  if (!transfers.empty()) {
    try {
      engine_->submit(transfers);
    } catch (const io::IoError&) {
      // The engine holds the transfers all the same: the flight fails when the last of them comes back.
      flight.error = std::current_exception();
    }
  } else if (op == io::Op::kRead) {
    flight.stage = Flight::Stage::kReady;
  } else {
    publish(flight);
  }
}

bool Updater::Worker::compute_one() {
  for (Flight& flight : flights_) {
    if (flight.stage != Flight::Stage::kReady) continue;
    try {
      compute(flight);
      submit(flight, io::Op::kWrite);
    } catch (...) {
      fail(flight, std::current_exception());
    }
    return true;
  }
  return false;
}

void Updater::Worker::compute(Flight& flight) {
  const auto start = io::Clock::now();
  const UpdaterOptions& options = updater_.options_;
  const Span& span = updater_.spans_[flight.task.work.span];
  const std::uint64_t page_bytes = table_.host().page_bytes();
  const std::uint64_t per_state_page = page_bytes / sizeof(float);
  const std::uint64_t per_grad_page = page_bytes / itemsize(options.grad_dtype);
  std::byte* param = span.device_param != nullptr ? span.device_param : flight.pieces[flight.first_param].address;
  const auto state = [&](std::size_t first, std::uint64_t element) {
    return reinterpret_cast<float*>(flight.pieces[first + element / per_state_page].address) + element % per_state_page;
  };

  std::uint64_t next = 0;  // first element that is neither updated nor republished yet
  const auto republish_until = [&](std::uint64_t end) {
    while (next < end) {
      const std::uint64_t count = std::min(end - next, per_state_page - next % per_state_page);
      republish(state(0, next), param, options.param_dtype, next, count);
      next += count;
    }
  };
  for (const Segment& segment : flight.task.work.segments) {
    republish_until(segment.start);
    const std::uint64_t end = segment.start + segment.count;
    while (next < end) {
      const std::uint64_t in_state_page = per_state_page - next % per_state_page;
      const std::uint64_t in_grad_page = per_grad_page - next % per_grad_page;
      const std::uint64_t count = std::min({end - next, in_state_page, in_grad_page});
      const std::byte* grad = flight.pieces[flight.first_grad + next / per_grad_page].address +
                              next % per_grad_page * itemsize(options.grad_dtype);
      kernels::step(flight.task.batch->hypers.at(segment.hyper),
                    {.master = state(0, next),
                     .exp_avg = span.exp_avg.empty() ? nullptr : state(flight.first_exp_avg, next),
                     .exp_avg_sq = span.exp_avg_sq.empty() ? nullptr : state(flight.first_exp_avg_sq, next),
                     .grad = grad,
                     .param = param + next * itemsize(options.param_dtype),
                     .count = count,
                     .grad_dtype = options.grad_dtype,
                     .param_dtype = options.param_dtype});
      next += count;
    }
  }
  republish_until(span.elements);
  done_.compute_seconds += seconds_since(start);
  done_.published_bytes += span.elements * itemsize(options.param_dtype);
}

// All content is where it belongs: make it current.
void Updater::Worker::publish(Flight& flight) {
  for (std::size_t i = 0; i < flight.pieces.size(); ++i) {
    Flight::Piece& piece = flight.pieces[i];
    if (i == flight.first_param && !piece.written_back) {
      Frame& own = flight.frames[flight.param_frame];
      own = table_.publish_frame(piece.page, own);
    } else if (i >= flight.first_grad && i < flight.first_param) {
      table_.discard(piece.page);
    } else if (piece.written_back) {
      table_.publish_slot(piece.page, *piece.slot);
      piece.slot.reset();
    } else {
      table_.publish_in_place(piece.page);
    }
  }
  finish(flight);
}

void Updater::Worker::finish(Flight& flight) {
  if (!flight.error) ++done_.spans;
  {
    std::lock_guard lock(updater_.mutex_);
    Utilisation& totals = updater_.totals_;
    const io::Counters& now = engine_->counters();
    totals.compute_seconds += done_.compute_seconds;
    totals.wait_seconds += done_.wait_seconds;
    totals.spans += done_.spans;
    totals.published_bytes += done_.published_bytes;
    totals.io.read_bytes += now.read_bytes - merged_.read_bytes;
    totals.io.written_bytes += now.written_bytes - merged_.written_bytes;
    totals.io.read_count += now.read_count - merged_.read_count;
    totals.io.write_count += now.write_count - merged_.write_count;
    totals.io.resumed_count += now.resumed_count - merged_.resumed_count;
    totals.io.retried_count += now.retried_count - merged_.retried_count;
    totals.io.failed_count += now.failed_count - merged_.failed_count;
    merged_ = now;
    done_ = {};
    if (flight.error && !updater_.failed_) updater_.failed_ = flight.error;
    updater_.open_[flight.task.work.span] = false;
  }
  const auto ticket = flight.task.batch->ticket;
  flight.task = {};
  flight.stage = Flight::Stage::kIdle;
  --active_;
  ticket->finish_part(flight.error);
}

// The span's SSD pages keep their former content in the table: what was reserved for the new one is given back. Its
// host states are updated in place, and so may be one step ahead; nothing more is updated after an error.
void Updater::Worker::fail(Flight& flight, std::exception_ptr error) {
  flight.error = error;
  for (Flight::Piece& piece : flight.pieces) {
    if (piece.slot) table_.cancel_slot(*piece.slot);
    piece.slot.reset();
  }
  finish(flight);
}

void Updater::Worker::wait_for_io() {
  const auto start = io::Clock::now();
  std::vector<io::Outcome> outcomes;
  // A ready span means there is something better to do than wait.
  const bool compute_next = std::any_of(flights_.begin(), flights_.end(),
                                        [](const Flight& flight) { return flight.stage == Flight::Stage::kReady; });
  std::exception_ptr stuck;
  try {
    engine_->reap(outcomes, compute_next ? 0 : 1, deadline_after(updater_.options_.deadline_seconds));
  } catch (const io::IoError&) {
    stuck = std::current_exception();
  }
  done_.wait_seconds += seconds_since(start);
  for (const io::Outcome& outcome : outcomes) {
    Flight& flight = flights_[outcome.tag >> 32];
    if (outcome.error && !flight.error) flight.error = std::make_exception_ptr(*outcome.error);
    if (--flight.transfers_left > 0) continue;
    if (flight.error) {
      fail(flight, flight.error);
    } else if (flight.stage == Flight::Stage::kReading) {
      flight.stage = Flight::Stage::kReady;
    } else {
      publish(flight);
    }
  }
  if (stuck) std::rethrow_exception(stuck);
}

void Updater::Worker::give_up(const std::exception_ptr& error) {
  for (const Flight& flight : flights_)
    if (flight.stage != Flight::Stage::kIdle) flight.task.batch->ticket->finish_part(error);
}

Updater::Updater(PageTable& table, std::vector<std::unique_ptr<io::Engine>> engines, std::vector<Span> spans,
                 const UpdaterOptions& options)
    : table_(table), spans_(std::move(spans)), options_(options), open_(spans_.size(), false) {
  if (engines.empty() || options_.ring_depth == 0 || options_.ring_depth > kMostRingDepth)
    throw std::invalid_argument("an updater has 1 thread or more, and a ring of 1 to " +
                                std::to_string(kMostRingDepth) + " spans for each");
  for (const Span& span : spans_) expect_valid(table, span, options_);
  const std::size_t frames = frames_per_slot(table, spans_);
  for (auto& engine : engines) {
    workers_.push_back(std::make_unique<Worker>(*this, std::move(engine)));
    workers_.back()->take_frames(frames);
  }
  try {
    for (auto& worker : workers_) threads_.emplace_back([this, &worker] { run(*worker); });
  } catch (...) {
    stop();  // a thread that is destroyed while it runs would end the process
    throw;
  }
}

void Updater::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  arrived_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

Updater::~Updater() {
  stop();
  // What was queued and never started must not leave its waiters behind.
  for (Task& task : queue_)
    task.batch->ticket->finish_part(std::make_exception_ptr(std::runtime_error("the updater was closed")));
}

std::size_t Updater::frames_per_slot(const PageTable& table, const std::vector<Span>& spans) {
  std::size_t most = 0;
  for (const Span& span : spans) {
    std::size_t frames = span.param != pages::kNoPage ? 1 : 0;
    for (const auto* ids : {&span.master, &span.exp_avg, &span.exp_avg_sq, &span.grad})
      for (const PageId page : *ids) frames += table.info(page).home == Home::kSsd;
    most = std::max(most, frames);
  }
  return most;
}

std::shared_ptr<Ticket> Updater::submit(std::string what, std::vector<Work> work, std::vector<kernels::Hyper> hypers) {
  for (const Work& item : work) expect_valid(item, spans_, hypers);
  for (const kernels::Hyper& hyper : hypers)
    if (hyper.rule != options_.rule) throw std::invalid_argument("hyperparameters of another rule than the updater's");
  auto ticket = std::make_shared<Ticket>(std::move(what), work.size());
  auto batch = std::make_shared<Batch>(Batch{ticket, std::move(hypers)});
  {
    std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < work.size(); ++i) {
      if (open_[work[i].span]) {
        for (std::size_t k = 0; k < i; ++k) open_[work[k].span] = false;
        throw std::logic_error("span " + std::to_string(work[i].span) + " is submitted before its last update is done");
      }
      open_[work[i].span] = true;
    }
    for (Work& item : work) queue_.push_back({batch, std::move(item)});
  }
  arrived_.notify_all();
  return ticket;
}

Utilisation Updater::utilisation() const {
  std::lock_guard lock(mutex_);
  return totals_;
}

bool Updater::pop(Task& task, bool wait) {
  std::unique_lock lock(mutex_);
  while (true) {
    if (wait) arrived_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (stopping_ || queue_.empty()) return false;
    task = std::move(queue_.front());
    queue_.pop_front();
    if (!failed_) return true;
    open_[task.work.span] = false;
    const std::exception_ptr error = failed_;
    const auto ticket = task.batch->ticket;
    lock.unlock();
    ticket->finish_part(error);
    lock.lock();
  }
}

void Updater::run(Worker& worker) {
  Task task;
  while (true) {
    while (!worker.full() && pop(task, worker.idle())) worker.start(std::move(task));
    if (worker.idle()) {
      std::lock_guard lock(mutex_);
      if (stopping_) return;
      continue;
    }
    try {
      worker.wait_for_io();
    } catch (...) {
      // The device does not answer. The waiters learn it from their own deadlines, which name the unit; the frames stay
      // with the kernel, so this thread may neither reuse nor release them.
      std::lock_guard lock(mutex_);
      if (!failed_) failed_ = std::current_exception();
      if (stopping_) {
        worker.give_up(failed_);
        return;
      }
    }
    worker.compute_one();
  }
}

}  // namespace angelptm::update
