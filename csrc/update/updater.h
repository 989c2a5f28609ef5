// The updater: native threads that carry spans through read → step → write →
// publish. Each thread keeps a ring of spans in flight, so that the SSD works
// on the next ones while the CPU computes this one; and where no gradient is
// there yet, it reads the states of the spans that are expected next.
//
// Two ways to get gradients, on the same pipeline. Submitted: a unit's spans
// are queued, their GRAD pages are the updater's until the tickets are done,
// and readers wait for the new parameters. Swept: the threads go round the
// spans and take out of the accumulators what has come since, parameters are
// published beside readers of the former ones, and nobody waits for anybody.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "io/engine.h"
#include "kernels/optimizer.h"
#include "pages/fetcher.h"
#include "pages/page_table.h"
#include "pages/ticket.h"
#include "update/accumulators.h"
#include "update/span.h"
#include "update/sweep.h"

namespace angelptm::update {

struct Work {
  std::uint32_t span;
  std::vector<Segment> segments;
};

struct Utilisation {
  double compute_seconds = 0;  // in kernels, summed over threads
  double wait_seconds = 0;     // for I/O with nothing to compute, summed over threads
  std::uint64_t spans = 0;
  std::uint64_t published_bytes = 0;  // PARAM bytes written to host frames, device frames and staging
  std::uint64_t read_ahead = 0;       // spans whose states were being read, or there, when their gradients came
  GradientCounts gradients;           // swept
  io::Counters io;
};

struct UpdaterOptions {
  std::size_t ring_depth = 3;  // spans in flight for each thread
  kernels::Rule rule = kernels::Rule::kAdamW;
  DType grad_dtype = DType::kF32;
  DType param_dtype = DType::kF32;
  std::uint64_t grad_page_elements = 0;  // of a GRAD page; 0: as many as it holds
  double deadline_seconds = 120;
  std::size_t write_depth = 3;  // of the ring: spans that are written at once at most, since each needs fresh slots
  std::optional<SweepOptions> sweep;  // swept; without it submitted
};

// What submit returns. `published`: the new parameters can be read, which is before the states are written. `done`: the
// updater has let go of the pages.
struct Tickets {
  std::shared_ptr<Ticket> done, published;
};

// Submitted: owns states and gradients of the spans while their tickets are open; nobody
// else may touch those pages. Errors travel in the tickets; after the first one
// every later span fails with it too, and nothing more is written.
class Updater {
 public:
  // One thread for each engine. Takes its staging frames from the host pool here and keeps them: throws
  // TierCapacityError when the pool has too few, and std::invalid_argument for spans whose pages do not fit them. New
  // parameters are handed to `fetcher`, which lives longer; null: they are read back from where they are published.
  Updater(pages::PageTable& table, std::vector<std::unique_ptr<io::Engine>> engines, std::vector<Span> spans,
          const UpdaterOptions& options, pages::Fetcher* fetcher = nullptr);
  ~Updater();  // stops after the spans in flight

  // Queues one unit's spans. Those of the lowest rank start first, equal ones in the order of the calls. A span whose
  // last update is not done is refused (std::logic_error), as is what does not fit the spans (std::invalid_argument);
  // nothing was queued then.
  Tickets submit(std::string what, std::vector<Work> work, std::vector<kernels::Hyper> hypers, std::uint32_t rank = 0);
  // The spans that submit will bring next, in order: while nothing is queued, their states are read into free slots of
  // the rings. Replaces what was expected and is not begun. A hint: what comes otherwise is updated all the same.
  void expect(std::vector<std::uint32_t> spans);
  // Gives up what is read ahead, and returns when nobody reads states: before somebody else writes to them.
  void recall();
  Utilisation utilisation() const;
  // Swept: what waits, what is published; std::logic_error otherwise.
  Sweep& sweep();
  // Sweep::hand_over, after the checks that submit makes.
  void hand_over(const std::vector<Sweep::Piece>& pieces, const std::vector<kernels::Hyper>& hypers, bool from_step);
  // Staging frames that each ring slot needs for `spans` (before construction, for the plan's own check).
  static std::size_t frames_per_slot(const pages::PageTable& table, const std::vector<Span>& spans, bool swept);

 private:
  struct Batch;
  struct Task;
  struct Flight;
  class Worker;

  void run(Worker& worker);
  void join_sweep();            // the calling thread
  void give_way(int niceness);  // of all of them, above the process's own
  void stop();
  void fail(const Task& task, const std::exception_ptr& error);  // which no worker has begun
  // The span's parameters stay what they are. To be called when its tickets say why, since who waits for the new
  // version must not take the former one for it; and before they are done, since the next update raises the version
  // again.
  void give_up_publish(std::uint32_t span);

  static constexpr std::size_t kMostRingDepth = 1024;
  static constexpr std::uint32_t kNobody = 0xffffffffu;
  // A span between two updates. `holder`: the worker that reads its states ahead, for as long as the span is
  // `expected_in` the present epoch.
  struct SpanState {
    bool open = false;  // submitted and not done
    std::uint32_t holder = kNobody;
    std::uint64_t expected_in = 0;
  };

  pages::PageTable& table_;
  pages::Fetcher* fetcher_;
  std::vector<Span> spans_;
  UpdaterOptions options_;
  std::unique_ptr<Sweep> sweep_;  // null where gradients are submitted
  mutable std::mutex mutex_;
  std::condition_variable arrived_, recalled_;
  std::map<std::uint32_t, std::deque<Task>> queue_;  // by rank
  std::deque<std::uint32_t> expected_;               // and neither held nor submitted since
  std::vector<SpanState> states_;                    // by span; guarded by mutex_
  std::uint64_t epoch_ = 0;                          // counts expectations
  std::size_t ahead_count_ = 0;                      // spans with a holder
  bool stopping_ = false;
  int process_niceness_ = 0;
  std::mutex niceness_mutex_;
  std::vector<id_t> sweepers_;  // their threads; guarded by niceness_mutex_
  std::exception_ptr failed_;   // guarded by mutex_
  Utilisation totals_;          // guarded by mutex_
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<std::thread> threads_;
};

}  // namespace angelptm::update
