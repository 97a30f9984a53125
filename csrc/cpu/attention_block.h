// What attention's forward, decode and backward share: which keys a row sees, the softmax of one split of keys,
// and the merge of splits.
//
// Canonical order, the reason why a row's bits depend on that row alone: keys are counted from the first valid one and
// cut into splits of kSplit. Inside a split a row's maximum m is taken over all its visible scores, p = 2^(c (s - m)) is
// computed once, l = sum p runs over fixed lanes, and o = p V is one product; nothing is rescaled. Splits are merged in
// ascending order by merge_row. Masked keys add exact zeros, so skipping blocks of them moves no bits, and decode,
// which computes splits in parallel and merges them afterwards, gives the bits of prefill.
// m stays a score, unscaled: s - m is exact at the maximum, so one visible key gives o = v exactly. c = scale * log2(e).
#pragma once

#include "attention.h"
#include "parallel.h"
#include "simd/gemm.h"

namespace tk::TK_ISA {

inline constexpr int kSplit = 512;        // keys
inline constexpr int kLine = 32;          // keys the softmax handles at a time; a multiple of every W and of Gemm's NR
inline constexpr int kLd = kSplit + 16;   // row stride of a block of scores: not a power of two, rows fall in different sets
inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr float kNoScore = -1e30f;  // below every real score: the maximum of a row that saw only -inf or NaN

struct Range {
  int64_t lo, hi;
};
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_down(int64_t x, int64_t to) { return x / to * to; }
inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// The keys lo <= j < hi that the query at position p sees among n; p and j count from the first valid key.
inline Range visible_keys(const AttentionShape& s, int64_t p, int64_t n) {
  int64_t lo = 0, hi = n;
  if (s.causal) hi = least(hi, p + 1);
  if (s.window_right >= 0) hi = least(hi, p + s.window_right + 1);
  if (s.window_left >= 0) lo = most(lo, p - s.window_left);
  if (s.chunk > 0) lo = most(lo, s.chunk * floor_div(p, s.chunk));
  return hi > lo ? Range{lo, hi} : Range{0, 0};
}

// A float score is a sum of chains of FMAs this long, added in ascending order; the same in forward, decode and backward. Where
// D takes more than one, they are shorter: at D = 256 two of 128 err twice as much as torch's product, which adds in lanes, four
// of 64 as much.
inline int64_t score_chain(int64_t D) { return D > Gemm<float>::KB ? Gemm<float>::KB / 2 : Gemm<float>::KB; }

// 2^t for t <= 127; error 1.2 ulp. Below 2^-126 it stays at 2^-126: nobody sees the difference beside the row's maximum,
// and no subnormals appear (they take 180 cycles a vector). NaN stays NaN. Minimax on [-1/2, 1/2], of degree 6 or, where
// the result is rounded to 16 bits, 5 (error 2 ulp).
// Here N vectors in place, step by step together: one alone is a chain of dependent instructions.
template <int N, int Degree = 6> inline __attribute__((always_inline)) void exp2_fast(vf* x) {
  constexpr float kC[2][7] = {
      {1.0f, 6.931470037e-1f, 2.402225137e-1f, 5.550736561e-2f, 9.671535343e-3f, 1.326455269e-3f},
      {1.0f, 6.931472028e-1f, 2.402264791e-1f, 5.550332472e-2f, 9.618437357e-3f, 1.339887440e-3f, 1.535336188e-4f}};
  constexpr int kSet = Degree - 5;
  vf n[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = max(splat(-126.0f), x[i]);
#if defined(__AVX512F__)
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) p[i] = (vf)_mm512_reduce_ps((__m512)x[i], 0);  // what is left after rounding to an integer
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) n[i] = x[i] - p[i], x[i] = p[i];
#else
  const vf magic = splat(12582912.0f);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) p[i] = x[i] + magic, x[i] = x[i] - (p[i] - magic);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) n[i] = as_float((as_int(p[i]) - 0x4b400000 + 127) << 23);
#endif
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) p[i] = fma(splat(kC[kSet][Degree]), x[i], splat(kC[kSet][Degree - 1]));
#pragma GCC unroll 8
  for (int j = Degree - 2; j >= 0; --j)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], x[i], splat(kC[kSet][j]));
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#if defined(__AVX512F__)
    x[i] = (vf)_mm512_scalef_ps((__m512)p[i], (__m512)n[i]);
#else
    x[i] = p[i] * n[i];
#endif
}
inline vf exp2_fast(vf t) {
  exp2_fast<1>(&t);
  return t;
}

#if defined(__AVX512BF16__)
// 2^x for x <= 0 or hardly more, where the result is rounded to bf16: error 1.5e-7 (degree 4 would do for that
// rounding, but its 3e-6 are too much for lse, which is float). scalef takes floor(x) itself, so x is cut into floor and rest,
// and the polynomial is minimax on [0, 1] with 2^0 = 1 and 2^1 = 2 exactly: a row's largest score comes out at or a hair below
// 0, and its exponential is 1. Nothing bounds x: only under FlushSubnormals. Every instruction counts here: a row of softmax is
// bound by the two vector ports.
template <int N> inline __attribute__((always_inline)) void exp2_rounded(vf* x) {
  constexpr float kC[6] = {1.0f, 0.6931517124f, 0.2401593179f, 0.0558186695f, 0.008990994655f, 0.001879318617f};
  vf r[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) r[i] = (vf)_mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEG_INF);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) p[i] = fma(splat(kC[5]), r[i], splat(kC[4]));
#pragma GCC unroll 8
  for (int j = 3; j >= 0; --j)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], r[i], splat(kC[j]));
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = (vf)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);
}

// While one lives, results below 2^-126 are zero: as subnormals they would take 180 cycles a vector.
struct FlushSubnormals {
  const unsigned before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | 0x8000); }
  ~FlushSubnormals() { _mm_setcsr(before); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};
#endif

// How scores become exponents of two: t = c * s, after s = softcap * tanh(scale * s / softcap) where there is a cap.
// A scale that is not positive is applied first too, so that the largest s is the largest t.
struct Transform {
  float c, factor, inner = 0.0f, cap = 0.0f;  // factor: c without log2(e)
  bool plain;
  explicit Transform(const AttentionShape& s) : c(s.scale * kLog2e), factor(s.scale), plain(s.softcap == 0.0f && s.scale > 0.0f) {
    if (plain) return;
    c = kLog2e, factor = 1.0f;
    inner = s.softcap == 0.0f ? s.scale : s.scale / s.softcap;
    cap = s.softcap;
  }
  vf apply(vf s) const { return cap == 0.0f ? s * inner : tanh(s * inner) * cap; }
};

// Where probabilities go: float overwrites the scores, bf16 is rounded into the left operand's panels.
template <class T> struct Probs;
template <> struct Probs<float> {
  static constexpr bool kRounded = false;
  struct Mode {
    Mode() {}
  };
  template <int N> static inline __attribute__((always_inline)) void exp2(vf* x) { exp2_fast<N>(x); }
  static constexpr int64_t size(int64_t) { return 0; }
  static float* row(float* scores, float*, int64_t r) { return scores + r * kLd; }
  static void put(float* row, int64_t k, const vf* x) {
    for (int u = 0; u < kLine / W; ++u) store(row + k + u * W, x[u]);
  }
};
#if defined(__AVX512BF16__)
template <> struct Probs<bf16> {
  using G = Gemm<bf16>;
  static constexpr bool kRounded = true;
  using Mode = FlushSubnormals;
  template <int N> static inline __attribute__((always_inline)) void exp2(vf* x) { exp2_rounded<N>(x); }
  static constexpr int64_t kPanel = G::MR * kSplit;
  static constexpr int64_t size(int64_t rows) { return rows * kSplit; }
  static bf16* row(float*, bf16* probs, int64_t r) { return probs + r / 32 * kPanel + r % 32 * 32; }
  static void put(bf16* row, int64_t k, const vf* x) {
    _mm512_store_si512(row + k * 32, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
  }
};
#endif

// A row of a block of scores: what it sees of a split, 0 <= lo < hi, and the whole lines among that.
struct RowLines {
  int64_t lo, hi, first = round_down(lo, kLine), last = round_up(hi, kLine);
  int64_t inner = round_up(lo, kLine), inner_end = round_down(hi, kLine);
  vi inside(int64_t k) const {
    const vi j = lane_index() + (int32_t)k;
    return (j >= (int32_t)lo) & (j < (int32_t)hi);
  }
};
inline constexpr int kStep = W < 16 ? kLine / W : 2 * kLine / W;  // vectors of a step through whole lines

// The maximum of a row's scores s, which are transformed on the way.
inline float row_max(const Transform& f, float* s, const RowLines& x) {
  constexpr int U = kLine / W, N = kStep;
  if (!f.plain)
    for (int64_t k = x.first; k < x.last; k += W) store(s + k, f.apply(load(s + k)));
  vf top[N];
  for (int i = 0; i < N; ++i) top[i] = splat(kNoScore);
  const auto edge = [&](int64_t k) __attribute__((always_inline)) {
    for (int u = 0; u < U; ++u) top[u] = max(select(x.inside(k + u * W), load(s + k + u * W), splat(kNoScore)), top[u]);
  };
  int64_t k = x.first;
  if (k < x.inner) edge(k), k += kLine;
  for (; k + N * W <= x.inner_end; k += N * W)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) top[i] = max(load(s + k + i * W), top[i]);
  for (; k < x.last; k += kLine) edge(k);
  for (int i = 1; i < N; ++i) top[0] = max(top[i], top[0]);
  return reduce_max(top[0]);
}

inline constexpr float kFar = 4096.0f;  // of c m: past it 2^(rounding of c m) is off by more than 2^-13

// Row r of a block: its transformed scores, whose maximum is m, -> probabilities over [k0, k1), zeros outside [lo, hi), and
// their sum, while a Probs<T>::Mode lives. k0 and k1 are multiples of kLine, k0 <= lo, hi <= k1.
template <class T>
inline __attribute__((always_inline)) float row_probs(const Transform& f, float m, float* scores, T* probs, int64_t r,
                                                      const RowLines& at, int64_t k0, int64_t k1) {
  constexpr int U = kLine / W, N = kStep;
  const float* s = scores + r * kLd;
  T* row = Probs<T>::row(scores, probs, r);
  // c (s - m), exact at the maximum; for 16-bit probabilities c s - c m, one rounding less, unless c m is so large that its own shows.
  const bool far = Probs<T>::kRounded && fabsf(m * f.c) > kFar;
  const vf c = splat(f.c), shift = far ? zero() : Probs<T>::kRounded ? splat(m) * c : splat(m);
  if (far)
    for (int64_t i = at.first; i < at.last; i += W) store(scores + r * kLd + i, load(scores + r * kLd + i) - m);
  const auto exponents = [&]<int n>(const float* s, vf* x) __attribute__((always_inline)) {
    if constexpr (Probs<T>::kRounded) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) x[i] = fms(load(s + i * W), c, shift);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) x[i] = load(s + i * W) - shift;
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) x[i] *= c;
    }
    Probs<T>::template exp2<n>(x);
  };
  vf sum[U], x[N];
  for (int u = 0; u < U; ++u) sum[u] = x[u] = zero();
  int64_t k = k0;
  for (; k < at.first; k += kLine) Probs<T>::put(row, k, x);
  // inline, or else x and sum would live in memory
  const auto edge = [&](int64_t k) __attribute__((always_inline)) {
    exponents.template operator()<U>(s + k, x);
    for (int u = 0; u < U; ++u) sum[u] += x[u] = select(at.inside(k + u * W), x[u], zero());
    Probs<T>::put(row, k, x);
  };
  if (k < at.inner) edge(k), k += kLine;
  for (; k + N * W <= at.inner_end; k += N * W) {
    exponents.template operator()<N>(s + k, x);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum[i % U] += x[i];
#pragma GCC unroll 8
    for (int i = 0; i < N; i += U) Probs<T>::put(row, k + i * W, x + i);
  }
  for (; k < at.last; k += kLine) edge(k);
  for (int u = 0; u < U; ++u) x[u] = zero();
  for (; k < k1; k += kLine) Probs<T>::put(row, k, x);
  for (int u = 1; u < U; ++u) sum[0] += sum[u];
  return reduce_add(sum[0]);
}

// Both for one row: its maximum and its sum.
template <class T>
inline void softmax_row(const Transform& f, float* scores, T* probs, int64_t r, int64_t lo, int64_t hi, int64_t k0,
                        int64_t k1, float* m, float* l) {
  const RowLines at{lo, hi};
  *m = row_max(f, scores + r * kLd, at);
  const typename Probs<T>::Mode mode;
  *l = row_probs<T>(f, *m, scores, probs, r, at, k0, k1);
}

// A row that sees nothing of [k0, k1).
template <class T> inline void blank_row(float* scores, T* probs, int64_t r, int64_t k0, int64_t k1) {
  vf x[kLine / W];
  for (vf& v : x) v = zero();
  for (int64_t k = k0; k < k1; k += kLine) Probs<T>::put(Probs<T>::row(scores, probs, r), k, x);
}

// (m, l, o) += (ms, ls, os): the running result of a row takes in the next split. Starts from m = -inf, o is then not read.
inline void merge_row(const Transform& f, float* m, float* l, float* o, float ms, float ls, const float* os, int64_t value_dim) {
  if (*m == -INFINITY) {
    *m = ms, *l = ls;
    memcpy(o, os, value_dim * sizeof(float));
    return;
  }
  const float both = ms > *m ? ms : *m;
  vf x[2] = {splat((*m - both) * f.c), splat((ms - both) * f.c)};
  exp2_fast<2>(x);
  const vf a = x[0], b = x[1];
  *l = fma(splat(ls), b, splat(*l) * a)[0];
  *m = both;
  for (int64_t d = 0; d < value_dim; d += W) {
    const vf kept = load(o + d) * a;
    store(o + d, fma(load(os + d), b, kept));
  }
}

// o / l into the output's dtype, and lse = scale * m + ln l. `sink` is null or the head's sink logit.
template <class S>
inline void finish_row(const Transform& f, float m, float l, const float* o, int64_t value_dim, const float* sink, S* out, float* lse) {
  if (m == -INFINITY) {
    for (int64_t d = 0; d < value_dim; ++d) out[d] = from_float<S>(0.0f);
    *lse = -INFINITY;
    return;
  }
  // In float, lse is rounded once: the backward's probabilities are e^(s - lse).
  if constexpr (sizeof(S) == 4) *lse = (float)((double)m * f.factor + ::log((double)l));
  else *lse = fma(splat(m), splat(f.factor), log(splat(l)))[0];
  // By the rounded lse: a sink's gradient is a product of out and e^(sink - lse), in which that rounding then cancels.
  const float divisor = sink ? l * (1.0f + exp(splat(*sink - *lse))[0]) : l;
  if constexpr (sizeof(S) == 2) {  // a division takes as long as 20 products; 16 bits do not show the second rounding
    const vf factor = splat(1.0f / divisor);
    int64_t d = 0;
    if constexpr (Probs<Compute<S>>::kRounded)
      for (; d + 2 * W <= value_dim; d += 2 * W) store_pair(out + d, load(o + d) * factor, load(o + d + W) * factor);
    for (; d < value_dim; d += W) store_n(out + d, load(o + d) * factor, (int)(value_dim - d));
  } else {
    for (int64_t d = 0; d < value_dim; d += W) store_n(out + d, load(o + d) / divisor, (int)(value_dim - d));
  }
}

template <class S> inline const S* at(const void* base, const int64_t stride[3], int64_t b, int64_t s, int64_t h) {
  return (const S*)base + b * stride[0] + s * stride[1] + h * stride[2];
}
template <class S> inline S* at(void* base, const int64_t stride[3], int64_t b, int64_t s, int64_t h) {
  return (S*)base + b * stride[0] + s * stride[1] + h * stride[2];
}

// The queries and results of forward and decode alike, of one length or packed.
struct Queries {
  const void* q;       // [B, S, H, D]; packed [N, H, D]
  void* out;           // [B, S, H, Dv]
  float* lse;          // [B, S, H]
  const float* sinks;  // [H] or null
  const int64_t *q_stride, *out_stride;
  int64_t q_len;                        // S
  const int32_t* cu_seqlens = nullptr;  // [B + 1] packed: sequence b holds rows cu_seqlens[b] ... of one batch row

  int64_t first(int64_t b) const { return cu_seqlens ? cu_seqlens[b] : 0; }
  int64_t length(int64_t b) const { return cu_seqlens ? cu_seqlens[b + 1] - cu_seqlens[b] : q_len; }
  int64_t lse_row(int64_t b, int64_t i) const { return cu_seqlens ? cu_seqlens[b] + i : b * q_len + i; }
};

// The valid keys of each sequence, j = 0 ... count(b) - 1: in a tensor, packed one after another, or in pages.
struct Keys {
  const void *k, *v;
  const int64_t *k_stride, *v_stride;
  int64_t k_len;                      // T
  const int32_t* key_start = nullptr;
  const int32_t* seqlens = nullptr;   // T of each row, instead of k_len
  const int32_t* block_table = nullptr;
  int64_t page_size = 0, max_pages = 0;
  const int32_t* cu_seqlens = nullptr;            // [B + 1] packed
  const AttentionDecodeParams* prefix = nullptr;  // whose shared prefix stands before every row's own keys
  int64_t prefix_length = 0;                      // with prefix

  int64_t start(int64_t b) const { return cu_seqlens ? cu_seqlens[b] : key_start ? key_start[b] : 0; }
  int64_t length(int64_t b) const { return cu_seqlens ? cu_seqlens[b + 1] : seqlens ? seqlens[b] : k_len; }  // past the last key
  int64_t count(int64_t b) const { return prefix_length + length(b) - start(b); }
  // Keys from j on that lie at a constant stride.
  int64_t run(int64_t j, int64_t end) const {
    int64_t page = block_table ? page_size : 0;
    if (j < prefix_length) end = least(end, prefix_length), page = prefix->prefix_table ? prefix->prefix_page_size : 0;
    else j -= prefix_length, end -= prefix_length;
    return page ? least(end - j, page - j % page) : end - j;
  }
  // Of k (stride = k_stride) or v: elements from key j to the next of its run, and key j itself.
  int64_t step(const int64_t* stride, int64_t j) const {
    return j >= prefix_length ? stride[1] : (stride == k_stride ? prefix->prefix_k_stride : prefix->prefix_v_stride)[1];
  }
  template <class S> const S* row(const void* base, const int64_t* stride, int64_t b, int64_t j, int64_t h) const {
    if (j < prefix_length) {
      const AttentionDecodeParams& x = *prefix;
      if (stride == k_stride) base = x.prefix_k, stride = x.prefix_k_stride;
      else base = x.prefix_v, stride = x.prefix_v_stride;
      if (!x.prefix_table) return at<S>(base, stride, 0, j, h);
      return at<S>(base, stride, x.prefix_table[j / x.prefix_page_size], j % x.prefix_page_size, h);
    }
    j -= prefix_length;
    if (!block_table) return at<S>(base, stride, b, start(b) + j, h);
    return at<S>(base, stride, block_table[b * max_pages + j / page_size], j % page_size, h);
  }
};

// Packs keys [j, j + keys) of head h as right operands: K^T [D, keys] and V [keys, Dv]. Pages and prefixes that end inside
// a panel are gathered into `rows` ([kSplit, max(D, Dv)]) first.
template <class S, class T = Compute<S>>
inline void pack_split(const Keys& x, int64_t b, int64_t h, int64_t j, int64_t keys, int64_t D, int64_t Dv, S* rows, T* k, T* v) {
  using Mm = Gemm<T>;
  const int64_t kp = Mm::padded_k(D), keys_p = Mm::padded_k(keys), end = j + keys;
  bool in_place = true;
  for (int64_t i = j; i < end; i += x.run(i, end)) in_place &= (i - j) % kLine == 0;
  const auto gather = [&](const void* base, const int64_t* stride, int64_t width) {
    for (int64_t i = 0; i < keys; ++i) memcpy((void*)(rows + i * width), x.row<S>(base, stride, b, j + i, h), width * sizeof(S));
  };
  if (!in_place) gather(x.k, x.k_stride, D), Mm::pack_b(rows, D, keys, D, k);
  for (int64_t i = j, n; in_place && i < end; i += n) {
    n = x.run(i, end);
    Mm::pack_b(x.row<S>(x.k, x.k_stride, b, i, h), x.step(x.k_stride, i), n, D, k + (i - j) * kp);
  }
  if (!in_place) gather(x.v, x.v_stride, Dv), Mm::pack_b_t(rows, Dv, Dv, keys, v);
  for (int64_t i = j, n; in_place && i < end; i += n) {
    n = x.run(i, end);
    const S* src = x.row<S>(x.v, x.v_stride, b, i, h);
    for (int64_t d = 0; d < Dv; d += Mm::NR)
      Mm::pack_b_t(src + d, x.step(x.v_stride, i), least(Mm::NR, Dv - d), n, v + d * keys_p + (i - j) * Mm::NR);
  }
}

// Forward over keys in a tensor or in pages, every row through its splits in order (attention_forward.cpp).
void attention_rows(const AttentionShape& s, const Queries& q, const Keys& k);

}  // namespace tk::TK_ISA
