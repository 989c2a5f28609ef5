// A step on compact states: decode a chunk that fits the first-level cache, the rule's own loop on it, encode. Included
// after lanes_*.h (see the note on linkage in lanes_scalar.h).
#pragma once

#include "kernels/codec_loop.h"
#include "kernels/compact.h"
#include "kernels/factors.h"
#include "kernels/optimizer_loop.h"

namespace angelptm::kernels {
namespace {

constexpr std::size_t kChunk = 4 * kBlock8;

inline MomentCodes codes_from(const MomentCodes& codes, std::size_t element) {
  return {codes.format, static_cast<char*>(codes.values) + element * itemsize(codes.format),
          codes.scales ? codes.scales + element / kBlock8 : nullptr};
}

// One moment of a chunk as floats, where they are or decoded; encoded again by `put_back`.
template <class L, Moment kMoment>
class OpenMoment {
 public:
  OpenMoment(const MomentCodes& codes, std::size_t start, std::size_t count) : count_(count) {
    if (!codes.values) return;
    codes_ = codes_from(codes, start);
    if (codes.format == MomentFormat::kF32) {
      values_ = static_cast<float*>(codes_.values);
    } else {
      values_ = room_;
      decode_lanes<L, kMoment>(codes_, room_, count);
    }
  }
  float* values() { return values_; }
  bool is_compact() const { return values_ == room_; }
  void put_back(const Random& random) {
    if (is_compact()) encode_lanes<L, kMoment>(room_, codes_, count_, random);
  }

 private:
  alignas(64) float room_[kChunk];
  MomentCodes codes_;
  float* values_ = nullptr;
  std::size_t count_;
};

template <class L>
void step_compact_lanes(const Hyper& hyper, const CompactRun& run) {
  const Factors factors(hyper);
  alignas(64) float room[kChunk];
  alignas(64) std::uint32_t random[kChunk];
  for (std::size_t start = 0; start < run.count; start += kChunk) {
    const std::size_t count = run.count - start < kChunk ? run.count - start : kChunk;
    OpenMoment<L, Moment::kExpAvg> exp_avg(run.exp_avg, start, count);
    OpenMoment<L, Moment::kExpAvgSq> exp_avg_sq(run.exp_avg_sq, start, count);
    const bool split = run.master_format == MasterFormat::kSplit;
    std::int16_t* remainder = split ? static_cast<std::int16_t*>(run.master) + start : nullptr;
    float* master = split ? room : static_cast<float*>(run.master) + start;
    if (split) join_lanes<L>(run.old_param + start, remainder, room, count);
    void* param = static_cast<char*>(run.param) + start * angelptm::itemsize(run.param_dtype);
    step_with<L>(hyper, factors,
                 {master, exp_avg.values(), exp_avg_sq.values(),
                  static_cast<const char*>(run.grad) + start * angelptm::itemsize(run.grad_dtype), param, count,
                  run.grad_dtype, run.param_dtype});
    if (split) split_lanes<L>(room, nullptr, remainder, count);
    const Rounding rounding{run.rounding.key, run.rounding.first_element + static_cast<std::uint32_t>(start)};
    if (!exp_avg.is_compact() && !exp_avg_sq.is_compact()) continue;
    make_random<L>(rounding, random, count);
    exp_avg.put_back({rounding, random});
    exp_avg_sq.put_back({rounding, random});
  }
}

}  // namespace
}  // namespace angelptm::kernels
