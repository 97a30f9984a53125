// A block of rows against one split of keys in attention's forward: scores, softmax, values.
//
// One after the other: products run step by step between the exponentials of a neighbouring block gain nothing (docs/speed.md).
#pragma once

#include "attention_block.h"

namespace tk::TK_ISA {

// Rows [row, row + rows) of a chunk against split `split`: the keys [k0, k1) of it are what any of them sees, in whole lines;
// panel[i] is the same for rows MR * i to MR * (i + 1), lo = hi where they see none.
struct Unit {
  int64_t split, row, rows, k0, k1;
  Range panel[5] = {};
};

// Products of packed operands.
template <class T> struct Products;

// Each panel of rows against the keys it sees alone: under a causal mask at 512 keys 6 % of the products are between a unit's
// first rows and its last keys. A panel of Q is 12 rows as they lie: to transpose them cost 5 % of a forward of 512.
template <> struct Products<float> {
  using Mm = Gemm<float>;
  // Row r of Q into its place.
  template <class S> static void pack_row(const S* src, int64_t r, int64_t D, float* to) {
    to += r * D;
    for (int64_t d = 0; d < D; d += W) store_n(to + d, load_n(src + d, (int)least(W, D - d)), (int)least(W, D - d));
  }
  // S = Q K^T
  static void scores(const Unit& u, int64_t D, const float* q, const float* k, float* s) {
    const int64_t chain = score_chain(D);
    each(u, kLine, [&](int64_t m, int64_t rows, int64_t from, int64_t to, bool) {
      for (int64_t d = 0; d < D; d += chain)
        Mm::gemm_panels<0, 1>(rows, to - from, least(chain, D - d), q + m * D + d, Mm::MR * D, k + from * D + d * Mm::NR, Mm::NR * D,
                              s + m * kLd + from, kLd, d > 0);
    });
  }
  // O = P V; the probabilities lie in the scores' place. keys: how many V has.
  static void values(const Unit& u, int64_t N, int64_t keys, const float* scores, const float*, const float* v, float* o) {
    each(u, Mm::KB, [&](int64_t m, int64_t rows, int64_t from, int64_t to, bool add) {
      Mm::gemm_panels<kLd, 1>(rows, N, least(to, keys) - from, scores + m * kLd + from, Mm::MR * kLd, v + from * Mm::NR, Mm::NR * keys,
                              o + m * N, N, add);
    });
  }

 private:
  // body(first row, rows, from, to, whether they had keys before `from`): every key that a panel sees, once, in pieces that
  // end at multiples of `step` (Gemm's summation blocks count from the split's first key).
  template <class F> static void each(const Unit& u, int64_t step, const F& body) {
    for (int64_t k = u.k0, end; k < u.k1; k = end) {
      end = least(round_down(k, step) + step, u.k1);
      for (int64_t m = 0, next; m < u.rows; m = next) {
        const auto part = [&](int64_t m) {
          const Range& x = u.panel[m / Mm::MR];
          return Range{most(k, x.lo), least(end, x.hi)};
        };
        const Range now = part(m);
        const bool add = k > u.panel[m / Mm::MR].lo;
        for (next = m + Mm::MR; next < u.rows; next += Mm::MR) {
          const Range x = part(next);
          if (x.lo != now.lo || x.hi != now.hi || (k > u.panel[next / Mm::MR].lo) != add) break;
        }
        next = least(next, u.rows);
        if (now.lo < now.hi) body(m, next - m, now.lo, now.hi, add);
      }
    }
  }
};

#if defined(__AVX512BF16__)
// Whole tiles only: M, N and the depth are multiples of 32. The same chain of sums as Gemm<bf16>::gemm.
template <> struct Products<bf16> {
  using Mm = Gemm<bf16>;
  static constexpr int64_t kTile = Mm::kTile;

  static void pack_row(const bf16* src, int64_t r, int64_t D, bf16* to) {
    to += r / 32 * 32 * Mm::padded_k(D) + r % 32 * 32;
    for (int64_t d = 0; d < D; d += 32, to += 32 * 32)
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(D - d < 32 ? (__mmask32)((1u << (D - d)) - 1) : ~0u, src + d));
  }
#if !defined(__AMX_BF16__)
  static void scores(const Unit& u, int64_t D, const bf16* q, const bf16* k, float* s) {
    const int64_t panel = 32 * Mm::padded_k(D);
    Mm::gemm_panels(u.rows, u.k1 - u.k0, D, q, panel, k + u.k0 / 32 * panel, panel, s + u.k0, kLd, false);
  }
  static void values(const Unit& u, int64_t N, int64_t keys, const float*, const bf16* probs, const bf16* v, float* o) {
    Mm::gemm_panels<true>(u.rows, N, least(u.k1, keys) - u.k0, probs + u.k0 * 32, 32 * kSplit, v + u.k0 * 32, 32 * keys, o, N, false);
  }
#else
  // S = Q K^T. A panel of K (8 KiB at D = 128) serves all rows before the next one is fetched; those of Q stay in L1.
  static void scores(const Unit& u, int64_t D, const bf16* q, const bf16* k, float* s) {
    const int64_t Dp = Mm::padded_k(D);
    Store last;
    for (int64_t n = u.k0; n < u.k1; n += 32)
      for (int64_t m = 0; m < u.rows; m += 32) {
        block<false>(Dp / 32, q + m * Dp, k + n * Dp, last);
        last = {s + m * kLd + n, kLd};
      }
    finish(last);
  }
  // O = P V. A panel of P (32 KiB) fills L1: V passes it by with streaming loads (20 % on the whole product).
  static void values(const Unit& u, int64_t N, int64_t keys, const float*, const bf16* probs, const bf16* v, float* o) {
    const int64_t steps = (least(u.k1, keys) - u.k0) / 32;
    Store last;
    for (int64_t m = 0; m < u.rows; m += 32)
      for (int64_t n = 0; n < N; n += 32) {
        block<true>(steps, probs + m * kSplit + u.k0 * 32, v + n * keys + u.k0 * 32, last);
        last = {o + m * N + n, N};
      }
    finish(last);
  }

 private:
  struct Store {
    float* c = nullptr;
    int64_t ld = 0;
  };
  static void finish(const Store& x) {
    if (!x.c) return;
    tile_store<0>(x.c, x.ld * 4);
    tile_store<1>(x.c + 16, x.ld * 4);
    tile_store<2>(x.c + 16 * x.ld, x.ld * 4);
    tile_store<3>(x.c + 16 * x.ld + 16, x.ld * 4);
    tile_fence();
  }
  // 32 x 32 results in tiles 0 to 3. Those of the block before are stored one by one between the first products of this one:
  // four stores in a row keep the tile unit waiting for 41 of the 195 cycles of a depth of four, stores between products cost
  // nothing.
  template <bool kStream>
  static __attribute__((always_inline)) void block(int64_t steps, const bf16* a, const bf16* b, const Store& last) {
    tile_fence();
    load<kStream>(a, b);
    if (last.c) {
      float* below = last.c + 16 * last.ld;
      const int64_t bytes = last.ld * 4;
      tile_store<0>(last.c, bytes);
      tile_zero<0>();
      tile_dot<0, 4, 6>();
      tile_store<2>(below, bytes);
      tile_zero<2>();
      tile_dot<2, 5, 6>();
      tile_store<1>(last.c + 16, bytes);
      tile_zero<1>();
      tile_dot<1, 4, 7>();
      tile_store<3>(below + 16, bytes);
      tile_zero<3>();
      tile_dot<3, 5, 7>();
    } else {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
      multiply();
    }
    for (int64_t i = 1; i < steps; ++i) load<kStream>(a += 2 * kTile, b += 2 * kTile), multiply();
  }
  template <bool kStream> static __attribute__((always_inline)) void load(const bf16* a, const bf16* b) {
    tile_load<4>(a, 64);
    if constexpr (kStream) {
      tile_stream_load<6>(b, 64);
      tile_load<5>(a + kTile, 64);
      tile_stream_load<7>(b + kTile, 64);
    } else {
      tile_load<6>(b, 64);
      tile_load<5>(a + kTile, 64);
      tile_load<7>(b + kTile, 64);
    }
  }
  static __attribute__((always_inline)) void multiply() {
    tile_dot<0, 4, 6>();
    tile_dot<2, 5, 6>();
    tile_dot<1, 4, 7>();
    tile_dot<3, 5, 7>();
  }
#endif
};
#endif

template <class T> struct SplitBlock {
  using Mm = Gemm<T>;
  static constexpr int64_t kRows = W < 16 ? 4 * Mm::MR : 64 / Mm::MR * Mm::MR;  // 64 (bf16), 60 (AVX-512), 24
  const Transform transform;
  const int64_t D, Dv, ldo = round_up(Dv, Mm::NR);
  float* const s;              // [kRows, kLd] scores
  T* const probs;              // bf16: packed [kRows, kSplit]
  float* const o_split;        // [kRows, ldo]
  float ms[kRows], ls[kRows];  // the split's maximum (-inf: the row sees nothing of it) and sum

  static int64_t probs_floats() { return Probs<T>::size(kRows) / 2; }
  static int64_t floats(int64_t Dv) { return kRows * kLd + probs_floats() + kRows * round_up(Dv, Mm::NR); }
  SplitBlock(const AttentionShape& shape, float* scratch)
      : transform(shape), D(shape.head_dim), Dv(shape.value_dim), s(scratch), probs((T*)(scratch + kRows * kLd)),
        o_split(scratch + kRows * kLd + probs_floats()) {}

  static Range clip(const Range& seen, int64_t base, int64_t keys) { return {most(seen.lo - base, 0), least(seen.hi - base, keys)}; }
  // Sets k0 and k1; false: these rows see nothing of the split's keys.
  static bool bounds(Unit& u, const Range* seen, int64_t keys) {
    u.k0 = keys, u.k1 = 0;
    for (int64_t i = 0; i < u.rows; i += Mm::MR) {
      Range& x = u.panel[i / Mm::MR] = {keys, 0};
      for (int64_t r = i; r < least(u.rows, i + Mm::MR); ++r) {
        const Range c = clip(seen[u.row + r], u.split * kSplit, keys);
        if (c.lo < c.hi) x = {least(x.lo, c.lo), most(x.hi, c.hi)};
      }
      if (x.lo >= x.hi) continue;
      x = {round_down(x.lo, kLine), round_up(x.hi, kLine)};
      u.k0 = least(u.k0, x.lo), u.k1 = most(u.k1, x.hi);
    }
    return u.k0 < u.k1;
  }

  // q and k packed, q from the unit's first row on
  void scores(const Unit& u, const T* q, const T* k) { Products<T>::scores(u, D, q, k, s); }
  void softmax(const Unit& u, const Range* seen, int64_t keys) {
    const auto find_max = [&](int64_t r) {
      const Range c = clip(seen[u.row + r], u.split * kSplit, keys);
      ms[r] = c.lo < c.hi ? row_max(transform, s + r * kLd, RowLines{c.lo, c.hi}) : -INFINITY;
    };
    const typename Probs<T>::Mode mode;
    find_max(0);
    for (int64_t r = 0; r < u.rows; ++r) {
      if (r + 1 < u.rows) find_max(r + 1);  // a row ahead: nobody waits for the reduction over the lanes
      const Range c = clip(seen[u.row + r], u.split * kSplit, keys);
      if (c.lo < c.hi) ls[r] = row_probs<T>(transform, ms[r], s, probs, r, RowLines{c.lo, c.hi}, u.k0, u.k1);
      else blank_row<T>(s, probs, r, u.k0, u.k1);
    }
  }
  // v packed, o [rows, ldo]; what a row with ms = -inf gets there is not to be read.
  void values(const Unit& u, const T* v, int64_t keys, float* o) {
    Products<T>::values(u, ldo, Mm::padded_k(keys), s, probs, v, o);
  }
};

}  // namespace tk::TK_ISA
