// The loop of ceiling.h; included after lanes_*.h (see the note on linkage in lanes_scalar.h). Unrolled by four, which
// measures a little faster than one; software prefetch measures slower than the hardware's.
#pragma once

#include "kernels/lanes_scalar.h"
#include "kernels/optimizer.h"

namespace angelptm::kernels {
namespace {

template <class L>
inline void add_in_place(float* to, typename L::Float x) {
  L::store(to, L::add(L::load(to), x));
}

template <class L, bool kPastCache, class Grad, class Param>
void ceiling_typed(const Run& run) {
  constexpr std::size_t kUnroll = 4;
  const Grad* grad = static_cast<const Grad*>(run.grad);
  Param* param = static_cast<Param*>(run.param);
  std::size_t i = 0;
  for (; run.count - i >= kUnroll * L::kFloats; i += kUnroll * L::kFloats) {
#pragma GCC unroll 4
    for (std::size_t k = 0; k < kUnroll; ++k) {
      const std::size_t at = i + k * L::kFloats;
      const typename L::Float g = L::load(grad + at);
      const typename L::Float master = L::add(L::load(run.master + at), g);
      add_in_place<L>(run.exp_avg + at, g);
      add_in_place<L>(run.exp_avg_sq + at, g);
      L::store(run.master + at, master);
      if constexpr (kPastCache) {
        L::store_past_cache(param + at, master);
      } else {
        L::store(param + at, master);
      }
    }
  }
  for (; i < run.count; ++i) {
    const float g = ScalarLanes::load(grad + i);
    add_in_place<ScalarLanes>(run.master + i, g);
    add_in_place<ScalarLanes>(run.exp_avg + i, g);
    add_in_place<ScalarLanes>(run.exp_avg_sq + i, g);
    ScalarLanes::store(param + i, run.master[i]);
  }
  if constexpr (kPastCache) L::fence();
}

template <class L, bool kPastCache>
void ceiling_lanes(const Run& run) {
  if (run.grad_dtype == DType::kF32) {
    if (run.param_dtype == DType::kF32) return ceiling_typed<L, kPastCache, float, float>(run);
    return ceiling_typed<L, kPastCache, float, std::uint16_t>(run);
  }
  if (run.param_dtype == DType::kF32) return ceiling_typed<L, kPastCache, std::uint16_t, float>(run);
  return ceiling_typed<L, kPastCache, std::uint16_t, std::uint16_t>(run);
}

}  // namespace
}  // namespace angelptm::kernels
