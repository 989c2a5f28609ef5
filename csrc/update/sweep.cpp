#include "update/sweep.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "pages/deadline.h"
#include "pages/ticket.h"

namespace angelptm::update {

Sweep::Sweep(pages::PageTable& table, const std::vector<Span>& spans, SweepOptions options,
             std::uint64_t grad_page_elements, double deadline_seconds)
    : table_(table),
      spans_(spans),
      options_(std::move(options)),
      deadline_seconds_(deadline_seconds),
      accumulators_(table, spans, options_.combine, grad_page_elements),
      tallies_(std::make_unique<Tally[]>(spans.size())) {
  options_.ranks.resize(spans.size(), 0);
  for (std::size_t i = 0; i < options_.spare_frames; ++i) {
    const auto frame = table.host().allocate();
    if (!frame) {
      for (const pages::Frame taken : retired_) table.host().release(taken);
      throw pages::TierCapacityError("host tier: too few frames for parameters that are read while new ones come");
    }
    retired_.push_back(*frame);
  }
}

Sweep::~Sweep() {
  for (const pages::Frame frame : retired_) table_.host().release(frame);
}

void Sweep::expect_known(std::uint32_t span) const {
  if (span >= spans_.size()) throw std::invalid_argument("no span " + std::to_string(span));
}

void Sweep::expect_known(const std::vector<std::uint32_t>& spans) const {
  for (const std::uint32_t span : spans) expect_known(span);
}

void Sweep::rethrow_failure() const {
  std::lock_guard lock(mutex_);
  if (failed_) std::rethrow_exception(failed_);
}

void Sweep::fail(const std::exception_ptr& error) {
  {
    std::lock_guard lock(mutex_);
    if (!failed_) failed_ = error;
  }
  progress_.notify_all();
}

// The lock is what keeps a waiter that has just looked from missing this.
void Sweep::progressed() {
  {
    std::lock_guard lock(mutex_);
  }
  progress_.notify_all();
}

template <typename Done>
bool Sweep::wait_within(double seconds, const Done& done) {
  std::unique_lock lock(mutex_);
  const auto over = [&] { return failed_ || done(); };
  bool came = over();
  if (!came) {
    if (waiting_++ == 0 && on_waiting) on_waiting(true);
    came = wait_while_running(progress_, lock, seconds, over);
    if (--waiting_ == 0 && on_waiting) on_waiting(false);
  }
  if (failed_) std::rethrow_exception(failed_);
  return came;
}

template <typename Done>
void Sweep::wait(const Done& done, const std::string& what) {
  if (!wait_within(deadline_seconds_, done))
    throw DeadlineError("waited " + std::to_string(deadline_seconds_) + " s for " + what);
}

// All of them or none: a box that stays held would never be taken.
template <typename One>
void Sweep::open_all(const std::vector<std::uint32_t>& spans, const One& open_one) {
  std::size_t opened = 0;
  try {
    for (; opened < spans.size(); ++opened) open_one(spans[opened]);
  } catch (...) {
    for (std::size_t i = 0; i < opened; ++i) accumulators_.put_back(spans[i]);
    throw;
  }
}

void Sweep::open(const std::vector<std::uint32_t>& spans) {
  expect_known(spans);
  rethrow_failure();
  await_whole_taken(spans);
  open_all(spans, [&](std::uint32_t span) { accumulators_.open(span); });
}

void Sweep::open_empty(const std::vector<std::uint32_t>& spans, const std::string& what) {
  expect_known(spans);
  open_all(spans, [&](std::uint32_t span) { wait([&] { return accumulators_.try_open_empty(span); }, what); });
}

void Sweep::put_back(const std::vector<std::uint32_t>& spans) {
  expect_known(spans);
  for (const std::uint32_t span : spans) accumulators_.put_back(span);
  if (on_gradients) on_gradients();  // what was there may be taken again
}

// Replayed: what is all of an update's gradients is taken before another one comes.
void Sweep::await_whole_taken(const std::vector<std::uint32_t>& spans) {
  if (!player_) return;
  const auto is_left = [&](std::uint32_t span) {
    const std::uint32_t waiting = accumulators_.waiting(span);
    return waiting > 0 && player_->is_whole(span, waiting);
  };
  for (const std::uint32_t span : spans) {
    if (!is_left(span)) continue;
    player_->want(span);
    if (on_gradients) on_gradients();
    wait([&] { return !is_left(span); }, "the update of span " + std::to_string(span) + " that was recorded");
  }
}

void Sweep::record() { recorder_ = std::make_unique<Recorder>(spans_.size()); }

Script Sweep::recorded() const {
  if (!recorder_) throw std::logic_error("nothing was recorded");
  return recorder_->script();
}

void Sweep::replay(Script script) {
  if (script.takes.size() != spans_.size() || script.uses.size() != spans_.size())
    throw std::invalid_argument("what was recorded is of " + std::to_string(script.takes.size()) + " spans, not " +
                                std::to_string(spans_.size()));
  player_ = std::make_unique<Player>(std::move(script));
}

void Sweep::used(const std::vector<std::uint32_t>& spans, const std::vector<std::uint32_t>& publishes) {
  expect_known(spans);
  if (publishes.size() != spans.size()) throw std::invalid_argument("one count for each span");
  for (std::size_t i = 0; i < spans.size(); ++i) {
    if (recorder_) recorder_->used(spans[i], publishes[i]);
    if (player_) player_->used(spans[i]);
  }
  if (player_ && on_gradients) on_gradients();  // more may be published
}

void Sweep::await_use(const std::vector<std::uint32_t>& spans, const std::string& what) {
  expect_known(spans);
  if (!player_) return;
  wait([&] { return std::all_of(spans.begin(), spans.end(), [&](auto span) { return player_->is_ready(span); }); },
       what);
}

void Sweep::end_replay() {
  if (player_) player_->end();
  progressed();
  if (on_gradients) on_gradients();
}

bool Sweep::may_take(std::uint32_t span) const {
  if (!accumulators_.is_full(span)) return false;
  return !player_ || player_->may_take(span, accumulators_.waiting(span));
}

bool Sweep::may_publish(std::uint32_t span) const { return !player_ || player_->may_publish(span); }

void Sweep::hand_over(const std::vector<Piece>& pieces, const std::vector<kernels::Hyper>& hypers, bool from_step) {
  rethrow_failure();
  if (from_step && player_) {
    std::vector<std::uint32_t> spans;
    for (const Piece& piece : pieces) spans.push_back(piece.span);
    await_whole_taken(spans);
  }
  for (const Piece& piece : pieces) {
    // Before the gradient can be taken, so that nobody sees more published than produced.
    tallies_[piece.span].produced.fetch_add(1);
    try {
      if (from_step)
        accumulators_.add(piece.span, piece.segments, hypers);
      else
        accumulators_.hand_over(piece.span, piece.segments, hypers);
    } catch (...) {
      tallies_[piece.span].produced.fetch_sub(1);  // refused: it is in no box
      throw;
    }
  }
  if (on_gradients) on_gradients();
}

bool Sweep::are_published(const std::vector<std::uint32_t>& spans, std::uint32_t most_behind) const {
  return std::all_of(spans.begin(), spans.end(), [&](std::uint32_t span) {
    const Tally& tally = tallies_[span];
    return tally.produced.load() <= tally.published.load() + most_behind;
  });
}

void Sweep::wait_published(const std::vector<std::uint32_t>& spans, std::uint32_t most_behind,
                           const std::string& what) {
  expect_known(spans);
  wait([&] { return are_published(spans, most_behind); }, what);
}

bool Sweep::wait_all_published(const std::vector<std::uint32_t>& spans, double seconds) {
  expect_known(spans);
  return wait_within(seconds, [&] { return are_published(spans, 0); });
}

bool Sweep::are_applied(const std::vector<std::uint32_t>& spans, const std::vector<std::uint64_t>& counts) const {
  expect_known(spans);
  if (counts.size() != spans.size()) throw std::invalid_argument("one count for each span");
  for (std::size_t i = 0; i < spans.size(); ++i)
    if (tallies_[spans[i]].applied.load() < counts[i]) return false;
  return true;
}

void Sweep::wait_applied(const std::vector<std::uint32_t>& spans, const std::vector<std::uint64_t>& counts,
                         const std::string& what) {
  wait([&] { return are_applied(spans, counts); }, what);
}

std::uint64_t Sweep::produced(std::uint32_t span) const {
  expect_known(span);
  return tallies_[span].produced.load();
}

std::uint64_t Sweep::published(std::uint32_t span) const {
  expect_known(span);
  return tallies_[span].published.load();
}

GradientCounts Sweep::counts() const {
  GradientCounts sums;
  for (std::size_t span = 0; span < spans_.size(); ++span) {
    // In this order: what is counted later may only have grown.
    sums.applied += tallies_[span].applied.load();
    sums.published += tallies_[span].published.load();
    sums.taken += tallies_[span].taken.load();
    sums.produced += tallies_[span].produced.load();
  }
  return sums;
}

std::optional<std::uint32_t> Sweep::next(const std::function<bool(std::uint32_t)>& is_free) {
  const auto count = static_cast<std::uint32_t>(spans_.size());
  std::optional<std::uint32_t> best;
  std::uint64_t best_value = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint32_t span = (cursor_ + i) % count;
    if (!may_take(span) || !is_free(span)) continue;
    std::uint64_t value = 0;  // the highest is taken, and of equal ones the first
    if (options_.order == Order::kMostGradients) {
      value = accumulators_.waiting(span);
    } else if (options_.order == Order::kNextNeeded) {
      const std::uint32_t ahead = options_.ranks[span] - position_.load();  // wraps: what has passed comes last
      value = UINT32_MAX - ahead;
    }
    if (!best || value > best_value) {
      best = span;
      best_value = value;
    }
    if (options_.order == Order::kRoundRobin) break;
  }
  if (best) cursor_ = (*best + 1) % count;
  return best;
}

bool Sweep::take(std::uint32_t span, pages::Frame* frames, Taken& taken) {
  const bool took = accumulators_.take(span, frames, taken, [&] {
    tallies_[span].taken.fetch_add(taken.gradients);
    if (recorder_) recorder_->took(span, taken.gradients);
    if (player_) player_->took(span);
  });
  if (!took) return false;
  progressed();  // for who waits for an empty box
  return true;
}

void Sweep::publish(std::uint32_t span, pages::Frame& frame, std::uint32_t gradients) {
  frame = table_.publish_frame(spans_[span].param, frame);
  tallies_[span].published.fetch_add(gradients);
  if (player_) player_->published(span);
  progressed();
  frame = unread(frame);
}

void Sweep::applied(std::uint32_t span, std::uint32_t gradients) {
  tallies_[span].applied.fetch_add(gradients);
  progressed();
}

// Where readers keep frames for long there is a spare one for each that they may keep. Where they only copy them there
// are fewer, and this waits for a copy at most.
pages::Frame Sweep::unread(pages::Frame frame) {
  const pages::HostPool& host = table_.host();
  if (host.readers(frame) == 0) return frame;
  const auto deadline = deadline_after(deadline_seconds_);
  bool kept = false;
  while (true) {
    {
      std::lock_guard lock(frames_mutex_);
      if (!kept) retired_.push_back(frame);
      kept = true;
      const auto found = std::find_if(retired_.begin(), retired_.end(),
                                      [&](pages::Frame retired) { return host.readers(retired) == 0; });
      if (found != retired_.end()) {
        const pages::Frame other = *found;
        retired_.erase(found);
        return other;
      }
    }
    if (std::chrono::steady_clock::now() > deadline) {
      std::lock_guard lock(frames_mutex_);
      std::erase(retired_, frame);
      throw DeadlineError("waited " + std::to_string(deadline_seconds_) +
                          " s for a frame of former parameters that nobody reads");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

}  // namespace angelptm::update
