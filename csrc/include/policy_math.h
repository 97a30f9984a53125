// The policy losses token by token: the one copy of that mathematics for the CPU kernel and the CUDA kernel.
// Formulas and names: python/thinkernel/reference/policy_loss.py (the specification); here with their gradients.
//
// B sequences of S tokens. r = exp(log weight) is the ratio, per token or per sequence. All functions are templated on the
// value type through `Ops`, so that one text serves W lanes of SIMD and one CUDA thread. Ops has:
//   V          a value (float, or a vector of floats);  M a condition (bool, or a vector mask)
//   splat(float) -> V;  exp(V);  abs(V);  expm1(V, V* exp): e^x - 1 without cancellation, and e^x where a pointer is given
//   min(V a, V b), max(V a, V b): b where either is NaN, so min(limit, x) keeps a NaN x. fminf does not: a < b ? a : b does
//   select(M, V, V), either(M, M)
//   and + - * / < > >= == between V's must work, the comparisons giving M.
// `ScalarOps` below is the one for a CUDA thread (and plain C++).
//
// How a kernel is built on it (what each step needs of a sequence is summed over its active tokens only):
//   1  over tokens:      sequence_terms()  summed per sequence          only where needs_sequence_sums(options)
//   2  per sequence:     finish_sequence() -> SequenceFactors           always (it holds 1 / tokens too)
//   3  over tokens:      token_loss() -> TokenLoss; loss += weight · result.loss, and the metrics.
//        (clip fractions: clip_bounds())
//        ratio per token:     dlogprob = weight · token_gradient(...)
//        ratio per sequence:  dlogprob = weight · result.direct, and G = Σ_tokens weight · result.slope of the sequence
//   4  over tokens, ratio per sequence: dlogprob += sequence_gradient(logprob, old, G · factors.slope, options)
// `weight` is the reduction's: sequence_weight(). Masked tokens add nothing and get gradient 0: their values may be NaN,
// so select 0, never multiply by 0. The entropy bonus, - entropy_coef · (mean entropy of the tokens that are active and have
// top = 1), is the kernel's own: its gradient is one constant.
#pragma once
#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define TK_POLICY inline __host__ __device__
#else
#define TK_POLICY inline __attribute__((always_inline))
#endif

namespace tk::policy {

// The numbers in which these enums reach a kernel are those of ops/policy_loss.py.
enum class Form : int32_t { clipped = 0, cispo = 1, sapo = 2, vespo = 3, reinforce = 4 };  // loss of a token
enum class Level : int32_t { token = 0, sequence_mean = 1, sequence_sum = 2 };  // log weight: log r, its mean, its sum (rloo)
enum class Reduction : int32_t { sequence_mean = 0, sequence_sum = 1, total = 2 };
enum class Kl : int32_t { none = 0, k1 = 1, k2 = 2, k3 = 3 };
enum class Rollout : int32_t { none = 0, token_truncate = 1, token_mask = 2, sequence_truncate = 3, sequence_mask = 4 };

struct Options {
  Form form = Form::clipped;
  Level level = Level::token;
  Reduction reduction = Reduction::total;
  Kl kl = Kl::none;
  Rollout rollout = Rollout::none;
  int32_t kl_correction = 0;
  int32_t off_policy = 0;           // whether off_policy_threshold counts
  float ratio_low = 0, ratio_high = 0;    // clip bounds of r: 1 - epsilon and 1 + epsilon_high; cispo: -, epsilon_high
  float delta = INFINITY;                 // upper bound of r outside the clip; inf: none
  float log_ratio_clamp = INFINITY;       // inf: none
  float beta = 0;
  float rollout_low = -INFINITY, rollout_high = INFINITY;
  float off_policy_threshold = 0;
  float tau_positive = 1, tau_negative = 1.05f;
};

constexpr double kMinLogWeight = -18.420680743952367;  // ln 1e-8: vespo's range of the sequence's log weight
constexpr double kMaxLogWeight = 20.0;

TK_POLICY bool rollout_per_token(const Options& o) { return o.rollout == Rollout::token_truncate || o.rollout == Rollout::token_mask; }
TK_POLICY bool rollout_per_sequence(const Options& o) {
  return o.rollout == Rollout::sequence_truncate || o.rollout == Rollout::sequence_mask;
}
TK_POLICY bool needs_sequence_sums(const Options& o) {
  return o.level != Level::token || o.form == Form::vespo || rollout_per_sequence(o) || o.off_policy;
}

// Outside which a ratio counts as clipped (low where A < 0, high where A > 0), for the metrics.
struct ClipBounds {
  float low, high;
};
TK_POLICY ClipBounds clip_bounds(const Options& o) {
  const bool clips = o.form == Form::clipped;
  return {clips ? o.ratio_low : -INFINITY, clips || o.form == Form::cispo ? o.ratio_high : INFINITY};
}

// One value per token. old is the token's own logprob where none is given; rollout is old where none is given or NaN.
template <class Ops> struct Token {
  using V = typename Ops::V;
  V logprob, old, ref, rollout, advantage;
  V top;  // 1, or 0 for a token that the top-entropy mask leaves out
};

// What step 1 sums over a sequence.
template <class Ops> struct SequenceTerms {
  typename Ops::V log_ratio;   // clamp(log r)
  typename Ops::V drift;       // rollout - logprob
  typename Ops::V rollout;     // old - rollout
  typename Ops::V log_weight;  // vespo: clamp(log r, ±20) + ln(rollout ratio)
};

// What step 2 makes of the sums.
struct SequenceFactors {
  float ratio = 1;           // r of the sequence, where the level is not token
  float slope = 0;           // d log weight / d log r of one token: 1 / tokens, or for the sum 1 (0 where that is clamped)
  float rollout_ratio = 1;   // where the correction is per sequence
  float phi_positive = 1, phi_negative = 1;  // vespo, for A >= 0 and for A < 0
  int32_t low_drift = 1;     // drift / tokens <= off_policy_threshold
};

template <class Ops> struct TokenLoss {
  using V = typename Ops::V;
  using M = typename Ops::M;
  V loss;    // masks, rollout correction and beta · KL in it; not the reduction's weight
  V direct;  // d loss / d logprob with the ratio held
  V slope;   // d loss / d log weight (the ratio is in it)
  V dref;    // d loss / d ref_logprob
  // for the metrics
  V ratio, kl, rollout_ratio;
  V approx_kl;                    // r - 1 - log r with the token's own r
  V kept;                         // off-policy mask, 1 or 0
  M inside;                       // log r was not clamped
};

template <class Ops> TK_POLICY typename Ops::V clamp(typename Ops::V x, float low, float high) {
  return Ops::min(Ops::splat(high), Ops::max(Ops::splat(low), x));  // NaN stays NaN
}

// The rollout correction of exp(log_ratio), log_ratio = old - rollout, per token or of the sequence's sum.
template <class Ops> TK_POLICY typename Ops::V rollout_ratio(typename Ops::V ratio, const Options& o) {
  if (o.rollout == Rollout::token_truncate || o.rollout == Rollout::sequence_truncate)
    return clamp<Ops>(ratio, o.rollout_low, o.rollout_high);
  const typename Ops::V low = Ops::splat(o.rollout_low), high = Ops::splat(o.rollout_high);
  return Ops::select(Ops::either(ratio < low, ratio > high), Ops::splat(0.0f), ratio);
}

// log r of a token, clamped; and what vespo sums of it. Both 0 for a token whose values are 0.
template <class Ops> TK_POLICY typename Ops::V log_ratio(const Token<Ops>& t, const Options& o) {
  return clamp<Ops>(t.logprob - t.old, -o.log_ratio_clamp, o.log_ratio_clamp);
}
template <class Ops> TK_POLICY typename Ops::V log_weight(const Token<Ops>& t) { return clamp<Ops>(t.logprob - t.old, -20.0f, 20.0f); }

// Step 1. ln(rollout ratio) of a truncated ratio is the clamped log; a masked one counts as 1e-8. rollout_log_low and _high:
// the logs of the bounds, -inf for a bound of 0 or less.
template <class Ops>
TK_POLICY SequenceTerms<Ops> sequence_terms(const Token<Ops>& t, const Options& o, float rollout_log_low, float rollout_log_high) {
  using V = typename Ops::V;
  SequenceTerms<Ops> s;
  s.log_ratio = log_ratio<Ops>(t, o);
  s.drift = t.rollout - t.logprob;
  s.rollout = t.old - t.rollout;
  s.log_weight = Ops::splat(0.0f);
  if (o.form == Form::vespo) {
    s.log_weight = log_weight<Ops>(t);
    if (o.rollout != Rollout::none) {
      V x = s.rollout;
      const V low = Ops::splat(rollout_log_low), high = Ops::splat(rollout_log_high);
      if (o.rollout == Rollout::token_truncate) x = Ops::min(high, Ops::max(low, x));
      else x = Ops::select(Ops::either(x < low, x > high), Ops::splat(-INFINITY), x);
      s.log_weight = s.log_weight + clamp<Ops>(x, (float)kMinLogWeight, (float)kMaxLogWeight);
    }
  }
  return s;
}

// vespo's φ(w) = exp(λ + k ln w - λ w), 1 at w = 1.
TK_POLICY float vespo_weight(double log_w, double k, double lambda) { return (float)::exp(lambda + k * log_w - lambda * ::exp(log_w)); }

TK_POLICY double clamp_double(double x, double low, double high) { return x < low ? low : x > high ? high : x; }  // NaN stays

// Step 2, from the sums over the sequence's active tokens (0 for those that were not needed) and their count.
TK_POLICY SequenceFactors finish_sequence(const Options& o, double log_ratio, double drift, double rollout, double log_weight,
                                          int64_t tokens) {
  SequenceFactors f;
  const double count = tokens > 0 ? (double)tokens : 1.0;
  if (o.level == Level::sequence_mean) {
    f.ratio = (float)::exp(log_ratio / count);
    f.slope = (float)(1.0 / count);
  } else if (o.level == Level::sequence_sum) {
    const double limit = o.log_ratio_clamp;
    f.ratio = (float)::exp(clamp_double(log_ratio, -limit, limit));
    f.slope = log_ratio < -limit || log_ratio > limit ? 0.0f : 1.0f;
  }
  if (o.rollout == Rollout::sequence_truncate || o.rollout == Rollout::sequence_mask) {
    const double ratio = ::exp(rollout), low = o.rollout_low, high = o.rollout_high;
    if (o.rollout == Rollout::sequence_truncate) f.rollout_ratio = (float)clamp_double(ratio, low, high);
    else f.rollout_ratio = ratio < low || ratio > high ? 0.0f : (float)ratio;
  }
  if (o.form == Form::vespo) {
    const double log_w = clamp_double(log_weight, kMinLogWeight, kMaxLogWeight);
    f.phi_positive = vespo_weight(log_w, 2.0, 3.0);
    f.phi_negative = vespo_weight(log_w, 3.0, 2.0);
  }
  f.low_drift = drift / count <= (double)o.off_policy_threshold;
  return f;
}

// The factor that the reduction gives every token of a sequence. total: what Reduction::total divides by (active tokens,
// num_items_in_batch, B · max_completion_length; at least 1).
TK_POLICY double sequence_weight(const Options& o, int64_t tokens, int64_t sequences, double total) {
  const double count = sequences > 0 ? (double)sequences : 1.0;
  if (o.reduction == Reduction::sequence_mean) return 1.0 / ((tokens > 0 ? (double)tokens : 1.0) * count);
  return 1.0 / (o.reduction == Reduction::sequence_sum ? count : total);
}

// Step 3.
template <class Ops> TK_POLICY TokenLoss<Ops> token_loss(const Token<Ops>& t, const SequenceFactors& f, const Options& o) {
  using V = typename Ops::V;
  const V zero = Ops::splat(0.0f), one = Ops::splat(1.0f), a = t.advantage;
  TokenLoss<Ops> out;

  // ---- ratio
  const V raw = t.logprob - t.old;
  const V limit = Ops::splat(o.log_ratio_clamp);
  const V log_ratio = Ops::min(limit, Ops::max(-limit, raw));
  V r;
  out.inside = log_ratio == raw;
  out.approx_kl = Ops::expm1(log_ratio, &r) - log_ratio;
  if (o.level != Level::token) r = Ops::splat(f.ratio);
  out.ratio = r;

  // ---- loss: value, gradient past the ratio (direct), gradient to the log weight (slope)
  V loss, direct = zero, slope = zero;
  if (o.form == Form::clipped) {
    const V capped = Ops::min(Ops::splat(o.delta), r), clipped = clamp<Ops>(r, o.ratio_low, o.ratio_high);
    const V x = capped * a, y = clipped * a;
    loss = -Ops::min(x, y);
    // the side that the minimum takes passes the gradient where it is r itself, at its bounds too; equals are both r
    slope = Ops::select(Ops::select(x > y, clipped, capped) == r, -a * r, zero);
  } else if (o.form == Form::cispo) {
    direct = -Ops::min(Ops::splat(o.ratio_high), r) * a;
    loss = direct * t.logprob;
  } else if (o.form == Form::sapo) {
    const V tau = Ops::select(a > zero, Ops::splat(o.tau_positive), Ops::splat(o.tau_negative));
    const V scale = Ops::select(a > zero, Ops::splat(4.0f / o.tau_positive), Ops::splat(4.0f / o.tau_negative));
    const V x = tau * (r - one), e = Ops::exp(-Ops::abs(x)), q = one / (one + e);  // sigmoid(|x|)
    loss = -Ops::select(x < zero, e * q, q) * scale * a;
    slope = Ops::splat(-4.0f) * a * (e * q * q) * r;
  } else {
    direct = -a;
    if (o.form == Form::vespo) direct = direct * Ops::select(a >= zero, Ops::splat(f.phi_positive), Ops::splat(f.phi_negative));
    loss = direct * t.logprob;
  }

  // ---- masks and the rollout correction
  V factor = t.top;
  out.kept = one;
  if (o.off_policy && !f.low_drift) factor = factor * (out.kept = Ops::select(a >= zero, one, zero));
  out.rollout_ratio = one;
  if (o.rollout != Rollout::none) {
    if (rollout_per_token(o)) out.rollout_ratio = rollout_ratio<Ops>(Ops::exp(t.old - t.rollout), o);
    else out.rollout_ratio = Ops::splat(f.rollout_ratio);
    if (o.form != Form::vespo) factor = factor * out.rollout_ratio;
  }
  loss = loss * factor;
  direct = direct * factor;
  slope = slope * factor;

  // ---- KL
  out.kl = out.dref = zero;
  if (o.kl != Kl::none) {
    const V d = t.logprob - t.ref, beta = Ops::splat(o.beta);
    V kl = d, dkl = one;
    if (o.kl == Kl::k2) {
      kl = Ops::splat(0.5f) * d * d;
      dkl = d;
    } else if (o.kl == Kl::k3) {
      const V m = Ops::expm1(-d, nullptr);  // e^(-d) + d - 1 without its cancellation
      kl = m + d;
      dkl = -m;
    }
    if (o.kl_correction) {
      kl = kl * r;
      dkl = dkl * r;
      slope = slope + beta * kl;
    }
    loss = loss + beta * kl;
    direct = direct + beta * dkl;
    out.dref = -beta * dkl;
    out.kl = kl;
  }
  out.loss = loss;
  out.direct = direct;
  out.slope = slope;
  return out;
}

// d loss / d logprob of a token whose ratio is its own.
template <class Ops> TK_POLICY typename Ops::V token_gradient(const TokenLoss<Ops>& x) {
  return x.direct + Ops::select(x.inside, x.slope, Ops::splat(0.0f));
}

// Step 4: what the sequence's ratio adds to a token's gradient. g: the sum over the sequence of weight · slope, times
// SequenceFactors::slope.
template <class Ops> TK_POLICY typename Ops::V sequence_gradient(typename Ops::V logprob, typename Ops::V old, float g, const Options& o) {
  const typename Ops::V raw = logprob - old;
  return Ops::select(clamp<Ops>(raw, -o.log_ratio_clamp, o.log_ratio_clamp) == raw, Ops::splat(g), Ops::splat(0.0f));
}

// One float: a CUDA thread, or plain C++.
struct ScalarOps {
  using V = float;
  using M = bool;
  static TK_POLICY V splat(float x) { return x; }
  static TK_POLICY V exp(V x) { return ::expf(x); }
  static TK_POLICY V expm1(V x, V* e) {
    if (e) *e = ::expf(x);
    return ::expm1f(x);
  }
  static TK_POLICY V abs(V x) { return ::fabsf(x); }
  static TK_POLICY V min(V a, V b) { return a < b ? a : b; }
  static TK_POLICY V max(V a, V b) { return a > b ? a : b; }
  static TK_POLICY V select(M m, V a, V b) { return m ? a : b; }
  static TK_POLICY M either(M a, M b) { return a || b; }
};

}  // namespace tk::policy
