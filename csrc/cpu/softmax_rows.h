// What a row of logits goes through on its way to a log-probability and back; shared by grpo.cpp and logprob.cpp.
//
//   y = logit,  u = c·tanh(y / c)  (no softcap: u = y),  z = u / τ
//   statistics of a stretch of the row:  m = max u,  s = Σ e^((u − m) / τ),  t = Σ (u − m) / τ · e^((u − m) / τ)
//   dz = g_lp (1[target] − p) − g_H p (log p + H),  dy = dz / τ · (1 − (u / c)²),  log p = (u − τ·lse) / τ
//
// Nothing here divides by τ element by element: a division takes longer than an exponential. The maximum is taken of u, so
// that (u − m)·(1 / τ) loses no more than u / τ − m / τ would. kExact is for float32 tensors, whose
// logits may be exact: what products with 1 / τ and 1 / c drop would then be most of the error.
#pragma once

#include "simd/vec.h"

namespace tk::TK_ISA {

struct Head {
  float temperature, inverse_temperature, inverse_rest;  // 1 / τ in two floats
  float softcap, inverse_softcap;
  Head(float temperature, float softcap)
      : temperature(temperature), inverse_temperature(1 / temperature),
        inverse_rest((float)(1 / (double)temperature - inverse_temperature)), softcap(softcap),
        inverse_softcap(softcap > 0 ? 1 / softcap : 0) {}
};

inline vf minus_infinity() { return splat(-INFINITY); }
// The reference point of a sum of exponentials: a row of -inf alone keeps 0, so that its terms are 0 and not NaN.
inline vf finite_max(vf m) { return m == -INFINITY ? zero() : m; }
inline float finite_max(float m) { return m == -INFINITY ? 0 : m; }

// u of y; *slope is du/dy.
template <bool kExact> inline vf soft_capped(vf y, const Head& head, vf* slope) {
  const vf t = tanh(kExact ? y / head.softcap : y * head.inverse_softcap);
  *slope = 1.0f - t * t;
  return head.softcap * t;
}

// A gradient or a kept logit into its dtype. The instruction for bf16 flushes what is below 1e-38 to zero, and takes a fifth of
// the time.
template <class S> inline void store_flushed(S* to, vf x) { store(to, x); }
#if defined(__AVX512BF16__)
template <> inline void store_flushed<bf16>(bf16* to, vf x) {
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  memcpy((void*)to, &rounded, sizeof rounded);
}
#endif

// e^(x + rest) as vec.h's exp, for x <= 0 or hardly more (no bound above: it saves a fifth of the instructions) and a rest
// that x is too coarse to hold.
inline vf exp_negative(vf x, vf rest = zero()) {
  x = max(splat(-104.0f), x);  // a NaN stays
  const vf magic = splat(12582912.0f);
  const vf t = fma(x + rest, splat(1.44269504088896341f), magic), n = t - magic;  // rest is not small where logits pass 10^7
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

  // dz / τ of one vector, the target's column apart.
  template <bool kExact> vf of(vf u, const Head& head) const {
    const vf d = u - shift, x = d * head.inverse_temperature;
    vf log_p, p;
    if (kExact) {  // what d and x are too coarse to hold goes into the exponential apart
      const vf dropped = (u - (d + shift)) - shift_rest;
      vf rest = fma(d, splat(head.inverse_temperature), -x) + fma(d, splat(head.inverse_rest), dropped * head.inverse_temperature);
      rest = x > -104.0f ? rest : zero();
      log_p = x + rest;
      p = exp_negative(x, rest);
    } else {
      log_p = (d - shift_rest) * head.inverse_temperature;
      p = exp_negative(log_p);
    }
    if (g_entropy == 0) return -g_logprob * p;
    const vf gradient = p * fma(splat(g_entropy), log_p + entropy, splat(g_logprob));
    return p > 0.0f ? -gradient : p;  // p log p = 0 at p = 0; a NaN stays
  }
};

}  // namespace tk::TK_ISA
