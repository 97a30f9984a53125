// One block of cached latents against rows of absorbed queries: scores, online softmax, values.
//
//   s = q . kv,  m' = max(m, max s),  p = 2^(c (s - m')),  l = l 2^(c (m - m')) + sum p,  o = o 2^(c (m - m')) + p kv[:Dv]
//
// Scores are computed transposed, a lane a row: S^T = KV Q^T. So the latents are the left operand as they lie in the cache,
// the queries are packed once, and maximum, sum and exponentials run down the keys without a reduction over lanes.
//
// Order of sums, which the bits depend on: a row's keys in blocks of kKeys from its split's first key; m, l and o are
// carried from block to block. A row whose maximum stays is not rescaled (times 1). What a row does not see adds exact zeros.
// next.beat(): something to fetch meanwhile (latent_cache.h).
//
// D values of a latent, Dv of them its value; a panel is 2W rows, as Gemm packs right operands; a half of it one lane each.
#pragma once

#include "attention_block.h"

namespace tk::TK_ISA {

// kLine latents, of which those past the end of a sequence are zeros: at a constant stride, as AMX's tiles are loaded, or each
// anywhere. A Block says in Block::Keys which it takes.
template <class T> struct Line {
  const T* at;
  int64_t step;
};
template <class T> struct Places {
  const T* at[kLine];
};
// Side by side, `width` apart.
template <class T> inline void lay(const T* rows, int64_t width, Line<T>* line) { *line = {rows, width}; }
template <class T> inline void lay(const T* rows, int64_t width, Places<T>* line) {
  for (const T*& at : line->at) at = rows, rows += width;
}

// Scores s [keys, W] of half a panel of rows -> probabilities, m and l [W] brought up to date. keys: whole lines. Row i sees the
// first limit[i] of them, shrink[i] becomes what its o is to be multiplied by. put(k, x): kLine / W vectors' worth of keys from k.
template <bool kRounded, class Put>
inline void softmax_down(const Transform& f, float* s, int64_t keys, const int32_t* limit, float* m, float* l, float* shrink,
                         const Put& put) {
  constexpr int N = W < 16 ? 4 : 8;
  vi see, index = vi{};
  memcpy(&see, limit, sizeof see);
  int32_t shortest = limit[0];
  for (int i = 1; i < W; ++i) shortest = shortest < limit[i] ? shortest : limit[i];
  const bool masked = shortest < keys;
  if (!f.plain)
    for (int64_t k = 0; k < keys; ++k) store(s + k * W, f.apply(load(s + k * W)));

  vf top[4];
  for (vf& x : top) x = splat(kNoScore);
  for (int64_t k = 0; k < keys; k += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      vf x = load(s + (k + u) * W);
      if (masked) x = select(index + (int32_t)(k + u) < see, x, splat(kNoScore));
      top[u] = max(x, top[u]);
    }
  const vf before = load(m), now = select(see > 0, max(max(max(top[0], top[1]), max(top[2], top[3])), before), before);
  const vf factor = select(see > 0, exp2_fast((before - now) * f.c), splat(1.0f));
  store(m, now);
  store(shrink, factor);

  const vf c = splat(f.c);
  vf shift = kRounded ? now * c : now;
  if constexpr (kRounded) {  // as in row_probs (attention_block.h)
    const vi far = (abs(shift) > kFar) & (see > 0);
    if (any(far)) {
      const vf base = select(far, now, zero());
      for (int64_t k = 0; k < keys; ++k) store(s + k * W, load(s + k * W) - base);
      shift = select(far, zero(), shift);
    }
  }
  vf sum[4] = {zero(), zero(), zero(), zero()};
  for (int64_t k = 0; k < keys; k += N) {
    vf x[N];
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) x[u] = kRounded ? fms(load(s + (k + u) * W), c, shift) : (load(s + (k + u) * W) - shift) * c;
    exp2_fast<N, kRounded ? 5 : 6>(x);
    if (masked)
#pragma GCC unroll 8
      for (int u = 0; u < N; ++u) x[u] = select(index + (int32_t)(k + u) < see, x[u], zero());
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) sum[u % 4] += x[u];
    put(k, x);
  }
  store(l, fma(load(l), factor, (sum[0] + sum[1]) + (sum[2] + sum[3])));
}

// o [rows, ldo] times what softmax_down found.
inline void shrink_rows(const float* shrink, int64_t rows, float* o, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r)
    if (shrink[r] != 1.0f)
      for (int64_t d = 0; d < ldo; d += W) store(o + r * ldo + d, load(o + r * ldo + d) * shrink[r]);
}

// By type of packed queries. Value: of latents.
template <class Q> struct LatentBlock;

// What a Block that knows one panel of rows at a time does with more of them.
template <class Block> struct ByPanels {
  // Calls of next.beat() before the last latent is read.
  static int64_t beats_of_scores(int64_t, int64_t D) { return Block::beats(1, D, 0); }
  static int64_t work_floats(int64_t) { return Block::kWork; }
  template <class S, class Q> static void pack_queries(const S* src, int64_t stride, int64_t rows, int64_t D, Q* to) {
    Gemm<Q>::pack_b(src, stride, rows, D, to);
  }
  // q: panels of `per_row` elements a row; those whose flag is not set see nothing.
  template <class Keys, class Q, class Next>
  static void probabilities(const Transform& f, const Keys* lines, int64_t count, int64_t rows, const bool* sees, int64_t D, const Q* q,
                            int64_t per_row, const int32_t* limit, float* m, float* l, float* o, int64_t ldo, bool first, float* result,
                            float* work, Next& next) {
    for (int64_t r = 0; r < rows; r += Block::kPanel)
      if (sees[r / Block::kPanel])
        Block::probabilities(f, lines, count, least(Block::kPanel, rows - r), D, q + r * per_row, limit + r, m + r, l + r, o + r * ldo, ldo,
                             first, result + r / Block::kPanel * Block::kProbs, work, next);
  }
};

// ------------------------------------------------------------------------------------------------ float

template <> struct LatentBlock<float> : ByPanels<LatentBlock<float>> {
  using Value = float;
  using Mm = Gemm<float>;
  using Keys = Places<float>;  // each latent where it lies
  using ByPanels::probabilities;
  static constexpr int64_t kKeys = 256;        // of a block
  static constexpr int64_t kPanel = 2 * W;
  static constexpr int64_t kHalf = kKeys * W;  // floats of the scores of half a panel, [keys, W]
  static constexpr int64_t kScoreBlock = 64;  // values of D summed in one chain: with 128 the error was 1.6 times torch's

  static int64_t width(int64_t D) { return D; }  // of a copied latent
  static bool takes(int64_t) { return true; }    // latents where they lie
  static int64_t ld_o(int64_t Dv) { return round_up(Dv, W) + W; }
  // Scratch in floats: the probabilities of a panel, and what values() and probabilities() need beside them.
  static constexpr int64_t kProbs = 2 * kHalf, kWork = 0;
  // How often next.beat() is called over a block of keys, for the scores (D values) and the values (Dv) of some rows.
  static int64_t beats(int64_t rows, int64_t D, int64_t Dv) {
    const int64_t panels = (rows + kPanel - 1) / kPanel;
    return panels * kKeys / 4 * ((D + kScoreBlock - 1) / kScoreBlock) + panels * kKeys / kLine * (Dv / W);
  }
  static void unfold(float*, int64_t) {}

  // Probabilities of a panel's first `rows` rows over `count` lines; q packed. first: o holds nothing yet.
  template <class Next>
  static void probabilities(const Transform& f, const Keys* lines, int64_t count, int64_t rows, int64_t D, const float* q,
                            const int32_t* limit, float* m, float* l, float* o, int64_t ldo, bool first, float* s, float*, Next& next) {
    products(lines, count, rows, D, q, s, next);
    for (int64_t h = 0; h * W < rows; ++h) {
      alignas(64) float shrink[W];
      float* x = s + h * kHalf;
      softmax_down<false>(f, x, count * kLine, limit + h * W, m + h * W, l + h * W, shrink, [&](int64_t k, const vf* p) {
#pragma GCC unroll 8
        for (int u = 0; u < (W < 16 ? 4 : 8); ++u) store(x + (k + u) * W, p[u]);
      });
      if (!first) shrink_rows(shrink, least(W, rows - h * W), o + h * W * ldo, ldo);
    }
  }
  // S^T alone: s [half of the panel][keys, W]
  template <class Next>
  static void products(const Keys* lines, int64_t count, int64_t rows, int64_t D, const float* q, float* s, Next& next) {
    for (int64_t d = 0; d < D; d += kScoreBlock)  // that much of the queries stays in L1 for all keys
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = least(kScoreBlock, D - d);
        if (rows > W) scores<2>(lines[i], d, n, q + d * kPanel, s + i * kLine * W, next);
        else scores<1>(lines[i], d, n, q + d * kPanel, s + i * kLine * W, next);
      }
  }
  // o (+)= P V for `rows` rows; panels whose flag is not set see nothing.
  template <class Next>
  static void values(const Keys* lines, int64_t count, int64_t rows, const bool* sees, int64_t Dv, const float* probs, float* o,
                     int64_t ldo, bool first, float*, Next& next) {
    constexpr int64_t kLines = Mm::KB / kLine;  // of a summation block
    for (int64_t i = 0; i < count; i += kLines) {
      const int64_t n = least(kLines, count - i);
      const bool add = !first || i > 0;
      for (int64_t d = 0; d < Dv;) {  // a column panel of the values stays in L1 for all rows
        const bool wide = d + 3 * W <= Dv;
        for (int64_t r = 0; r < rows; r += kPanel) {
          if (!sees[r / kPanel]) continue;
          const float* p = probs + r / kPanel * kProbs + i * kLine * W;
          if (wide) columns<3>(lines + i, n, d, 0, least(kPanel, rows - r), p, o + r * ldo + d, ldo, add, next);
          else columns<1>(lines + i, n, d, Dv - d, least(kPanel, rows - r), p, o + r * ldo + d, ldo, add, next);
        }
        d += wide ? 3 * W : W;
      }
    }
  }

 private:
  // S^T of kLine keys and N halves of a panel of rows: what values d to d + n of D add to it.
  template <int N, class Next>
  static void scores(const Keys& line, int64_t d, int64_t n, const float* q, float* s, Next& next) {
    constexpr int K = W == 16 ? (N == 1 ? 12 : 8) : 8 / N;  // keys at a time: their sums and places stay in registers
    int64_t key = 0;
    for (; key + K <= kLine; key += K) some_scores<K, N>(line.at + key, d, n, q, s + key * W, next);
    if constexpr (kLine % K != 0) some_scores<kLine % K, N>(line.at + key, d, n, q, s + key * W, next);
  }
  template <int K, int N, class Next>
  static __attribute__((noinline)) void some_scores(const float* const* at, int64_t d, int64_t n, const float* q, float* s, Next& next) {
    for (int i = 0; i < (K + 2) / 4; ++i) next.beat();
    vf acc[K][N];
    const float* row[K];
#pragma GCC unroll 16
    for (int i = 0; i < K; ++i) {
      row[i] = at[i] + d;
#pragma GCC unroll 2
      for (int h = 0; h < N; ++h) acc[i][h] = zero();
    }
    for (int64_t j = 0; j < n; ++j, q += kPanel) {
      vf y[N];
#pragma GCC unroll 2
      for (int h = 0; h < N; ++h) y[h] = load(q + h * W);
#pragma GCC unroll 16
      for (int i = 0; i < K; ++i) {
        const vf k = splat(row[i][j]);
#pragma GCC unroll 2
        for (int h = 0; h < N; ++h) acc[i][h] = fma(k, y[h], acc[i][h]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 2
      for (int h = 0; h < N; ++h) {
        float* to = s + h * kHalf + i * W;
        store(to, d > 0 ? load(to) + acc[i][h] : acc[i][h]);
      }
  }

  // o[rows, C vectors] (+)= P V over n lines; `left` columns are left where a vector may reach past the last one (C = 1).
  template <int C, class Next>
  static void columns(const Keys* lines, int64_t n, int64_t d, int64_t left, int64_t rows, const float* p, float* o,
                      int64_t ldo, bool add, Next& next) {
    by_groups<W / 2>(rows, [&]<int R>(int64_t r) {
      tile<R, C>(lines, n, d, left, p + r / W * kHalf + r % W, o + r * ldo, ldo, add, next);
    });
  }
  template <int R, int C, class Next>
  static __attribute__((noinline)) void tile(const Keys* lines, int64_t n, int64_t d, int64_t left, const float* p, float* o, int64_t ldo, bool add,
                   Next& next) {
    vf acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = zero();
    const bool tail = C == 1 && left < W;
    for (int64_t i = 0; i < n; ++i) {
      for (int u = 0; u < 4; ++u) next.beat();
      for (int64_t k = 0; k < kLine; ++k, p += W) {
        const float* v = lines[i].at[k] + d;
        vf x[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) x[c] = tail ? load_n(v, (int)left) : load(v + c * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const vf weight = splat(p[r]);
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) acc[r][c] = fma(weight, x[c], acc[r][c]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        float* to = o + r * ldo + c * W;
        store(to, add ? load(to) + acc[r][c] : acc[r][c]);
      }
  }
};

}  // namespace tk::TK_ISA
