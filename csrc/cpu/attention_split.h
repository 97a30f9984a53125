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

// Products of packed operands, begun by scores() and values(), done after finish().
template <class T> struct Products;

template <> struct Products<float> {
  using Mm = Gemm<float>;
  // S = Q K^T
  void scores(int64_t M, int64_t N, int64_t D, const float* q, const float* k, float* s) {
    Mm::gemm_panels(M, N, D, q, Mm::MR * D, k, Mm::NR * D, s, kLd, false);
  }
  // O = P[:, k0:k1] V[k0:k1]; the probabilities lie in the scores' place.
  void values(int64_t M, int64_t N, int64_t k0, int64_t k1, const float* scores, const float*, const float* v, int64_t v_panel,
              float* o) {
    for (int64_t k = k0; k < k1;) {  // Gemm's summation blocks count from the split's first key, not from k0
      const int64_t end = least(round_down(k, Mm::KB) + Mm::KB, k1);
      Mm::gemm_panels<kLd, 1>(M, N, end - k, scores + k, Mm::MR * kLd, v + k * Mm::NR, v_panel, o, N, k > k0);
      k = end;
    }
  }
  void tick() {}
  void finish() {}
};

#if defined(__AMX_BF16__)
// Whole tiles only: M, N and the depth are multiples of 32. The same chain of sums as Gemm<bf16>::gemm.
template <> struct Products<bf16> {
  using Mm = Gemm<bf16>;
  static constexpr int64_t kTile = Mm::kTile;

  void scores(int64_t M, int64_t N, int64_t D, const bf16* q, const bf16* k, float* s) {
    const int64_t panel = 32 * Mm::padded_k(D);
    add({q, k, s, panel, panel, kLd, M, N, Mm::padded_k(D) / 32, false});
  }
  void values(int64_t M, int64_t N, int64_t k0, int64_t k1, const float*, const bf16* probs, const bf16* v, int64_t v_panel, float* o) {
    add({probs + k0 * 32, v + k0 * 32, o, 32 * kSplit, v_panel, N, M, N, (k1 - k0) / 32, true});
  }
  // One step of what was begun. Inline: a call would cost the caller every constant it holds in a register.
  __attribute__((always_inline)) void tick() { step(); }
  void finish() {
    while (step()) {}
    count = at = 0;
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
  int64_t m = 0, n = 0;              // the tile being worked on
  int64_t done = 0, left = 0;        // elements of its operands behind, steps ahead
  const bf16 *a = nullptr, *b = nullptr;
  bool deep = false;

  void add(const Product& x) { queue[count++] = x; }
  __attribute__((always_inline)) bool step() {
    tile_fence();
    if (__builtin_expect(left == 0, 0)) {
      if (at == count) return false;
      const Product& x = queue[at];
      a = x.a + m / 32 * x.a_panel, b = x.b + n / 32 * x.b_panel, done = 0, left = x.depth, deep = x.deep;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const bf16 *from_a = a + done, *from_b = b + done;
    done += 2 * kTile;
    if (deep) {
      _tile_stream_loadd(6, from_b, 64);
      _tile_stream_loadd(7, from_b + kTile, 64);
    } else {
      _tile_loadd(6, from_b, 64);
      _tile_loadd(7, from_b + kTile, 64);
    }
    _tile_loadd(4, from_a, 64);
    _tile_loadd(5, from_a + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    if (__builtin_expect(--left == 0, 0)) {
      const Product& x = queue[at];
      float* c = x.c + m * x.ldc + n;
      const int64_t bytes = x.ldc * 4;
      _tile_stored(0, c, bytes);
      _tile_stored(1, c + 16, bytes);
      _tile_stored(2, c + 16 * x.ldc, bytes);
      _tile_stored(3, c + 16 * x.ldc + 16, bytes);
      if (x.deep) {
        if ((n += 32) == x.cols) n = 0, m += 32;
        if (m == x.rows) m = 0, ++at;
      } else {
        if ((m += 32) == x.rows) m = 0, n += 32;
        if (n == x.cols) n = 0, ++at;
      }
    }
    return true;
  }
};
#endif

// Rows [row, row + rows) of a chunk against split `split`: the keys [k0, k1) of it are what any of them sees, in whole lines.
struct Unit {
  int64_t split, row, rows, k0, k1;
};

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
    for (int64_t r = u.row; r < u.row + u.rows; ++r) {
      const Range c = clip(seen[r], u.split * kSplit, keys);
      if (c.lo < c.hi) u.k0 = least(u.k0, c.lo), u.k1 = most(u.k1, c.hi);
    }
    u.k0 = round_down(u.k0, kLine), u.k1 = round_up(u.k1, kLine);
    return u.k0 < u.k1;
  }

  // q and k packed
  void scores(const Unit& u, Place& x, const T* q, const T* k) {
    const int64_t kp = Mm::padded_k(D);
    products.scores(round_up(u.rows, Mm::MR), u.k1 - u.k0, D, q + u.row * kp, k + u.k0 * kp, x.scores + u.k0);
  }
  void softmax(const Unit& u, Place& x, const Range* seen, int64_t keys) {
    const auto find_max = [&](int64_t r) {
      const Range c = clip(seen[u.row + r], u.split * kSplit, keys);
      x.ms[r] = c.lo < c.hi ? row_max(transform, x.scores + r * kLd, RowLines{c.lo, c.hi}) : -INFINITY;
    };
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
    const int64_t keys_p = Mm::padded_k(keys);
    products.values(round_up(u.rows, Mm::MR), ldo, u.k0, least(u.k1, keys_p), x.scores, x.probs, v, Mm::NR * keys_p, o);
  }
};

}  // namespace tk::TK_ISA
