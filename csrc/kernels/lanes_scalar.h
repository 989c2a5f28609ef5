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
  using Int = std::uint32_t;  // of 32 bits, as many as floats
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
  // The same with ties away from zero (codec.h).
  static Float to_bf16_away(Float a) {
    return __builtin_bit_cast(float, (__builtin_bit_cast(std::uint32_t, a) + 0x8000u) & 0xffff0000u);
  }

  // Bits and integers, for the codes of compact states. Sums, products and shifts wrap; shifts are of unsigned numbers.
  static Int bits(Float a) { return __builtin_bit_cast(Int, a); }
  static Float of_bits(Int a) { return __builtin_bit_cast(Float, a); }
  static Int all_bits(std::uint32_t x) { return x; }
  static Int count_from(std::uint32_t first) { return first; }  // first, first + 1, ...
  static Int add(Int a, Int b) { return a + b; }
  static Int mul(Int a, Int b) { return a * b; }
  static Int both(Int a, Int b) { return a & b; }
  static Int differing(Int a, Int b) { return a ^ b; }
  static Int greater_of(Int a, Int b) { return a > b ? a : b; }  // unsigned
  template <int kBy>
  static Int left(Int a) {
    return a << kBy;
  }
  template <int kBy>
  static Int right(Int a) {
    return a >> kBy;
  }
  static Float to_float(Int a) { return static_cast<float>(static_cast<std::int32_t>(a)); }  // signed
  static Int truncate(Float a) { return static_cast<Int>(static_cast<std::int32_t>(a)); }    // a fits int32
  static Float abs(Float a) { return __builtin_fabsf(a); }
  static Float lesser_of(Float a, Float b) { return a < b ? a : b; }
  static Int one_if_less(Float a, Float b) { return a < b ? 1u : 0u; }
  static Float negative_if_odd(Float a, Int b) { return of_bits(bits(a) ^ (b << 31)); }
  static Int load_codes(const std::int8_t* from) { return static_cast<Int>(std::int32_t{*from}); }
  static Int load_codes(const std::uint8_t* from) { return *from; }
  static Int load_codes(const std::int16_t* from) { return static_cast<Int>(std::int32_t{*from}); }
  static void store_codes(std::int8_t* to, Int a) { *to = static_cast<std::int8_t>(a); }  // low bits
  static void store_codes(std::uint8_t* to, Int a) { *to = static_cast<std::uint8_t>(a); }
  static void store_codes(std::int16_t* to, Int a) { *to = static_cast<std::int16_t>(a); }
  static Int load_bits(const std::uint32_t* from) { return *from; }
  static void store_bits(std::uint32_t* to, Int a) { *to = a; }

  // sums[0 .. kFloats / kDoubles) += squares of a, exact products in double.
  static void add_squares(Double* sums, Float a) { sums[0] += static_cast<double>(a) * static_cast<double>(a); }
  static Double zero() { return 0.0; }
  static void store(double* to, Double a) { *to = a; }
};

}  // namespace
}  // namespace angelptm::kernels
