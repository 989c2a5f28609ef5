// Folding: 256 bytes are a polynomial A of 2048 bits, and A * x^2048 + (the next 256) leaves the same remainder as both
// in a row. Each quarter of a register multiplies its halves by x^(2048 + 64) and x^2048 mod P, which fits 128 bits
// again; only at the end does the crc32 instruction take the remainder.
#include "io/crc32c_kinds.h"

#ifdef ANGELPTM_CRC32C_X86

#include <immintrin.h>

#include "io/crc32c_polynomial.h"

namespace angelptm::io {
namespace {

constexpr std::size_t kStripeBytes = 256;  // Four registers of 64, since a multiplication takes several cycles.

// What multiplies the first (higher) and the second half of 128 bits when they move `bits` bits up. As 64-bit words
// they have their 32 bits on top, and they are one power lower: see crc32c_polynomial.h, "product".
constexpr long long first_half(std::uint64_t bits) {
  return static_cast<long long>(static_cast<std::uint64_t>(polynomial::x_to_the(bits + 64 - 1)) << 32);
}
constexpr long long second_half(std::uint64_t bits) {
  return static_cast<long long>(static_cast<std::uint64_t>(polynomial::x_to_the(bits - 1)) << 32);
}

// Four times x^kBits, plus `next`.
template <std::uint64_t kBits>
[[gnu::target("avx512f,vpclmulqdq")]] inline __m512i fold(__m512i from, __m512i next) {
  constexpr long long kFirst = first_half(kBits), kSecond = second_half(kBits);
  const __m512i factors = _mm512_set_epi64(kSecond, kFirst, kSecond, kFirst, kSecond, kFirst, kSecond, kFirst);
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(from, factors, 0x00),
                                   _mm512_clmulepi64_epi128(from, factors, 0x11), next, 0x96);  // a ^ b ^ c
}

template <int kIndex>
[[gnu::target("avx512f")]] inline __m128i quarter(__m512i quarters) {
  // The plain form of this intrinsic has an undefined operand, which GCC 12 takes for a mistake (its bug 105593).
  return _mm512_maskz_extracti32x4_epi32(0xFF, quarters, kIndex);
}

// The four quarters as one: each is moved over those behind it, by 384, 256, 128 and no bits.
[[gnu::target("avx512f,vpclmulqdq")]] inline __m128i joined(__m512i quarters) {
  constexpr long long kFirst[] = {first_half(384), first_half(256), first_half(128)};
  constexpr long long kSecond[] = {second_half(384), second_half(256), second_half(128)};
  const __m512i factors = _mm512_set_epi64(0, 0, kSecond[2], kFirst[2], kSecond[1], kFirst[1], kSecond[0], kFirst[0]);
  const __m512i moved = _mm512_xor_si512(_mm512_clmulepi64_epi128(quarters, factors, 0x00),
                                         _mm512_clmulepi64_epi128(quarters, factors, 0x11));
  const __m128i sum = _mm_xor_si128(quarter<0>(moved), quarter<1>(moved));
  return _mm_xor_si128(_mm_xor_si128(sum, quarter<2>(moved)), quarter<3>(quarters));
}

[[gnu::target("avx512f,vpclmulqdq")]] inline __m512i load(const unsigned char* data) {
  return _mm512_loadu_si512(data);
}

// As many stripes as there are, of which there must be one; moves `data` and `bytes` past them.
[[gnu::target("avx512f,vpclmulqdq," ANGELPTM_CRC32C_SSE42)]] std::uint32_t stripes(std::uint32_t state,
                                                                                   const unsigned char*& data,
                                                                                   std::size_t& bytes) {
  // The register's former content is added to the first four bytes, as it would be one by one.
  __m512i a = _mm512_xor_si512(load(data), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
  __m512i b = load(data + 64), c = load(data + 128), d = load(data + 192);
  for (data += kStripeBytes, bytes -= kStripeBytes; bytes >= kStripeBytes;
       data += kStripeBytes, bytes -= kStripeBytes) {
    a = fold<8 * kStripeBytes>(a, load(data));
    b = fold<8 * kStripeBytes>(b, load(data + 64));
    c = fold<8 * kStripeBytes>(c, load(data + 128));
    d = fold<8 * kStripeBytes>(d, load(data + 192));
  }
  const __m128i rest = joined(fold<1024>(fold<512>(a, b), fold<512>(c, d)));
  const std::uint64_t wide = _mm_crc32_u64(0, static_cast<std::uint64_t>(_mm_cvtsi128_si64(rest)));
  return static_cast<std::uint32_t>(_mm_crc32_u64(wide, static_cast<std::uint64_t>(_mm_extract_epi64(rest, 1))));
}

}  // namespace

std::uint32_t crc32c_avx512(std::uint32_t state, const unsigned char* data, std::size_t bytes) {
  if (bytes >= kStripeBytes) state = stripes(state, data, bytes);
  return crc32c_sse42(state, data, bytes);
}

}  // namespace angelptm::io

#endif
