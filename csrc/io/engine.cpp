#include "io/engine.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <thread>
#include <utility>

namespace angelptm::io {

namespace {

constexpr std::uint64_t kMostBytesOfAttempt = std::uint64_t{1} << 30;
constexpr std::size_t kMostDepth = 4096;
// Attempts in a row that moved nothing before the transfer fails with the last error. With the pauses below they
// spread over about a quarter of a second.
constexpr int kMostRetries = 16;

// None at first, since a signal or a full queue has usually passed by then; after that 0.1 ms doubling up to 25.6 ms.
Clock::duration pause_before(int retry) {
  if (retry <= 1) return Clock::duration::zero();
  return std::chrono::microseconds(100) * (1 << std::min(retry - 2, 8));
}

// Not EIO, least of all of a sync: the kernel reports a failed write-back once and marks the pages clean, so a second
// fdatasync would succeed although the bytes never reached the disk.
// ECANCELED is among them because the kernel answers it when the thread that submitted has ended meanwhile.
bool passes(int error) { return error == EINTR || error == EAGAIN || error == ECANCELED; }

}  // namespace

// A transfer's way: waiting -> active (ready -> in flight -> ready ... ) -> finished -> reaped.
struct Engine::State {
  struct Active {
    Transfer transfer;
    std::uint64_t sequence = 0;  // order of submission
    std::uint64_t done = 0;      // bytes transferred, always a multiple of the offset alignment
    int retries = 0;             // attempts in a row that moved nothing
    bool used = false;
    bool in_flight = false;
    Clock::time_point not_before;  // of the next attempt
  };

  explicit State(std::size_t depth) : active(depth) {
    batch.reserve(depth);
    answers.reserve(depth);
    free_slots.reserve(depth);
    for (std::size_t slot = depth; slot-- > 0;) free_slots.push_back(slot);
  }

  std::vector<Transfer> waiting;  // [waiting_head, end) in order; the part before is spent
  std::size_t waiting_head = 0;
  std::vector<Active> active;  // by slot; an attempt's id is its slot
  std::vector<std::size_t> free_slots;
  std::vector<Outcome> finished;
  std::vector<Attempt> batch;
  std::vector<Answer> answers;
  std::size_t in_flight = 0;
  std::uint64_t next_sequence = 0;
  Clock::time_point queue_full_until;  // after the queue took nothing though nothing was in flight

  std::size_t waiting_count() const { return waiting.size() - waiting_head; }
  std::size_t active_count() const { return active.size() - free_slots.size(); }

  // Gives waiting transfers the free slots.
  void activate() {
    while (!free_slots.empty() && waiting_count() > 0) {
      Active& slot = active[free_slots.back()];
      free_slots.pop_back();
      slot = Active{.transfer = waiting[waiting_head++], .sequence = next_sequence++, .used = true, .not_before = {}};
    }
    if (waiting_head == waiting.size()) {
      waiting.clear();  // keeps its memory
      waiting_head = 0;
    } else if (waiting_head >= 1024 && waiting_head * 2 >= waiting.size()) {
      waiting.erase(waiting.begin(), waiting.begin() + static_cast<std::ptrdiff_t>(waiting_head));
      waiting_head = 0;
    }
  }

  // Hands every attempt whose time has come to the queue, oldest transfer first. Says how many of the batch it took.
  std::size_t pump(Queue& queue) {
    activate();
    batch.clear();
    const Clock::time_point now = Clock::now();
    if (active_count() == in_flight || now < queue_full_until) return 0;
    for (std::size_t slot = 0; slot < active.size(); ++slot) {
      const Active& a = active[slot];
      if (!a.used || a.in_flight || a.not_before > now) continue;
      const std::uint64_t left = a.transfer.bytes - a.done;
      batch.push_back({slot, a.transfer.op, a.transfer.file, a.transfer.offset + a.done, a.transfer.buffer + a.done,
                       static_cast<std::uint32_t>(std::min(left, kMostBytesOfAttempt))});
    }
    if (batch.empty()) return 0;
    std::sort(batch.begin(), batch.end(),
              [&](const Attempt& x, const Attempt& y) { return active[x.id].sequence < active[y.id].sequence; });
    const std::size_t taken = queue.submit(batch);
    for (std::size_t i = 0; i < taken; ++i) active[batch[i].id].in_flight = true;
    in_flight += taken;
    if (in_flight == 0) queue_full_until = now + std::chrono::milliseconds(1);
    return taken;
  }

  // When pump could next do something although no answer arrives.
  Clock::time_point next_pump() const {
    Clock::time_point next = Clock::time_point::max();
    for (const Active& a : active) {
      if (a.used && !a.in_flight) next = std::min(next, std::max(a.not_before, queue_full_until));
    }
    return next;
  }

  const Transfer* oldest() const {
    const Active* oldest = nullptr;
    for (const Active& a : active) {
      if (a.used && (oldest == nullptr || a.sequence < oldest->sequence)) oldest = &a;
    }
    if (oldest != nullptr) return &oldest->transfer;
    return waiting_count() > 0 ? &waiting[waiting_head] : nullptr;
  }
};

namespace {

// What one answer means for its transfer.
enum class Step { kComplete, kResume, kRetry, kFail };
struct Verdict {
  Step step;
  std::uint64_t done;  // bytes of the whole transfer that need not be asked for again
  int error = 0;
};

Verdict judge(const Transfer& transfer, const File& file, std::uint64_t done, std::int32_t result) {
  if (result < 0) return {passes(-result) ? Step::kRetry : Step::kFail, done, -result};
  const std::uint64_t reached = done + static_cast<std::uint64_t>(result);
  if (reached == transfer.bytes) return {Step::kComplete, reached};
  if (result == 0) {
    if (transfer.op == Op::kRead) return {Step::kFail, done, kEndOfFile};
    return {Step::kRetry, done, EIO};  // a write that writes nothing and says no error
  }
  // Resuming has to start on the alignment. Example: 8 KiB asked, 700 B arrived, alignment 512: the next attempt asks
  // from 512 on, and 188 B travel twice.
  const std::uint64_t resumed = reached - reached % file.offset_alignment();
  if (transfer.op == Op::kRead && transfer.offset + reached >= file.size_bytes())
    return {Step::kFail, reached, kEndOfFile};
  return {resumed > done ? Step::kResume : Step::kRetry, resumed, EIO};
}

}  // namespace

Engine::Engine(std::vector<std::shared_ptr<const File>> files, std::unique_ptr<Queue> queue, double close_seconds,
               std::shared_ptr<DriveMeter> meter)
    : files_(std::move(files)),
      queue_(std::move(queue)),
      close_seconds_(close_seconds),
      meter_(std::move(meter)),
      state_(std::make_unique<State>(queue_->depth())) {}

Engine::~Engine() {
  if (state_->in_flight == 0) return;
  if (meter_ != nullptr)
    for (const State::Active& a : state_->active)
      if (a.used && a.in_flight) meter_->end(a.transfer.op, 0);
  const auto bound = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(close_seconds_));
  const Clock::time_point deadline = Clock::now() + bound;
  std::string reason = std::to_string(close_seconds_) + " s passed";
  try {
    while (state_->in_flight > 0 && Clock::now() < deadline) {
      state_->answers.clear();
      state_->in_flight -= queue_->reap(state_->answers, state_->in_flight, deadline);
    }
  } catch (const std::exception& error) {
    reason = error.what();
  }
  if (state_->in_flight > 0) {
    // Freeing the rings or joining the threads now would wait without bound, or free what the kernel still uses.
    std::fprintf(
        stderr,
        "angelptm: closing an I/O engine (%s): %zu requests are still with the kernel: %s; its queue is leaked, "
        "and their buffers must not be reused\n",
        queue_->name(), state_->in_flight, reason.c_str());
    static_cast<void>(queue_.release());
  }
}

void Engine::submit(std::span<const Transfer> transfers) {
  for (const Transfer& t : transfers) {
    if (t.op != Op::kRead && t.op != Op::kWrite && t.op != Op::kSync) {
      throw std::invalid_argument("a transfer is a read, a write or a sync");
    }
    if (t.file < 0 || static_cast<std::size_t>(t.file) >= files_.size()) {
      throw std::invalid_argument("file index " + std::to_string(t.file) + " of " + std::to_string(files_.size()));
    }
    if (t.op == Op::kSync) {
      if (t.offset != 0 || t.bytes != 0 || t.buffer != nullptr) {
        throw std::invalid_argument("a sync is of the whole file: offset 0, 0 bytes, no buffer");
      }
      continue;
    }
    const File& file = *files_[static_cast<std::size_t>(t.file)];
    const std::uint64_t most = std::numeric_limits<std::int64_t>::max();
    if (t.bytes == 0 || t.bytes > most || t.offset > most - t.bytes) {
      throw std::invalid_argument("a transfer needs 1 byte or more, and its end below 2^63");
    }
    if (t.offset % file.offset_alignment() != 0 || t.bytes % file.offset_alignment() != 0) {
      throw std::invalid_argument("offset " + std::to_string(t.offset) + " and length " + std::to_string(t.bytes) +
                                  " must be multiples of " + std::to_string(file.offset_alignment()) + " for " +
                                  file.path());
    }
    if (reinterpret_cast<std::uintptr_t>(t.buffer) % file.memory_alignment() != 0 || t.buffer == nullptr) {
      throw std::invalid_argument("the buffer's address must be a multiple of " +
                                  std::to_string(file.memory_alignment()) + " for " + file.path());
    }
  }
  state_->waiting.insert(state_->waiting.end(), transfers.begin(), transfers.end());
  pump();
}

void Engine::pump() {
  const std::size_t taken = state_->pump(*queue_);
  if (meter_ == nullptr) return;
  for (std::size_t i = 0; i < taken; ++i) meter_->begin(state_->batch[i].op, state_->batch[i].bytes);
}

std::size_t Engine::unfinished() const {
  return state_->waiting_count() + state_->active_count() + state_->finished.size();
}

std::size_t Engine::reap(std::vector<Outcome>& outcomes, std::size_t at_least, Clock::time_point deadline) {
  const std::size_t count = reap_some(outcomes, at_least, deadline);
  if (count >= at_least) return count;
  const Transfer& t = *state_->oldest();  // there is one: at_least did not exceed unfinished()
  throw IoError(t.op, files_[static_cast<std::size_t>(t.file)]->path(), t.offset, t.bytes, kDeadline,
                "the oldest of " + std::to_string(unfinished()) + " unfinished transfers");
}

std::size_t Engine::reap_some(std::vector<Outcome>& outcomes, std::size_t at_least, Clock::time_point deadline) {
  if (at_least > unfinished()) throw std::invalid_argument("cannot reap more transfers than are unfinished");
  State& s = *state_;
  std::size_t delivered = 0;
  for (;;) {
    const Clock::time_point now = Clock::now();
    const bool last = delivered + s.finished.size() >= at_least || now >= deadline;  // then only look, do not wait
    s.answers.clear();
    if (s.in_flight > 0) {
      // With transfers waiting for a slot, wake at the first answer and refill; else sleep until all that is asked for.
      const std::size_t missing = last ? 0 : at_least - delivered - s.finished.size();
      const std::size_t wanted = s.waiting_count() > 0 ? std::min<std::size_t>(missing, 1) : missing;
      s.in_flight -=
          queue_->reap(s.answers, std::min(wanted, s.in_flight), last ? now : std::min(deadline, s.next_pump()));
    } else if (!last) {
      std::this_thread::sleep_until(std::min(deadline, s.next_pump()));
    }
    for (const Answer& answer : s.answers) settle(answer.id, answer.result);
    pump();
    delivered += s.finished.size();
    std::move(s.finished.begin(), s.finished.end(), std::back_inserter(outcomes));
    s.finished.clear();
    if (delivered >= at_least || last) return delivered;
  }
}

void Engine::sync(Clock::time_point deadline) {
  if (unfinished() != 0) {
    throw std::logic_error("a sync covers only what was reaped before it; unfinished: " + std::to_string(unfinished()));
  }
  std::vector<Transfer> syncs;
  for (std::size_t i = 0; i < files_.size(); ++i) {
    syncs.push_back({kSyncTag, Op::kSync, static_cast<int>(i), 0, nullptr, 0});
  }
  submit(syncs);
  std::vector<Outcome> outcomes;
  reap(outcomes, syncs.size(), deadline);
  for (const Outcome& outcome : outcomes) {
    if (outcome.error) throw *outcome.error;
  }
}

void Engine::settle(std::uint64_t slot, std::int32_t result) {
  State::Active& a = state_->active[slot];
  const File& file = *files_[static_cast<std::size_t>(a.transfer.file)];
  a.in_flight = false;
  const Verdict verdict = judge(a.transfer, file, a.done, result);
  const Op op = a.transfer.op;
  (op == Op::kRead ? counters_.read_bytes : counters_.written_bytes) += verdict.done - a.done;  // 0 for a sync
  if (meter_ != nullptr) meter_->end(op, verdict.done - a.done);
  const bool whole_attempt = static_cast<std::uint64_t>(std::max(result, 0)) == kMostBytesOfAttempt;
  a.done = verdict.done;
  Outcome outcome{a.transfer.tag, std::nullopt};
  switch (verdict.step) {
    case Step::kResume:
      if (!whole_attempt) ++counters_.resumed_count;
      a.retries = 0;
      return;
    case Step::kRetry:
      ++a.retries;
      if (a.retries <= kMostRetries) {
        ++counters_.retried_count;
        a.not_before = Clock::now() + pause_before(a.retries);
        return;
      }
      outcome.error.emplace(a.transfer.op, file.path(), a.transfer.offset + a.done, a.transfer.bytes - a.done,
                            verdict.error, "after " + std::to_string(kMostRetries) + " retries");
      break;
    case Step::kFail:
      outcome.error.emplace(a.transfer.op, file.path(), a.transfer.offset + a.done, a.transfer.bytes - a.done,
                            verdict.error);
      break;
    case Step::kComplete:
      ++(op == Op::kRead ? counters_.read_count : op == Op::kWrite ? counters_.write_count : counters_.sync_count);
      break;
  }
  if (outcome.error) ++counters_.failed_count;
  a.used = false;
  state_->free_slots.push_back(slot);
  state_->finished.push_back(std::move(outcome));
}

std::unique_ptr<Engine> make_engine(Backend backend, std::vector<std::shared_ptr<const File>> files,
                                    std::vector<Region> regions, std::size_t depth, const FaultPlan* faults,
                                    std::string* chosen_because, double close_seconds,
                                    std::shared_ptr<DriveMeter> meter) {
  if (depth == 0 || depth > kMostDepth) {
    throw std::invalid_argument("queue depth must be from 1 to " + std::to_string(kMostDepth));
  }
  std::unique_ptr<Queue> queue;
  std::string because = "asked for";
  if (backend != Backend::kThreads) {
    try {
      queue = make_uring_queue(files, std::move(regions), depth);
      if (backend == Backend::kAuto) because = "uring: io_uring works here";
    } catch (const IoError& error) {
      if (backend == Backend::kUring) throw;
      because = std::string("threads: io_uring does not work here: ") + error.what();
    }
  }
  // pread and pwrite hold a thread for as long as the device takes, so the pool is as wide as the queue is deep.
  constexpr std::size_t kMostThreads = 64;
  if (queue == nullptr) queue = make_thread_queue(files, depth, std::min(depth, kMostThreads));
  if (faults != nullptr) queue = make_fault_queue(std::move(queue), files, *faults);
  if (chosen_because != nullptr) *chosen_because = because;
  return std::make_unique<Engine>(std::move(files), std::move(queue), close_seconds, std::move(meter));
}

}  // namespace angelptm::io
