// The entry points of each instruction set, for dispatch.cpp alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/codec.h"
#include "kernels/compact.h"
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
using StepCompact = void(const Hyper& hyper, const CompactRun& run);
using Decode = void(Moment moment, const MomentCodes& codes, float* to, std::size_t count);
using Encode = void(Moment moment, const float* from, const MomentCodes& codes, std::size_t count, Rounding rounding);
using JoinMaster = void(const std::uint16_t* param, const std::int16_t* remainder, float* master, std::size_t count);
using SplitMaster = void(const float* master, std::uint16_t* param, std::int16_t* remainder, std::size_t count);

Step step_scalar;
Ceiling ceiling_scalar;
Accumulate accumulate_scalar;
StepCompact step_compact_scalar;
Decode decode_scalar;
Encode encode_scalar;
JoinMaster join_master_scalar;
SplitMaster split_master_scalar;
#ifdef ANGELPTM_X86_SIMD
Step step_avx2, step_avx512;
Ceiling ceiling_avx2, ceiling_avx512;
Accumulate accumulate_avx2, accumulate_avx512;
StepCompact step_compact_avx2, step_compact_avx512;
Decode decode_avx2, decode_avx512;
Encode encode_avx2, encode_avx512;
JoinMaster join_master_avx2, join_master_avx512;
SplitMaster split_master_avx2, split_master_avx512;
#endif

}  // namespace angelptm::kernels
