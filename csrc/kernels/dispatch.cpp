// Chooses the instruction set: the best of the CPU at start, or what a test asked for.
#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels/ceiling.h"
#include "kernels/gradient.h"
#include "kernels/isa.h"
#include "kernels/optimizer.h"

namespace angelptm::kernels {
namespace {

Isa best_isa() {
  if (isa_supported(Isa::kAvx512)) return Isa::kAvx512;
  if (isa_supported(Isa::kAvx2)) return Isa::kAvx2;
  return Isa::kScalar;
}

// Relaxed everywhere: the choice guards no other memory, and every choice gives the same bits.
std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

bool isa_supported(Isa isa) {
#ifdef ANGELPTM_X86_SIMD
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == Isa::kScalar;
#endif
}

Isa isa_in_use() { return chosen().load(std::memory_order_relaxed); }

void use_isa(Isa isa) {
  if (!isa_supported(isa)) throw std::invalid_argument(std::string("this CPU or build has no ") + isa_name(isa));
  chosen().store(isa, std::memory_order_relaxed);
}

void step(const Hyper& hyper, const Run& run) {
#ifdef ANGELPTM_X86_SIMD
  const Isa isa = isa_in_use();
  if (isa == Isa::kAvx512) return step_avx512(hyper, run);
  if (isa == Isa::kAvx2) return step_avx2(hyper, run);
#endif
  return step_scalar(hyper, run);
}

void memory_ceiling(const Run& run, bool past_cache) {
#ifdef ANGELPTM_X86_SIMD
  const Isa isa = isa_in_use();
  if (isa == Isa::kAvx512) return ceiling_avx512(run, past_cache);
  if (isa == Isa::kAvx2) return ceiling_avx2(run, past_cache);
#endif
  return ceiling_scalar(run, past_cache);
}

GradStats accumulate(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::size_t count, bool add,
                     std::uint64_t first_element) {
#ifdef ANGELPTM_X86_SIMD
  const Isa isa = isa_in_use();
  if (isa == Isa::kAvx512) return accumulate_avx512(dst, dst_dtype, src, src_dtype, count, add, first_element);
  if (isa == Isa::kAvx2) return accumulate_avx2(dst, dst_dtype, src, src_dtype, count, add, first_element);
#endif
  return accumulate_scalar(dst, dst_dtype, src, src_dtype, count, add, first_element);
}

}  // namespace angelptm::kernels
