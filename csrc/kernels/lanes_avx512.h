// Sixteen floats, eight doubles (AVX-512 F, BW, DQ, VL). Same operations as ScalarLanes, where they are described.
// AVX512_BF16's own conversion is of no use: it flushes denormals to zero.
#pragma once

// GCC 12 takes the deliberately undefined pass-through operands of its own intrinsics for a mistake (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "kernels/lanes_scalar.h"

namespace angelptm::kernels {
namespace {

struct Avx512Lanes {
  using Float = __m512;
  using Int = __m512i;
  using Double = __m512d;
  static constexpr std::size_t kFloats = 16;
  static constexpr std::size_t kDoubles = 8;

  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  static Float load(const std::uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static void store(float* to, Float x) { _mm512_storeu_ps(to, x); }
  static void store(std::uint16_t* to, Float rounded) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), upper_halves(rounded));
  }
  static void store_past_cache(float* to, Float x) { _mm512_stream_ps(to, x); }
  static void store_past_cache(std::uint16_t* to, Float rounded) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), upper_halves(rounded));
  }
  static void fence() { _mm_sfence(); }
  static Float all(float x) { return _mm512_set1_ps(x); }

  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float sqrt(Float a) { return _mm512_sqrt_ps(a); }
  static Float signed_like(Float x, Float of) {
    const __mmask16 positive = _mm512_cmp_ps_mask(of, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __mmask16 negative = _mm512_cmp_ps_mask(of, _mm512_setzero_ps(), _CMP_LT_OQ);
    const Float negated = _mm512_xor_ps(x, _mm512_set1_ps(-0.0f));
    return _mm512_mask_mov_ps(_mm512_maskz_mov_ps(positive, x), negative, negated);
  }

  static Float one_nan(Float a) {
    const Float nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
    return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), nan);
  }
  static Float to_bf16(Float a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static Float to_bf16_away(Float a) { return of_bits(both(add(bits(a), all_bits(0x8000u)), all_bits(0xffff0000u))); }

  static Int bits(Float a) { return _mm512_castps_si512(a); }
  static Float of_bits(Int a) { return _mm512_castsi512_ps(a); }
  static Int all_bits(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Int count_from(std::uint32_t first) {
    return add(all_bits(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int mul(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static Int both(Int a, Int b) { return _mm512_and_si512(a, b); }
  static Int differing(Int a, Int b) { return _mm512_xor_si512(a, b); }
  static Int greater_of(Int a, Int b) { return _mm512_max_epu32(a, b); }
  template <int kBy>
  static Int left(Int a) {
    return _mm512_slli_epi32(a, kBy);
  }
  template <int kBy>
  static Int right(Int a) {
    return _mm512_srli_epi32(a, kBy);
  }
  static Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
  static Int truncate(Float a) { return _mm512_cvttps_epi32(a); }
  static Float abs(Float a) { return _mm512_abs_ps(a); }
  static Float lesser_of(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Int one_if_less(Float a, Float b) {
    return _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), all_bits(1));
  }
  static Float negative_if_odd(Float a, Int b) { return of_bits(differing(bits(a), left<31>(b))); }
  static Int load_codes(const std::int8_t* from) { return _mm512_cvtepi8_epi32(sixteen_bytes(from)); }
  static Int load_codes(const std::uint8_t* from) { return _mm512_cvtepu8_epi32(sixteen_bytes(from)); }
  static Int load_codes(const std::int16_t* from) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static void store_codes(std::int8_t* to, Int a) { store_low_bytes(to, a); }
  static void store_codes(std::uint8_t* to, Int a) { store_low_bytes(to, a); }
  static void store_codes(std::int16_t* to, Int a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(a));
  }
  static Int load_bits(const std::uint32_t* from) { return _mm512_loadu_si512(from); }
  static void store_bits(std::uint32_t* to, Int a) { _mm512_storeu_si512(to, a); }

  static void add_squares(Double* sums, Float a) {
    const Double low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
    const Double high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
    sums[0] = _mm512_add_pd(sums[0], _mm512_mul_pd(low, low));
    sums[1] = _mm512_add_pd(sums[1], _mm512_mul_pd(high, high));
  }
  static Double zero() { return _mm512_setzero_pd(); }
  static void store(double* to, Double a) { _mm512_storeu_pd(to, a); }

 private:
  static __m128i sixteen_bytes(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  static void store_low_bytes(void* to, Int a) { _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a)); }
  static __m256i upper_halves(Float a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a), 16)); }
};

}  // namespace
}  // namespace angelptm::kernels
