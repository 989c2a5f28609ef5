#include "update/updater.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "timeline/recorder.h"
#include "update/worker.h"

namespace angelptm::update {

using pages::Home;

namespace {

// Content of the pages `ids` of one kind for `elements` elements, `page_elements` on each, or an error that names the
// kind.
void expect_pages(const PageTable& table, const char* kind, const std::vector<PageId>& ids, std::uint64_t elements,
                  std::uint64_t page_elements, std::uint64_t item_bytes) {
  if (ids.size() != (elements + page_elements - 1) / page_elements)
    throw std::invalid_argument("a span of " + std::to_string(elements) + " elements cannot have " +
                                std::to_string(ids.size()) + " " + kind + " pages");
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (table.info(ids[i]).used_bytes < std::min(page_elements, elements - i * page_elements) * item_bytes)
      throw std::invalid_argument(std::string("a ") + kind + " page is too short for its span");
}

void expect_place(const PageTable& table, const Span& span, const StateRun& run, const StatePlace& place,
                  std::uint64_t item_bytes, bool has_scales) {
  const std::uint64_t used = place.page < span.states.size() ? table.info(span.states[place.page]).used_bytes : 0;
  const auto fits = [&](std::uint64_t offset, std::uint64_t bytes) { return offset <= used && bytes <= used - offset; };
  if (!fits(place.offset, run.count * item_bytes) ||
      (has_scales && !fits(place.scales, kernels::blocks8(run.count) * sizeof(float))))
    throw std::invalid_argument("states of a span lie outside its pages");
  if (place.offset % sizeof(float) != 0 || place.scales % sizeof(float) != 0)
    throw std::invalid_argument("states begin at multiples of 4 bytes");
}

void expect_runs(const PageTable& table, const Span& span, const UpdaterOptions& options) {
  using kernels::MomentFormat;
  std::uint64_t next = 0;
  const int moments = kernels::moment_count(options.rule);
  for (const StateRun& run : span.runs) {
    if (run.start != next || run.count == 0 || run.count > span.elements - next)
      throw std::invalid_argument("the states of a span are runs of elements one after the other");
    next += run.count;
    if (run.master_format == kernels::MasterFormat::kSplit && options.param_dtype != DType::kBF16)
      throw std::invalid_argument("only masters of bf16 parameters can be split");
    expect_place(table, span, run, run.master, kernels::itemsize(run.master_format), false);
    const auto expect_moment = [&](const StatePlace& place, MomentFormat format) {
      expect_place(table, span, run, place, kernels::itemsize(format), format == MomentFormat::kInt8);
    };
    if (moments >= 1) expect_moment(run.exp_avg, run.exp_avg_format);
    if (moments >= 2) expect_moment(run.exp_avg_sq, run.exp_avg_sq_format);
  }
  if (next != span.elements) throw std::invalid_argument("a span has states for all of its elements");
}

// Workers index pages by element without looking back, so what does not fit is refused here.
void expect_valid(const PageTable& table, const Span& span, const UpdaterOptions& options) {
  const std::uint64_t param_elements = table.host().page_bytes() / itemsize(options.param_dtype);
  if (span.elements == 0 || span.elements > param_elements)
    throw std::invalid_argument("a span has from 1 element to a PARAM page of them, not " +
                                std::to_string(span.elements));
  expect_runs(table, span, options);
  expect_pages(table, "GRAD", span.grad, span.elements, options.grad_page_elements, itemsize(options.grad_dtype));
  if ((span.param != pages::kNoPage) == (span.device_param != nullptr))
    throw std::invalid_argument("a span's parameters are on one page or at one device address");
  if (span.param != pages::kNoPage)
    expect_pages(table, "PARAM", {span.param}, span.elements, param_elements, itemsize(options.param_dtype));
}

// A sweep exchanges frames: of parameters beside their readers, and of gradients.
void expect_sweepable(const PageTable& table, const Span& span, const UpdaterOptions& options) {
  const auto in_pool = [&](PageId page) {
    const pages::PageInfo info = table.info(page);
    return info.home == Home::kHost && info.fixed == nullptr;
  };
  if (options.grad_dtype != DType::kF32) throw std::invalid_argument("gradients that are added up are fp32");
  if (!span.step_grad.empty())
    expect_pages(table, "GRAD", span.step_grad, span.elements, options.grad_page_elements,
                 itemsize(options.grad_dtype));
  std::vector<PageId> exchanged = span.grad;
  exchanged.insert(exchanged.end(), span.step_grad.begin(), span.step_grad.end());
  if (span.param == pages::kNoPage || !in_pool(span.param) || !std::all_of(exchanged.begin(), exchanged.end(), in_pool))
    throw std::invalid_argument("parameters and gradients of a sweep live in the host tier");
}

id_t this_thread() { return static_cast<id_t>(syscall(SYS_gettid)); }

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

}  // namespace

void Updater::Task::set_error(const std::exception_ptr& error, bool published) const {
  if (batch->tickets.done == nullptr) return;  // swept
  if (!published) batch->tickets.published->set_error(error);
  batch->tickets.done->set_error(error);
}

Updater::Updater(PageTable& table, std::vector<std::unique_ptr<io::Engine>> engines, std::vector<Span> spans,
                 const UpdaterOptions& options, pages::Fetcher* fetcher)
    : table_(table), fetcher_(fetcher), spans_(std::move(spans)), options_(options), states_(spans_.size()) {
  if (engines.empty() || options_.ring_depth == 0 || options_.ring_depth > kMostRingDepth || options_.write_depth == 0)
    throw std::invalid_argument("an updater has 1 thread or more, and a ring of 1 to " +
                                std::to_string(kMostRingDepth) + " spans for each, of which 1 or more may be written");
  const std::uint64_t most = table.host().page_bytes() / itemsize(options_.grad_dtype);
  if (options_.grad_page_elements == 0) options_.grad_page_elements = most;
  if (options_.grad_page_elements > most || options_.grad_page_elements % kernels::kBlock8 != 0)
    throw std::invalid_argument("a GRAD page holds a multiple of 128 elements, at most " + std::to_string(most));
  for (const Span& span : spans_) expect_valid(table, span, options_);
  if (options_.sweep) {
    for (const Span& span : spans_) expect_sweepable(table, span, options_);
    sweep_ =
        std::make_unique<Sweep>(table, spans_, *options_.sweep, options_.grad_page_elements, options_.deadline_seconds);
    process_niceness_ = getpriority(PRIO_PROCESS, this_thread());
    sweep_->on_waiting = [this](bool somebody) { give_way(somebody ? 0 : options_.sweep->niceness); };
    sweep_->on_gradients = [this] {
      {
        std::lock_guard lock(mutex_);
      }
      arrived_.notify_all();
    };
  }
  const std::size_t frames = frames_per_slot(table, spans_, sweep_ != nullptr);
  for (auto& engine : engines) {
    const auto index = static_cast<std::uint32_t>(workers_.size());
    workers_.push_back(std::make_unique<Worker>(*this, index, std::move(engine)));
    workers_.back()->take_frames(frames);
  }
  try {
    for (auto& worker : workers_)
      threads_.emplace_back([this, &worker, index = threads_.size()] {
        timeline::name_lane("updater " + std::to_string(index));
        if (sweep_) join_sweep();
        run(*worker);
      });
  } catch (...) {
    stop();  // a thread that is destroyed while it runs would end the process
    throw;
  }
}

void Updater::join_sweep() {
  {
    std::lock_guard lock(niceness_mutex_);
    sweepers_.push_back(this_thread());
  }
  give_way(options_.sweep->niceness);
}

// Computing goes first where both want a core, but not while it waits for these threads. What the system refuses (to go
// back takes a privilege) is a slower step and nothing else, so the results are not read.
void Updater::give_way(int niceness) {
  std::lock_guard lock(niceness_mutex_);
  for (const id_t thread : sweepers_) (void)setpriority(PRIO_PROCESS, thread, process_niceness_ + niceness);
}

void Updater::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  if (sweep_) sweep_->end_replay();  // what was taken and waits for its use is published
  arrived_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

Updater::~Updater() {
  stop();
  // What was queued and never started must not leave its waiters behind.
  const auto closed = std::make_exception_ptr(std::runtime_error("the updater was closed"));
  for (const auto& [rank, tasks] : queue_)
    for (const Task& task : tasks) fail(task, closed);
}

void Updater::fail(const Task& task, const std::exception_ptr& error) {
  task.set_error(error, false);
  give_up_publish(task.work.span);
  {
    std::lock_guard lock(mutex_);
    states_[task.work.span].open = false;
  }
  task.batch->tickets.published->finish_part();
  task.batch->tickets.done->finish_part();
}

void Updater::give_up_publish(std::uint32_t span) {
  if (spans_[span].param == pages::kNoPage) return;
  table_.give_up_publish(spans_[span].param);
  if (fetcher_ != nullptr) fetcher_->look_for_errors();
}

std::size_t Updater::frames_per_slot(const PageTable& table, const std::vector<Span>& spans, bool swept) {
  std::size_t most = 0;
  for (const Span& span : spans) {
    std::size_t frames = span.param != pages::kNoPage ? 1 : 0;
    for (const auto* ids : {&span.states, &span.grad})
      for (const PageId page : *ids) frames += table.info(page).home == Home::kSsd || (swept && ids == &span.grad);
    most = std::max(most, frames);
  }
  return most;
}

Sweep& Updater::sweep() {
  if (!sweep_) throw std::logic_error("this updater's gradients are submitted");
  return *sweep_;
}

void Updater::hand_over(const std::vector<Sweep::Piece>& pieces, const std::vector<kernels::Hyper>& hypers,
                        bool from_step) {
  for (const Sweep::Piece& piece : pieces) {
    expect_valid({piece.span, piece.segments}, spans_, hypers);
    if (piece.segments.empty() || std::any_of(piece.segments.begin(), piece.segments.end(),
                                              [](const Segment& segment) { return segment.count == 0; }))
      throw std::invalid_argument("a gradient that is handed over has elements, and so has each part of it");
    if (from_step && spans_[piece.span].step_grad.empty())
      throw std::invalid_argument("span " + std::to_string(piece.span) + " has no pages for a step's gradient");
  }
  for (const kernels::Hyper& hyper : hypers)
    if (hyper.rule != options_.rule) throw std::invalid_argument("hyperparameters of another rule than the updater's");
  sweep().hand_over(pieces, hypers, from_step);
}

Tickets Updater::submit(std::string what, std::vector<Work> work, std::vector<kernels::Hyper> hypers,
                        std::uint32_t rank) {
  if (sweep_) throw std::logic_error("this updater takes gradients out of accumulators");
  for (const Work& item : work) expect_valid(item, spans_, hypers);
  for (const kernels::Hyper& hyper : hypers)
    if (hyper.rule != options_.rule) throw std::invalid_argument("hyperparameters of another rule than the updater's");
  const Tickets tickets{std::make_shared<Ticket>(what, work.size()), std::make_shared<Ticket>(what, work.size())};
  const auto batch = std::make_shared<Batch>(Batch{tickets, std::move(hypers), rank});
  {
    std::unique_lock lock(mutex_);
    for (std::size_t i = 0; i < work.size(); ++i) {
      if (states_[work[i].span].open) {
        for (std::size_t k = 0; k < i; ++k) states_[work[k].span].open = false;
        throw std::logic_error("span " + std::to_string(work[i].span) + " is submitted before its last update is done");
      }
      states_[work[i].span].open = true;
    }
    for (Work& item : work) {
      const Span& span = spans_[item.span];
      if (span.param != pages::kNoPage) table_.expect_publish(span.param);
      // Not to be read ahead any more: it would be for the step after, when the next expectation replaces this one.
      if (const auto found = std::find(expected_.begin(), expected_.end(), item.span); found != expected_.end())
        expected_.erase(found);
      const std::uint32_t holder = states_[item.span].holder;
      if (holder != kNobody)
        workers_[holder]->adopt({batch, std::move(item)}, lock);
      else
        queue_[rank].push_back({batch, std::move(item)});
    }
  }
  arrived_.notify_all();
  return tickets;
}

void Updater::expect(std::vector<std::uint32_t> spans) {
  for (const std::uint32_t span : spans)
    if (span >= spans_.size()) throw std::invalid_argument("no span " + std::to_string(span));
  {
    std::lock_guard lock(mutex_);
    ++epoch_;
    expected_.clear();
    for (const std::uint32_t span : spans) {
      states_[span].expected_in = epoch_;
      if (states_[span].holder == kNobody) expected_.push_back(span);
    }
  }
  arrived_.notify_all();
}

void Updater::recall() {
  expect({});
  std::unique_lock lock(mutex_);
  if (!wait_while_running(recalled_, lock, options_.deadline_seconds, [this] { return ahead_count_ == 0; }))
    throw DeadlineError("waited " + std::to_string(options_.deadline_seconds) +
                        " s for optimizer states that are being read ahead");
}

Utilisation Updater::utilisation() const {
  std::lock_guard lock(mutex_);
  Utilisation now = totals_;
  if (sweep_) now.gradients = sweep_->counts();
  return now;
}

void Updater::run(Worker& worker) {
  while (true) {
    {
      Worker::Lock lock(mutex_);
      if (stopping_ && !worker.has_tasks() && !worker.waits_for_io()) return;
      if (!worker.take_work(lock) && !worker.has_something_to_do(lock)) {
        const timeline::Scope scope(timeline::What::kWaitWork);
        arrived_.wait(lock);
        continue;
      }
    }
    try {
      worker.wait_for_io();
    } catch (...) {
      // The device does not answer. The waiters learn it from their own deadlines, which name the unit; the frames stay
      // with the kernel, so this thread may neither reuse nor release them.
      std::unique_lock lock(mutex_);
      if (!failed_) failed_ = std::current_exception();
      if (sweep_) sweep_->fail(failed_);
      if (stopping_) {
        const std::exception_ptr failed = failed_;
        lock.unlock();
        worker.give_up(failed);
        return;
      }
    }
    worker.write_computed();
    worker.compute_one();
    worker.write_computed();
  }
}

}  // namespace angelptm::update
