#include "kernels/isa.h"

#ifdef ANGELPTM_X86_SIMD

// What has external linkage comes before the pragma, so that its inline functions are the baseline's.
#include "kernels/factors.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#include "kernels/ceiling_loop.h"
#include "kernels/lanes_avx512.h"
#include "kernels/optimizer_loop.h"

namespace angelptm::kernels {

void step_avx512(const Hyper& hyper, const Run& run) { step_lanes<Avx512Lanes>(hyper, run); }

void ceiling_avx512(const Run& run, bool past_cache) {
  past_cache ? ceiling_lanes<Avx512Lanes, true>(run) : ceiling_lanes<Avx512Lanes, false>(run);
}

}  // namespace angelptm::kernels

#endif
