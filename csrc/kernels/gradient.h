// Gradient copy-out: copies or adds a gradient into its page and, in the same
// pass, yields the sum of squares and whether all values are finite, so that
// clipping and inf/nan checks cost no further pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace angelptm::kernels {

struct GradStats {
  double sum_squares;  // of the values as stored in dst after this call
  bool finite;         // every one of them
};

// Sums of squares are formed over a fixed tree, so that a norm does not depend
// on page size, tier or threads. Leaves: kBlock elements, aligned to multiples
// of kBlock in the unit's element space; within a leaf 16 double lanes (lane =
// index from the start of the piece mod 16), added as ((0+8)+(4+12))+... i.e.
// lane i with i+8, then i+4, i+2, i+1. Above: a binary tree over block indices,
// aligned at powers of two; an absent leaf counts as 0.0, which adding leaves exact.
constexpr std::size_t kBlock = 16384;

// dst (count,) of dst_dtype = add ? dst + src : src, added in fp32 and rounded to nearest even once.
// `first_element` is the index of dst[0] in the unit's element space; it decides where the leaves lie.
// A page holds a power of two of blocks and is aligned, so the result is a node of the tree.
GradStats accumulate(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::size_t count, bool add,
                     std::uint64_t first_element);

// dst (count,) = dst * dst_scale + src * src_scale, without fused multiply-add; without src, dst * dst_scale.
void add_scaled(float* dst, float dst_scale, const float* src, float src_scale, std::size_t count);

// The tree above the pages: values[i] is the node of the aligned group i of equal size. Also used for the leaves in
// accumulate.
double tree_sum(const double* values, std::size_t count, std::uint64_t first_index);

}  // namespace angelptm::kernels
