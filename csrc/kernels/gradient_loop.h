// One pass that copies or adds a gradient and squares what it stored; included after lanes_*.h (see the note on linkage
// in lanes_scalar.h).
#pragma once

#include "kernels/gradient.h"
#include "kernels/lanes_scalar.h"
#include "kernels/leaf_sums.h"

namespace angelptm::kernels {
namespace {

constexpr std::size_t kLanes = 16;  // of a leaf's sum, whatever the width of L

// One vector: dst = src or dst + src; returns the values as stored.
template <class L, bool kAdd, class Dst, class Src>
inline typename L::Float put(Dst* dst, const Src* src) {
  typename L::Float value = L::load(src);
  if constexpr (kAdd) value = L::add(L::load(dst), value);
  value = L::one_nan(value);
  if constexpr (sizeof(Dst) == 2) value = L::to_bf16(value);
  L::store(dst, value);
  return value;
}

// The piece of one leaf, `count` <= kBlock elements.
template <class L, bool kAdd, class Dst, class Src>
double sum_piece(Dst* dst, const Src* src, std::size_t count) {
  constexpr std::size_t kSums = kLanes / L::kDoubles;
  constexpr std::size_t kVectors = kLanes / L::kFloats;
  typename L::Double sums[kSums];
  for (std::size_t k = 0; k < kSums; ++k) sums[k] = L::zero();
  std::size_t i = 0;
  for (; count - i >= kLanes; i += kLanes) {
#pragma GCC unroll 16
    for (std::size_t k = 0; k < kVectors; ++k) {
      const std::size_t at = i + k * L::kFloats;
      L::add_squares(sums + k * (L::kFloats / L::kDoubles), put<L, kAdd>(dst + at, src + at));
    }
  }
  double lanes[kLanes];
  for (std::size_t k = 0; k < kSums; ++k) L::store(lanes + k * L::kDoubles, sums[k]);
  for (; i < count; ++i) ScalarLanes::add_squares(lanes + i % kLanes, put<ScalarLanes, kAdd>(dst + i, src + i));
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

template <class L, bool kAdd, class Dst, class Src>
GradStats pass(Dst* dst, const Src* src, std::size_t count, std::uint64_t first_element) {
  LeafSums leaves(first_element);
  for (std::size_t i = 0; i < count;) {
    const std::size_t piece = leaves.piece(count - i);
    leaves.add(sum_piece<L, kAdd>(dst + i, src + i, piece), piece);
    i += piece;
  }
  return leaves.stats();
}

template <class L, class Dst, class Src>
GradStats pass_typed(void* dst, const void* src, std::size_t count, bool add, std::uint64_t first_element) {
  Dst* to = static_cast<Dst*>(dst);
  const Src* from = static_cast<const Src*>(src);
  return add ? pass<L, true>(to, from, count, first_element) : pass<L, false>(to, from, count, first_element);
}

template <class L>
GradStats accumulate_lanes(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::size_t count, bool add,
                           std::uint64_t first_element) {
  if (dst_dtype == DType::kF32) {
    if (src_dtype == DType::kF32) return pass_typed<L, float, float>(dst, src, count, add, first_element);
    return pass_typed<L, float, std::uint16_t>(dst, src, count, add, first_element);
  }
  if (src_dtype == DType::kF32) return pass_typed<L, std::uint16_t, float>(dst, src, count, add, first_element);
  return pass_typed<L, std::uint16_t, std::uint16_t>(dst, src, count, add, first_element);
}

}  // namespace
}  // namespace angelptm::kernels
