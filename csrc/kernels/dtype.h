// Element types of pages, and the two conversions between them.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace angelptm {

enum class DType : std::uint8_t { kF32, kBF16 };

constexpr std::size_t itemsize(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

inline float bf16_to_f32(std::uint16_t value) { return std::bit_cast<float>(std::uint32_t{value} << 16); }

}  // namespace angelptm
