#include "kernels/isa.h"

#ifdef ANGELPTM_X86_SIMD

// What has external linkage comes before the pragma, so that its inline functions are the baseline's.
#include "kernels/leaf_sums.h"

#pragma GCC target("avx2")
#include "kernels/gradient_loop.h"
#include "kernels/lanes_avx2.h"

namespace angelptm::kernels {

GradStats accumulate_avx2(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::size_t count, bool add,
                          std::uint64_t first_element) {
  return accumulate_lanes<Avx2Lanes>(dst, dst_dtype, src, src_dtype, count, add, first_element);
}

}  // namespace angelptm::kernels

#endif
