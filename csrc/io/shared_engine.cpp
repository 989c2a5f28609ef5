#include "io/shared_engine.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace angelptm::io {

namespace {

// How long a reaping thread may keep others from submitting.
constexpr auto kSlice = std::chrono::milliseconds(2);

}  // namespace

SharedEngine::SharedEngine(std::unique_ptr<Engine> engine, std::string chosen_because)
    : engine_(std::move(engine)),
      name_(engine_->queue().name()),
      notes_(engine_->queue().notes()),
      chosen_because_(std::move(chosen_because)),
      depth_(engine_->queue().depth()) {}

SharedEngine::Turn::Turn(SharedEngine& shared) {
  const std::lock_guard next(shared.next_);
  engine = std::unique_lock(shared.engine_mutex_);
}

Engine& SharedEngine::open_engine(const Turn&) {
  if (engine_ == nullptr) throw std::invalid_argument("the I/O engine is closed");
  return *engine_;
}

void SharedEngine::submit(std::span<const Transfer> transfers) {
  const Turn turn(*this);
  open_engine(turn).submit(transfers);
}

// Leaves what it found in `outcomes`, also when it throws.
void SharedEngine::reap_into(std::vector<Outcome>& outcomes, std::size_t at_least, Clock::time_point deadline) {
  for (;;) {
    const Turn turn(*this);
    Engine& engine = open_engine(turn);
    std::move(kept_.begin(), kept_.end(), std::back_inserter(outcomes));
    kept_.clear();
    const std::size_t missing = at_least - std::min(at_least, outcomes.size());
    const std::size_t wanted = std::min(missing, engine.unfinished());
    if (engine.reap_some(outcomes, wanted, std::min(deadline, Clock::now() + kSlice)) >= wanted) return;
    if (Clock::now() >= deadline) return;
  }
}

std::vector<Outcome> SharedEngine::reap_some(std::size_t at_least, Clock::time_point deadline) {
  std::vector<Outcome> outcomes;
  try {
    reap_into(outcomes, at_least, deadline);
  } catch (...) {
    const Turn turn(*this);
    std::move(outcomes.begin(), outcomes.end(), std::back_inserter(kept_));
    throw;
  }
  return outcomes;
}

std::vector<Outcome> SharedEngine::reap(std::size_t at_least, Clock::time_point deadline) {
  std::vector<Outcome> outcomes = reap_some(at_least, deadline);
  if (outcomes.size() >= at_least) return outcomes;
  const Turn turn(*this);
  Engine& engine = open_engine(turn);
  const std::size_t wanted = std::min(at_least - outcomes.size(), engine.unfinished());
  try {
    engine.reap(outcomes, wanted, Clock::now());
  } catch (...) {
    std::move(outcomes.begin(), outcomes.end(), std::back_inserter(kept_));
    throw;
  }
  return outcomes;
}

void SharedEngine::sync(Clock::time_point deadline) {
  const Turn turn(*this);
  Engine& engine = open_engine(turn);
  if (!kept_.empty()) throw std::logic_error("outcomes are to be reaped before a sync");
  engine.sync(deadline);
}

std::size_t SharedEngine::unfinished() {
  const Turn turn(*this);
  return open_engine(turn).unfinished() + kept_.size();
}

Counters SharedEngine::counters() {
  const Turn turn(*this);
  return engine_ != nullptr ? engine_->counters() : last_counters_;
}

void SharedEngine::close() {
  const Turn turn(*this);
  if (engine_ == nullptr) return;
  last_counters_ = engine_->counters();
  engine_.reset();
}

bool SharedEngine::closed() {
  const Turn turn(*this);
  return engine_ == nullptr;
}

}  // namespace angelptm::io
