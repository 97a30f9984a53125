// What a row of logits goes through on its way to a log-probability and back; shared by grpo.cpp and logprob.cpp.
//
//   y = logit,  u = c·tanh(y / c)  (no softcap: u = y),  z = u / τ
//   statistics of a stretch of the row:  m = max u,  s = Σ e^((u − m) / τ),  t = Σ (u − m) / τ · e^((u − m) / τ)
//   dz = g_lp (1[target] − p) − g_H p (log p + H),  dy = dz / τ · (1 − (u / c)²),  log p = (u − τ·lse) / τ
//
// Nothing here divides by τ or c element by element: a division takes longer than an exponential. The maximum is taken
// of u, so that (u − m)·(1 / τ) loses no more than u / τ − m / τ would.
#pragma once

#include "simd/vec.h"

namespace tk::TK_ISA {

struct Head {
  float temperature, inverse_temperature, softcap, inverse_softcap;
  Head(float temperature, float softcap)
      : temperature(temperature), inverse_temperature(1 / temperature), softcap(softcap), inverse_softcap(softcap > 0 ? 1 / softcap : 0) {}
};

inline vf minus_infinity() { return splat(-INFINITY); }
// The reference point of a sum of exponentials: a row of -inf alone keeps 0, so that its terms are 0 and not NaN.
inline vf finite_max(vf m) { return m == -INFINITY ? zero() : m; }
inline float finite_max(float m) { return m == -INFINITY ? 0 : m; }

// u of y; *slope is du/dy.
inline vf soft_capped(vf y, const Head& head, vf* slope) {
  const vf t = tanh(y * head.inverse_softcap);
  *slope = 1.0f - t * t;
  return head.softcap * t;
}

// e^(x + rest) as vec.h's exp, for x <= 0 or hardly more (no bound above: it saves a fifth of the instructions) and a rest
// that x is too coarse to hold.
inline vf exp_negative(vf x, vf rest = zero()) {
  x = max(splat(-104.0f), x);  // a NaN stays
  const vf magic = splat(12582912.0f);
  const vf t = fma(x, splat(1.44269504088896341f), magic), n = t - magic;
  vf r = fma(n, splat(-0.693145751953125f), x);
  r = fma(n, splat(-1.42860682030941723212e-6f), r) + rest;
  vf p = splat(1.98412698e-4f);
  p = fma(p, r, splat(1.38888889e-3f));
  p = fma(p, r, splat(8.33333333e-3f));
  p = fma(p, r, splat(4.16666667e-2f));
  p = fma(p, r, splat(0.166666667f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r * r, r) + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vi i = as_int(t) - 0x4b400000, half = i >> 1;
  return p * as_float((half + 127) << 23) * as_float((i - half + 127) << 23);
#endif
}

// Adds x = (u − m) / τ of one vector to Σ e^x and Σ x e^x.
inline void accumulate(vf x, bool entropy, vf* sum, vf* weighted) {
  const vf e = exp_negative(x);
  *sum += e;
  if (entropy) *weighted += e > 0.0f ? x * e : e;  // 0 log 0 = 0; a NaN stays
}

// What a row's backward needs, the same for all its columns.
struct RowGradient {
  float g_logprob, g_entropy, entropy;  // the two gradients divided by τ
  float shift, shift_rest;              // τ·lse in two floats: one would tilt every p of the row
  RowGradient(const Head& head, float dlogprob, float dentropy, double lse, float entropy)
      : g_logprob(dlogprob / head.temperature), g_entropy(dentropy / head.temperature), entropy(entropy),
        shift((float)(lse * head.temperature)),
        shift_rest(isfinite(shift) ? (float)(lse * head.temperature - shift) : 0) {}

  // dz / τ of one vector, the target's column apart. kExact: log p keeps what a float of its size drops, for logits that are
  // exact themselves (p was off by four of its last places, torch's by two).
  template <bool kExact> vf of(vf u, const Head& head) const {
    const vf d = u - shift;
    const vf rest = kExact ? (u - (d + shift)) - shift_rest : splat(-shift_rest);
    const vf log_p = kExact ? d * head.inverse_temperature : (d + rest) * head.inverse_temperature;
    const vf p = kExact ? exp_negative(log_p, d > -104.0f ? rest * head.inverse_temperature : zero()) : exp_negative(log_p);
    if (g_entropy == 0) return -g_logprob * p;
    const vf gradient = p * fma(splat(g_entropy), log_p + entropy, splat(g_logprob));
    return p > 0.0f ? -gradient : p;  // p log p = 0 at p = 0; a NaN stays
  }
};

}  // namespace tk::TK_ISA
