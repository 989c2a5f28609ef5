#include "kernels/ceiling_loop.h"
#include "kernels/compact_loop.h"
#include "kernels/isa.h"
#include "kernels/optimizer_loop.h"

namespace angelptm::kernels {

void step_scalar(const Hyper& hyper, const Run& run) { step_lanes<ScalarLanes>(hyper, run); }

void step_compact_scalar(const Hyper& hyper, const CompactRun& run) { step_compact_lanes<ScalarLanes>(hyper, run); }

void decode_scalar(Moment moment, const MomentCodes& codes, float* to, std::size_t count) {
  Codec<ScalarLanes>::decode(moment, codes, to, count);
}

void encode_scalar(Moment moment, const float* from, const MomentCodes& codes, std::size_t count, Rounding rounding) {
  Codec<ScalarLanes>::encode(moment, from, codes, count, rounding);
}

void join_master_scalar(const std::uint16_t* param, const std::int16_t* remainder, float* master, std::size_t count) {
  join_lanes<ScalarLanes>(param, remainder, master, count);
}

void split_master_scalar(const float* master, std::uint16_t* param, std::int16_t* remainder, std::size_t count) {
  split_lanes<ScalarLanes>(master, param, remainder, count);
}

void ceiling_scalar(const Run& run, bool past_cache) {
  past_cache ? ceiling_lanes<ScalarLanes, true>(run) : ceiling_lanes<ScalarLanes, false>(run);
}

}  // namespace angelptm::kernels
