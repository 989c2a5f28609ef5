// Seeded faults in front of any queue. The Engine that survives them is the one that runs without them.
#include <algorithm>
#include <cerrno>
#include <random>
#include <stdexcept>
#include <thread>
#include <unordered_map>

#include "io/crash_plan.h"
#include "io/queue.h"

namespace angelptm::io {

namespace {

struct Fate {
  std::int32_t error = 0;  // answered without transferring when not 0
  double kept = 1;         // fraction of the transfer that is asked for, in [0, 1)
  bool shortened = false;  // whether `kept` applies
  bool delayed = false;
};

class FaultQueue final : public Queue {
 public:
  FaultQueue(std::unique_ptr<Queue> inner, std::vector<std::shared_ptr<const File>> files, const FaultPlan& plan)
      : inner_(std::move(inner)), files_(std::move(files)), plan_(plan), shuffler_(plan.seed) {
    for (const double p : {plan.short_transfer, plan.eintr, plan.eagain, plan.eio, plan.enospc, plan.delay}) {
      if (!(p >= 0 && p <= 1)) throw std::invalid_argument("a fault's probability must be in [0, 1]");
    }
    if (!(plan.delay_seconds >= 0)) throw std::invalid_argument("delay_seconds must not be negative");
  }

  const char* name() const override { return inner_->name(); }
  std::size_t depth() const override { return inner_->depth(); }
  std::string notes() const override { return inner_->notes(); }

  std::size_t submit(std::span<const Attempt> attempts) override {
    const std::size_t room = depth() - inside_.size() - held_.size();
    attempts = attempts.first(std::min(attempts.size(), room));
    std::vector<Attempt> forwarded;
    std::vector<std::size_t> origin;  // forwarded[k] is attempts[origin[k]]
    std::vector<Fate> fates;
    std::uint64_t transfer_count = transfer_count_, sync_count = sync_count_;
    for (std::size_t i = 0; i < attempts.size(); ++i) {
      fates.push_back(fate_of(attempts[i].op == Op::kSync ? sync_count++ : transfer_count++, attempts[i]));
      if (fates[i].error != 0) continue;
      forwarded.push_back(attempts[i]);
      if (fates[i].shortened) forwarded.back().bytes = shortened_bytes(attempts[i], fates[i].kept);
      origin.push_back(i);
    }
    const std::size_t inner_taken = forwarded.empty() ? 0 : hand_over(forwarded);
    const std::size_t taken = inner_taken < forwarded.size() ? origin[inner_taken] : attempts.size();
    const Clock::time_point now = Clock::now();
    for (std::size_t i = 0; i < taken; ++i) {
      if (fates[i].error != 0) {
        hold({attempts[i].id, fates[i].error}, fates[i].delayed, now);
      } else {
        inside_.push_back({attempts[i].id, fates[i].delayed});
      }
      ++(attempts[i].op == Op::kSync ? sync_count_ : transfer_count_);
    }
    return taken;
  }

  std::size_t reap(std::vector<Answer>& answers, std::size_t at_least, Clock::time_point deadline) override {
    const std::size_t before = answers.size();
    for (;;) {
      const Clock::time_point now = Clock::now();
      release(answers, now);
      const bool enough = answers.size() - before >= at_least || now >= deadline;
      Clock::time_point wake = deadline;
      for (const Held& held : held_) wake = std::min(wake, held.release_at);
      std::vector<Answer> arrived;
      if (!inside_.empty()) {
        inner_->reap(arrived, enough ? 0 : 1, enough ? now : wake);
      } else if (!enough) {
        std::this_thread::sleep_until(wake);
      }
      for (const Answer& answer : arrived) {
        const auto found =
            std::find_if(inside_.begin(), inside_.end(), [&](const Inside& x) { return x.id == answer.id; });
        const bool delayed = found->delayed;
        inside_.erase(found);
        if (const auto crash = crash_numbers_.extract(answer.id)) plan_.crash->end(crash.mapped(), answer.result);
        hold(answer, delayed, Clock::now());
      }
      if (enough) break;
    }
    release(answers, Clock::now());
    if (plan_.reorder) std::shuffle(answers.begin() + static_cast<std::ptrdiff_t>(before), answers.end(), shuffler_);
    return answers.size() - before;
  }

 private:
  struct Inside {
    std::uint64_t id;
    bool delayed;
  };
  struct Held {
    Answer answer;
    Clock::time_point release_at;
  };

  Fate fate_of(std::uint64_t sequence, const Attempt& attempt) const {
    std::vector<std::uint64_t> words{plan_.seed & 0xffffffffu, plan_.seed >> 32, sequence & 0xffffffffu,
                                     sequence >> 32};
    if (attempt.op == Op::kSync) words.push_back(1);
    std::seed_seq seeds(words.begin(), words.end());
    std::mt19937_64 generator(seeds);
    // Always the same number of draws, so that changing one probability leaves the other faults where they were.
    std::uniform_real_distribution<double> uniform(0, 1);
    const double eio = uniform(generator), enospc = uniform(generator), eintr = uniform(generator);
    const double eagain = uniform(generator), cut = uniform(generator), kept = uniform(generator);
    const double delay = uniform(generator);
    Fate fate;
    if (eio < plan_.eio) {
      fate.error = -EIO;
    } else if (attempt.op == Op::kWrite && enospc < plan_.enospc) {
      fate.error = -ENOSPC;
    } else if (eintr < plan_.eintr) {
      fate.error = -EINTR;
    } else if (eagain < plan_.eagain) {
      fate.error = -EAGAIN;
    } else if (attempt.op != Op::kSync && cut < plan_.short_transfer) {
      fate.shortened = true;
      fate.kept = kept;
    }
    fate.delayed = delay < plan_.delay;
    return fate;
  }

  // With a crash plan one at a time, so that nothing behind the attempt that kills has been handed over.
  std::size_t hand_over(std::span<const Attempt> attempts) {
    if (plan_.crash == nullptr) return inner_->submit(attempts);
    std::size_t taken = 0;
    for (const Attempt& attempt : attempts) {
      const std::uint64_t number = plan_.crash->begin(attempt, *files_[static_cast<std::size_t>(attempt.file)]);
      if (inner_->submit({&attempt, 1}) == 0) {
        plan_.crash->withdraw(number);
        break;
      }
      crash_numbers_.emplace(attempt.id, number);
      ++taken;
    }
    return taken;
  }

  // A multiple of the offset alignment, at least one of it and less than the whole; the whole where it is only one.
  std::uint32_t shortened_bytes(const Attempt& attempt, double kept) const {
    const std::uint32_t grain = files_[static_cast<std::size_t>(attempt.file)]->offset_alignment();
    const std::uint32_t grains = attempt.bytes / grain;
    if (grains < 2) return attempt.bytes;
    return (1 + static_cast<std::uint32_t>(kept * (grains - 1))) * grain;
  }

  void hold(const Answer& answer, bool delayed, Clock::time_point now) {
    const auto delay = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(plan_.delay_seconds));
    held_.push_back({answer, delayed ? now + delay : now});
  }

  void release(std::vector<Answer>& answers, Clock::time_point now) {
    std::erase_if(held_, [&](const Held& held) {
      if (held.release_at > now) return false;
      answers.push_back(held.answer);
      return true;
    });
  }

  const std::unique_ptr<Queue> inner_;
  const std::vector<std::shared_ptr<const File>> files_;
  const FaultPlan plan_;
  std::mt19937_64 shuffler_;
  std::uint64_t transfer_count_ = 0, sync_count_ = 0;               // taken so far
  std::unordered_map<std::uint64_t, std::uint64_t> crash_numbers_;  // of what is inside, by the attempt's id
  std::vector<Inside> inside_;                                      // taken by the inner queue, unanswered
  std::vector<Held> held_;                                          // answered, and kept back until its time
};

}  // namespace

std::unique_ptr<Queue> make_fault_queue(std::unique_ptr<Queue> inner, std::vector<std::shared_ptr<const File>> files,
                                        const FaultPlan& plan) {
  return std::make_unique<FaultQueue>(std::move(inner), std::move(files), plan);
}

}  // namespace angelptm::io
