// The arithmetic of every rule, once, over a vector-traits type; included after lanes_*.h (see the note on linkage in
// lanes_scalar.h). Each rule is an object of broadcast factors; its call operator takes one vector of master, gradient
// and moments, updates the moments and returns the new master.
#pragma once

#include "kernels/factors.h"
#include "kernels/lanes_scalar.h"

namespace angelptm::kernels {
namespace {

// torch.optim.AdamW's single-tensor formulas in torch's order of operations.
template <class L>
struct AdamW {
  static constexpr int kMoments = 2;
  using Float = typename L::Float;

  explicit AdamW(const Factors& f)
      : decay(L::all(f.decay)),
        beta1(L::all(f.beta1)),
        beta2(L::all(f.beta2)),
        rest1(L::all(f.rest1)),
        rest2(L::all(f.rest2)),
        eps(L::all(f.eps)),
        step_size(L::all(f.step_size)),
        over_bias_correction2_sqrt(L::all(f.over_bias_correction2_sqrt)),
        from_old(f.rest1 < 0.5f) {}

  Float operator()(Float master, Float grad, Float& m, Float& v) const {
    // lerp starts from the nearer end, as torch's: with beta1 = 0 the average is the gradient itself, without a trace
    // of the old average's rounding.
    const Float toward = L::sub(grad, m);
    m = from_old ? L::add(m, L::mul(rest1, toward)) : L::sub(grad, L::mul(toward, beta1));
    v = L::add(L::mul(v, beta2), L::mul(L::mul(rest2, grad), grad));
    const Float denominator = L::add(L::mul(L::sqrt(v), over_bias_correction2_sqrt), eps);
    return L::sub(L::mul(master, decay), L::div(L::mul(step_size, m), denominator));
  }

  Float decay, beta1, beta2, rest1, rest2, eps, step_size, over_bias_correction2_sqrt;
  bool from_old;
};

// torch.optim.SGD with momentum.
template <class L>
struct SgdMomentum {
  static constexpr int kMoments = 1;
  using Float = typename L::Float;

  explicit SgdMomentum(const Factors& f)
      : lr(L::all(f.lr)),
        momentum(L::all(f.beta1)),
        undamped(L::all(f.undamped)),
        weight_decay(L::all(f.weight_decay)),
        first_step(f.first_step),
        nesterov(f.nesterov),
        decays(f.weight_decay != 0) {}

  Float operator()(Float master, Float grad, Float& m, Float&) const {
    if (decays) grad = L::add(grad, L::mul(weight_decay, master));
    m = first_step ? grad : L::add(L::mul(m, momentum), L::mul(undamped, grad));
    const Float update = nesterov ? L::add(grad, L::mul(momentum, m)) : m;
    return L::sub(master, L::mul(lr, update));
  }

  Float lr, momentum, undamped, weight_decay;
  bool first_step, nesterov;
  bool decays;  // Adding 0 * master would not be free of effect where master is inf.
};

// torch.optim.SGD without momentum.
template <class L>
struct SgdPlain {
  static constexpr int kMoments = 0;
  using Float = typename L::Float;

  explicit SgdPlain(const Factors& f)
      : lr(L::all(f.lr)), weight_decay(L::all(f.weight_decay)), decays(f.weight_decay != 0) {}

  Float operator()(Float master, Float grad, Float&, Float&) const {
    if (decays) grad = L::add(grad, L::mul(weight_decay, master));
    return L::sub(master, L::mul(lr, grad));
  }

  Float lr, weight_decay;
  bool decays;
};

// Lion (arXiv 2302.06675) with its decoupled weight decay.
template <class L>
struct Lion {
  static constexpr int kMoments = 1;
  using Float = typename L::Float;

  explicit Lion(const Factors& f)
      : lr(L::all(f.lr)),
        decay(L::all(f.decay)),
        beta1(L::all(f.beta1)),
        beta2(L::all(f.beta2)),
        rest1(L::all(f.rest1)),
        rest2(L::all(f.rest2)) {}

  Float operator()(Float master, Float grad, Float& m, Float&) const {
    const Float direction = L::add(L::mul(m, beta1), L::mul(rest1, grad));
    m = L::add(L::mul(m, beta2), L::mul(rest2, grad));
    return L::sub(L::mul(master, decay), L::signed_like(lr, direction));
  }

  Float lr, decay, beta1, beta2, rest1, rest2;
};

// Note "past cache": param is the one stream that is written and not read. A plain store would first read its line from
// memory, 2 bytes an element for nothing, so long runs store past the cache. master and the moments are read anyway.
// The fence makes the stores visible before whatever the caller publishes them with. Below this count the lines are
// better left in cache for whoever copies them next.
constexpr std::size_t kPastCacheCount = 65536;

template <class L, bool kPastCache, class Param>
void put(Param* to, typename L::Float value) {
  if constexpr (kPastCache) {
    L::store_past_cache(to, value);
  } else {
    L::store(to, value);
  }
}

// Whole vectors of L from `begin` on; returns the first element that was left over.
template <class L, template <class> class R, class Grad, class Param, bool kPastCache>
std::size_t sweep(const Factors& factors, const Run& run, std::size_t begin) {
  using Float = typename L::Float;
  using Rule = R<L>;
  const Rule rule(factors);
  const Float grad_scale = L::all(factors.grad_scale);
  const Grad* grad = static_cast<const Grad*>(run.grad);
  Param* param = static_cast<Param*>(run.param);
  std::size_t i = begin;
  for (; run.count - i >= L::kFloats; i += L::kFloats) {
    const Float g = L::mul(L::load(grad + i), grad_scale);
    Float m = L::all(0.0f);
    Float v = L::all(0.0f);
    if constexpr (Rule::kMoments >= 1) m = L::load(run.exp_avg + i);
    if constexpr (Rule::kMoments >= 2) v = L::load(run.exp_avg_sq + i);
    const Float master = L::one_nan(rule(L::load(run.master + i), g, m, v));
    L::store(run.master + i, master);
    if constexpr (Rule::kMoments >= 1) L::store(run.exp_avg + i, L::one_nan(m));
    if constexpr (Rule::kMoments >= 2) L::store(run.exp_avg_sq + i, L::one_nan(v));
    if constexpr (sizeof(Param) == sizeof(float)) {
      put<L, kPastCache>(param + i, master);
    } else {
      put<L, kPastCache>(param + i, L::to_bf16_away(master));
    }
  }
  if constexpr (kPastCache) L::fence();
  return i;
}

template <class L, template <class> class R, class Grad, class Param>
void sweep_all(const Factors& factors, const Run& run) {
  std::size_t done = 0;
  if constexpr (L::kFloats > 1) {
    const bool aligned = reinterpret_cast<std::uintptr_t>(run.param) % (L::kFloats * sizeof(Param)) == 0;
    done = aligned && run.count >= kPastCacheCount ? sweep<L, R, Grad, Param, true>(factors, run, 0)
                                                   : sweep<L, R, Grad, Param, false>(factors, run, 0);
  }
  sweep<ScalarLanes, R, Grad, Param, false>(factors, run, done);
}

template <class L, template <class> class R>
void sweep_dtypes(const Factors& factors, const Run& run) {
  if (run.grad_dtype == DType::kF32) {
    if (run.param_dtype == DType::kF32) return sweep_all<L, R, float, float>(factors, run);
    return sweep_all<L, R, float, std::uint16_t>(factors, run);
  }
  if (run.param_dtype == DType::kF32) return sweep_all<L, R, std::uint16_t, float>(factors, run);
  return sweep_all<L, R, std::uint16_t, std::uint16_t>(factors, run);
}

template <class L>
void step_with(const Hyper& hyper, const Factors& factors, const Run& run) {
  switch (hyper.rule) {
    case Rule::kAdamW:
      return sweep_dtypes<L, AdamW>(factors, run);
    case Rule::kSgd:
      return hyper.beta1 == 0 ? sweep_dtypes<L, SgdPlain>(factors, run) : sweep_dtypes<L, SgdMomentum>(factors, run);
    case Rule::kLion:
      return sweep_dtypes<L, Lion>(factors, run);
  }
}

template <class L>
void step_lanes(const Hyper& hyper, const Run& run) {
  step_with<L>(hyper, Factors(hyper), run);
}

}  // namespace
}  // namespace angelptm::kernels
