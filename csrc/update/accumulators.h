// Gradients that wait for their update, in the modes in which computing does
// not wait for updates: for each span a box with the sum of what was handed
// over, how many gradients that is, and what each of them asks for.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/optimizer.h"
#include "pages/page_table.h"
#include "update/span.h"

namespace angelptm::update {

// What several gradients of a span become. kMean: their average, applied for as many steps (see `collapsed`). kSum:
// their sum, applied as the gradient of the newest one's step.
enum class Combine : std::uint8_t { kMean, kSum };

// The hyperparameters of one update that stands for several gradients, whose sum times `scale` is the gradient. The
// oldest comes first. For one gradient: its own, unchanged.
kernels::Hyper collapsed(const std::vector<kernels::Hyper>& hypers, double scale, Combine combine);

// What a worker took out of a box.
struct Taken {
  std::uint32_t gradients = 0;  // handed over since the last take
  std::vector<Segment> segments;
  std::vector<kernels::Hyper> hypers;  // collapsed; segments name them by index
};

// A box is in one hand at a time: nobody's (empty or full), the computing thread's (held, until it has put a whole
// gradient into it), or for an instant a worker's. The sum lies in the span's GRAD pages, whose frames a worker
// exchanges for its own: it takes all that is there at once, and nothing is ever subtracted.
class Accumulators {
 public:
  // A range of a span that holds gradients: elements [start, start + count).
  using Range = std::pair<std::uint64_t, std::uint64_t>;

  Accumulators(pages::PageTable& table, const std::vector<Span>& spans, Combine combine,
               std::uint64_t grad_page_elements);

  // The computing thread's side.

  // Takes the box; what it holds already stays in its pages, to be added to: with a scale of 1.
  void open(std::uint32_t span);
  bool try_open_empty(std::uint32_t span);              // false where gradients wait in it
  std::vector<Range> ranges(std::uint32_t span) const;  // of a box that it holds
  // Puts a box back as it was taken; what was written to the pages of an empty one is nothing then.
  void put_back(std::uint32_t span);
  // One more gradient is in the pages of the box that it holds, in the elements of `segments`; elements that held
  // gradients before have the sum. Their scale (Hyper::grad_scale) must be that of the others there.
  void hand_over(std::uint32_t span, const std::vector<Segment>& segments, const std::vector<kernels::Hyper>& hypers);
  // The gradient is in the span's `step_grad` pages: exchanges them for those of an empty box, or adds them up. The box
  // is nobody's before and after.
  void add(std::uint32_t span, const std::vector<Segment>& segments, const std::vector<kernels::Hyper>& hypers);

  // A worker's side.

  bool is_full(std::uint32_t span) const { return boxes_[span].state.load() == State::kFull; }
  bool is_empty(std::uint32_t span) const { return boxes_[span].state.load() == State::kEmpty; }
  std::uint32_t waiting(std::uint32_t span) const { return boxes_[span].gradients.load(); }
  // Takes what is in the box and leaves it empty; the span's GRAD pages get `frames`, and `frames` what they had.
  // `note` is called before anybody else can have the box. False, with nothing changed, where the box is not full.
  bool take(std::uint32_t span, pages::Frame* frames, Taken& taken, const std::function<void()>& note);

 private:
  enum class State : std::uint8_t { kEmpty, kFull, kHeld, kBeingTaken };
  // Gradients of elements [start, start + count). Their sum times `scale` is in the pages.
  struct Run {
    std::uint64_t start, count;
    double scale;
    std::vector<kernels::Hyper> hypers;
  };
  struct Box {
    std::atomic<State> state{State::kEmpty};
    std::atomic<std::uint32_t> gradients{0};  // written by whoever has the box
    std::vector<Run> runs;                    // ascending; touched by whoever has the box
  };
  void enter(std::uint32_t span);  // empty or full → held
  void leave(std::uint32_t span);  // held → what it is
  template <typename Both, typename New>
  void merge(Box& box, const std::vector<Segment>& segments, const std::vector<kernels::Hyper>& hypers,
             const Both& on_both, const New& on_new);
  float* grad(const std::vector<PageId>& pages, std::uint64_t page, std::uint64_t element) const;
  template <typename Piece>
  void for_pieces(std::uint64_t start, std::uint64_t count, const Piece& piece) const;

  pages::PageTable& table_;
  const std::vector<Span>& spans_;
  Combine combine_;
  std::uint64_t page_elements_;
  std::unique_ptr<Box[]> boxes_;
};

}  // namespace angelptm::update
