// What policy_math.h is written in, for W lanes: vec.h's floats, and sums of them in double.
#pragma once

#include "policy_math.h"
#include "simd/gemm.h"

namespace tk::TK_ISA {

struct VectorOps {
  using V = vf;
  using M = vi;
  static TK_POLICY V splat(float x) { return TK_ISA::splat(x); }
  static TK_POLICY V exp(V x) { return TK_ISA::exp(x); }
  static TK_POLICY V abs(V x) { return TK_ISA::abs(x); }
  static TK_POLICY V min(V a, V b) { return TK_ISA::min(a, b); }
  static TK_POLICY V max(V a, V b) { return TK_ISA::max(a, b); }
  static TK_POLICY V select(M m, V a, V b) { return m ? a : b; }
  static TK_POLICY M either(M a, M b) { return a | b; }

  // e^x - 1 = 2^n (e^r - 1) + (2^n - 1) with vec.h's reduction x = n ln2 + r and one more term of the series: at most
  // 1.3 ulp off where |x| < 60 (measured); from there it is e^x, and -1 below -60.
  static TK_POLICY V expm1(V x, V* e) {
    x = min(splat(89.0f), max(splat(-104.0f), x));
    const V magic = splat(12582912.0f);
    const V t = fma(x, splat(1.44269504088896341f), magic);
    const V n = t - magic;
    V r = fma(n, splat(-0.693145751953125f), x);
    r = fma(n, splat(-1.42860682030941723212e-6f), r);
    // the Taylor series, its terms in pairs: the chain of dependent steps is what the loss pass waits for
    const V r2 = r * r;
    const V a = fma(splat(1.98412698e-4f), r, splat(1.38888889e-3f)), b = fma(splat(8.33333333e-3f), r, splat(4.16666667e-2f));
    const V c = fma(splat(0.166666667f), r, splat(0.5f));
    const V p = fma(fma(fma(a, r2, b), r2, c), r2, r);  // e^r - 1
    const V q = p + 1.0f;
#if defined(__AVX512F__)
    const V power = (V)_mm512_scalef_ps((__m512)splat(1.0f), (__m512)n);
    const V whole = (V)_mm512_scalef_ps((__m512)q, (__m512)n);
#else
    const M i = as_int(t) - 0x4b400000, half = i >> 1;
    const V first = as_float((half + 127) << 23), second = as_float((i - half + 127) << 23);
    const V power = first * second, whole = q * first * second;
#endif
    if (e) *e = whole;
    return select(x > 60.0f, whole, fma(p, power, power - 1.0f));  // 2^128 is no float
  }
};

// Double lanes, W / 2 of them.
typedef double vd __attribute__((vector_size(W * 4), may_alias));

// A sum of floats: up to kRun vectors in float, and those partial sums lane by lane in double.
struct Sum {
  static constexpr int kRun = 8;  // converting every vector took a fifth of the loss pass
  vf run = vf{};
  vd low = vd{}, high = vd{};
  void add(vf x) { run += x; }
  void flush() {
#if defined(__AVX512F__)
    low += (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)run));
    high += (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)run, 1));
#elif defined(__AVX__)
    low += (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)run));
    high += (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)run, 1));
#else
    for (int i = 0; i < W / 2; ++i) {
      low[i] += run[i];
      high[i] += run[W / 2 + i];
    }
#endif
    run = vf{};
  }
  double total() {
    flush();
    double sum = 0;
    for (int i = 0; i < W / 2; ++i) sum += low[i];
    for (int i = 0; i < W / 2; ++i) sum += high[i];
    return sum;
  }
};

// One bit a lane <-> lane masks (0 or -1).
inline vi lanes_of(uint32_t bits) {
#if defined(__AVX512F__)
  return (vi)_mm512_maskz_set1_epi32((__mmask16)bits, -1);
#else
  vi one;
  for (int i = 0; i < W; ++i) one[i] = 1 << i;
  return (splat((int32_t)bits) & one) != 0;
#endif
}
inline uint32_t bits_of(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX__)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

}  // namespace tk::TK_ISA
