#include "kernels/isa.h"

#ifdef ANGELPTM_X86_SIMD

// What has external linkage comes before the pragma, so that its inline functions are the baseline's.
#include "kernels/leaf_sums.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#include "kernels/gradient_loop.h"
#include "kernels/lanes_avx512.h"

namespace angelptm::kernels {

GradStats accumulate_avx512(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::size_t count, bool add,
                            std::uint64_t first_element) {
  return accumulate_lanes<Avx512Lanes>(dst, dst_dtype, src, src_dtype, count, add, first_element);
}

}  // namespace angelptm::kernels

#endif
