// Compact formats of the optimizer states: how masters and moments become fewer bytes, and back.
//
// - split: the fp32 master is the bf16 parameter and a remainder of 16 bits. The parameter is the master rounded to the
//   nearest bf16, ties away from zero, so the remainder is what the master's lower 16 bits say as a signed number, and
//   no bit is stored twice or lost. (With ties to even it could not be: of 65,537 masters that round to an even bf16 a
//   remainder of 16 bits tells 65,536 apart.) NaN is 0x7fc00000, as in all kernels.
// - bf16 moments are rounded to one of the two neighbours at random, up with the probability that keeps the expected
//   value: what a step adds to a moment is often less than half a bf16 step, and would never arrive.
// - int8 moments come in blocks of kBlock8 elements with one fp32 scale, the block's greatest magnitude. exp_avg is
//   stored as q with m = scale * q * |q| / 127^2, exp_avg_sq as q with v = scale * (q / 255)^4, so that small values
//   have finer steps: the ratio of the greatest to the least is 1.6e4 and 4.2e9. Rounding is at random likewise, except
//   that a v above zero never becomes zero, which would be a division by eps. Where a value of a block is inf or NaN
//   the scale is NaN, and so is all of the block. Blocks whose greatest magnitude is below 2^-100 become zero.
//
// "At random" is a function of key and element alone, so that any cut into runs and any threads give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace angelptm::kernels {

enum class MasterFormat : std::uint8_t { kF32, kSplit };
enum class MomentFormat : std::uint8_t { kF32, kBf16, kInt8 };
enum class Moment : std::uint8_t { kExpAvg, kExpAvgSq };

constexpr std::size_t kBlock8 = 128;  // elements under one scale

constexpr std::size_t blocks8(std::size_t count) { return (count + kBlock8 - 1) / kBlock8; }
constexpr std::size_t itemsize(MasterFormat format) { return format == MasterFormat::kF32 ? 4 : 2; }
constexpr std::size_t itemsize(MomentFormat format) {
  return format == MomentFormat::kF32 ? 4 : format == MomentFormat::kBf16 ? 2 : 1;
}

// One moment of a run of elements. A run of int8 begins with a block.
struct MomentCodes {
  MomentFormat format = MomentFormat::kF32;
  void* values = nullptr;   // (count,) float, bf16 bits, or q as int8 (exp_avg) or uint8 (exp_avg_sq)
  float* scales = nullptr;  // (blocks8(count),), int8 only
};

// What the random rounding of a run depends on.
struct Rounding {
  std::uint32_t key = 0;            // rounding_key
  std::uint32_t first_element = 0;  // low bits of the run's first element in its unit
};

// From a run's seed, the step, and what tells the unit (and elements 2^32 apart) from others.
constexpr std::uint32_t rounding_key(std::uint64_t seed, std::uint64_t step, std::uint64_t unit) {
  std::uint64_t mixed = 0;
  for (const std::uint64_t part : {seed, step, unit}) {  // splitmix64's finalizer
    mixed = (mixed ^ part) + 0x9e3779b97f4a7c15u;
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
    mixed ^= mixed >> 31;
  }
  return static_cast<std::uint32_t>(mixed >> 32);
}

void decode(Moment moment, const MomentCodes& codes, float* to, std::size_t count);
void encode(Moment moment, const float* from, const MomentCodes& codes, std::size_t count, Rounding rounding);

// `param`: (count,) bf16 bits. join reads both; split writes both, and needs no remainder where that is null.
void join_master(const std::uint16_t* param, const std::int16_t* remainder, float* master, std::size_t count);
void split_master(const float* master, std::uint16_t* param, std::int16_t* remainder, std::size_t count);

}  // namespace angelptm::kernels
