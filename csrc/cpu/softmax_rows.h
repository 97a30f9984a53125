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

// Adds x = (u − m) / τ of one vector to Σ e^x and Σ x e^x.
inline void accumulate(vf x, bool entropy, vf* sum, vf* weighted) {
  const vf e = exp(x);
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

  // dz / τ of one vector, the target's column apart.
  vf operator()(vf u, const Head& head) const {
    const vf log_p = ((u - shift) - shift_rest) * head.inverse_temperature, p = exp(log_p);
    if (g_entropy == 0) return -g_logprob * p;
    const vf d = p * fma(splat(g_entropy), log_p + entropy, splat(g_logprob));
    return p > 0.0f ? -d : p;  // p log p = 0 at p = 0; a NaN stays
  }
};

}  // namespace tk::TK_ISA
