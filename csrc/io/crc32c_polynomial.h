// Polynomials over GF(2) modulo the Castagnoli polynomial P, from which every constant of the checksum is derived.
//
// Note: reflected. CRC32C sends the least significant bit of each byte first, so a word's *lowest* bit holds its
// *highest* power: in 32 bits, bit i is the coefficient of x^(31-i); 1 is 0x80000000 and x is 0x40000000. In the same
// way bit i of a 64-bit word is x^(63-i), and of a 128-bit one x^(127-i), so that bytes in memory order are one long
// polynomial, first byte highest.
//
// Note: product. Carry-less multiplication adds bit numbers. Of two 64-bit words, bits i and j meet in bit i+j of 128,
// which stands for x^(127-i-j), while their product is x^(63-i) * x^(63-j) = x^(126-i-j): the instruction gives the
// product *times x*. Of two 32-bit words it gives bit i+j of 64: x^(63-i-j) instead of x^(62-i-j), again times x.
// Constants for it are therefore one power lower than what they are to multiply by.
#pragma once

#include <cstdint>

namespace angelptm::io::polynomial {

// P without its x^32, reflected: 0x1EDC6F41 read from the other end.
inline constexpr std::uint32_t kCastagnoli = 0x82F63B78;
inline constexpr std::uint32_t kOne = 0x80000000;
inline constexpr std::uint32_t kX = 0x40000000;

constexpr std::uint32_t times_x(std::uint32_t a) { return (a >> 1) ^ ((a & 1) ? kCastagnoli : 0); }

// a * b mod P: Horner's rule, from b's highest power down.
constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (int bit = 0; bit < 32; ++bit) product = times_x(product) ^ (((b >> bit) & 1) ? a : 0);
  return product;
}

// x^n mod P, by repeated squaring.
constexpr std::uint32_t x_to_the(std::uint64_t n) {
  std::uint32_t result = kOne;
  for (std::uint32_t square = kX; n; n >>= 1, square = multiply(square, square)) {
    if (n & 1) result = multiply(result, square);
  }
  return result;
}

static_assert(x_to_the(31) == 1 && x_to_the(32) == kCastagnoli);
// P is (x + 1) times a primitive polynomial of degree 31, so x comes back to 1 after 2^31 - 1 steps and not before.
static_assert(x_to_the((1ULL << 31) - 1) == kOne);

}  // namespace angelptm::io::polynomial
