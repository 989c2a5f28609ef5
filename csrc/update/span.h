// What is updated at once: the elements of one PARAM page, and where everything
// about them lives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/codec.h"
#include "pages/page_table.h"

namespace angelptm::update {

using pages::PageId;

// Where a run of elements has one of its states: bytes from the start of the span's state page of that index. `scales`
// counts for int8 alone.
struct StatePlace {
  std::uint32_t page = 0, offset = 0, scales = 0;
};

// Elements [start, start + count) of a span: states in the same formats, each of them on one page. What the optimizer's
// rule does not keep has no place.
struct StateRun {
  std::uint64_t start = 0, count = 0;
  kernels::MasterFormat master_format = kernels::MasterFormat::kF32;
  kernels::MomentFormat exp_avg_format = kernels::MomentFormat::kF32;
  kernels::MomentFormat exp_avg_sq_format = kernels::MomentFormat::kF32;
  StatePlace master, exp_avg, exp_avg_sq;
};

// Fixed for the life of the run.
struct Span {
  std::uint64_t elements = 0;
  std::vector<PageId> states;                 // of all kinds
  std::vector<StateRun> runs;                 // ascending, one after the other: all elements of the span
  std::vector<PageId> grad;                   // page k holds elements [k, k + 1) × grad_page_elements
  PageId param = pages::kNoPage;              // published here ...
  std::byte* device_param = nullptr;          // ... or written here, when the parameters live on the device
  std::vector<PageId> step_grad = {};         // like grad: where a step's gradient is until it is known that it counts
  std::uint64_t unit = 0, first_element = 0;  // which elements of which unit it has, for random rounding

  // Whether masters are made of the former parameters too.
  bool has_split_masters() const {
    for (const StateRun& run : runs)
      if (run.master_format == kernels::MasterFormat::kSplit) return true;
    return false;
  }
};

// Elements [start, start + count) of a span that share one set of hyperparameters. Elements in no run keep their state.
struct Segment {
  std::uint64_t start, count;
  std::uint32_t hyper;
};

}  // namespace angelptm::update
