// Element types of pages, and the two conversions between them.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace angelptm {

enum class DType : std::uint8_t { kF32, kBF16 };

constexpr std::size_t itemsize(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

inline float bf16_to_f32(std::uint16_t value) { return std::bit_cast<float>(std::uint32_t{value} << 16); }

// Rounds to nearest even, as torch does; a NaN stays a (quiet) NaN.
inline std::uint16_t f32_to_bf16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace angelptm
