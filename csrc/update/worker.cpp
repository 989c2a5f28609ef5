#include "update/worker.h"

#include <algorithm>
#include <cstring>

#include "pages/deadline.h"
#include "pages/page_mover.h"

namespace angelptm::update {

using pages::Home;

namespace {

double seconds_since(io::Clock::time_point start) {
  return std::chrono::duration<double>(io::Clock::now() - start).count();
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
      piece.unchecked = true;
      piece.read_from = info;
    } else {
      slot = table_.reserve_slot();
      piece.slot = slot;
      piece.crc = pages::seal(piece.address, piece.used_bytes);
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
      check_pages(flight);
      compute(flight);
      submit(flight, io::Op::kWrite);
    } catch (...) {
      fail(flight, std::current_exception());
    }
    return true;
  }
  return false;
}

// Here and not when the reads arrive: the kernel finds in the cache what was just checked.
void Updater::Worker::check_pages(Flight& flight) {
  for (Flight::Piece& piece : flight.pieces) {
    if (!piece.unchecked) continue;
    pages::check(table_, piece.page, piece.read_from, piece.address);
    piece.unchecked = false;
  }
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

}  // namespace angelptm::update
