#include "kernels/isa.h"
#include "kernels/optimizer_loop.h"

namespace angelptm::kernels {

void step_scalar(const Hyper& hyper, const Run& run) { step_lanes<ScalarLanes>(hyper, run); }

}  // namespace angelptm::kernels
