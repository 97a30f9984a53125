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

// 2^t for t <= 127; error 1.2 ulp. Below 2^-126 it stays at 2^-126: nobody sees the difference beside the row's maximum,
// and no subnormals appear. NaN stays NaN. Degree 6 on [-1/2, 1/2], minimax.
inline vf exp2_fast(vf t) {
  t = max(splat(-126.0f), t);
  const vf magic = splat(12582912.0f);
  const vf shifted = t + magic;
  const vf n = shifted - magic;
  const vf r = t - n;
  vf p = splat(1.535336188e-4f);
  p = fma(p, r, splat(1.339887440e-3f));
  p = fma(p, r, splat(9.618437357e-3f));
  p = fma(p, r, splat(5.550332472e-2f));
  p = fma(p, r, splat(2.402264791e-1f));
  p = fma(p, r, splat(6.931472028e-1f));
  p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * as_float((as_int(shifted) - 0x4b400000 + 127) << 23);
#endif
}

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
  static constexpr int64_t size(int64_t) { return 0; }
  static void put(float* scores, float*, int64_t r, int64_t k, const vf* x) {
    for (int u = 0; u < kLine / W; ++u) store(scores + r * kLd + k + u * W, x[u]);
  }
  // C = P[:, k0:k1] V[k0:k1]
  static void times(int64_t M, int64_t N, int64_t k0, int64_t k1, const float* scores, const float*, const float* v,
                    int64_t v_panel, float* c, int64_t ldc) {
    using G = Gemm<float>;
    for (int64_t k = k0; k < k1;) {  // Gemm's summation blocks count from the split's first key, not from k0
      const int64_t end = least(round_down(k, G::KB) + G::KB, k1);
      G::gemm_panels<kLd, 1>(M, N, end - k, scores + k, G::MR * kLd, v + k * G::NR, v_panel, c, ldc, k > k0);
      k = end;
    }
  }
};
#if defined(__AMX_BF16__)
template <> struct Probs<bf16> {
  using G = Gemm<bf16>;
  static constexpr int64_t kPanel = G::MR * kSplit;
  static constexpr int64_t size(int64_t rows) { return rows * kSplit; }
  static void put(float*, bf16* probs, int64_t r, int64_t k, const vf* x) {
    bf16* line = probs + r / 32 * kPanel + k * 32 + r % 32 * 32;
    _mm512_store_si512(line, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
  }
  static void times(int64_t M, int64_t N, int64_t k0, int64_t k1, const float*, const bf16* probs, const bf16* v,
                    int64_t v_panel, float* c, int64_t ldc) {
    G::gemm_panels(M, N, k1 - k0, probs + k0 * G::MR, kPanel, v + k0 * G::NR, v_panel, c, ldc, false);
  }
};
#endif

// One row r of a block: scores[r][lo:hi) of a split -> probabilities over [k0, k1), zeros outside [lo, hi);
// returns the maximum and the sum. k0 and k1 are multiples of kLine, 0 <= k0 <= lo < hi <= k1.
template <class T>
inline void softmax_row(const Transform& f, float* scores, T* probs, int64_t r, int64_t lo, int64_t hi, int64_t k0,
                        int64_t k1, float* m, float* l) {
  constexpr int U = kLine / W;
  float* s = scores + r * kLd;
  const int64_t first = round_down(lo, kLine), last = round_up(hi, kLine);
  const vi lanes = lane_index();
  const auto edge = [&](int64_t k) { return k < lo || k + kLine > hi; };
  const auto inside = [&](int64_t k) {
    const vi j = lanes + (int32_t)k;
    return (j >= (int32_t)lo) & (j < (int32_t)hi);
  };
  if (!f.plain)
    for (int64_t k = first; k < last; k += W) store(s + k, f.apply(load(s + k)));

  vf top[U];
  for (int u = 0; u < U; ++u) top[u] = splat(kNoScore);
  for (int64_t k = first; k < last; k += kLine) {
    if (edge(k)) {
      for (int u = 0; u < U; ++u) top[u] = max(select(inside(k + u * W), load(s + k + u * W), splat(kNoScore)), top[u]);
    } else {
      for (int u = 0; u < U; ++u) top[u] = max(load(s + k + u * W), top[u]);
    }
  }
  for (int u = 1; u < U; ++u) top[0] = max(top[u], top[0]);
  const float maximum = reduce_max(top[0]);

  const vf c = splat(f.c), shift = splat(maximum);
  vf sum[U], x[U];
  for (int u = 0; u < U; ++u) sum[u] = x[u] = zero();
  for (int64_t k = k0; k < first; k += kLine) Probs<T>::put(scores, probs, r, k, x);
  for (int64_t k = first; k < last; k += kLine) {
    for (int u = 0; u < U; ++u) {
      x[u] = exp2_fast((load(s + k + u * W) - shift) * c);
      if (edge(k)) x[u] = select(inside(k + u * W), x[u], zero());
      sum[u] += x[u];
    }
    Probs<T>::put(scores, probs, r, k, x);
  }
  for (int u = 0; u < U; ++u) x[u] = zero();
  for (int64_t k = last; k < k1; k += kLine) Probs<T>::put(scores, probs, r, k, x);
  for (int u = 1; u < U; ++u) sum[0] += sum[u];
  *m = maximum;
  *l = reduce_add(sum[0]);
}

// A row that sees nothing of [k0, k1).
template <class T> inline void blank_row(float* scores, T* probs, int64_t r, int64_t k0, int64_t k1) {
  vf x[kLine / W];
  for (vf& v : x) v = zero();
  for (int64_t k = k0; k < k1; k += kLine) Probs<T>::put(scores, probs, r, k, x);
}

// (m, l, o) += (ms, ls, os): the running result of a row takes in the next split. Starts from (-inf, 0, 0).
inline void merge_row(const Transform& f, float* m, float* l, float* o, float ms, float ls, const float* os, int64_t value_dim) {
  const float both = ms > *m ? ms : *m;
  const vf a = *m == -INFINITY ? zero() : exp2_fast(splat((*m - both) * f.c)), b = exp2_fast(splat((ms - both) * f.c));
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
  *lse = fma(splat(m), splat(f.factor), splat(logf(l)))[0];
  const float divisor = sink ? l * (1.0f + expf(*sink - *lse)) : l;
  for (int64_t d = 0; d < value_dim; d += W) store_n(out + d, load(o + d) / divisor, (int)(value_dim - d));
}

template <class S> inline const S* at(const void* base, const int64_t stride[3], int64_t b, int64_t s, int64_t h) {
  return (const S*)base + b * stride[0] + s * stride[1] + h * stride[2];
}
template <class S> inline S* at(void* base, const int64_t stride[3], int64_t b, int64_t s, int64_t h) {
  return (S*)base + b * stride[0] + s * stride[1] + h * stride[2];
}

// The queries and results of forward and decode alike.
struct Queries {
  const void* q;       // [B, S, H, D]
  void* out;           // [B, S, H, Dv]
  float* lse;          // [B, S, H]
  const float* sinks;  // [H] or null
  const int64_t *q_stride, *out_stride;
};

// The valid keys of each batch row, j = 0 ... count(b) - 1, in a tensor or in pages.
struct Keys {
  const void *k, *v;
  const int64_t *k_stride, *v_stride;
  int64_t k_len;                      // T
  const int32_t* key_start = nullptr;
  const int32_t* seqlens = nullptr;   // T of each row, instead of k_len
  const int32_t* block_table = nullptr;
  int64_t page_size = 0, max_pages = 0;
  const AttentionDecodeParams* prefix = nullptr;  // whose shared prefix stands before every row's own keys
  int64_t prefix_length = 0;                      // with prefix

  int64_t start(int64_t b) const { return key_start ? key_start[b] : 0; }
  int64_t length(int64_t b) const { return seqlens ? seqlens[b] : k_len; }  // T of this row
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

// A block of rows against one split of keys: scores, softmax, values.
template <class T> struct SplitBlock {
  using Mm = Gemm<T>;
  static constexpr int64_t kRows = W < 16 ? 4 * Mm::MR : 64 / Mm::MR * Mm::MR;  // 64 (bf16), 60 (AVX-512), 24
  const Transform transform;
  const int64_t D, Dv, ldo = round_up(Dv, Mm::NR);
  float* scores;   // [kRows, kLd]
  T* probs;        // bf16: packed [kRows, kSplit]
  float* o_split;  // [kRows, ldo]
  float ms[kRows], ls[kRows];  // the split's maximum (-inf: the row sees nothing of it) and sum

  static int64_t floats(int64_t Dv) { return kRows * (kLd + round_up(Dv, Mm::NR)) + Probs<T>::size(kRows) / 2; }
  SplitBlock(const AttentionShape& s, float* scratch)
      : transform(s), D(s.head_dim), Dv(s.value_dim), scores(scratch), probs((T*)(scratch + kRows * kLd)),
        o_split(scratch + kRows * kLd + Probs<T>::size(kRows) / 2) {}

  // rows <= kRows packed queries q that see `seen` of the keys [base, base + keys) packed in k and v; false: nothing of them.
  bool run(int64_t rows, const Range* seen, int64_t base, int64_t keys, const T* q, const T* k, const T* v) {
    int64_t k0 = keys, k1 = 0;
    const auto clip = [&](int64_t r) { return Range{most(seen[r].lo - base, 0), least(seen[r].hi - base, keys)}; };
    for (int64_t r = 0; r < rows; ++r) {
      const Range c = clip(r);
      if (c.lo < c.hi) k0 = least(k0, c.lo), k1 = most(k1, c.hi);
    }
    if (k0 >= k1) return false;
    k0 = round_down(k0, kLine), k1 = round_up(k1, kLine);

    const int64_t M = round_up(rows, Mm::MR), kp = Mm::padded_k(D), keys_p = Mm::padded_k(keys);
    Mm::gemm_panels(M, k1 - k0, D, q, Mm::MR * kp, k + k0 * kp, Mm::NR * kp, scores + k0, kLd, false);
    for (int64_t r = 0; r < rows; ++r) {
      const Range c = clip(r);
      ms[r] = -INFINITY;
      if (c.lo < c.hi) softmax_row<T>(transform, scores, probs, r, c.lo, c.hi, k0, k1, ms + r, ls + r);
      else blank_row<T>(scores, probs, r, k0, k1);
    }
    Probs<T>::times(M, ldo, k0, least(k1, keys_p), scores, probs, v, Mm::NR * keys_p, o_split, ldo);
    return true;
  }
};

// Forward over keys in a tensor or in pages, every row through its splits in order (attention_forward.cpp).
void attention_rows(const AttentionShape& s, const Queries& q, const Keys& k);

}  // namespace tk::TK_ISA
