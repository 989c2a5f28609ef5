#include "kernels/isa.h"

#ifdef ANGELPTM_X86_SIMD

// What has external linkage comes before the pragma, so that its inline functions are the baseline's.
#include "kernels/compact.h"
#include "kernels/factors.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#include "kernels/ceiling_loop.h"
#include "kernels/compact_loop.h"
#include "kernels/lanes_avx512.h"
#include "kernels/optimizer_loop.h"

namespace angelptm::kernels {

void step_avx512(const Hyper& hyper, const Run& run) { step_lanes<Avx512Lanes>(hyper, run); }

void step_compact_avx512(const Hyper& hyper, const CompactRun& run) { step_compact_lanes<Avx512Lanes>(hyper, run); }

void decode_avx512(Moment moment, const MomentCodes& codes, float* to, std::size_t count) {
  Codec<Avx512Lanes>::decode(moment, codes, to, count);
}

void encode_avx512(Moment moment, const float* from, const MomentCodes& codes, std::size_t count, Rounding rounding) {
  Codec<Avx512Lanes>::encode(moment, from, codes, count, rounding);
}

void join_master_avx512(const std::uint16_t* param, const std::int16_t* remainder, float* master, std::size_t count) {
  join_lanes<Avx512Lanes>(param, remainder, master, count);
}

void split_master_avx512(const float* master, std::uint16_t* param, std::int16_t* remainder, std::size_t count) {
  split_lanes<Avx512Lanes>(master, param, remainder, count);
}

void ceiling_avx512(const Run& run, bool past_cache) {
  past_cache ? ceiling_lanes<Avx512Lanes, true>(run) : ceiling_lanes<Avx512Lanes, false>(run);
}

}  // namespace angelptm::kernels

#endif
