#include "update/worker.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "kernels/compact.h"
#include "pages/deadline.h"
#include "pages/page_mover.h"
#include "timeline/recorder.h"

namespace angelptm::update {

using pages::Home;

namespace {

double seconds_since(io::Clock::time_point start) {
  return std::chrono::duration<double>(io::Clock::now() - start).count();
}
}  // namespace

Updater::Flight* Updater::Worker::idle_flight() {
  const auto found = std::find_if(flights_.begin(), flights_.end(),
                                  [](const Flight& flight) { return flight.stage == Flight::Stage::kIdle; });
  return found == flights_.end() ? nullptr : &*found;
}

bool Updater::Worker::has_tasks() const {
  return !adopted_.empty() || std::any_of(flights_.begin(), flights_.end(), [](const Flight& flight) {
    return flight.stage != Flight::Stage::kIdle && flight.task.batch;
  });
}

std::size_t Updater::Worker::ahead_count() const {
  return static_cast<std::size_t>(
      std::count_if(flights_.begin(), flights_.end(), [](const Flight& flight) { return flight.ahead(); }));
}

bool Updater::Worker::may_compute(const Flight& flight) const {
  if (flight.stage != Flight::Stage::kReady) return false;
  if (!updater_.sweep_) return flight.task.batch != nullptr;
  return flight.task.batch ? updater_.sweep_->may_publish(flight.span) : updater_.sweep_->may_take(flight.span);
}

Updater::Flight* Updater::Worker::soonest(Flight::Stage stage) {
  Flight* found = nullptr;
  for (Flight& flight : flights_)
    if (flight.stage == stage && flight.task.batch && (stage != Flight::Stage::kReady || may_compute(flight)) &&
        (found == nullptr ||
         std::pair(flight.task.batch->rank, flight.claim) < std::pair(found->task.batch->rank, found->claim)))
      found = &flight;
  return found;
}

bool Updater::Worker::has_something_to_do(Lock&) const {
  return waits_for_io() ||
         std::any_of(flights_.begin(), flights_.end(), [this](const Flight& flight) { return may_compute(flight); });
}

// Forgets what was read ahead and is expected no more.
bool Updater::Worker::drop_ahead(Lock&) {
  bool dropped = false;
  for (Flight& flight : flights_) {
    SpanState& state = updater_.states_[flight.span];
    if (!flight.ahead() || flight.stage != Flight::Stage::kReady || state.expected_in == updater_.epoch_) continue;
    if (updater_.sweep_ && updater_.sweep_->accumulators().waiting(flight.span) > 0) continue;
    flight.stage = Flight::Stage::kIdle;
    flight.error = nullptr;
    state.holder = kNobody;
    --updater_.ahead_count_;
    dropped = true;
  }
  if (dropped) updater_.recalled_.notify_all();
  return dropped;
}

// What the ring has room for: first the tasks of what it has read ahead, then queued spans, and where none is queued,
// expected ones, but for one slot: a span that nobody expected must never wait for one whose gradients do not come.
bool Updater::Worker::take_work(Lock& lock) {
  bool took = false;
  while (true) {
    if (!adopted_.empty()) {
      Task task = std::move(adopted_.back());
      adopted_.pop_back();
      const auto flight = std::find_if(flights_.begin(), flights_.end(),
                                       [&](const Flight& one) { return one.ahead() && one.span == task.work.span; });
      updater_.states_[task.work.span].holder = kNobody;
      if (--updater_.ahead_count_ == 0) updater_.recalled_.notify_all();
      ++done_.read_ahead;
      const std::exception_ptr failed = updater_.failed_;
      lock.unlock();
      if (failed && !flight->error) flight->error = failed;
      attach(*flight, std::move(task));
      lock.lock();
      took = true;
      continue;
    }
    drop_ahead(lock);
    Flight* flight = idle_flight();
    if (updater_.stopping_ || flight == nullptr) return took;
    auto& queue = updater_.queue_;
    while (!queue.empty() && queue.begin()->second.empty()) queue.erase(queue.begin());
    if (!queue.empty()) {
      Task task = std::move(queue.begin()->second.front());
      queue.begin()->second.pop_front();
      if (const std::exception_ptr failed = updater_.failed_) {
        lock.unlock();
        updater_.fail(task, failed);
        lock.lock();
        took = true;  // who learned of it may have stopped the updater meanwhile, and nobody tells a waiter again
        continue;
      }
      lock.unlock();
      start(task.work.span, *flight);
      attach(*flight, std::move(task));
      lock.lock();
      took = true;
      continue;
    }
    if (updater_.failed_ || !start_ahead(*flight, lock)) return took;
    took = true;
  }
}

// Begins to read the states of a span whose gradients wait in an accumulator, or are expected; the latter with all but
// one slot of the ring.
bool Updater::Worker::start_ahead(Flight& flight, Lock& lock) {
  const auto is_free = [this](std::uint32_t span) {
    return !updater_.states_[span].open && updater_.states_[span].holder == kNobody;
  };
  auto& expected = updater_.expected_;
  std::optional<std::uint32_t> span;
  if (updater_.sweep_) span = updater_.sweep_->next(is_free);
  if (!span && ahead_count() + 1 < flights_.size() && !(updater_.sweep_ && updater_.sweep_->replays()))
    if (const auto next = std::find_if(expected.begin(), expected.end(), is_free); next != expected.end()) span = *next;
  if (!span) return false;
  if (const auto found = std::find(expected.begin(), expected.end(), *span); found != expected.end())
    expected.erase(found);
  updater_.states_[*span].holder = index_;
  ++updater_.ahead_count_;
  lock.unlock();
  start(*span, flight);
  lock.lock();
  return true;
}

// As late as can be: all that has come by now is in this update. False where the computing thread has the accumulator,
// which is full again afterwards.
bool Updater::Worker::take_gradients(Flight& flight) {
  Taken taken;
  if (!updater_.sweep_->take(flight.span, flight.frames.data() + flight.taken_frame, taken)) return false;
  Task task{std::make_shared<Batch>(Batch{{}, std::move(taken.hypers), 0}),
            {flight.span, std::move(taken.segments)},
            taken.gradients};
  {
    std::lock_guard lock(updater_.mutex_);
    SpanState& state = updater_.states_[flight.span];
    state.open = true;
    state.holder = kNobody;
    if (updater_.failed_ && !flight.error) flight.error = updater_.failed_;
    if (--updater_.ahead_count_ == 0) updater_.recalled_.notify_all();
  }
  flight.task = std::move(task);
  for (std::size_t page = 0; page < updater_.spans_[flight.span].grad.size(); ++page) {
    const PageId id = updater_.spans_[flight.span].grad[page];
    flight.pieces.push_back({id, table_.host().address(flight.frames[flight.taken_frame + page]),
                             table_.info(id).used_bytes, false, false, std::nullopt});
  }
  add_param(flight);
  if (flight.error) fail(flight, flight.error);  // of its reads
  return !flight.error;
}

void Updater::Worker::add_pieces(Flight& flight, const std::vector<PageId>& ids, bool written_back) {
  for (const PageId page : ids) {
    const PageInfo info = table_.info(page);
    const bool staged = info.home == Home::kSsd;
    std::size_t next = 0;
    for (const auto& piece : flight.pieces) next += piece.staged;
    std::byte* address = staged ? table_.host().address(flight.frames.at(next)) : table_.address(info);
    flight.pieces.push_back({page, address, info.used_bytes, staged, staged && written_back, std::nullopt});
  }
}

// Begins with the states, which need no gradients.
void Updater::Worker::start(std::uint32_t span_index, Flight& flight) {
  flight.span = span_index;
  flight.claim = claims_++;
  flight.task = {};
  flight.error = nullptr;
  flight.lent = flight.published = false;
  flight.transfers_left = 0;
  flight.pieces.clear();
  const Span& span = updater_.spans_[span_index];
  add_pieces(flight, span.states, true);
  flight.first_grad = flight.pieces.size();
  flight.taken_frame = 0;
  for (const Flight::Piece& piece : flight.pieces) flight.taken_frame += piece.staged;
  read(flight, 0);
}

// The gradients have come: reads those that live on the SSD too.
void Updater::Worker::attach(Flight& flight, Task task) {
  flight.task = std::move(task);
  const Span& span = updater_.spans_[flight.span];
  add_pieces(flight, span.grad, false);
  add_param(flight);
  read(flight, flight.first_grad);
  if (flight.transfers_left == 0 && flight.error) fail(flight, flight.error);
}

void Updater::Worker::add_param(Flight& flight) {
  const Span& span = updater_.spans_[flight.span];
  flight.first_param = flight.pieces.size();
  flight.param_frame = flight.frames.empty() ? 0 : flight.frames.size() - 1;
  if (span.param == pages::kNoPage) return;
  const PageInfo info = table_.info(span.param);
  // The new content goes to a frame of our own in either case; publishing writes it out or exchanges the frames. Where
  // masters are made of the former parameters, those are read into it, and the new ones take their place.
  const bool on_ssd = info.home == Home::kSsd;
  flight.pieces.push_back({span.param, table_.host().address(flight.frames.at(flight.param_frame)), info.used_bytes,
                           on_ssd && span.has_split_masters(), on_ssd, std::nullopt});
}

std::uint64_t Updater::Worker::tag_of(const Flight& flight, std::size_t piece) const {
  return static_cast<std::uint64_t>(&flight - flights_.data()) << 32 | piece;
}

// Reads the staged pages from the `first` piece on.
void Updater::Worker::read(Flight& flight, std::size_t first) {
  std::vector<io::Transfer> transfers;
  for (std::size_t i = first; i < flight.pieces.size(); ++i) {
    Flight::Piece& piece = flight.pieces[i];
    if (!piece.staged) continue;
    const PageInfo info = table_.info(piece.page);
    piece.read_from = info;
    if (!info.written) {
      std::memset(piece.address, 0, piece.used_bytes);
      continue;
    }
    piece.unchecked = true;
    transfers.push_back({tag_of(flight, i), io::Op::kRead, static_cast<int>(info.slot.file),
                         table_.ssd().offset(info.slot), piece.address, pages::transfer_bytes(piece.used_bytes)});
  }
  submit(flight, transfers);
  flight.stage = flight.transfers_left > 0 ? Flight::Stage::kReading : Flight::Stage::kReady;
}

// Writes every page that goes back to a fresh slot.
void Updater::Worker::write(Flight& flight) {
  std::vector<io::Transfer> transfers;
  for (std::size_t i = 0; i < flight.pieces.size(); ++i) {
    Flight::Piece& piece = flight.pieces[i];
    if (!piece.written_back) continue;
    piece.slot = table_.reserve_slot();
    {
      const timeline::Scope scope(timeline::What::kCheck, flight.span, piece.used_bytes);
      piece.crc = pages::seal(piece.address, piece.used_bytes);
    }
    transfers.push_back({tag_of(flight, i), io::Op::kWrite, static_cast<int>(piece.slot->file),
                         table_.ssd().offset(*piece.slot), piece.address, pages::transfer_bytes(piece.used_bytes)});
  }
  flight.stage = Flight::Stage::kWriting;
  ++writing_;
  submit(flight, transfers);
  if (transfers.empty()) publish(flight);
}

void Updater::Worker::submit(Flight& flight, const std::vector<io::Transfer>& transfers) {
  if (transfers.empty()) return;
  if (flight.transfers_left == 0) {
    flight.submitted = timeline::begin();
    flight.submitted_bytes = 0;
  }
  for (const io::Transfer& transfer : transfers) flight.submitted_bytes += transfer.bytes;
  flight.transfers_left += transfers.size();
  try {
    engine_->submit(transfers);
  } catch (const io::IoError&) {
    // The engine holds the transfers all the same: the flight fails when the last of them comes back.
    flight.error = std::current_exception();
  }
}

// The new parameters are there before their states wait for their turn to be written.
bool Updater::Worker::compute_one() {
  Flight* flight = soonest(Flight::Stage::kReady);
  if (flight == nullptr && updater_.sweep_) {
    // The one that has waited longest: where this thread gets little of a core, reads are faster than it, and a span
    // that is passed by whenever another is ready too would wait for good.
    for (Flight& one : flights_)
      if (may_compute(one) && (flight == nullptr || one.claim < flight->claim)) flight = &one;
    if (flight == nullptr || !take_gradients(*flight)) return false;
    if (!may_compute(*flight)) return true;  // in a replay: the computing thread uses the former parameters first
  }
  if (flight == nullptr) return false;
  try {
    check_pages(*flight);
    compute(*flight);
    publish_param(*flight);
    flight->stage = Flight::Stage::kComputed;
  } catch (...) {
    fail(*flight, std::current_exception());
  }
  return true;
}

void Updater::Worker::write_computed() {
  while (writing_ < updater_.options_.write_depth) {
    Flight* flight = soonest(Flight::Stage::kComputed);
    if (flight == nullptr) return;
    try {
      write(*flight);
    } catch (...) {
      fail(*flight, std::current_exception());
    }
  }
}

// Here and not when the reads arrive: the kernel finds in the cache what was just checked.
void Updater::Worker::check_pages(Flight& flight) {
  for (Flight::Piece& piece : flight.pieces) {
    const PageInfo now = table_.info(piece.page);
    const auto index = static_cast<std::size_t>(&piece - flight.pieces.data());
    // Parameters are made in a frame of our own, and gradients out of an accumulator lie in some.
    const bool own = index >= (updater_.sweep_ ? flight.first_grad : flight.first_param);
    const bool moved = !piece.staged && !own && table_.address(now) != piece.address;
    if (moved || (piece.staged && !same_content(piece.read_from, now)))
      throw std::logic_error("a page was written to while the updater had read it ahead: recall comes first");
    if (!piece.unchecked) continue;
    const timeline::Scope scope(timeline::What::kCheck, flight.span, piece.used_bytes);
    pages::check(table_, piece.page, piece.read_from, piece.address);
    piece.unchecked = false;
  }
}

void Updater::Worker::compute(Flight& flight) {
  const auto start = io::Clock::now();
  const timeline::Scope scope(timeline::What::kUpdate, flight.span);
  const Span& span = updater_.spans_[flight.task.work.span];
  std::uint64_t next = 0;  // first element that is neither updated nor published again yet
  auto run = span.runs.begin();
  const auto go_on_until = [&](std::uint64_t end, const kernels::Hyper* hyper) {
    while (next < end) {
      while (run->start + run->count <= next) ++run;
      const std::uint64_t count = std::min(end, run->start + run->count) - next;
      compute_run(flight, *run, hyper, next, count);
      next += count;
    }
  };
  for (const Segment& segment : flight.task.work.segments) {
    go_on_until(segment.start, nullptr);
    go_on_until(segment.start + segment.count, &flight.task.batch->hypers.at(segment.hyper));
  }
  go_on_until(span.elements, nullptr);
  done_.compute_seconds += seconds_since(start);
  done_.published_bytes += span.elements * itemsize(updater_.options_.param_dtype);
}

// Elements [start, start + count) of a span, which lie in `run`. Those that nothing updates (no `hyper`) keep their
// master, and so their parameter is that master, rounded again.
void Updater::Worker::compute_run(const Flight& flight, const StateRun& run, const kernels::Hyper* hyper,
                                  std::uint64_t start, std::uint64_t count) {
  const UpdaterOptions& options = updater_.options_;
  const Span& span = updater_.spans_[flight.span];
  const std::uint64_t offset = start - run.start;  // in the run
  const auto at = [&](const StatePlace& place, std::uint64_t item_bytes) {
    return flight.pieces[place.page].address + place.offset + offset * item_bytes;
  };
  const auto moment = [&](const StatePlace& place, kernels::MomentFormat format, bool kept) {
    if (!kept) return kernels::MomentCodes{};
    kernels::MomentCodes codes{format, at(place, kernels::itemsize(format)), nullptr};
    if (format == kernels::MomentFormat::kInt8)
      codes.scales =
          reinterpret_cast<float*>(flight.pieces[place.page].address + place.scales) + offset / kernels::kBlock8;
    return codes;
  };
  const bool split = run.master_format == kernels::MasterFormat::kSplit;
  const std::uint64_t param_itemsize = itemsize(options.param_dtype);
  std::byte* params = span.device_param;
  const std::byte* old_params = params;
  if (params == nullptr) {
    const Flight::Piece& piece = flight.pieces[flight.first_param];
    params = piece.address;
    old_params = piece.staged ? params : table_.address(table_.info(piece.page));
  }
  std::byte* param = params + start * param_itemsize;
  const std::byte* old_param = old_params + start * param_itemsize;
  void* master = at(run.master, kernels::itemsize(run.master_format));

  if (hyper == nullptr) {
    if (split || options.param_dtype == DType::kF32) {
      const void* from = split ? static_cast<const void*>(old_param) : master;
      if (from != param) std::memcpy(param, from, count * param_itemsize);
    } else {
      kernels::split_master(static_cast<const float*>(master), reinterpret_cast<std::uint16_t*>(param), nullptr, count);
    }
    return;
  }

  const int moments = kernels::moment_count(options.rule);
  const kernels::MomentCodes exp_avg = moment(run.exp_avg, run.exp_avg_format, moments >= 1);
  const kernels::MomentCodes exp_avg_sq = moment(run.exp_avg_sq, run.exp_avg_sq_format, moments >= 2);
  const bool has_blocks =
      exp_avg.format == kernels::MomentFormat::kInt8 || exp_avg_sq.format == kernels::MomentFormat::kInt8;
  if (has_blocks && offset % kernels::kBlock8 != 0)
    throw std::logic_error("an update of int8 moments begins inside a block of them");
  constexpr auto kF32 = kernels::MomentFormat::kF32;
  const bool plain = !split && exp_avg.format == kF32 && exp_avg_sq.format == kF32;
  for (std::uint64_t done = 0; done < count;) {
    const std::uint64_t element = start + done;
    const std::uint64_t in_page = element % options.grad_page_elements;
    const std::uint64_t part = std::min(count - done, options.grad_page_elements - in_page);
    const std::byte* grad = flight.pieces[flight.first_grad + element / options.grad_page_elements].address +
                            in_page * itemsize(options.grad_dtype);
    const auto from_there = [&](const kernels::MomentCodes& codes) {
      if (codes.values == nullptr) return codes;
      return kernels::MomentCodes{codes.format,
                                  static_cast<std::byte*>(codes.values) + done * kernels::itemsize(codes.format),
                                  codes.scales == nullptr ? nullptr : codes.scales + done / kernels::kBlock8};
    };
    void* part_master = static_cast<std::byte*>(master) + done * kernels::itemsize(run.master_format);
    const kernels::MomentCodes first = from_there(exp_avg), second = from_there(exp_avg_sq);
    std::byte* part_param = param + done * param_itemsize;
    if (plain) {
      kernels::step(*hyper, {.master = static_cast<float*>(part_master),
                             .exp_avg = static_cast<float*>(first.values),
                             .exp_avg_sq = static_cast<float*>(second.values),
                             .grad = grad,
                             .param = part_param,
                             .count = part,
                             .grad_dtype = options.grad_dtype,
                             .param_dtype = options.param_dtype});
    } else {
      const std::uint64_t in_unit = span.first_element + element;
      const std::uint64_t unit = span.unit + (in_unit >> 32 << 32);
      kernels::step(*hyper, {.master_format = run.master_format,
                             .master = part_master,
                             .exp_avg = first,
                             .exp_avg_sq = second,
                             .grad = grad,
                             .old_param = reinterpret_cast<const std::uint16_t*>(old_param + done * param_itemsize),
                             .param = part_param,
                             .count = part,
                             .grad_dtype = options.grad_dtype,
                             .param_dtype = options.param_dtype,
                             .rounding = {kernels::rounding_key(hyper->seed, hyper->step, unit),
                                          static_cast<std::uint32_t>(in_unit)}});
    }
    done += part;
  }
}

// The new parameters can be read from here on: on the device, or by way of the fetcher. The page table shows them when
// the states are written too, so that an error leaves both as they were.
void Updater::Worker::publish_param(Flight& flight) {
  if (updater_.sweep_) {
    updater_.sweep_->publish(flight.span, flight.frames[flight.param_frame], flight.task.gradients);
    flight.published = true;
    return;
  }
  if (flight.first_param < flight.pieces.size()) {
    if (updater_.fetcher_ == nullptr) return;  // told at the end
    const Flight::Piece& piece = flight.pieces[flight.first_param];
    updater_.fetcher_->lend(piece.page, table_.info(piece.page).expected, piece.address);
    flight.lent = true;
  }
  flight.published = true;
  flight.task.batch->tickets.published->finish_part();
}

// Everything is written: makes it current.
void Updater::Worker::publish(Flight& flight) {
  for (std::size_t i = 0; i < flight.pieces.size(); ++i) {
    Flight::Piece& piece = flight.pieces[i];
    if (updater_.sweep_ && i >= flight.first_grad) break;  // published before, and frames of our own
    if (i == flight.first_param && !piece.written_back) {
      Frame& own = flight.frames[flight.param_frame];
      own = table_.publish_frame(piece.page, own);
    } else if (i >= flight.first_grad && i < flight.first_param) {
      table_.discard(piece.page);
    } else if (piece.written_back) {
      table_.publish_slot(piece.page, *piece.slot, piece.crc);
      piece.slot.reset();
    } else {
      table_.publish_in_place(piece.page);
    }
  }
  finish(flight);
}

void Updater::Worker::finish(Flight& flight) {
  if (!flight.error) ++done_.spans;
  if (flight.stage == Flight::Stage::kWriting) --writing_;
  if (flight.lent) {
    const Flight::Piece& param = flight.pieces[flight.first_param];
    Frame& own = flight.frames[flight.param_frame];
    own = updater_.fetcher_->take_back(param.page, own, param.written_back && !flight.error, flight.task.batch->rank);
  }
  {
    std::lock_guard lock(updater_.mutex_);
    Utilisation& totals = updater_.totals_;
    const io::Counters& now = engine_->counters();
    totals.compute_seconds += done_.compute_seconds;
    totals.wait_seconds += done_.wait_seconds;
    totals.spans += done_.spans;
    totals.published_bytes += done_.published_bytes;
    totals.read_ahead += done_.read_ahead;
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
    updater_.states_[flight.span].open = false;
  }
  const Tickets tickets = flight.task.batch->tickets;
  const std::uint32_t gradients = flight.task.gradients;
  flight.task = {};
  flight.stage = Flight::Stage::kIdle;
  if (updater_.sweep_) {
    if (flight.error)
      updater_.sweep_->fail(flight.error);
    else
      updater_.sweep_->applied(flight.span, gradients);
  } else {
    if (!flight.published) tickets.published->finish_part(flight.error);
    tickets.done->finish_part(flight.error);
  }
  updater_.arrived_.notify_all();  // the span may be read ahead again
}

// The span's SSD pages keep their former content in the table: what was reserved for the new one is given back. Its
// host states are updated in place, and so may be one step ahead; nothing more is updated after an error.
void Updater::Worker::fail(Flight& flight, const std::exception_ptr& error) {
  flight.error = error;
  for (Flight::Piece& piece : flight.pieces) {
    if (piece.slot) table_.cancel_slot(*piece.slot);
    piece.slot.reset();
  }
  flight.task.set_error(error, flight.published);
  if (!updater_.sweep_) updater_.give_up_publish(flight.span);
  finish(flight);
}

void Updater::Worker::wait_for_io() {
  if (engine_->unfinished() == 0) return;
  const auto start = io::Clock::now();
  std::vector<io::Outcome> outcomes;
  // A ready span means there is something better to do than wait.
  const bool compute_next =
      std::any_of(flights_.begin(), flights_.end(), [this](const Flight& flight) { return may_compute(flight); });
  std::exception_ptr stuck;
  const auto waiting = compute_next ? timeline::Clock::time_point{} : timeline::begin();
  try {
    engine_->reap(outcomes, compute_next ? 0 : 1, deadline_after(updater_.options_.deadline_seconds));
  } catch (const io::IoError&) {
    stuck = std::current_exception();
  }
  timeline::end(timeline::What::kWaitIo, waiting, 0, 0);
  done_.wait_seconds += seconds_since(start);
  for (const io::Outcome& outcome : outcomes) {
    Flight& flight = flights_[outcome.tag >> 32];
    if (outcome.error && !flight.error) flight.error = std::make_exception_ptr(*outcome.error);
    if (--flight.transfers_left > 0) continue;
    timeline::end(flight.stage == Flight::Stage::kWriting ? timeline::What::kWrite : timeline::What::kRead,
                  flight.submitted, flight.span, flight.submitted_bytes);
    if (flight.stage == Flight::Stage::kReading) flight.stage = Flight::Stage::kReady;
    if (flight.ahead()) continue;  // an error stays with it for the task that comes
    if (flight.error) {
      fail(flight, flight.error);
    } else if (flight.stage == Flight::Stage::kWriting) {
      publish(flight);
    }
  }
  if (stuck) std::rethrow_exception(stuck);
}

void Updater::Worker::give_up(const std::exception_ptr& error) {
  if (updater_.sweep_) {
    updater_.sweep_->fail(error);
    return;
  }
  for (const Task& task : adopted_) updater_.fail(task, error);
  adopted_.clear();
  for (const Flight& flight : flights_)
    if (flight.stage != Flight::Stage::kIdle && flight.task.batch) {
      flight.task.set_error(error, flight.published);
      updater_.give_up_publish(flight.span);
      if (!flight.published) flight.task.batch->tickets.published->finish_part();
      flight.task.batch->tickets.done->finish_part();
    }
}

}  // namespace angelptm::update
