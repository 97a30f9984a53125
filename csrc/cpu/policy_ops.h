// What policy_math.h is written in for a CPU level, VectorOps: kWidth lanes as one value, and sums of them in double.
#pragma once

#include "policy_math.h"
#include "simd/gemm.h"

namespace tk::TK_ISA {

// ---- 2 W floats as one value. A token's arithmetic is one long chain of dependent steps, and the core looks ahead by less
// than one of them: two chains side by side keep it busy (a sapo token took 117 cycles for 16 lanes, a third of that at work).

#if defined(__AVX512F__)
struct vf2 {
  vf low, high;
};
struct mask2 {
  __mmask16 low, high;
};
#define TK_EACH(op) \
  TK_POLICY vf2 operator op(vf2 x, vf2 y) { return {x.low op y.low, x.high op y.high}; }
TK_EACH(+) TK_EACH(-) TK_EACH(*) TK_EACH(/)
#undef TK_EACH
#define TK_EACH(op, code)                                           \
  TK_POLICY mask2 operator op(vf2 x, vf2 y) {                       \
    return {_mm512_cmp_ps_mask((__m512)x.low, (__m512)y.low, code), \
            _mm512_cmp_ps_mask((__m512)x.high, (__m512)y.high, code)}; \
  }
TK_EACH(<, _CMP_LT_OQ) TK_EACH(>, _CMP_GT_OQ) TK_EACH(<=, _CMP_LE_OQ) TK_EACH(>=, _CMP_GE_OQ)
TK_EACH(==, _CMP_EQ_OQ) TK_EACH(!=, _CMP_NEQ_UQ)
#undef TK_EACH
TK_POLICY vf2 operator-(vf2 x) { return {-x.low, -x.high}; }
TK_POLICY mask2 operator&(mask2 x, mask2 y) { return {(__mmask16)(x.low & y.low), (__mmask16)(x.high & y.high)}; }
TK_POLICY mask2 operator|(mask2 x, mask2 y) { return {(__mmask16)(x.low | y.low), (__mmask16)(x.high | y.high)}; }
TK_POLICY vf select(__mmask16 m, vf x, vf y) { return (vf)_mm512_mask_blend_ps(m, (__m512)y, (__m512)x); }
TK_POLICY vf2 select(mask2 m, vf2 x, vf2 y) { return {select(m.low, x.low, y.low), select(m.high, x.high, y.high)}; }
TK_POLICY vf2 min(vf2 x, vf2 y) { return {min(x.low, y.low), min(x.high, y.high)}; }
TK_POLICY vf2 max(vf2 x, vf2 y) { return {max(x.low, y.low), max(x.high, y.high)}; }
TK_POLICY vf2 abs(vf2 x) { return {abs(x.low), abs(x.high)}; }
TK_POLICY vf2 exp(vf2 x) { return {exp(x.low), exp(x.high)}; }
TK_POLICY vf2 fma(vf2 x, vf2 y, vf2 z) { return {fma(x.low, y.low, z.low), fma(x.high, y.high, z.high)}; }
#endif

template <class V> TK_POLICY V all(float x);
template <> TK_POLICY vf all<vf>(float x) { return splat(x); }
#if defined(__AVX512F__)
template <> TK_POLICY vf2 all<vf2>(float x) { return {splat(x), splat(x)}; }
#endif

// x 2^n for an integer n, t being n + 1.5 * 2^23; rounded once more where the result is subnormal.
#if defined(__AVX512F__)
TK_POLICY vf scale(vf x, vf n, vf) { return (vf)_mm512_scalef_ps((__m512)x, (__m512)n); }
TK_POLICY vf2 scale(vf2 x, vf2 n, vf2 t) { return {scale(x.low, n.low, t.low), scale(x.high, n.high, t.high)}; }
#else
TK_POLICY vf scale(vf x, vf, vf t) {
  const vi i = as_int(t) - 0x4b400000, half = i >> 1;
  return x * as_float((half + 127) << 23) * as_float((i - half + 127) << 23);
}
#endif

// e^x - 1 = 2^n (e^r - 1) + (2^n - 1) with vec.h's reduction x = n ln2 + r and one more term of the series: at most
// 1.3 ulp off where |x| < 60 (measured); from there it is e^x, and -1 below -60. *e = e^x.
template <class V> TK_POLICY V expm1(V x, V* e) {
  const auto c = [](float y) { return all<V>(y); };
  x = min(c(89.0f), max(c(-104.0f), x));
  const V magic = c(12582912.0f);
  const V t = fma(x, c(1.44269504088896341f), magic);
  const V n = t - magic;
  V r = fma(n, c(-0.693145751953125f), x);
  r = fma(n, c(-1.42860682030941723212e-6f), r);
  // the Taylor series, its terms in pairs, for a shorter chain
  const V r2 = r * r;
  const V p3 = fma(fma(c(1.98412698e-4f), r, c(1.38888889e-3f)), r2, fma(c(8.33333333e-3f), r, c(4.16666667e-2f)));
  const V p = fma(fma(p3, r2, fma(c(0.166666667f), r, c(0.5f))), r2, r);  // e^r - 1
  const V power = scale(c(1.0f), n, t), whole = scale(p + c(1.0f), n, t);
  if (e) *e = whole;
  return select(x > c(60.0f), whole, fma(p, power, power - c(1.0f)));  // 2^128 is no float
}

// Double lanes, W / 2 of them.
typedef double vd __attribute__((vector_size(W * 4), may_alias));

// A sum of floats: up to kRun vectors in float, and those partial sums lane by lane in double.
struct Sum {
  static constexpr int kRun = 8;  // converting every vector took a fifth of the loss pass
  vf run = vf{};
  vd low = vd{}, high = vd{};
  void add(vf x) { run += x; }
#if defined(__AVX512F__)
  void add(vf2 x) { run += x.low + x.high; }
#endif
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

// Past the caches: no line is fetched to be overwritten, none is pushed out. p lies on a vector's boundary.
inline void stream(float* p, vf x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}
// After streaming stores, before another thread reads them.
inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

struct VectorOps {
#if defined(__AVX512F__)
  using V = vf2;
  using M = mask2;
  static constexpr int kWidth = 2 * W;
  static TK_POLICY V load(const float* p, int n) { return {load_n(p, n), load_n(p + W, n - W)}; }
  static TK_POLICY void store(float* p, V x, int n) {
    store_n(p, x.low, n);
    store_n(p + W, x.high, n - W);
  }
  static TK_POLICY void store(float* p, V x, int n, bool streams) {
    if (!streams || n < kWidth) return store(p, x, n);
    stream(p, x.low);
    stream(p + W, x.high);
  }
  static TK_POLICY M lanes(const uint16_t* words) { return {words[0], words[1]}; }
  static TK_POLICY bool none(const uint16_t* words) { return (words[0] | words[1]) == 0; }
  static TK_POLICY vf fold_min(V x) { return TK_ISA::min(x.low, x.high); }
  static TK_POLICY vf fold_max(V x) { return TK_ISA::max(x.low, x.high); }
  static TK_POLICY int count(M m) { return count_bits((uint32_t)m.high << 16 | m.low); }
#else  // 16 registers hold one chain
  using V = vf;
  using M = vi;
  static constexpr int kWidth = W;
  static TK_POLICY V load(const float* p, int n) { return load_n(p, n); }
  static TK_POLICY void store(float* p, V x, int n) { store_n(p, x, n); }
  static TK_POLICY void store(float* p, V x, int n, bool streams) { streams && n == W ? stream(p, x) : store_n(p, x, n); }
  static TK_POLICY M lanes(const uint16_t* words) { return lanes_of(words[0]); }
  static TK_POLICY bool none(const uint16_t* words) { return words[0] == 0; }
  static TK_POLICY vf fold_min(V x) { return x; }
  static TK_POLICY vf fold_max(V x) { return x; }
  static TK_POLICY int count(M m) { return count_bits(bits_of(m)); }
#endif
  static constexpr int kWords = kWidth / W;  // words of W mask bits
  static TK_POLICY V splat(float x) { return all<V>(x); }
  static TK_POLICY V exp(V x) { return TK_ISA::exp(x); }
  static TK_POLICY V expm1(V x, V* e) { return TK_ISA::expm1(x, e); }
  static TK_POLICY V abs(V x) { return TK_ISA::abs(x); }
  static TK_POLICY V min(V a, V b) { return TK_ISA::min(a, b); }
  static TK_POLICY V max(V a, V b) { return TK_ISA::max(a, b); }
  static TK_POLICY V select(M m, V a, V b) { return TK_ISA::select(m, a, b); }
  static TK_POLICY M either(M a, M b) { return a | b; }
};

}  // namespace tk::TK_ISA
