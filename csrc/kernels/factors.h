// What a rule multiplies and divides by: derived from Hyper once for each call in double, then rounded to float, which
// is also how torch rounds the scalars of its single-tensor optimizers.
#pragma once

#include "kernels/optimizer.h"

namespace angelptm::kernels {

struct Factors {
  explicit Factors(const Hyper& hyper)
      : grad_scale(static_cast<float>(hyper.grad_scale)),
        lr(static_cast<float>(hyper.lr)),
        decay(static_cast<float>(1.0 - hyper.lr * hyper.weight_decay)),
        weight_decay(static_cast<float>(hyper.weight_decay)),
        beta1(static_cast<float>(hyper.beta1)),
        beta2(static_cast<float>(hyper.beta2)),
        rest1(static_cast<float>(1.0 - hyper.beta1)),
        rest2(static_cast<float>(1.0 - hyper.beta2)),
        eps(static_cast<float>(hyper.eps)),
        step_size(static_cast<float>(hyper.lr / hyper.bias_correction1)),
        over_bias_correction2_sqrt(static_cast<float>(1.0 / hyper.bias_correction2_sqrt)),
        undamped(static_cast<float>(1.0 - hyper.dampening)),
        nesterov(hyper.nesterov),
        first_step(hyper.first_step) {}

  float grad_scale, lr, decay, weight_decay, beta1, beta2;
  float rest1, rest2;  // 1 - beta1, 1 - beta2
  float eps, step_size;
  float over_bias_correction2_sqrt;  // a reciprocal, because the divider is what bounds AdamW in cache
  float undamped;                    // 1 - dampening
  bool nesterov, first_step;
};

}  // namespace angelptm::kernels
