// A block of rows against one split of keys in attention's forward: scores, softmax, values.
//
// The products of a block's neighbours (values of the block before, scores of the block after) run step by step between the
// exponentials of this one: while the tile unit multiplies, the vector units take 64 instructions for nothing (a step of 4
// tile products and 4 tile loads takes 66 cycles alone or with 64 FMAs, 131 with 128). That is 7 to 10 % of a forward, not
// more, because tile instructions occupy one of the two vector ports. Float products use the vector units themselves and
// simply run when they are begun.
#pragma once

#include "attention_block.h"

namespace tk::TK_ISA {

// Rows [row, row + rows) of a chunk against split `split`: the keys [k0, k1) of it are what any of them sees, in whole lines;
// panel[i] is the same for rows MR * i to MR * (i + 1), lo = hi where they see none.
struct Unit {
  int64_t split, row, rows, k0, k1;
  Range panel[5] = {};
};

// Products of packed operands, begun by scores() and values(), done after finish().
template <class T> struct Products;

// Each panel of rows against the keys it sees alone: under a causal mask at 512 keys 6 % of the products are between a unit's
// first rows and its last keys. A panel of Q is 12 rows as they lie: to transpose them cost 5 % of a forward of 512.
template <> struct Products<float> {
  using Mm = Gemm<float>;
  template <class S> static void pack_q(const S* src, int64_t stride, int64_t rows, int64_t D, float* to) {
    for (int64_t r = 0; r < rows; ++r, src += stride, to += D)
      for (int64_t d = 0; d < D; d += W) store_n(to + d, load_n(src + d, (int)least(W, D - d)), (int)least(W, D - d));
  }
  // S = Q K^T
  void scores(const Unit& u, int64_t D, const float* q, const float* k, float* s) {
    each(u, kLine, [&](int64_t m, int64_t rows, int64_t from, int64_t to, bool) {
      Mm::gemm_panels<0, 1>(rows, to - from, D, q + m * D, Mm::MR * D, k + from * D, Mm::NR * D, s + m * kLd + from, kLd, false);
    });
  }
  // O = P V; the probabilities lie in the scores' place. keys: how many V has.
  void values(const Unit& u, int64_t N, int64_t keys, const float* scores, const float*, const float* v, float* o) {
    each(u, Mm::KB, [&](int64_t m, int64_t rows, int64_t from, int64_t to, bool add) {
      Mm::gemm_panels<kLd, 1>(rows, N, least(to, keys) - from, scores + m * kLd + from, Mm::MR * kLd, v + from * Mm::NR, Mm::NR * keys,
                              o + m * N, N, add);
    });
  }
  void tick() {}
  void finish() {}

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

#if defined(__AMX_BF16__)
// Whole tiles only: M, N and the depth are multiples of 32. The same chain of sums as Gemm<bf16>::gemm.
template <> struct Products<bf16> {
  using Mm = Gemm<bf16>;
  static constexpr int64_t kTile = Mm::kTile;

  template <class S> static void pack_q(const S* src, int64_t stride, int64_t rows, int64_t D, bf16* to) {
    Mm::pack_a(src, stride, rows, D, to);
  }
  void scores(const Unit& u, int64_t D, const bf16* q, const bf16* k, float* s) {
    const int64_t panel = 32 * Mm::padded_k(D);
    add({q, k + u.k0 * Mm::padded_k(D), s + u.k0, panel, panel, kLd, round_up(u.rows, 32), u.k1 - u.k0, Mm::padded_k(D) / 32, false});
  }
  void values(const Unit& u, int64_t N, int64_t keys, const float*, const bf16* probs, const bf16* v, float* o) {
    const int64_t k1 = least(u.k1, keys);
    add({probs + u.k0 * 32, v + u.k0 * 32, o, 32 * kSplit, 32 * keys, N, round_up(u.rows, 32), N, (k1 - u.k0) / 32, true});
  }
  // One step of what was begun. Inline: a call would cost the caller every constant it holds in a register.
  __attribute__((always_inline)) void tick() { step(); }
  void finish() {
    Products x = *this;
    while (x.step()) {}
    c = x.c, ldc = x.ldc, m = x.m, n = x.n, left = 0;
    if (c) {
      _tile_stored(0, c, ldc * 4);
      _tile_stored(1, c + 16, ldc * 4);
      _tile_stored(2, c + 16 * ldc, ldc * 4);
      _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
    }
    c = nullptr, count = at = 0;
    tile_fence();
  }

 private:
  struct Product {
    const bf16 *a, *b;
    float* c;
    int64_t a_panel, b_panel, ldc, rows, cols, depth;  // depth: steps of 32 along k
    // A deep panel of A (32 KiB of probabilities) fills L1: B then passes it by with streaming loads (20 % on the whole
    // product). Shallow panels of A all stay in L1, and a panel of B serves all rows before the next one is fetched.
    bool deep;
  };
  Product queue[2];
  int count = 0, at = 0;
  int64_t m = 0, n = 0;                   // the block to begin next
  int64_t left = 0;                       // steps of the one being worked on, whose next operands are
  const bf16 *a = nullptr, *b = nullptr;  // these
  bool deep = false;
  float* c = nullptr;                     // where it goes once the next one begins; null: nowhere
  int64_t ldc = 0;

  void add(const Product& x) { queue[count++] = x; }
  // The tiles of a block of results are stored one by one between the first products of the next block: four stores in a row
  // keep the tile unit waiting for 41 of the 195 cycles of a depth of four, stores between products cost nothing.
  __attribute__((always_inline)) bool step() {
    tile_fence();
    if (__builtin_expect(left == 0, 0)) {
      if (at == count) return false;
      const Product& x = queue[at];
      a = x.a + m / 32 * x.a_panel, b = x.b + n / 32 * x.b_panel, left = x.depth, deep = x.deep;
      load();
      if (c) {
        float* below = c + 16 * ldc;
        const int64_t bytes = ldc * 4;
        _tile_stored(0, c, bytes);
        _tile_zero(0);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stored(2, below, bytes);
        _tile_zero(2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_stored(1, c + 16, bytes);
        _tile_zero(1);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stored(3, below + 16, bytes);
        _tile_zero(3);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        multiply();
      }
      c = x.c + m * x.ldc + n, ldc = x.ldc;
      if (x.deep) {
        if ((n += 32) == x.cols) n = 0, m += 32;
        if (m == x.rows) m = 0, ++at;
      } else {
        if ((m += 32) == x.rows) m = 0, n += 32;
        if (n == x.cols) n = 0, ++at;
      }
    } else {
      load();
      multiply();
    }
    a += 2 * kTile, b += 2 * kTile, --left;
    return true;
  }
  __attribute__((always_inline)) void load() {
    if (deep) {
      _tile_stream_loadd(6, b, 64);
      _tile_stream_loadd(7, b + kTile, 64);
    } else {
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + kTile, 64);
    }
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + kTile, 64);
  }
  __attribute__((always_inline)) void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
};
#endif

template <class T> struct SplitBlock {
  using Mm = Gemm<T>;
  static constexpr int64_t kRows = W < 16 ? 4 * Mm::MR : 64 / Mm::MR * Mm::MR;  // 64 (bf16), 60 (AVX-512), 24
  const Transform transform;
  const int64_t D, Dv, ldo = round_up(Dv, Mm::NR);
  Products<T> products;
  // Two units are in flight at a time; a unit's place goes by turns.
  struct Place {
    float* scores;               // [kRows, kLd]
    T* probs;                    // bf16: packed [kRows, kSplit]
    float ms[kRows], ls[kRows];  // the split's maximum (-inf: the row sees nothing of it) and sum
  } places[2];
  float* o_split;  // [kRows, ldo]

  static int64_t place_floats() { return kRows * kLd + Probs<T>::size(kRows) / 2; }
  static int64_t floats(int64_t Dv) { return 2 * place_floats() + kRows * round_up(Dv, Mm::NR); }
  SplitBlock(const AttentionShape& s, float* scratch)
      : transform(s), D(s.head_dim), Dv(s.value_dim), o_split(scratch + 2 * place_floats()) {
    for (Place& x : places) x.scores = scratch, x.probs = (T*)(scratch + kRows * kLd), scratch += place_floats();
  }

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

  // q and k packed
  void scores(const Unit& u, Place& x, const T* q, const T* k) {
    products.scores(u, D, q + u.row * Mm::padded_k(D), k, x.scores);
  }
  void softmax(const Unit& u, Place& x, const Range* seen, int64_t keys) {
    const auto find_max = [&](int64_t r) {
      const Range c = clip(seen[u.row + r], u.split * kSplit, keys);
      x.ms[r] = c.lo < c.hi ? row_max(transform, x.scores + r * kLd, RowLines{c.lo, c.hi}) : -INFINITY;
    };
    const typename Probs<T>::Mode mode;
    find_max(0);
    for (int64_t r = 0; r < u.rows; ++r) {
      if (r + 1 < u.rows) find_max(r + 1);  // a row ahead: nobody waits for the reduction over the lanes
      const Range c = clip(seen[u.row + r], u.split * kSplit, keys);
      if (c.lo < c.hi) x.ls[r] = row_probs<T>(transform, x.ms[r], x.scores, x.probs, r, RowLines{c.lo, c.hi}, u.k0, u.k1, products);
      else blank_row<T>(x.scores, x.probs, r, u.k0, u.k1);
    }
  }
  // v packed, o [rows, ldo]; what a row with ms = -inf gets there is not to be read.
  void values(const Unit& u, Place& x, const T* v, int64_t keys, float* o) {
    products.values(u, ldo, Mm::padded_k(keys), x.scores, x.probs, v, o);
  }
};

}  // namespace tk::TK_ISA
