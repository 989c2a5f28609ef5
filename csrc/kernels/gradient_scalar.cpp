#include "kernels/gradient_loop.h"
#include "kernels/isa.h"

namespace angelptm::kernels {

GradStats accumulate_scalar(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::size_t count, bool add,
                            std::uint64_t first_element) {
  return accumulate_lanes<ScalarLanes>(dst, dst_dtype, src, src_dtype, count, add, first_element);
}

}  // namespace angelptm::kernels
