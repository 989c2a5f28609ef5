#include "kernels/isa.h"

#ifdef ANGELPTM_X86_SIMD

// What has external linkage comes before the pragma, so that its inline functions are the baseline's.
#include "kernels/compact.h"
#include "kernels/factors.h"

#pragma GCC target("avx2")
#include "kernels/ceiling_loop.h"
#include "kernels/compact_loop.h"
#include "kernels/lanes_avx2.h"
#include "kernels/optimizer_loop.h"

namespace angelptm::kernels {

void step_avx2(const Hyper& hyper, const Run& run) { step_lanes<Avx2Lanes>(hyper, run); }

void step_compact_avx2(const Hyper& hyper, const CompactRun& run) { step_compact_lanes<Avx2Lanes>(hyper, run); }

void decode_avx2(Moment moment, const MomentCodes& codes, float* to, std::size_t count) {
  Codec<Avx2Lanes>::decode(moment, codes, to, count);
}

void encode_avx2(Moment moment, const float* from, const MomentCodes& codes, std::size_t count, Rounding rounding) {
  Codec<Avx2Lanes>::encode(moment, from, codes, count, rounding);
}

void join_master_avx2(const std::uint16_t* param, const std::int16_t* remainder, float* master, std::size_t count) {
  join_lanes<Avx2Lanes>(param, remainder, master, count);
}

void split_master_avx2(const float* master, std::uint16_t* param, std::int16_t* remainder, std::size_t count) {
  split_lanes<Avx2Lanes>(master, param, remainder, count);
}

void ceiling_avx2(const Run& run, bool past_cache) {
  past_cache ? ceiling_lanes<Avx2Lanes, true>(run) : ceiling_lanes<Avx2Lanes, false>(run);
}

}  // namespace angelptm::kernels

#endif
