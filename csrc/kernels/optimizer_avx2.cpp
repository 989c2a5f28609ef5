#include "kernels/isa.h"

#ifdef ANGELPTM_X86_SIMD

// What has external linkage comes before the pragma, so that its inline functions are the baseline's.
#include "kernels/factors.h"

#pragma GCC target("avx2")
#include "kernels/ceiling_loop.h"
#include "kernels/lanes_avx2.h"
#include "kernels/optimizer_loop.h"

namespace angelptm::kernels {

void step_avx2(const Hyper& hyper, const Run& run) { step_lanes<Avx2Lanes>(hyper, run); }

void ceiling_avx2(const Run& run, bool past_cache) {
  past_cache ? ceiling_lanes<Avx2Lanes, true>(run) : ceiling_lanes<Avx2Lanes, false>(run);
}

}  // namespace angelptm::kernels

#endif
