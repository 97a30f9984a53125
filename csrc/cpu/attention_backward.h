// One block of queries against one block of keys in attention's backward: five products and the elementwise middle.
//
//   GradBlock<T>::run: S^T = K Q^T, dP^T = V dO^T, P^T = gate e^(scale S^T - lse), dS^T = P^T (dP^T - <dO, O> + dlse), then
//   dV += P^T dO, dK += dS^T Q, dQ += (dS^T)^T K, by panels of kPanel keys and groups of kGroup queries.
// Panels and groups that see nothing of each other are skipped; what they would add is zero.
#pragma once

#include "attention_block.h"

namespace tk::TK_ISA {

// The keys each query of a (batch, key head) pair sees, and bounds over each group of queries.
struct QueryRanges {
  int32_t *lo, *hi;            // [rows] keys lo <= j < hi, counted from the first valid key
  int32_t *hull_lo, *hull_hi;  // [rows / group] every key outside is unseen by the whole group; (0, 0) if nobody sees any
  int32_t *core_lo, *core_hi;  // [rows / group] every key inside is seen by the whole group

  static int64_t floats(int64_t rows, int64_t group) { return 2 * rows + 4 * (rows / group); }
  void place(int32_t* base, int64_t rows, int64_t group) {
    lo = base, hi = lo + rows;
    hull_lo = hi + rows, hull_hi = hull_lo + rows / group;
    core_lo = hull_hi + rows / group, core_hi = core_lo + rows / group;
  }
  QueryRanges from(int64_t q, int64_t group) const {
    const int64_t g = q / group;
    return {lo + q, hi + q, hull_lo + g, hull_hi + g, core_lo + g, core_hi + g};
  }
  // Whole groups of queries from `at` on, of which `count` exist, the first at `position`; n keys.
  void fill(const AttentionShape& s, int64_t at, int64_t count, int64_t position, int64_t n, int64_t group) const {
    for (int64_t first = at; first < at + count; first += group) {
      const int64_t g = first / group;
      hull_lo[g] = (int32_t)n, hull_hi[g] = 0, core_lo[g] = 0, core_hi[g] = (int32_t)n;
      for (int64_t i = first; i < first + group; ++i) {
        const Range seen = i - at < count ? visible_keys(s, position + i - at, n) : Range{0, 0};
        lo[i] = (int32_t)seen.lo, hi[i] = (int32_t)seen.hi;
        core_lo[g] = core_lo[g] > lo[i] ? core_lo[g] : lo[i];
        core_hi[g] = core_hi[g] < hi[i] ? core_hi[g] : hi[i];
        if (lo[i] == hi[i]) continue;
        hull_lo[g] = hull_lo[g] < lo[i] ? hull_lo[g] : lo[i];
        hull_hi[g] = hull_hi[g] > hi[i] ? hull_hi[g] : hi[i];
      }
      if (hull_hi[g] == 0) hull_lo[g] = 0;
    }
  }
  bool meets(int64_t g, int64_t k0, int64_t k1) const { return hull_lo[g] < k1 && hull_hi[g] > k0; }
};

// Packed operands of the two blocks ("down": rows of the block are summed over or are C's rows; "across": C's columns).
template <class T> struct BlockOperands {
  int64_t keys, queries, D, Dv, ldk, ldv, first_key;
  bool ascending;              // the order in which dK and dV sum the queries (float only)
  const T *q_across, *q_down;  // [D, queries], [queries, D] right operands
  const T *o_across, *o_down;  // [Dv, queries], [queries, Dv] right operands: dO
  const T *k_down, *v_down;    // [keys, D], [keys, Dv] left operands
  const T* key;                // K for dQ
  const float *logit, *dot;    // [queries] lse (times log2(e) for bf16), <dO, O>
  const float* rest;           // [queries] what lse lacks where that is known (float only)
  const float *dlse, *gate;    // [queries] gradient of lse; what a sink leaves of a row; null where there are none
  QueryRanges seen;
};

// p and dS of W scores. Float takes e^(scale s - lse), whose argument is rounded once and is small where p is not; the
// two roundings of 2^(c s - log2(e) lse) cost 2 ulp more at |lse| = 4, which bf16 does not notice.
template <class T> struct Grad {
  static constexpr bool natural = sizeof(T) != 2;
  const Transform& f;
  vf c;
  explicit Grad(const Transform& transform) : f(transform), c(splat(natural ? transform.factor : transform.c)) {}
  static float logit(float lse) { return natural ? lse : lse * kLog2e; }
  // The exponent of p, and d(scaled score) / d(score) without the scale.
  vf exponent(vf s, vf l, vf* slope) const {
    *slope = splat(1.0f);
    if (!f.plain) {
      s = s * f.inner;
      if (f.cap != 0.0f) {
        s = tanh(s);
        *slope = fma(-s, s, *slope);
        s = s * f.cap;
      }
    }
    return fma(s, c, -l);
  }
  vf probability(vf s, vf l, vf rest, vf* slope) const {
    const vf t = exponent(s, l, slope);
    return natural ? exp(t - rest) : exp2_fast(t);
  }
  // gate, if there is one, is multiplied onto p (rather than into lse, which would be rounded once more); dlse, if there is
  // one, knows nothing of it, and joins after dp - dot, which may cancel.
  void operator()(vf s, vf dp, vf l, vf rest, vf dot, const vf* dlse, const vf* gate, vf* p, vf* ds) const {
    vf slope;
    *p = probability(s, l, rest, &slope);
    const vf plain_p = *p;
    if (gate) *p = *p * *gate;
    *ds = *p * (dp - dot);
    if (dlse) *ds = fma(plain_p, *dlse, *ds);
    if (!f.plain) *ds = *ds * slope;
  }
};

// <dO, O> of W queries. One all of whose keys are among the `rows` from j0 on takes gate Σ p dP / Σ p of these very products: of few
// keys dP - <dO, O> is small, and the roundings of dP cancel as well then, which those of O do not. s, dp: [rows, ld]
template <class T>
inline vf dot_here(const Grad<T>& grad, const float* s, const float* dp, int64_t ld, int64_t j0, int64_t rows, vf logit, vf rest,
                   const vf* gate, vi lo, vi hi, vf dot) {
  vi few = (lo >= splat((int32_t)j0)) & (hi <= splat((int32_t)(j0 + rows))) & (hi - lo > (gate ? 0 : 1));
  if (!any(few)) return dot;
  vf sum = zero(), weighted = zero();
  for (int64_t r = 0; r < rows; ++r) {
    vf slope;
    const vi j = splat((int32_t)(j0 + r)), in = (lo <= j) & (j < hi);
    const vf p = select(in, grad.probability(load(s + r * ld), logit, rest, &slope), zero());
    sum += p;
    weighted = fma(p, select(in, load(dp + r * ld), zero()), weighted);
  }
  const vf mean = weighted / sum;
  few &= abs(sum - 1.0f) < 1e-3f;  // else lse is of more keys than these
  return select(few, gate ? mean * *gate : mean, dot);
}

// Groups [a, b) of queries that see something of keys [k0, k1).
template <class T> inline void groups_seeing(const BlockOperands<T>& o, int64_t group, int64_t k0, int64_t k1, int64_t* a, int64_t* b) {
  const int64_t groups = (o.queries + group - 1) / group;
  *a = groups, *b = 0;
  for (int64_t g = 0; g < groups; ++g)
    if (o.seen.meets(g, o.first_key + k0, o.first_key + k1)) *a = least(*a, g), *b = g + 1;
}
// Keys [a, b) of the block, in whole panels, of which group g sees something.
template <class T> inline void keys_seen(const BlockOperands<T>& o, int64_t panel, int64_t g, int64_t* a, int64_t* b) {
  *a = o.keys, *b = 0;
  for (int64_t k0 = 0; k0 < o.keys; k0 += panel)
    if (o.seen.meets(g, o.first_key + k0, o.first_key + least(k0 + panel, o.keys))) *a = least(*a, k0), *b = k0 + panel;
}

template <class T> struct GradBlock;

// ------------------------------------------------------------------------------------------------ float

template <> struct GradBlock<float> {
  using Mm = Gemm<float>;
  static constexpr int64_t kQueries = 192, kKeys = 192, kGroup = 48, kPanel = 48;
  // dP^T sums its Dv terms in chains of so many: what dP loses to rounding is half of dQ's and dK's error where a row sees a
  // dozen keys, and one chain of 128 loses twice as much as four of 32.
  static constexpr int64_t kStep = 32;
  static constexpr int64_t kLdq = kQueries + 16;  // rows of scores in different cache sets

  using Scores = Mm;  // of K Q^T
  static constexpr int64_t kTogether = 2;  // key blocks a query block passes over while it is in L2
  static constexpr bool kFresh = false;  // whether queries are packed at each use
  static int64_t key_size(int64_t D) { return Mm::size_b(D, kKeys); }
  static int64_t dq_size(int64_t D) { return kQueries * round_up(D, Mm::NR); }
  static int64_t floats() { return (kPanel + kKeys) * kLdq; }
  template <class S> static void pack_key(const S* src, int64_t stride, int64_t keys, int64_t D, float* dst) {
    Mm::pack_b_t(src, stride, D, keys, dst);
  }
  const float* dq_row(const float* dq, int64_t r, int64_t D) const { return dq + r * round_up(D, Mm::NR); }

  // <dO_i, O_i> of the rows packed across in dout, over eight interleaved sums: where dP and this nearly cancel, a chain's
  // rounding would show. A row that sees one key has O = V: there (one_key is -1) it is summed as the product
  // V dO^T is, and dP - dot is exactly 0.
  template <class S>
  static void dots(const float* dout, const S*, int64_t, const S* out, int64_t stride, int64_t rows, int64_t Dv,
                   const int32_t* one_key, float* dot) {
    alignas(64) float across[Mm::NR * 256];
    for (int64_t r = 0; r < rows; r += Mm::NR, dout += Mm::NR * Dv) {
      Mm::pack_b(out + r * stride, stride, least(Mm::NR, rows - r), Dv, across);
      for (int64_t c = 0; c < Mm::NR; c += W) {
        vf part[8] = {}, chain = zero(), sum = zero();
        for (int64_t k = 0; k < Dv; ++k) {
          const vf x = load(dout + k * Mm::NR + c), y = load(across + k * Mm::NR + c);
          part[k % 8] = fma(x, y, part[k % 8]);
          chain = fma(x, y, chain);
          if ((k + 1) % kStep == 0 || k + 1 == Dv) sum = k < kStep ? chain : sum + chain, chain = zero();
        }
        for (int h = 4; h; h /= 2)
          for (int i = 0; i < h; ++i) part[i] += part[i + h];
        vi one;
        memcpy(&one, one_key + r + c, sizeof one);
        store(dot + r + c, select(one, sum, part[0]));
      }
    }
  }

  float *s, *ds;  // [kPanel, kLdq] S^T, then P^T; [kKeys, kLdq] dP^T, then dS^T
  explicit GradBlock(float* base) : s(base), ds(base + kPanel * kLdq) {}

  // dq_started, by groups: whether dq holds a sum already.
  void run(const Transform& f, const BlockOperands<float>& o, float* dk, float* dv, float* dq, bool* dq_started) {
    const Grad<float> grad(f);
    const int64_t q_panel = Mm::NR * o.queries, chain = score_chain(o.D);
    for (int64_t k0 = 0; k0 < o.keys; k0 += kPanel) {
      const int64_t rows = least(kPanel, o.keys - k0);
      int64_t ga, gb;
      groups_seeing(o, kGroup, k0, k0 + rows, &ga, &gb);
      if (ga >= gb) continue;
      const int64_t qa = ga * kGroup, qb = least(gb * kGroup, o.queries);
      const int64_t ca = round_down(qa, Mm::NR), cb = round_up(gb * kGroup, Mm::NR);
      float* dp = ds + k0 * kLdq;
      for (int64_t d = 0; d < o.D; d += chain)
        Mm::gemm_panels(rows, cb - ca, least(chain, o.D - d), o.k_down + k0 * o.D + d * Mm::MR, Mm::MR * o.D,
                        o.q_across + ca * o.D + d * Mm::NR, Mm::NR * o.D, s + ca, kLdq, d > 0);
      for (int64_t d = 0; d < o.Dv; d += kStep)
        Mm::gemm_panels(rows, cb - ca, least(kStep, o.Dv - d), o.v_down + k0 * o.Dv + d * Mm::MR, Mm::MR * o.Dv,
                        o.o_across + ca * o.Dv + d * Mm::NR, Mm::NR * o.Dv, dp + ca, kLdq, d > 0);
      for (int64_t g = ga; g < gb; ++g) elements(grad, o, g, k0, rows, dp);
      if (!dk) continue;
      if (o.ascending) {
        Mm::gemm_panels<kLdq, 1>(rows, o.ldv, qb - qa, s + qa, Mm::MR * kLdq, o.o_down + qa * Mm::NR, q_panel, dv + k0 * o.ldv,
                                 o.ldv, true);
        Mm::gemm_panels<kLdq, 1>(rows, o.ldk, qb - qa, dp + qa, Mm::MR * kLdq, o.q_down + qa * Mm::NR, q_panel, dk + k0 * o.ldk,
                                 o.ldk, true);
      } else {
        const int64_t last = qb - 1;
        Mm::gemm_panels<kLdq, -1, -1>(rows, o.ldv, qb - qa, s + last, Mm::MR * kLdq, o.o_down + last * Mm::NR, q_panel,
                                      dv + k0 * o.ldv, o.ldv, true);
        Mm::gemm_panels<kLdq, -1, -1>(rows, o.ldk, qb - qa, dp + last, Mm::MR * kLdq, o.q_down + last * Mm::NR, q_panel,
                                      dk + k0 * o.ldk, o.ldk, true);
      }
    }
    if (!dq) return;
    for (int64_t q = 0; q < o.queries; q += kGroup) {
      int64_t ka, kb;
      keys_seen(o, kPanel, q / kGroup, &ka, &kb);
      if (ka >= kb) continue;
      bool& started = dq_started[q / kGroup];
      Mm::gemm_panels<1, kLdq>(least(kGroup, o.queries - q), o.ldk, least(kb, o.keys) - ka, ds + ka * kLdq + q, Mm::MR,
                               o.key + ka * Mm::NR, Mm::NR * o.keys, dq + q * o.ldk, o.ldk, started);
      started = true;
    }
  }

 private:
  void elements(const Grad<float>& grad, const BlockOperands<float>& o, int64_t g, int64_t k0, int64_t rows, float* dp) {
    const int64_t j0 = o.first_key + k0;
    const bool whole = o.seen.core_lo[g] <= j0 && j0 + rows <= o.seen.core_hi[g];
    for (int64_t q = g * kGroup; q < (g + 1) * kGroup; q += W) {
      const vf logit = load(o.logit + q), rest = load(o.rest + q);
      vf dot = load(o.dot + q);
      const vf dlse = o.dlse ? load(o.dlse + q) : zero(), gate = o.gate ? load(o.gate + q) : zero();
      vi lo, hi;
      memcpy(&lo, o.seen.lo + q, sizeof lo);
      memcpy(&hi, o.seen.hi + q, sizeof hi);
      dot = dot_here(grad, s + q, dp + q, kLdq, j0, rows, logit, rest, o.gate ? &gate : nullptr, lo, hi, dot);
      for (int64_t r = 0; r < rows; ++r) {
        vf p, d;
        grad(load(s + r * kLdq + q), load(dp + r * kLdq + q), logit, rest, dot, o.dlse ? &dlse : nullptr, o.gate ? &gate : nullptr,
             &p, &d);
        if (!whole) {
          const vi j = splat((int32_t)(j0 + r)), in = (lo <= j) & (j < hi);
          p = select(in, p, zero()), d = select(in, d, zero());
        }
        store(s + r * kLdq + q, p);
        store(dp + r * kLdq + q, d);
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------ bf16

#if defined(__AVX512BF16__)
// dQ^T of a group, [Dp][32] with columns in the order of `unpack`, as rows [32][256].
inline void turn_group(const float* dq, int64_t Dp, float* rows) {
  for (int64_t d = 0; d < Dp; d += 16)
    for (int64_t u = 0; u < 2; ++u) {
      vi v[16];
      for (int64_t i = 0; i < 16; ++i) memcpy(&v[i], dq + (d + i) * 32 + u * 16, 64);
      transpose(v);
      for (int64_t c = 0; c < 16; ++c) memcpy(rows + (c / 4 * 8 + c % 4 + u * 4) * 256 + d, &v[c], 64);
    }
}

template <> struct GradBlock<bf16> {
  using Mm = Gemm<bf16>;
  static constexpr int64_t kQueries = 256, kKeys = 256, kGroup = 32, kPanel = 32;
  static constexpr int64_t kLdq = kQueries + 16;
  static constexpr int64_t kStep = kPanel * 32;  // elements of a panel's step of 32 along k

  using Scores = Mm;  // of K Q^T
  static constexpr int64_t kTogether = 2;  // key blocks a query block passes over while it is in L2
  static constexpr bool kFresh = false;  // whether queries are packed at each use
  static int64_t key_size(int64_t D) { return Mm::size_a(D, kKeys); }
  static int64_t dq_size(int64_t D) { return kQueries * round_up(D, 32); }  // [queries / 32][D][32]: dQ^T by groups
  static int64_t floats() { return 2 * kPanel * kLdq + 2 * kPanel * kQueries / 2 + kKeys * kQueries / 2 + 32 * 256; }
  template <class S> static void pack_key(const S* src, int64_t stride, int64_t keys, int64_t D, bf16* dst) {
    Mm::pack_a_t(src, stride, D, keys, dst);
  }

  float *s, *dp;         // [kPanel, kLdq] S^T, dP^T
  bf16 *p_down, *ds_down;  // [kPanel, kQueries] left operands
  bf16* ds_across;       // [kKeys, kQueries] right operand, columns of a group in the order of `unpack`
  float* rows;           // [32, 256] a group of dQ, rows again
  explicit GradBlock(float* base) {
    s = base, dp = s + kPanel * kLdq;
    p_down = (bf16*)(dp + kPanel * kLdq), ds_down = p_down + kPanel * kQueries;
    ds_across = ds_down + kPanel * kQueries;
    rows = (float*)(ds_across + kKeys * kQueries);
  }

  // <dO_i, O_i>: the diagonal of the product, in the product's order, so that one visible key cancels as in GradBlock<float>.
  template <class S>
  static void dots(const bf16* dout, const S*, int64_t, const S* out, int64_t stride, int64_t rows, int64_t Dv, const int32_t*,
                   float* dot) {
    alignas(64) bf16 down[Mm::MR * 256];
    alignas(64) float product[Mm::MR * Mm::NR];
    for (int64_t r = 0; r < rows; r += Mm::MR, dout += Mm::NR * Mm::padded_k(Dv)) {
      Mm::pack_a(out + r * stride, stride, least(Mm::MR, rows - r), Dv, down);
      Mm::gemm(Mm::MR, Mm::NR, Dv, down, dout, product, Mm::NR, false);
      for (int64_t i = 0; i < Mm::MR; ++i) dot[r + i] = product[i * Mm::NR + i];
    }
  }

  // Row r of dQ; asked for in ascending order, a group is turned around at its first row.
  const float* dq_row(const float* dq, int64_t r, int64_t D) {
    const int64_t Dp = round_up(D, 32);
    if (r % 32 == 0) turn_group(dq + r * Dp, Dp, rows);
    return rows + r % 32 * 256;
  }

  void run(const Transform& f, const BlockOperands<bf16>& o, float* dk, float* dv, float* dq, bool* dq_started) {
    const Grad<bf16> grad(f);
    const int64_t kp = Mm::padded_k(o.D), vp = Mm::padded_k(o.Dv);
    const int64_t q_panel = Mm::NR * Mm::padded_k(o.queries);
    for (int64_t k0 = 0; k0 < o.keys; k0 += kPanel) {
      int64_t ga, gb;
      groups_seeing(o, kGroup, k0, least(k0 + kPanel, o.keys), &ga, &gb);
      if (ga >= gb) continue;
      const int64_t qa = ga * kGroup, qb = gb * kGroup;
      Mm::gemm_panels(kPanel, qb - qa, o.D, o.k_down + k0 * kp, 0, o.q_across + qa * kp, Mm::NR * kp, s + qa, kLdq, false);
      Mm::gemm_panels(kPanel, qb - qa, o.Dv, o.v_down + k0 * vp, 0, o.o_across + qa * vp, Mm::NR * vp, dp + qa, kLdq, false);
      for (int64_t g = ga; g < gb; ++g) elements(grad, o, g, k0);
      if (!dk) continue;
      Mm::gemm_panels(kPanel, o.ldv, qb - qa, p_down + ga * kStep, 0, o.o_down + qa * Mm::NR, q_panel, dv + k0 * o.ldv, o.ldv,
                      true);
      Mm::gemm_panels(kPanel, o.ldk, qb - qa, ds_down + ga * kStep, 0, o.q_down + qa * Mm::NR, q_panel, dk + k0 * o.ldk,
                      o.ldk, true);
    }
    if (!dq) return;
    const int64_t k_panel = Mm::MR * Mm::padded_k(o.keys);
    for (int64_t g = 0; g * kGroup < o.queries; ++g) {
      int64_t ka, kb;
      keys_seen(o, kPanel, g, &ka, &kb);
      if (ka >= kb) continue;
      Mm::gemm_panels(kp, 32, kb - ka, o.key + ka * Mm::MR, k_panel, ds_across + g * 32 * kKeys + ka * 32, 0, dq + g * kp * 32,
                      32, dq_started[g]);
      dq_started[g] = true;
    }
  }

 private:
  static __m512i pack2(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

  void elements(const Grad<bf16>& grad, const BlockOperands<bf16>& o, int64_t g, int64_t k0) {
    const int64_t j0 = o.first_key + k0, q = g * kGroup;
    if (o.seen.core_lo[g] <= j0 && j0 + kPanel <= o.seen.core_hi[g]) elements<true>(grad, o, g, q, k0, j0);
    else elements<false>(grad, o, g, q, k0, j0);
  }
  template <bool whole>
  void elements(const Grad<bf16>& grad, const BlockOperands<bf16>& o, int64_t g, int64_t q, int64_t k0, int64_t j0) {
    const vf logit[2] = {load(o.logit + q), load(o.logit + q + W)}, dot[2] = {load(o.dot + q), load(o.dot + q + W)};
    vf dlse[2] = {}, gate[2] = {};
    if (o.dlse) dlse[0] = load(o.dlse + q), dlse[1] = load(o.dlse + q + W);
    if (o.gate) gate[0] = load(o.gate + q), gate[1] = load(o.gate + q + W);
    vi lo[2], hi[2];
    memcpy(lo, o.seen.lo + q, sizeof lo);
    memcpy(hi, o.seen.hi + q, sizeof hi);
    bf16* across = ds_across + q * kKeys + k0 * 32;
    for (int64_t r = 0; r < kPanel; r += 2) {
      __m512i pair[2];
      for (int64_t e = 0; e < 2; ++e) {
        vf p[2], d[2];
        for (int u = 0; u < 2; ++u) {
          const int64_t at = (r + e) * kLdq + q + u * W;
          grad(load(s + at), load(dp + at), logit[u], zero(), dot[u], o.dlse ? dlse + u : nullptr, o.gate ? gate + u : nullptr, p + u,
               d + u);
          if (!whole) {
            const vi j = splat((int32_t)(j0 + r + e)), in = (lo[u] <= j) & (j < hi[u]);
            p[u] = select(in, p[u], zero()), d[u] = select(in, d[u], zero());
          }
        }
        const int64_t line = g * kStep + (r + e) * 32;
        pair[e] = pack2(d[0], d[1]);
        _mm512_store_si512(p_down + line, pack2(p[0], p[1]));
        _mm512_store_si512(ds_down + line, pair[e]);
      }
      _mm512_store_si512(across + r / 2 * 32, _mm512_unpacklo_epi16(pair[0], pair[1]));
      _mm512_store_si512(across + Mm::kTile + r / 2 * 32, _mm512_unpackhi_epi16(pair[0], pair[1]));
    }
  }
};
#endif

}  // namespace tk::TK_ISA
