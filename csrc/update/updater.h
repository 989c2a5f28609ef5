// The updater: native threads that carry spans through read → step → write →
// publish. Each thread keeps a ring of spans in flight, so that the SSD works
// on the next ones while the CPU computes this one.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "io/engine.h"
#include "kernels/optimizer.h"
#include "pages/page_table.h"
#include "pages/ticket.h"

namespace angelptm::update {

using pages::PageId;

// The elements of one PARAM page, and where everything about them lives. Fixed for the life of the run.
struct Span {
  std::uint64_t elements = 0;
  std::vector<PageId> master, exp_avg, exp_avg_sq;  // page k holds elements [k, k + 1) × page_bytes / 4
  std::vector<PageId> grad;                         // page k holds elements [k, k + 1) × page_bytes / itemsize(grad)
  PageId param = pages::kNoPage;                    // published here ...
  std::byte* device_param = nullptr;                // ... or written here, when the parameters live on the device
};

// Elements [start, start + count) of a span that share one set of hyperparameters. Elements in no run keep their state.
struct Segment {
  std::uint64_t start, count;
  std::uint32_t hyper;
};

struct Work {
  std::uint32_t span;
  std::vector<Segment> segments;
};

struct Utilisation {
  double compute_seconds = 0;  // in kernels, summed over threads
  double wait_seconds = 0;     // for I/O with nothing to compute, summed over threads
  std::uint64_t spans = 0;
  std::uint64_t published_bytes = 0;  // PARAM bytes written to host frames, device frames and staging
  io::Counters io;
};

struct UpdaterOptions {
  std::size_t ring_depth = 3;  // spans in flight for each thread
  kernels::Rule rule = kernels::Rule::kAdamW;
  DType grad_dtype = DType::kF32;
  DType param_dtype = DType::kF32;
  double deadline_seconds = 120;
};

// Owns states and gradients of the spans while their tickets are open; nobody
// else may touch those pages. Errors travel in the tickets; after the first one
// every later span fails with it too, and nothing more is written.
class Updater {
 public:
  // One thread for each engine. Takes its staging frames from the host pool here and keeps them: throws
  // TierCapacityError when the pool has too few, and std::invalid_argument for spans whose pages do not fit them.
  Updater(pages::PageTable& table, std::vector<std::unique_ptr<io::Engine>> engines, std::vector<Span> spans,
          const UpdaterOptions& options);
  ~Updater();  // stops after the spans in flight

  // Queues one unit's spans; they start in the order of the calls. A span whose last update is not done is refused
  // (std::logic_error), as is what does not fit the spans (std::invalid_argument); nothing was queued then.
  std::shared_ptr<Ticket> submit(std::string what, std::vector<Work> work, std::vector<kernels::Hyper> hypers);
  Utilisation utilisation() const;
  // Staging frames that each ring slot needs for `spans` (before construction, for the plan's own check).
  static std::size_t frames_per_slot(const pages::PageTable& table, const std::vector<Span>& spans);

 private:
  struct Batch;
  struct Task;
  struct Flight;
  class Worker;

  void run(Worker& worker);
  bool pop(Task& task, bool wait);
  void stop();

  static constexpr std::size_t kMostRingDepth = 1024;
  pages::PageTable& table_;
  std::vector<Span> spans_;
  UpdaterOptions options_;
  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<Task> queue_;
  std::vector<bool> open_;  // by span: submitted and not done; guarded by mutex_
  bool stopping_ = false;
  std::exception_ptr failed_;  // guarded by mutex_
  Utilisation totals_;         // guarded by mutex_
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<std::thread> threads_;
};

}  // namespace angelptm::update
