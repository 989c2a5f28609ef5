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

#ifdef ANGELPTM_X86_SIMD
template <class Kernel>
Kernel* choose(Kernel* scalar, Kernel* avx2, Kernel* avx512) {
  const Isa isa = isa_in_use();
  return isa == Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : scalar;
}
#endif

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

// Of one kernel's versions that for the instruction set in use.
#ifdef ANGELPTM_X86_SIMD
#define ANGELPTM_CHOOSE(name) choose(name##_scalar, name##_avx2, name##_avx512)
#else
#define ANGELPTM_CHOOSE(name) (&name##_scalar)
#endif

void step(const Hyper& hyper, const Run& run) { ANGELPTM_CHOOSE(step)(hyper, run); }

void step(const Hyper& hyper, const CompactRun& run) { ANGELPTM_CHOOSE(step_compact)(hyper, run); }

void memory_ceiling(const Run& run, bool past_cache) { ANGELPTM_CHOOSE(ceiling)(run, past_cache); }

GradStats accumulate(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::size_t count, bool add,
                     std::uint64_t first_element) {
  return ANGELPTM_CHOOSE(accumulate)(dst, dst_dtype, src, src_dtype, count, add, first_element);
}

void decode(Moment moment, const MomentCodes& codes, float* to, std::size_t count) {
  ANGELPTM_CHOOSE(decode)(moment, codes, to, count);
}

void encode(Moment moment, const float* from, const MomentCodes& codes, std::size_t count, Rounding rounding) {
  ANGELPTM_CHOOSE(encode)(moment, from, codes, count, rounding);
}

void join_master(const std::uint16_t* param, const std::int16_t* remainder, float* master, std::size_t count) {
  ANGELPTM_CHOOSE(join_master)(param, remainder, master, count);
}

void split_master(const float* master, std::uint16_t* param, std::int16_t* remainder, std::size_t count) {
  ANGELPTM_CHOOSE(split_master)(master, param, remainder, count);
}

}  // namespace angelptm::kernels
