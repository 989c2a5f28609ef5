// The memory ceiling that a benchmark holds `step` against: the same arrays read, the same written, and one addition
// where AdamW has its arithmetic.
#pragma once

#include "kernels/optimizer.h"

namespace angelptm::kernels {

// master, exp_avg, exp_avg_sq += grad; param = master, cut to bf16 if so. Overwrites real state: for benchmarks only.
// past_cache: param, which must then be 64 B aligned, is stored past the cache. Uses the instruction set in use.
void memory_ceiling(const Run& run, bool past_cache);

}  // namespace angelptm::kernels
