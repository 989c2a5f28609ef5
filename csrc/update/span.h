// What is updated at once: the elements of one PARAM page, and where everything
// about them lives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pages/page_table.h"

namespace angelptm::update {

using pages::PageId;

// Fixed for the life of the run.
struct Span {
  std::uint64_t elements = 0;
  std::vector<PageId> master, exp_avg, exp_avg_sq;  // page k holds elements [k, k + 1) × page_bytes / 4
  std::vector<PageId> grad;                         // page k holds elements [k, k + 1) × page_bytes / itemsize(grad)
  PageId param = pages::kNoPage;                    // published here ...
  std::byte* device_param = nullptr;                // ... or written here, when the parameters live on the device
  std::vector<PageId> step_grad = {};  // like grad: where a step's gradient is until it is known that it counts
};

// Elements [start, start + count) of a span that share one set of hyperparameters. Elements in no run keep their state.
struct Segment {
  std::uint64_t start, count;
  std::uint32_t hyper;
};

}  // namespace angelptm::update
