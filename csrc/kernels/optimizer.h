// One optimizer step on a run of elements: states and gradient in, states and
// parameters out, in one pass over memory. A kernel is a free function on raw
// pointers; the scalar one is the reference, and the SIMD ones give the same
// bits (no fused multiply-add anywhere, IEEE division and square root). Every
// NaN that a kernel stores is 0x7fc00000 (bf16 0x7fc0): which NaN an operation
// yields is the one thing IEEE leaves to the processor and the compiler.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace angelptm::kernels {

enum class Rule : std::uint8_t { kAdamW, kSgd, kLion };
// States that a rule keeps beside MASTER: AdamW 2, SGD and Lion 1 (in exp_avg).
constexpr int moment_count(Rule rule) { return rule == Rule::kAdamW ? 2 : 1; }

// All that depends on group and step. Doubles, because the kernels round only what they derive: with beta2 = 0.999 as a
// float, 1 - beta2 would be 4.7e-5 off, and so would exp_avg_sq.
struct Hyper {
  Rule rule = Rule::kAdamW;
  double lr = 0;
  double beta1 = 0;  // SGD: momentum; 0 keeps no buffer, and exp_avg is neither read nor written
  double beta2 = 0;
  double eps = 0;
  double weight_decay = 0;      // AdamW, Lion: decoupled, master *= 1 - lr * weight_decay; SGD: added to the gradient
  double dampening = 0;         // SGD
  bool nesterov = false;        // SGD
  bool first_step = false;      // SGD: the momentum buffer starts as the gradient itself, as torch.optim.SGD
  double bias_correction1 = 1;  // AdamW: 1 - beta1^t
  double bias_correction2_sqrt = 1;  // AdamW: sqrt(1 - beta2^t)
  double grad_scale = 1;             // gradient is multiplied by it first: clip factor times 1 / loss scale
  std::uint64_t seed = 0, step = 0;  // what random rounding to compact formats depends on (rounding_key)
};

// Elements [0, count) of one parameter run. Pointers need no alignment beyond their element's.
struct Run {
  float* master;      // (count,) fp32, read and written
  float* exp_avg;     // (count,) fp32, read and written; SGD: momentum buffer, may be null without momentum
  float* exp_avg_sq;  // (count,) fp32; null where the rule has one moment
  const void* grad;   // (count,) of grad_dtype
  void* param;        // (count,) of param_dtype, written: the new master rounded to nearest, ties away from zero
  std::size_t count;
  DType grad_dtype;
  DType param_dtype;
};

void step(const Hyper& hyper, const Run& run);

// Instruction sets, best last. `step` and the gradient kernels use the best that the CPU has, unless a test chose
// another.
enum class Isa : std::uint8_t { kScalar, kAvx2, kAvx512 };
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
Isa isa_in_use();
void use_isa(Isa isa);  // throws std::invalid_argument where the CPU lacks it

}  // namespace angelptm::kernels
