// The experts' activations and their derivatives, a vector at a time. Formulas: include/moe.h's enum, MATH section 4.
//
//   swiglu     silu(g) u                g = min(gate, limit), u = clamp(up, -limit, limit): a clamped entry has gradient 0
//   gpt_oss    (u + 1) g sigmoid(1.702 g)
//   geglu      gelu(g) u, by erfc or (geglu_tanh) by tanh
//   relu2      max(z, 0)^2
#pragma once

#include "moe.h"
#include "simd/gemm.h"

namespace tk::TK_ISA {

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// Phi(x) = erfc(-x / sqrt 2) / 2, and phi(x) sqrt(2 pi) = e^(-x^2 / 2). erfc(y) = t e^(-y^2) P(t), t = 1 / (1 + y / 2), P fitted to
// 3e-8 of erfc for y >= 0.
inline vf normal_cdf(vf x, vf* density) {
  const vf y = abs(x) * 0.70710678118654752f, t = 1.0f / fma(splat(0.5f), y, splat(1.0f));
  vf p = splat(9.784051399e-03f);
  p = fma(p, t, splat(-1.097140083e-01f));
  p = fma(p, t, splat(3.972917555e-01f));
  p = fma(p, t, splat(-6.283048289e-01f));
  p = fma(p, t, splat(3.871741136e-01f));
  p = fma(p, t, splat(-8.046451512e-02f));
  p = fma(p, t, splat(2.195777132e-01f));
  p = fma(p, t, splat(2.398661828e-01f));
  p = fma(p, t, splat(2.827183851e-01f));
  p = fma(p, t, splat(2.820711299e-01f));
  const vf e = exp(x * x * -0.5f), half = p * t * e * 0.5f;
  *density = e;
  return select((vi)(x < 0.0f), half, 1.0f - half);
}

struct Gated {
  vf a, dgate, dup;  // the activation, and its derivatives by gate and up
};

template <MoeActivation kind> inline Gated gated(vf gate, vf up, vf limit, bool derivatives) {
  const vf g = min(limit, gate), u = max(-limit, min(limit, up));  // NaN stays
  Gated out;
  vf inner, slope;  // of g alone: a = inner * u
  if constexpr (kind == MoeActivation::swiglu) {
    const vf s = sigmoid(g);
    inner = g * s;
    slope = s * fma(g, 1.0f - s, splat(1.0f));
  } else if constexpr (kind == MoeActivation::gpt_oss) {
    const vf s = sigmoid(1.702f * g);
    inner = g * s;
    slope = s * fma(1.702f * g, 1.0f - s, splat(1.0f));
  } else if constexpr (kind == MoeActivation::geglu) {
    vf density;
    const vf cdf = normal_cdf(g, &density);
    inner = g * cdf;
    slope = fma(g * 0.39894228040143268f, density, cdf);
  } else {
    const vf square = g * g, arg = 0.79788456080286536f * g * fma(splat(0.044715f), square, splat(1.0f)), t = tanh(arg);
    inner = 0.5f * g * (1.0f + t);
    slope = 0.5f * (1.0f + t) + 0.5f * g * (1.0f - t * t) * 0.79788456080286536f * fma(splat(0.134145f), square, splat(1.0f));
  }
  const vf factor = kind == MoeActivation::gpt_oss ? u + 1.0f : u;
  out.a = inner * factor;
  if (derivatives) {
    out.dgate = select((vi)(gate > limit), zero(), factor * slope);
    out.dup = select((vi)(up > limit) | (vi)(up < -limit), zero(), inner);
  }
  return out;
}

// [a0 b0 a1 b1 ...] of two vectors -> a and b, and back.
inline void deinterleave(vf x, vf y, vf* a, vf* b) {
  vi even, odd;
  for (int i = 0; i < W; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  *a = __builtin_shuffle(x, y, even);
  *b = __builtin_shuffle(x, y, odd);
}
inline void interleave(vf a, vf b, vf* x, vf* y) {
  vi low, high;
  for (int i = 0; i < W; ++i) low[i] = i / 2 + (i & 1) * W, high[i] = W / 2 + i / 2 + (i & 1) * W;
  *x = __builtin_shuffle(a, b, low);
  *y = __builtin_shuffle(a, b, high);
}

// z as it is kept: rounding must not carry a value across the limit, where the gradient jumps. Values beyond it stay beyond.
template <class S> struct Kept {
  vf limit, low, high;  // the greatest S that is not above the limit, and the next one
  explicit Kept(float x) : limit(splat(x)), low(limit), high(limit) {
    if constexpr (sizeof(S) == 2) {
      if (isinf(x)) return;
      S s = from_float<S>(x);
      if (to_float(s) > x) --s.bits;
      low = splat(to_float(s));
      ++s.bits;
      high = splat(to_float(s));
    }
  }
  vf gate(vf x) const { return select((vi)(x > limit), max(high, x), min(low, x)); }
  vf up(vf x) const { return select((vi)(x < -limit), min(-high, x), max(-low, gate(x))); }
};

// sums [rows, ld] -> activations in place, columns 0 .. cols - 1; pre-activations to z. Halves: up lies half columns on.
template <MoeActivation kind, class S>
inline void activate_tile(float* sums, int64_t rows, int64_t cols, int64_t ld, int64_t half, const float* b1, int64_t inner, int64_t j, float limit,
                   S* z, int64_t z_stride) {
  constexpr bool interleaved = kind == MoeActivation::gpt_oss, single = kind == MoeActivation::relu2;
  const int64_t at = interleaved ? 2 * j : j, up_at = inner + j;  // columns of z
  const Kept<S> kept(limit);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = sums + r * ld;
    S* to = z ? z + r * z_stride : nullptr;
    for (int64_t i = 0; i < cols; i += W) {
      const int n = (int)least(W, cols - i);
      if constexpr (single) {
        vf x = load_n(row + i, n);
        if (b1) x += load_n(b1 + at + i, n);
        if (to) store_n(to + at + i, x, n);
        const vf positive = max(zero(), x);
        store_n(row + i, positive * positive, n);
      } else if constexpr (interleaved) {
        const int n0 = (int)least(W, 2 * n), n1 = 2 * n - n0;
        vf x = load_n(row + 2 * i, n0), y = load_n(row + 2 * i + W, n1), gate, up;
        if (b1) x += load_n(b1 + at + 2 * i, n0), y += load_n(b1 + at + 2 * i + W, n1);
        deinterleave(x, y, &gate, &up);
        if (to) {
          interleave(kept.gate(gate), kept.up(up), &x, &y);
          store_n(to + at + 2 * i, x, n0);
          store_n(to + at + 2 * i + W, y, n1);
        }
        store_n(row + i, gated<kind>(gate, up, splat(limit), false).a, n);  // behind what is still to be read
      } else {
        vf gate = load_n(row + i, n), up = load_n(row + half + i, n);
        if (b1) gate += load_n(b1 + at + i, n), up += load_n(b1 + up_at + i, n);
        if (to) {
          store_n(to + at + i, kept.gate(gate), n);
          store_n(to + up_at + i, kept.up(up), n);
        }
        store_n(row + i, gated<kind>(gate, up, splat(limit), false).a, n);
      }
    }
  }
}

template <class S>
inline void activate(MoeActivation kind, float* sums, int64_t rows, int64_t cols, int64_t ld, int64_t half, const float* b1, int64_t inner,
              int64_t j, float limit, S* z, int64_t z_stride) {
  using A = MoeActivation;
  const auto run = kind == A::swiglu     ? activate_tile<A::swiglu, S>
                   : kind == A::gpt_oss  ? activate_tile<A::gpt_oss, S>
                   : kind == A::geglu    ? activate_tile<A::geglu, S>
                   : kind == A::geglu_tanh ? activate_tile<A::geglu_tanh, S>
                                         : activate_tile<A::relu2, S>;
  run(sums, rows, cols, ld, half, b1, inner, j, limit, z, z_stride);
}

}  // namespace tk::TK_ISA
