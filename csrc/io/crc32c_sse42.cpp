// The crc32 instruction takes eight bytes every cycle but gives its result after three, so three streams keep it busy.
#include "io/crc32c_kinds.h"

#ifdef ANGELPTM_CRC32C_X86

#include <immintrin.h>

#include <cstring>

#include "io/crc32c_polynomial.h"

namespace angelptm::io {
namespace {

constexpr std::size_t kLineBytes = 64;

// A stream is this long; three are joined once for each 3 * kLongBytes, and near the end for each 3 * kShortBytes. 65
// lines and not 64, so that what the three read at one time lies in different sets of the first cache.
constexpr std::size_t kLongBytes = 65 * kLineBytes, kShortBytes = 4 * kLineBytes;

std::uint64_t load(const unsigned char* data) {
  std::uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

// state * x^(8 * bytes), up to a reduction that crc32 does: on a word w it gives w * x^32 mod P, and the product has
// one x too many (see crc32c_polynomial.h, "product"), so the constant has 33 powers less.
template <std::size_t kBytes>
[[gnu::target(ANGELPTM_CRC32C_SSE42)]] inline std::uint64_t shifted(std::uint64_t state) {
  constexpr std::uint32_t kShift = polynomial::x_to_the(8 * kBytes - 33);
  const __m128i product =
      _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<long long>(state)), _mm_cvtsi64_si128(kShift), 0);
  return static_cast<std::uint64_t>(_mm_cvtsi128_si64(product));
}

// Takes as many times three streams of kBytes as there are; moves `data` and `bytes` past them.
template <std::size_t kBytes>
[[gnu::target(ANGELPTM_CRC32C_SSE42)]] inline std::uint64_t three_streams(std::uint64_t state,
                                                                          const unsigned char*& data,
                                                                          std::size_t& bytes) {
  static_assert(kBytes % kLineBytes == 0);
  for (; bytes >= 3 * kBytes; data += 3 * kBytes, bytes -= 3 * kBytes) {
    std::uint64_t second = 0, third = 0;
    // A stream is too short for the CPU to see where the next begins. Fetching the next three into the second cache
    // meanwhile doubled the speed from memory: 11 to 21 GB/s on an EPYC, and 13 when fetched into the first.
    const std::size_t ahead = bytes >= 6 * kBytes ? 3 * kBytes : 0;
    for (std::size_t line = 0; line < kBytes; line += kLineBytes) {
      for (std::size_t stream = 0; stream < 3 && kBytes == kLongBytes; ++stream) {
        _mm_prefetch(reinterpret_cast<const char*>(data + ahead + stream * kBytes + line), _MM_HINT_T1);
      }
      for (std::size_t i = line; i < line + kLineBytes; i += 8) {
        state = _mm_crc32_u64(state, load(data + i));
        second = _mm_crc32_u64(second, load(data + kBytes + i));
        third = _mm_crc32_u64(third, load(data + 2 * kBytes + i));
      }
    }
    state = _mm_crc32_u64(0, shifted<2 * kBytes>(state) ^ shifted<kBytes>(second)) ^ third;
  }
  return state;
}

}  // namespace

[[gnu::target(ANGELPTM_CRC32C_SSE42)]] std::uint32_t crc32c_sse42(std::uint32_t state, const unsigned char* data,
                                                                  std::size_t bytes) {
  std::uint64_t wide = three_streams<kLongBytes>(state, data, bytes);
  wide = three_streams<kShortBytes>(wide, data, bytes);
  for (; bytes >= 8; data += 8, bytes -= 8) wide = _mm_crc32_u64(wide, load(data));
  state = static_cast<std::uint32_t>(wide);
  for (; bytes; ++data, --bytes) state = _mm_crc32_u8(state, *data);
  return state;
}

}  // namespace angelptm::io

#endif
