#include "kernels/ceiling_loop.h"
#include "kernels/isa.h"
#include "kernels/optimizer_loop.h"

namespace angelptm::kernels {

void step_scalar(const Hyper& hyper, const Run& run) { step_lanes<ScalarLanes>(hyper, run); }

void ceiling_scalar(const Run& run, bool past_cache) {
  past_cache ? ceiling_lanes<ScalarLanes, true>(run) : ceiling_lanes<ScalarLanes, false>(run);
}

}  // namespace angelptm::kernels
