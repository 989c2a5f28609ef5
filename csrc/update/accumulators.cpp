#include "update/accumulators.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "kernels/gradient.h"

namespace angelptm::update {

namespace {

constexpr int kTriesBeforeYield = 64;
constexpr std::size_t kMostStepsAtOnce = 4;

// 1 + ratio + ... + ratio^(count - 1)
double powers(double ratio, std::size_t count) {
  double sum = 0, term = 1;
  for (std::size_t i = 0; i < count; ++i, term *= ratio) sum += term;
  return sum;
}

}  // namespace

// Note "one update for several gradients": n steps with the gradients g1 ... gn, none of which has seen the parameters
// that the one before it made, are applied as n steps with their mean. The averages of n such steps are closed forms
// (beta^n, and for momentum a geometric sum), and their sizes of step add up; only that each of the n steps would have
// divided by an exp_avg_sq of its own is lost. Bias corrections are those of the newest step, which is what beta^n
// makes them. One direction is not followed for more than four steps: where updates come so late that more gradients
// gather, longer strides made small models diverge.
kernels::Hyper collapsed(const std::vector<kernels::Hyper>& hypers, double scale, Combine combine) {
  kernels::Hyper one = hypers.back();
  one.grad_scale = scale;
  const std::size_t count = hypers.size();
  if (count == 1 || combine == Combine::kSum) return one;
  one.grad_scale = scale / static_cast<double>(count);
  one.lr = 0;
  double decay = 0;
  for (const kernels::Hyper& hyper : hypers) {
    one.lr += hyper.lr;
    decay += hyper.lr * hyper.weight_decay;
  }
  const double stride = count > kMostStepsAtOnce ? static_cast<double>(kMostStepsAtOnce) / count : 1;
  one.lr *= stride;
  decay *= stride;
  switch (one.rule) {
    case kernels::Rule::kAdamW:
      one.beta1 = one.beta2 = 1;
      for (const kernels::Hyper& hyper : hypers) {
        one.beta1 *= hyper.beta1;
        one.beta2 *= hyper.beta2;
      }
      one.weight_decay = one.lr == 0 ? 0 : decay / one.lr;
      break;
    case kernels::Rule::kLion:
      one.beta2 = std::pow(one.beta2, static_cast<double>(count));
      one.weight_decay = one.lr == 0 ? 0 : decay / one.lr;
      break;
    case kernels::Rule::kSgd:
      if (one.beta1 == 0) break;
      one.first_step = false;
      if (hypers.front().first_step)  // whose momentum is the gradient itself, undamped, after one of zero
        one.dampening = 1 - std::pow(one.beta1, static_cast<double>(count - 1)) -
                        (1 - one.dampening) * powers(one.beta1, count - 1);
      else
        one.dampening = 1 - (1 - one.dampening) * powers(one.beta1, count);
      one.beta1 = std::pow(one.beta1, static_cast<double>(count));
      break;
  }
  return one;
}

Accumulators::Accumulators(pages::PageTable& table, const std::vector<Span>& spans, Combine combine,
                           std::uint64_t grad_page_elements)
    : table_(table),
      spans_(spans),
      combine_(combine),
      page_elements_(grad_page_elements),
      boxes_(std::make_unique<Box[]>(spans.size())) {}

// A worker has a box for less than a microsecond, so the computing thread does not sleep for it.
void Accumulators::enter(std::uint32_t span) {
  std::atomic<State>& state = boxes_[span].state;
  for (int tries = 0;; ++tries) {
    State found = state.load();
    if (found == State::kHeld) throw std::logic_error("span " + std::to_string(span) + ": its box is held already");
    if (found != State::kBeingTaken && state.compare_exchange_weak(found, State::kHeld)) return;
    if (tries >= kTriesBeforeYield) std::this_thread::yield();
  }
}

void Accumulators::leave(std::uint32_t span) {
  Box& box = boxes_[span];
  box.state.store(box.runs.empty() ? State::kEmpty : State::kFull);
}

void Accumulators::open(std::uint32_t span) {
  enter(span);
  for (Run& run : boxes_[span].runs) {
    if (run.scale == 1) continue;
    for_pieces(run.start, run.count, [&](std::uint64_t page, std::uint64_t first, std::uint64_t part) {
      kernels::add_scaled(grad(spans_[span].grad, page, first), static_cast<float>(run.scale), nullptr, 0, part);
    });
    run.scale = 1;
  }
}

bool Accumulators::try_open_empty(std::uint32_t span) {
  State empty = State::kEmpty;
  return boxes_[span].state.compare_exchange_strong(empty, State::kHeld);
}

std::vector<Accumulators::Range> Accumulators::ranges(std::uint32_t span) const {
  std::vector<Range> found;
  for (const Run& run : boxes_[span].runs) found.emplace_back(run.start, run.count);
  return found;
}

void Accumulators::put_back(std::uint32_t span) { leave(span); }

// Cuts the runs of a box and new segments at each other's borders. `on_both` gets start, count, the run's scale and the
// new gradient's where both have elements, and returns the scale of the sum; `on_new` gets start and count.
template <typename Both, typename New>
void Accumulators::merge(Box& box, const std::vector<Segment>& segments, const std::vector<kernels::Hyper>& hypers,
                         const Both& on_both, const New& on_new) {
  std::vector<std::uint64_t> cuts;
  for (const Run& run : box.runs) cuts.insert(cuts.end(), {run.start, run.start + run.count});
  for (const Segment& segment : segments) cuts.insert(cuts.end(), {segment.start, segment.start + segment.count});
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<Run> merged;
  std::size_t old = 0, next = 0;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    const std::uint64_t start = cuts[i], count = cuts[i + 1] - start;
    while (old < box.runs.size() && box.runs[old].start + box.runs[old].count <= start) ++old;
    while (next < segments.size() && segments[next].start + segments[next].count <= start) ++next;
    const bool has_old = old < box.runs.size() && box.runs[old].start <= start;
    const bool has_new = next < segments.size() && segments[next].start <= start;
    if (!has_old && !has_new) continue;
    Run run{start, count, 1, {}};
    if (has_old) {
      run.scale = box.runs[old].scale;
      run.hypers = box.runs[old].hypers;
    }
    if (has_new) {
      const kernels::Hyper& hyper = hypers[segments[next].hyper];
      run.scale = has_old ? on_both(start, count, run.scale, hyper.grad_scale) : hyper.grad_scale;
      if (!has_old) on_new(start, count);
      run.hypers.push_back(hyper);
    }
    merged.push_back(std::move(run));
  }
  box.runs = std::move(merged);
}

void Accumulators::hand_over(std::uint32_t span, const std::vector<Segment>& segments,
                             const std::vector<kernels::Hyper>& hypers) {
  Box& box = boxes_[span];
  if (box.state.load() != State::kHeld)
    throw std::logic_error("span " + std::to_string(span) + ": a gradient is handed over of a box that is not held");
  merge(
      box, segments, hypers,
      [](std::uint64_t, std::uint64_t, double scale, double added) {
        if (scale != added) throw std::logic_error("gradients of different scales were added up");
        return scale;
      },
      [](std::uint64_t, std::uint64_t) {});
  box.gradients.fetch_add(1);
  leave(span);
}

// Elements [start, start + count) page by page: index of the page, first element in it, count.
template <typename Piece>
void Accumulators::for_pieces(std::uint64_t start, std::uint64_t count, const Piece& piece) const {
  while (count > 0) {
    const std::uint64_t page = start / page_elements_, first = start % page_elements_;
    const std::uint64_t part = std::min(count, page_elements_ - first);
    piece(page, first, part);
    start += part;
    count -= part;
  }
}

void Accumulators::add(std::uint32_t span_index, const std::vector<Segment>& segments,
                       const std::vector<kernels::Hyper>& hypers) {
  const Span& span = spans_[span_index];
  Box& box = boxes_[span_index];
  enter(span_index);
  if (box.runs.empty()) {
    for (std::size_t page = 0; page < span.grad.size(); ++page)
      table_.exchange_frames(span.grad[page], span.step_grad[page]);
    merge(
        box, segments, hypers, [](std::uint64_t, std::uint64_t, double scale, double) { return scale; },
        [](std::uint64_t, std::uint64_t) {});
  } else {
    merge(
        box, segments, hypers,
        [&](std::uint64_t start, std::uint64_t count, double scale, double added) {
          for_pieces(start, count, [&](std::uint64_t page, std::uint64_t first, std::uint64_t part) {
            kernels::add_scaled(grad(span.grad, page, first), static_cast<float>(scale),
                                grad(span.step_grad, page, first), static_cast<float>(added), part);
          });
          return 1.0;
        },
        [&](std::uint64_t start, std::uint64_t count) {
          for_pieces(start, count, [&](std::uint64_t page, std::uint64_t first, std::uint64_t part) {
            std::memcpy(grad(span.grad, page, first), grad(span.step_grad, page, first), part * sizeof(float));
          });
        });
  }
  box.gradients.fetch_add(1);
  leave(span_index);
}

float* Accumulators::grad(const std::vector<PageId>& pages, std::uint64_t page, std::uint64_t element) const {
  return reinterpret_cast<float*>(table_.address(table_.info(pages[page]))) + element;
}

bool Accumulators::take(std::uint32_t span_index, pages::Frame* frames, Taken& taken,
                        const std::function<void()>& note) {
  Box& box = boxes_[span_index];
  State full = State::kFull;
  if (!box.state.compare_exchange_strong(full, State::kBeingTaken)) return false;
  const Span& span = spans_[span_index];
  for (std::size_t page = 0; page < span.grad.size(); ++page)
    frames[page] = table_.publish_frame(span.grad[page], frames[page]);
  const std::vector<Run> runs = std::move(box.runs);
  box.runs.clear();
  taken.gradients = box.gradients.exchange(0);
  note();
  box.state.store(State::kEmpty);
  taken.segments.clear();
  taken.hypers.clear();
  for (const Run& run : runs) {
    taken.segments.push_back({run.start, run.count, static_cast<std::uint32_t>(taken.hypers.size())});
    taken.hypers.push_back(collapsed(run.hypers, run.scale, combine_));
  }
  return true;
}

}  // namespace angelptm::update
