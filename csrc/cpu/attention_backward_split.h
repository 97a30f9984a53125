// GradBlock (attention_backward.h) for float and float16 on AMX: four of the five products on tiles, each float as the sum of
// three bf16 (simd/gemm_split.h).
//
// S^T = K Q^T stays in FMAs, in the order of the forward's product: p = e^(s - lse) has the errors of the very scores that lse
// was made of, and where one key takes nearly all of a row they cancel. P^T and dS^T are split as they are made: left operands
// for dV and dK, and dS^T once more as a right operand for dQ^T, as in GradBlock<bf16>.
#pragma once

#include "attention_backward.h"
#include "simd/gemm_split.h"

#if defined(__AMX_BF16__)

namespace tk::TK_ISA {

template <> struct GradBlock<bf16x3> {
  using Mm = Gemm<bf16x3>;
  using Scores = Gemm<float>;  // of K Q^T
  static constexpr int64_t kQueries = 128, kKeys = 128, kGroup = 32, kPanel = 32;
  static constexpr int64_t kLdq = kQueries + 16;  // rows of scores in different cache sets
  static constexpr int64_t kTogether = 4;  // key blocks a query block passes over while it is in L2
  static constexpr bool kFresh = true;  // packing costs what reading the packed form from the last level does
  static constexpr int64_t kTile = Mm::kTile, kStep = Mm::kStep, kPart = Mm::kPart;

  static int64_t key_size(int64_t D) { return Mm::size_a(D, kKeys); }
  static int64_t dq_size(int64_t D) { return kQueries * round_up(D, 32); }  // [queries / 32][D][32]: dQ^T by groups
  static int64_t floats() {
    return (round_up(kKeys, Scores::MR) + kPanel) * kLdq + (2 * kPanel + kKeys) * kQueries * 3 / 2 + 32 * 256;
  }
  template <class S> static void pack_key(const S* src, int64_t stride, int64_t keys, int64_t D, bf16x3* dst) {
    Mm::pack_a_t(src, stride, D, keys, dst);
  }

  float *s, *dp;            // [kKeys, kLdq] S^T, [kPanel, kLdq] dP^T
  bf16 *p_down, *ds_down;   // [kPanel, kQueries] left operands
  bf16* ds_across;          // [kKeys, kQueries] right operand, columns of a group in the order of `unpack`
  float* rows;              // [32, 256] a group of dQ, rows again
  explicit GradBlock(float* base) {
    s = base, dp = s + round_up(kKeys, Scores::MR) * kLdq;
    p_down = (bf16*)(dp + kPanel * kLdq), ds_down = p_down + 3 * kPanel * kQueries;
    ds_across = ds_down + 3 * kPanel * kQueries;
    rows = (float*)(ds_across + 3 * kKeys * kQueries);
  }

  // <dO_i, O_i>, over four interleaved sums.
  template <class S>
  static void dots(const bf16x3*, const S* dout, int64_t dout_stride, const S* out, int64_t stride, int64_t rows, int64_t Dv,
                   const int32_t*, float* dot) {
    for (int64_t r = 0; r < rows; ++r, dout += dout_stride, out += stride) {
      vf part[4] = {};
      for (int64_t d = 0; d < Dv; d += W) {
        if (r + 4 < rows) __builtin_prefetch(out + 4 * stride + d, 0, 2);
        part[d / W % 4] = fma(load_n(dout + d, (int)least(W, Dv - d)), load_n(out + d, (int)least(W, Dv - d)), part[d / W % 4]);
      }
      dot[r] = reduce_add((part[0] + part[2]) + (part[1] + part[3]));
    }
  }

  // Row r of dQ; asked for in ascending order, a group is turned around at its first row.
  const float* dq_row(const float* dq, int64_t r, int64_t D) {
    const int64_t Dp = round_up(D, 32);
    if (r % 32 == 0) turn_group(dq + r * Dp, Dp, rows);
    return rows + r % 32 * 256;
  }

  void run(const Transform& f, const BlockOperands<bf16x3>& o, float* dk, float* dv, float* dq, bool* dq_started) {
    const Grad<bf16x3> grad(f);
    const int64_t kp = Mm::padded_k(o.D), vp = Mm::padded_k(o.Dv);
    const int64_t q_panel = Mm::NR * Mm::padded_k(o.queries);
    const int64_t groups = (o.queries + kGroup - 1) / kGroup, chain = score_chain(o.D);
    const float *key = (const float*)o.k_down, *query = (const float*)o.q_across;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t a = round_down(most(o.seen.hull_lo[g] - o.first_key, 0), Scores::MR);
      const int64_t b = least(o.seen.hull_hi[g] - o.first_key, o.keys), q = g * kGroup;
      if (a >= b) continue;
      for (int64_t d = 0; d < o.D; d += chain)
        Scores::gemm_panels(b - a, kGroup, least(chain, o.D - d), key + a * o.D + d * Scores::MR, Scores::MR * o.D,
                            query + q * o.D + d * Scores::NR, Scores::NR * o.D, s + a * kLdq + q, kLdq, d > 0);
    }
    for (int64_t k = 0; k < o.keys; k += kPanel) {
      int64_t ga, gb;
      groups_seeing(o, kGroup, k, least(k + kPanel, o.keys), &ga, &gb);
      if (ga >= gb) continue;
      const int64_t qa = ga * kGroup, qb = gb * kGroup;
      Mm::gemm_panels<1, false, true>(kPanel, qb - qa, o.Dv, o.v_down + k * vp, 0, o.o_across + qa * vp, Mm::NR * vp, dp + qa, kLdq,
                                      false);
      for (int64_t g = ga; g < gb; ++g) elements(grad, o, g, k);
      if (!dk) continue;
      if (o.ascending) sums<1>(o, k, qa, qb, q_panel, dk, dv);
      else sums<-1>(o, k, qa, qb, q_panel, dk, dv);
    }
    if (!dq) return;
    const int64_t k_panel = Mm::MR * Mm::padded_k(o.keys);
    for (int64_t g = 0; g < groups; ++g) {
      int64_t ka, kb;
      keys_seen(o, kPanel, g, &ka, &kb);
      if (ka >= kb) continue;
      const bf16x3* across = (const bf16x3*)(ds_across + 3 * (g * 32 * kKeys + ka * 32));
      Mm::gemm_panels<1, false>(kp, 32, kb - ka, o.key + ka * Mm::MR, k_panel, across, 0, dq + g * kp * 32, 32, dq_started[g]);
      dq_started[g] = true;
    }
  }

 private:
  template <int Direction>
  void sums(const BlockOperands<bf16x3>& o, int64_t k, int64_t qa, int64_t qb, int64_t q_panel, float* dk, float* dv) {
    const int64_t at = 3 * qa * kPanel;
    Mm::gemm_panels<Direction, false>(kPanel, o.ldv, qb - qa, (const bf16x3*)(p_down + at), 0, o.o_down + qa * Mm::NR, q_panel,
                               dv + k * o.ldv, o.ldv, true);
    Mm::gemm_panels<Direction, false>(kPanel, o.ldk, qb - qa, (const bf16x3*)(ds_down + at), 0, o.q_down + qa * Mm::NR, q_panel,
                               dk + k * o.ldk, o.ldk, true);
  }

  void elements(const Grad<bf16x3>& grad, const BlockOperands<bf16x3>& o, int64_t g, int64_t k) {
    const int64_t j0 = o.first_key + k;
    if (o.seen.core_lo[g] <= j0 && j0 + kPanel <= o.seen.core_hi[g]) elements<true>(grad, o, g, k);
    else elements<false>(grad, o, g, k);
  }
  template <bool whole>
  void elements(const Grad<bf16x3>& grad, const BlockOperands<bf16x3>& o, int64_t g, int64_t k) {
    const int64_t j0 = o.first_key + k, q = g * kGroup;
    const vf logit[2] = {load(o.logit + q), load(o.logit + q + W)};
    const vf rest[2] = {load(o.rest + q), load(o.rest + q + W)};
    vf dlse[2] = {}, gate[2] = {};
    if (o.dlse) dlse[0] = load(o.dlse + q), dlse[1] = load(o.dlse + q + W);
    if (o.gate) gate[0] = load(o.gate + q), gate[1] = load(o.gate + q + W);
    vi lo[2], hi[2], one[2];
    memcpy(lo, o.seen.lo + q, sizeof lo);
    memcpy(hi, o.seen.hi + q, sizeof hi);
    const float* scores = s + k * kLdq;
    vf dot[2];
    for (int u = 0; u < 2; ++u) {
      const int64_t at = q + u * W;
      one[u] = hi[u] - lo[u] == 1;
      dot[u] = dot_here(grad, scores + at, dp + at, kLdq, j0, kPanel, logit[u], rest[u], o.gate ? gate + u : nullptr, lo[u], hi[u],
                        load(o.dot + at));
    }
    bf16* across = ds_across + 3 * (q * kKeys + k * 32);
    for (int64_t r = 0; r < kPanel; r += 2) {
      Mm::Parts pair[2];
      for (int64_t e = 0; e < 2; ++e) {
        vf p[2], d[2];
        for (int u = 0; u < 2; ++u) {
          const int64_t at = (r + e) * kLdq + q + u * W;
          vf down = load(dp + at);
          if (!whole && !o.gate) down = select(one[u], dot[u], down);  // O = V there: the difference is 0
          grad(load(scores + at), down, logit[u], whole ? zero() : rest[u], dot[u], o.dlse ? dlse + u : nullptr,
               o.gate ? gate + u : nullptr, p + u, d + u);
          if (!whole) {
            const vi j = splat((int32_t)(j0 + r + e)), in = (lo[u] <= j) & (j < hi[u]);
            p[u] = select(in, p[u], zero()), d[u] = select(in, d[u], zero());
          }
        }
        const int64_t line = g * kStep + (r + e) * 32;
        pair[e] = Mm::split(d[0], d[1]);
        Mm::store_a(p_down + line, Mm::split(p[0], p[1]));
        Mm::store_a(ds_down + line, pair[e]);
      }
      for (int i = 0; i < 3; ++i, across += kPart) {
        _mm512_storeu_si512(across + r / 2 * 32, _mm512_unpacklo_epi16(pair[0].part[i], pair[1].part[i]));
        _mm512_storeu_si512(across + kTile + r / 2 * 32, _mm512_unpackhi_epi16(pair[0].part[i], pair[1].part[i]));
      }
      across -= 3 * kPart;
    }
  }
};

}  // namespace tk::TK_ISA

#endif
