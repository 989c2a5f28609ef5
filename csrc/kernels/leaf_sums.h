// Cuts a run of elements into the leaves of gradient.h's tree and sums them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/gradient.h"
#include "kernels/tree_sum.h"

namespace angelptm::kernels {

// Not inline: the SIMD files call the baseline's one copy instead of making their own.
class LeafSums {
 public:
  explicit LeafSums(std::uint64_t first_element);
  std::size_t piece(std::size_t left) const;  // elements, of `left`, that belong to the current leaf
  void add(double sum_squares, std::size_t piece_count);
  GradStats stats() const;

 private:
  TreeSum tree_;
  std::uint64_t next_;
};

}  // namespace angelptm::kernels
