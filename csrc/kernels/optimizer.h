// One optimizer step on a run of elements: states and gradient in, states and
// parameters out, in one pass over memory. A kernel is a free function on raw
// pointers; the scalar one is the reference, and the SIMD ones give the same
// bits (no fused multiply-add anywhere, IEEE division and square root).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace angelptm::kernels {

enum class Rule : std::uint8_t { kAdamW, kSgd, kLion };
// States that a rule keeps beside MASTER: AdamW 2, SGD and Lion 1 (in exp_avg).
constexpr int moment_count(Rule rule) { return rule == Rule::kAdamW ? 2 : 1; }

// All that depends on group and step, computed once in double on the caller's side and rounded to float here.
struct Hyper {
  Rule rule = Rule::kAdamW;
  float lr = 0;
  float beta1 = 0;          // SGD: momentum
  float beta2 = 0;
  float eps = 0;
  float weight_decay = 0;   // AdamW, Lion: decoupled, master *= 1 - lr * weight_decay; SGD: added to the gradient, as torch.optim.SGD
  float dampening = 0;      // SGD
  bool nesterov = false;    // SGD
  bool first_step = false;  // SGD: the momentum buffer starts as the gradient itself, as torch.optim.SGD
  float bias_correction1 = 1;       // AdamW: 1 - beta1^t
  float bias_correction2_sqrt = 1;  // AdamW: sqrt(1 - beta2^t)
  float grad_scale = 1;             // gradient is multiplied by it first: clip factor times 1 / loss scale
};

// Elements [0, count) of one parameter run. Pointers need no alignment beyond their element's.
struct Run {
  float* master;      // (count,) fp32, read and written
  float* exp_avg;     // (count,) fp32, read and written; SGD: momentum buffer
  float* exp_avg_sq;  // (count,) fp32; null where the rule has one moment
  const void* grad;   // (count,) of grad_dtype
  void* param;        // (count,) of param_dtype, written: the new master rounded to nearest even
  std::size_t count;
  DType grad_dtype;
  DType param_dtype;
};

void step(const Hyper& hyper, const Run& run);

// Instruction sets, best last. `step` and the gradient kernels use the best that the CPU has, unless a test chose another.
enum class Isa : std::uint8_t { kScalar, kAvx2, kAvx512 };
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
Isa isa_in_use();
void use_isa(Isa isa);  // throws std::invalid_argument where the CPU lacks it

}  // namespace angelptm::kernels
