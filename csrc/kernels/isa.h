// The entry points of each instruction set, for dispatch.cpp alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/gradient.h"
#include "kernels/optimizer.h"

// GCC's target pragma is what lets one file hold code for a CPU better than the baseline's.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ANGELPTM_X86_SIMD 1
#endif

namespace angelptm::kernels {

using Step = void(const Hyper& hyper, const Run& run);
using Ceiling = void(const Run& run, bool past_cache);
using Accumulate = GradStats(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::size_t count, bool add,
                             std::uint64_t first_element);

Step step_scalar;
Ceiling ceiling_scalar;
Accumulate accumulate_scalar;
#ifdef ANGELPTM_X86_SIMD
Step step_avx2, step_avx512;
Ceiling ceiling_avx2, ceiling_avx512;
Accumulate accumulate_avx2, accumulate_avx512;
#endif

}  // namespace angelptm::kernels
