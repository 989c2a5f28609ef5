#include "kernels/gradient.h"

#include <cmath>
#include <limits>

#include "kernels/leaf_sums.h"
#include "kernels/tree_sum.h"

namespace angelptm::kernels {

LeafSums::LeafSums(std::uint64_t first_element) : tree_(first_element / kBlock), next_(first_element) {}

std::size_t LeafSums::piece(std::size_t left) const {
  const std::size_t room = kBlock - static_cast<std::size_t>(next_ % kBlock);
  return left < room ? left : room;
}

void LeafSums::add(double sum_squares, std::size_t piece_count) {
  tree_.add(sum_squares);
  next_ += piece_count;
}

GradStats LeafSums::stats() const {
  // The square of a finite float is at most 1.2e77, so no sum of them reaches infinity in double, and an infinity or a
  // NaN among non-negative terms cannot be cancelled: the sum is finite exactly if every value is.
  const double sum = tree_.total();
  return {std::isnan(sum) ? std::numeric_limits<double>::quiet_NaN() : sum, std::isfinite(sum)};
}

// Plain code: memory is what bounds it, in whatever vectors the compiler finds.
void add_scaled(float* dst, float dst_scale, const float* src, float src_scale, std::size_t count) {
  if (src == nullptr)
    for (std::size_t i = 0; i < count; ++i) dst[i] *= dst_scale;
  else
    for (std::size_t i = 0; i < count; ++i) dst[i] = dst[i] * dst_scale + src[i] * src_scale;
}

double tree_sum(const double* values, std::size_t count, std::uint64_t first_index) {
  TreeSum tree(first_index);
  for (std::size_t i = 0; i < count; ++i) tree.add(values[i]);
  return tree.total();
}

}  // namespace angelptm::kernels
