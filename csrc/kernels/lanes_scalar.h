// The vector-traits type of width one: the reference, and the tails of the SIMD kernels.
//
// Included by every kernel file after that file's target pragma, so all is of internal linkage: a copy compiled for
// AVX-512 must never be the one that the linker keeps for the baseline. For the same reason nothing here or in the loop
// headers instantiates a template of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace angelptm::kernels {
namespace {

struct ScalarLanes {
  using Float = float;
  using Double = double;
  static constexpr std::size_t kFloats = 1;
  static constexpr std::size_t kDoubles = 1;

  static Float load(const float* from) { return *from; }
  static Float load(const std::uint16_t* from) { return bf16_to_f32(*from); }
  static void store(float* to, Float x) { *to = x; }
  static void store(std::uint16_t* to, Float rounded) {
    *to = static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, rounded) >> 16);
  }
  // On SIMD lanes: aligned to the bytes stored, not read into cache, ordered before later stores only by fence().
  static void store_past_cache(float* to, Float x) { store(to, x); }
  static void store_past_cache(std::uint16_t* to, Float rounded) { store(to, rounded); }
  static void fence() {}
  static Float all(float x) { return x; }

  static Float add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float div(Float a, Float b) { return a / b; }
  static Float sqrt(Float a) { return __builtin_sqrtf(a); }
  // x with the sign of `of`; zero where `of` is zero or NaN, as torch.sign.
  static Float signed_like(Float x, Float of) { return of > 0 ? x : of < 0 ? -x : 0.0f; }

  static Float one_nan(Float a) { return a != a ? __builtin_bit_cast(float, 0x7fc00000u) : a; }
  // The nearest bf16, ties to even, of any number or the one NaN (whose low bits are zero, so no carry reaches it).
  static Float to_bf16(Float a) {
    const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, a);
    return __builtin_bit_cast(float, (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  }

  // sums[0 .. kFloats / kDoubles) += squares of a, exact products in double.
  static void add_squares(Double* sums, Float a) { sums[0] += static_cast<double>(a) * static_cast<double>(a); }
  static Double zero() { return 0.0; }
  static void store(double* to, Double a) { *to = a; }
};

}  // namespace
}  // namespace angelptm::kernels
