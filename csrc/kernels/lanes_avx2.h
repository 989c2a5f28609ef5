// Eight floats, four doubles (AVX2). Same operations as ScalarLanes, where they are described.
#pragma once

#include <immintrin.h>

#include "kernels/lanes_scalar.h"

namespace angelptm::kernels {
namespace {

struct Avx2Lanes {
  using Float = __m256;
  using Int = __m256i;
  using Double = __m256d;
  static constexpr std::size_t kFloats = 8;
  static constexpr std::size_t kDoubles = 4;

  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static Float load(const std::uint16_t* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static void store(float* to, Float x) { _mm256_storeu_ps(to, x); }
  static void store(std::uint16_t* to, Float rounded) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), upper_halves(rounded));
  }
  static void store_past_cache(float* to, Float x) { _mm256_stream_ps(to, x); }
  static void store_past_cache(std::uint16_t* to, Float rounded) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), upper_halves(rounded));
  }
  static void fence() { _mm_sfence(); }
  static Float all(float x) { return _mm256_set1_ps(x); }

  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float sqrt(Float a) { return _mm256_sqrt_ps(a); }
  static Float signed_like(Float x, Float of) {
    const Float negated = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
    const Float positive = _mm256_cmp_ps(of, _mm256_setzero_ps(), _CMP_GT_OQ);
    const Float negative = _mm256_cmp_ps(of, _mm256_setzero_ps(), _CMP_LT_OQ);
    return _mm256_or_ps(_mm256_and_ps(positive, x), _mm256_and_ps(negative, negated));
  }

  static Float one_nan(Float a) {
    const Float nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(a, nan, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  static Float to_bf16(Float a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static Float to_bf16_away(Float a) { return of_bits(both(add(bits(a), all_bits(0x8000u)), all_bits(0xffff0000u))); }

  static Int bits(Float a) { return _mm256_castps_si256(a); }
  static Float of_bits(Int a) { return _mm256_castsi256_ps(a); }
  static Int all_bits(std::uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static Int count_from(std::uint32_t first) { return add(all_bits(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int mul(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static Int both(Int a, Int b) { return _mm256_and_si256(a, b); }
  static Int differing(Int a, Int b) { return _mm256_xor_si256(a, b); }
  static Int greater_of(Int a, Int b) { return _mm256_max_epu32(a, b); }
  template <int kBy>
  static Int left(Int a) {
    return _mm256_slli_epi32(a, kBy);
  }
  template <int kBy>
  static Int right(Int a) {
    return _mm256_srli_epi32(a, kBy);
  }
  static Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
  static Int truncate(Float a) { return _mm256_cvttps_epi32(a); }
  static Float abs(Float a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static Float lesser_of(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Int one_if_less(Float a, Float b) { return right<31>(bits(_mm256_cmp_ps(a, b, _CMP_LT_OQ))); }
  static Float negative_if_odd(Float a, Int b) { return of_bits(differing(bits(a), left<31>(b))); }
  static Int load_codes(const std::int8_t* from) { return _mm256_cvtepi8_epi32(eight_bytes(from)); }
  static Int load_codes(const std::uint8_t* from) { return _mm256_cvtepu8_epi32(eight_bytes(from)); }
  static Int load_codes(const std::int16_t* from) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static void store_codes(std::int8_t* to, Int a) { store_low_bytes(to, a); }
  static void store_codes(std::uint8_t* to, Int a) { store_low_bytes(to, a); }
  static void store_codes(std::int16_t* to, Int a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), upper_halves(of_bits(left<16>(a))));
  }
  static Int load_bits(const std::uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static void store_bits(std::uint32_t* to, Int a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a); }

  static void add_squares(Double* sums, Float a) {
    const Double low = _mm256_cvtps_pd(_mm256_castps256_ps128(a));
    const Double high = _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
    sums[0] = _mm256_add_pd(sums[0], _mm256_mul_pd(low, low));
    sums[1] = _mm256_add_pd(sums[1], _mm256_mul_pd(high, high));
  }
  static Double zero() { return _mm256_setzero_pd(); }
  static void store(double* to, Double a) { _mm256_storeu_pd(to, a); }

 private:
  static __m128i eight_bytes(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
  static void store_low_bytes(void* to, Int a) {
    const __m128i halves = upper_halves(of_bits(left<16>(both(a, all_bits(0xff)))));
    _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
  }
  static __m128i upper_halves(Float a) {
    const __m256i halves = _mm256_srli_epi32(_mm256_castps_si256(a), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  }
};

}  // namespace
}  // namespace angelptm::kernels
