// The reference: eight bytes at once, each through a table of its own.
#include <array>
#include <bit>
#include <cstring>

#include "io/crc32c_kinds.h"
#include "io/crc32c_polynomial.h"

namespace angelptm::io {
namespace {

static_assert(std::endian::native == std::endian::little, "the first byte of a word must be its lowest");

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

// tables[k][b]: what byte b leaves in an empty register once k zero bytes have followed it. In the register's lowest
// byte, b stands for b * x^24, and each byte that goes through multiplies the register by x^8.
constexpr Tables make_tables() {
  Tables tables{};
  for (std::size_t k = 0; k < tables.size(); ++k) {
    const std::uint32_t shift = polynomial::x_to_the(8 * (k + 1));
    // Addition is exclusive or, so 8 products give all 256.
    for (std::uint32_t high = 1; high < 256; high *= 2) {
      const std::uint32_t product = polynomial::multiply(high, shift);
      for (std::uint32_t low = 0; low < high; ++low) tables[k][high + low] = product ^ tables[k][low];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

}  // namespace

std::uint32_t crc32c_table(std::uint32_t state, const unsigned char* data, std::size_t bytes) {
  for (; bytes >= 8; data += 8, bytes -= 8) {
    std::uint64_t word;
    std::memcpy(&word, data, sizeof word);
    word ^= state;
    state = 0;
    // The first byte has seven behind it.
    for (std::size_t i = 0; i < 8; ++i) state ^= kTables[7 - i][(word >> (8 * i)) & 0xFF];
  }
  for (; bytes; ++data, --bytes) state = kTables[0][(state ^ *data) & 0xFF] ^ (state >> 8);
  return state;
}

}  // namespace angelptm::io
