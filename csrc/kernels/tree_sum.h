// The summation tree of gradient.h as a stream: leaves come in order of index, nothing is stored but one partial sum a
// level. Plain code for the baseline architecture; the kernels only hand leaves to it.
#pragma once

#include <array>
#include <cstdint>

namespace angelptm::kernels {

class TreeSum {
 public:
  explicit TreeSum(std::uint64_t first_index) : next_(first_index) {}

  void add(double node) {
    std::uint64_t index = next_++;
    int level = 0;
    // A right child (odd index) completes its parent. Its left sibling is the last node written at this level, or lies
    // before the first index and counts as the 0.0 that was there from the start.
    for (; index & 1; index >>= 1) node = left_[level++] + node;
    left_[level] = node;
  }

  // The root over all that came; what has not come counts as 0.0.
  double total() const {
    double node = 0.0;
    int level = 0;
    // The bits of the count are the left children that still wait for a right sibling.
    for (std::uint64_t count = next_; count != 0; count >>= 1, ++level) {
      if (count & 1) node = left_[level] + node;
    }
    return node;
  }

 private:
  std::uint64_t next_;
  std::array<double, 65> left_{};
};

}  // namespace angelptm::kernels
