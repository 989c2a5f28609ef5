// One optimizer step on a run of elements whose states are in compact formats (codec.h): the arithmetic of
// optimizer.h between decoding and encoding, in one pass over memory. The scalar kernel is the reference, and the SIMD
// ones give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/codec.h"
#include "kernels/dtype.h"
#include "kernels/optimizer.h"

namespace angelptm::kernels {

// Elements [0, count) of one parameter run; of int8 moments it begins with a block. Where the rule lacks a moment, its
// values are null.
struct CompactRun {
  MasterFormat master_format;
  void* master;  // (count,) float, or the remainders as int16; read and written
  MomentCodes exp_avg;
  MomentCodes exp_avg_sq;
  const void* grad;                // (count,) of grad_dtype
  const std::uint16_t* old_param;  // (count,) bf16 bits, split only: with the remainders the master; may be param
  void* param;                     // (count,) of param_dtype, which is bf16 where the master is split; written
  std::size_t count;
  DType grad_dtype;
  DType param_dtype;
  Rounding rounding;
};

void step(const Hyper& hyper, const CompactRun& run);

}  // namespace angelptm::kernels
