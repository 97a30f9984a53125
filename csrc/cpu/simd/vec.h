// Vectors of floats for one ISA level, from the compiler's vector extensions.
//
//   W            floats per vector: 16 (AVX-512, AMX), 8 (AVX2), 4 (baseline)
//   vf, vi, vu   W floats, W int32, W uint32
//   bf16, f16    16-bit storage types; arithmetic is always in float
//
// load/store convert from and to float, bf16 and f16; the `_n` forms touch only n < W elements and
// read zeros beyond. Everything rounds to nearest even, NaN stays NaN, subnormals are kept. Sums over
// lanes are taken in one fixed tree order. No operation here depends on alignment or position.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef TK_ISA
#define TK_ISA baseline
#endif

namespace tk::TK_ISA {

#if defined(__AVX512F__)
inline constexpr int W = 16;
#elif defined(__AVX2__)
inline constexpr int W = 8;  // 16 lanes emulated under AVX2 ran at an eighth of the speed
#else
inline constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4), may_alias));
typedef uint32_t vu __attribute__((vector_size(W * 4), may_alias));
typedef uint16_t vh __attribute__((vector_size(W * 2), may_alias));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline vf splat(float x) { return x - vf{}; }  // x - 0 folds away; x + 0 does not, it turns -0 into 0
inline vi splat(int32_t x) { return vi{} + x; }
inline vf zero() { return vf{}; }
inline vi as_int(vf x) { return (vi)x; }
inline vf as_float(vi x) { return (vf)x; }
inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }  // mask lanes are 0 or -1
inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#endif
  int32_t found = 0;
  for (int i = 0; i < W; ++i) found |= mask[i];
  return found != 0;
}
// b where either is NaN. On AVX-512 GCC 12 compiles the comparison to two instructions and a mask.
inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
inline vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}
inline vf abs(vf x) { return as_float(as_int(x) & 0x7fffffff); }
inline vi lane_index() {
  vi x;
  for (int i = 0; i < W; ++i) x[i] = i;
  return x;
}

// a * b + c with one rounding (baseline x86 has no FMA: two roundings there, on every path alike).
inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// a * b - c with one rounding
inline vf fms(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return fma(a, b, -c);
#endif
}

// ---- scalar conversions

inline float bits_to_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float((uint32_t)x.bits << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13 | ((rest & 0x3ff) ? 0x400000 : 0));
  if (rest < 0x400) {  // zero or subnormal: exact in float
    const float magnitude = (float)rest * 0x1p-24f;
    return bits_to_float(sign | float_to_bits(magnitude));
  }
  return bits_to_float(sign | ((rest << 13) + 0x38000000));
}

template <class S> inline S from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {(uint16_t)(u >> 16 | 0x40)};
  return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) {
  const uint32_t u = float_to_bits(x);
  const uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return {(uint16_t)(sign | 0x7e00 | (a >> 13 & 0x3ff))};
  if (a >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};  // rounds to infinity
  if (a < 0x38800000) {                                      // subnormal result: adding 0.5 rounds at 2^-24
    const float y = bits_to_float(a) + 0.5f;
    return {(uint16_t)(sign | (float_to_bits(y) - 0x3f000000))};
  }
  return {(uint16_t)(sign | ((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13))};
}

// ---- vector loads

inline vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf x;
  for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}
template <class S> inline vf load_n(const S* p, int n) {
  if (n >= W) return load(p);
#if defined(__AVX512F__)
  const __mmask16 m = n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
  if constexpr (sizeof(S) == 4) return (vf)_mm512_maskz_loadu_ps(m, p);
  alignas(32) S tail[W];
  _mm256_store_si256((__m256i*)tail, _mm256_maskz_loadu_epi16(m, p));
  return load(tail);
#else
  S tail[W] = {};
  for (int i = 0; i < n; ++i) tail[i] = p[i];
  return load(tail);
#endif
}

// ---- vector stores

inline void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
inline void store(bf16* p, vf x) {
  const vu u = (vu)x;
  const vu rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const vu quiet = u >> 16 | 0x40;
  const vh h = __builtin_convertvector((vu)(x != x ? (vi)quiet : (vi)rounded), vh);
  memcpy(p, &h, sizeof h);
}
inline void store(f16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) p[i] = from_float<f16>(x[i]);
#endif
}
template <class S> inline void store_n(S* p, vf x, int n) {
  if (n >= W) return store(p, x);
#if defined(__AVX512F__)
  const __mmask16 m = n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
  if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, m, (__m512)x);
  alignas(32) S tail[W];
  store(tail, x);
  _mm256_mask_storeu_epi16(p, m, _mm256_load_si256((const __m256i*)tail));
#else
  S tail[W];
  store(tail, x);
  for (int i = 0; i < n; ++i) p[i] = tail[i];
#endif
}

#if defined(__AVX512BF16__)
// Two vectors one after the other. Subnormals become zero here.
inline void store_pair(bf16* p, vf first, vf second) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
#endif

// ---- reductions over the lanes: halves added, then halves of those, ...

#if defined(__AVX2__)
// Lane 0 of f over all lanes; in registers: through memory a row of softmax waited longer for this than for its 512 exponentials.
template <class F> inline float reduce_lanes(vf x, const F& f) {
#if defined(__AVX512F__)
  const __m256 y = f(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
#else
  const __m256 y = (__m256)x;
#endif
  const __m256 q = f(y, _mm256_permute2f128_ps(y, y, 1));
  const __m256 h = f(q, _mm256_permute_ps(q, 0b01001110));
  return _mm256_cvtss_f32(f(h, _mm256_permute_ps(h, 0b10110001)));
}
inline float reduce_add(vf x) {
  return reduce_lanes(x, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
}
// NaN lanes are ignored or not, as they fall: callers that must see NaN get it from their sums.
inline float reduce_max(vf x) {
  return reduce_lanes(x, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
}
#else
inline float reduce_add(vf x) {
  float t[W];
  store(t, x);
  for (int h = W / 2; h; h /= 2)
    for (int i = 0; i < h; ++i) t[i] += t[i + h];
  return t[0];
}
inline float reduce_max(vf x) {
  float t[W];
  store(t, x);
  for (int h = W / 2; h; h /= 2)
    for (int i = 0; i < h; ++i) t[i] = t[i] > t[i + h] ? t[i] : t[i + h];
  return t[0];
}
#endif

// ---- functions

// e^x: at most 1.03 ulp off in the normal range (measured), 0 below -104 (so exp(-inf) = 0), subnormal results
// rounded once more, +inf above 88.73, NaN for NaN. x = n ln2 + r, |r| <= ln2/2, Taylor to r^7.
inline vf exp(vf x) {
  x = x < -104.0f ? splat(-104.0f) : x;
  x = x > 89.0f ? splat(89.0f) : x;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf t = fma(x, splat(1.44269504088896341f), magic);
  const vf n = t - magic;
  vf r = fma(n, splat(-0.693145751953125f), x);  // ln2 in two parts, the first with zeros at the end
  r = fma(n, splat(-1.42860682030941723212e-6f), r);
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
  const vi i = as_int(t) - 0x4b400000;
  const vi half = i >> 1;  // in two steps, so that 2^128 and subnormal results work
  return p * as_float((half + 127) << 23) * as_float((i - half + 127) << 23);
#endif
}

// ln x: at most 1 ulp off in the normal range, -inf at 0, +inf for +inf, NaN below 0 and for NaN; subnormals count as 0.
// x = 2^n (1 + r), |r| <= sqrt(2) - 1 about, polynomial in r by Cephes' coefficients.
inline vf log(vf x) {
  const vi bits = as_int(x) - 0x3f3504f3;  // sqrt(1/2)
  const vf n = __builtin_convertvector(bits >> 23, vf);
  const vf r = as_float((bits & 0x7fffff) + 0x3f3504f3) - 1.0f, z = r * r;
  vf p = splat(7.0376836292e-2f);
  p = fma(p, r, splat(-1.1514610310e-1f));
  p = fma(p, r, splat(1.1676998740e-1f));
  p = fma(p, r, splat(-1.2420140846e-1f));
  p = fma(p, r, splat(1.4249322787e-1f));
  p = fma(p, r, splat(-1.6668057665e-1f));
  p = fma(p, r, splat(2.0000714765e-1f));
  p = fma(p, r, splat(-2.4999993993e-1f));
  p = fma(p, r, splat(3.3333331174e-1f));
  vf y = fma(n, splat(-2.12194440e-4f), p * r * z);
  y = fma(z, splat(-0.5f), y);
  y = fma(n, splat(0.693359375f), r + y);
  y = x < 1.17549435e-38f ? splat(-INFINITY) : y;
  y = x == INFINITY ? x : y;
  return x >= 0.0f ? y : splat(NAN);
}

// tanh: below 0.625 an odd polynomial (Cephes' coefficients), above 1 - 2 / (e^2|x| + 1). At most 1.4 ulp off (measured).
inline vf tanh(vf x) {
  const vf a = abs(x), z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const vf near = fma(p * z, x, x);
  const vf far = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  const vf signed_far = as_float(as_int(far) | (as_int(x) & (int32_t)0x80000000));
  return a < 0.625f ? near : signed_far;
}

// Transposes the W x W matrix v[row][lane] in place: log2(W) rounds of swapping off-diagonal blocks.
template <int H> __attribute__((always_inline)) inline void transpose_round(vi* v) {
  vi first, second;
  for (int lane = 0; lane < W; ++lane) {
    first[lane] = lane & H ? lane - H + W : lane;
    second[lane] = lane & H ? lane + W : lane + H;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & H) continue;
    const vi a = v[i], b = v[i + H];
    v[i] = __builtin_shuffle(a, b, first);
    v[i + H] = __builtin_shuffle(a, b, second);
  }
}
__attribute__((always_inline)) inline void transpose(vi* v) {
  if constexpr (W == 16) transpose_round<8>(v);
  if constexpr (W >= 8) transpose_round<4>(v);
  transpose_round<2>(v);
  transpose_round<1>(v);
}

// f<R>(r) for rows r to r + R, the largest R (a power of two) as often as they last, then half of it, and so on.
template <int R, class F> inline void by_groups(int64_t rows, const F& f, int64_t r = 0) {
  for (; r + R <= rows; r += R) f.template operator()<R>(r);
  if constexpr (R > 1) by_groups<R / 2>(rows, f, r);
}

}  // namespace tk::TK_ISA
