// One block of cached latents against rows of absorbed queries: scores, online softmax, values.
//
//   s = q . kv,  m' = max(m, max s),  p = 2^(c (s - m')),  l = l 2^(c (m - m')) + sum p,  o = o 2^(c (m - m')) + p kv[:Dv]
//
// Scores are computed transposed, a lane a row: S^T = KV Q^T. So the latents are the left operand as they lie in the cache,
// the queries are packed once, and maximum, sum and exponentials run down the keys without a reduction over lanes.
//
// Order of sums, which the bits depend on: a row's keys in blocks of kLatentBlock from its split's first key; m, l and o are
// carried from block to block. A row whose maximum stays is not rescaled (times 1). What a row does not see adds exact zeros.
//
// D values of a latent, Dv of them its value; a panel is 2W rows, as Gemm packs right operands; a half of it one lane each.
#pragma once

#include "attention_block.h"

namespace tk::TK_ISA {

inline constexpr int64_t kLatentBlock = 256;  // keys
inline constexpr int64_t kLatentLines = kLatentBlock / kLine;
inline constexpr int64_t kHalf = kLatentBlock * W;  // floats of the scores of half a panel, [keys, W]

// kLine latents at a constant stride, of which those past the end of a sequence are zeros.
template <class T> struct Line {
  const T* at;
  int64_t step;
};

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

  const vf c = splat(f.c), shift = kRounded ? now * c : now;
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

template <class T> struct LatentBlock;

// ------------------------------------------------------------------------------------------------ float

template <> struct LatentBlock<float> {
  using Mm = Gemm<float>;
  static constexpr int64_t kPanel = 2 * W;

  static int64_t width(int64_t D) { return D; }  // of a copied latent
  static bool takes(int64_t) { return true; }    // latents where they lie
  static int64_t ld_o(int64_t Dv) { return round_up(Dv, W) + W; }
  static int64_t floats(int64_t) { return 2 * kHalf; }  // scratch: scores of a panel
  static int64_t values_floats(int64_t) { return 0; }
  static void unfold(float*, int64_t) {}

  // Nothing to prepare: values are read as they lie.
  static void pack_values(const Line<float>&, int64_t, int64_t, float*) {}

  // A panel's rows (the first `rows` of it) against `lines` lines; q packed. first: o holds nothing yet.
  static void run(const Transform& f, const Line<float>* lines, int64_t count, int64_t rows, int64_t D, int64_t Dv, const float* q,
                  const float*, const int32_t* limit, float* m, float* l, float* o, int64_t ldo, bool first, float* s) {
    for (int64_t i = 0; i < count; ++i) {
      if (rows > W) scores<W == 16 ? 8 : 4, 2>(lines[i], D, q, s + i * kLine * W);
      else scores<W == 16 ? 16 : 8, 1>(lines[i], D, q, s + i * kLine * W);
    }
    for (int64_t h = 0; h * W < rows; ++h) {
      alignas(64) float shrink[W];
      float* x = s + h * kHalf;
      softmax_down<false>(f, x, count * kLine, limit + h * W, m + h * W, l + h * W, shrink, [&](int64_t k, const vf* p) {
#pragma GCC unroll 8
        for (int u = 0; u < (W < 16 ? 4 : 8); ++u) store(x + (k + u) * W, p[u]);
      });
      if (!first) shrink_rows(shrink, least(W, rows - h * W), o + h * W * ldo, ldo);
    }
    constexpr int64_t kLines = Mm::KB / kLine;  // of a summation block
    for (int64_t i = 0; i < count; i += kLines) {
      const int64_t n = least(kLines, count - i);
      const bool add = !first || i > 0;
      int64_t d = 0;
      for (; d + 3 * W <= Dv; d += 3 * W) columns<3>(lines + i, n, d, 0, rows, s + i * kLine * W, o + d, ldo, add);
      for (; d < Dv; d += W) columns<1>(lines + i, n, d, Dv - d, rows, s + i * kLine * W, o + d, ldo, add);
    }
  }

 private:
  // S^T of kLine keys, K at a time, and N halves of a panel of rows.
  template <int K, int N> static void scores(const Line<float>& line, int64_t D, const float* q, float* s) {
    for (int64_t key = 0; key < kLine; key += K, s += K * W)
      for (int64_t first = 0; first < D; first += Mm::KB) {  // Gemm's summation blocks
        const int64_t end = least(D, first + Mm::KB), step = line.step;
        vf acc[K][N];
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i)
#pragma GCC unroll 2
          for (int h = 0; h < N; ++h) acc[i][h] = zero();
        const float* row[(K + 2) / 3];  // every third row: the two after it are within reach of an address
#pragma GCC unroll 16
        for (int i = 0; i < K; i += 3) row[i / 3] = line.at + (key + i) * step + first;
        const float* x = q + first * kPanel;
        for (int64_t d = first; d < end; ++d, x += kPanel) {
          vf y[N];
#pragma GCC unroll 2
          for (int h = 0; h < N; ++h) y[h] = load(x + h * W);
#pragma GCC unroll 16
          for (int i = 0; i < K; ++i) {
            const vf k = splat(row[i / 3][i % 3 * step]);
#pragma GCC unroll 2
            for (int h = 0; h < N; ++h) acc[i][h] = fma(k, y[h], acc[i][h]);
          }
#pragma GCC unroll 16
          for (int i = 0; i < K; i += 3) ++row[i / 3];
        }
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i)
#pragma GCC unroll 2
          for (int h = 0; h < N; ++h) {
            float* to = s + h * kHalf + i * W;
            store(to, first > 0 ? load(to) + acc[i][h] : acc[i][h]);
          }
      }
  }

  // o[rows, C vectors] (+)= P V over n lines; `left` columns are left where a vector may reach past the last one (C = 1).
  template <int C>
  static void columns(const Line<float>* lines, int64_t n, int64_t d, int64_t left, int64_t rows, const float* p, float* o,
                      int64_t ldo, bool add) {
    constexpr int R = W == 16 ? 8 : W == 8 ? 4 : 2;
    for (int64_t r = 0; r < rows;) {
      const float* x = p + r / W * kHalf + r % W;
      const int64_t some = rows - r;
      if (some >= R) tile<R, C>(lines, n, d, left, x, o + r * ldo, ldo, add), r += R;
      else if (some >= 4) tile<4, C>(lines, n, d, left, x, o + r * ldo, ldo, add), r += 4;
      else if (some >= 2) tile<2, C>(lines, n, d, left, x, o + r * ldo, ldo, add), r += 2;
      else tile<1, C>(lines, n, d, left, x, o + r * ldo, ldo, add), r += 1;
    }
  }
  template <int R, int C>
  static void tile(const Line<float>* lines, int64_t n, int64_t d, int64_t left, const float* p, float* o, int64_t ldo, bool add) {
    vf acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = zero();
    const bool tail = C == 1 && left < W;
    for (int64_t i = 0; i < n; ++i) {
      const float* v = lines[i].at + d;
      const int64_t step = lines[i].step;
      for (int64_t k = 0; k < kLine; ++k, v += step, p += W) {
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

// ------------------------------------------------------------------------------------------------ bf16 on AMX

#if defined(__AMX_BF16__)
template <> struct LatentBlock<bf16> {
  using Mm = Gemm<bf16>;
  static constexpr int64_t kPanel = 32, kTile = Mm::kTile;
  static constexpr int64_t kProbs = kLatentBlock * 16;  // elements of the probabilities of half a panel, [lines, 16 rows, 32 keys]

  static int64_t width(int64_t D) { return round_up(D, 32); }
  static bool takes(int64_t D) { return D % 32 == 0; }  // else a tile row would reach past the latent
  static int64_t ld_o(int64_t Dv) { return round_up(Dv, 32) + 16; }  // no power of two: the rows of a tile fall in different sets
  static int64_t floats(int64_t) { return 2 * kHalf + kProbs; }      // scratch: scores and probabilities of a panel
  static int64_t values_floats(int64_t Dv) { return kLatentBlock * round_up(Dv, 32) / 2; }

  // Right operands of P V of line i: pairs of keys interleaved, [Dv / 32][lines][2 tiles][16 pairs][16 columns][2], the columns
  // in the order that the instruction gives: tile 0 of 32 holds 0-3, 8-11, ..., tile 1 the others. unfold() undoes it.
  static void pack_values(const Line<bf16>& line, int64_t i, int64_t Dv, float* values) {
    bf16* to = (bf16*)values + i * 2 * kTile;
    for (int64_t d = 0; d < Dv; d += 32, to += kLatentLines * 2 * kTile)
#pragma GCC unroll 4
      for (int64_t pair = 0; pair < 16; ++pair) {
        const bf16* row = line.at + 2 * pair * line.step + d;
        const __m512i even = _mm512_loadu_si512(row), odd = _mm512_loadu_si512(row + line.step);
        _mm512_store_si512(to + pair * 32, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(to + kTile + pair * 32, _mm512_unpackhi_epi16(even, odd));
      }
  }
  static void unfold(float* o, int64_t Dv) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (float* x = o; x < o + Dv; x += 32) {
      const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
      _mm512_storeu_ps(x, _mm512_permutex2var_ps(a, low, b));
      _mm512_storeu_ps(x + 16, _mm512_permutex2var_ps(a, high, b));
    }
  }

  static void run(const Transform& f, const Line<bf16>* lines, int64_t count, int64_t rows, int64_t D, int64_t Dv, const bf16* q,
                  const float* values, const int32_t* limit, float* m, float* l, float* o, int64_t ldo, bool first, float* s) {
    const int64_t halves = rows > 16 ? 2 : 1, steps = Mm::padded_k(D) / 32;
    bf16* probs = (bf16*)(s + 2 * kHalf);
    for (int64_t i = 0; i < count; ++i) {
      if (halves == 2) scores<2>(lines[i], steps, q, s + i * kLine * 16);
      else scores<1>(lines[i], steps, q, s + i * kLine * 16);
    }
    tile_fence();
    for (int64_t h = 0; h < halves; ++h) {
      alignas(64) float shrink[16];
      softmax(f, s + h * kHalf, count * kLine, limit + h * 16, m + h * 16, l + h * 16, shrink, probs + h * kProbs);
      if (!first) shrink_rows(shrink, least(16, rows - h * 16), o + h * 16 * ldo, ldo);
    }
    const bf16* v = (const bf16*)values;
    for (int64_t d = 0; d < Dv; d += 32, v += kLatentLines * 2 * kTile) {
      if (halves == 2) add_values<2>(count, probs, v, o + d, ldo, first);
      else add_values<1>(count, probs, v, o + d, ldo, first);
    }
    tile_fence();
  }

 private:
  // S^T of kLine keys and N halves of a panel of rows.
  template <int N> static void scores(const Line<bf16>& line, int64_t steps, const bf16* q, float* s) {
    const bf16 *a = line.at, *below = a + 16 * line.step;
    const int64_t bytes = line.step * 2;
    tile_fence();
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (N == 2) {
      _tile_zero(1);
      _tile_zero(3);
    }
    for (; steps; --steps, a += 32, below += 32, q += 2 * kTile) {
      _tile_loadd(4, a, bytes);
      _tile_loadd(6, q, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, below, bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) {
        _tile_loadd(7, q + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, s, 64);
    _tile_stored(2, s + 256, 64);
    if constexpr (N == 2) {
      _tile_stored(1, s + kHalf, 64);
      _tile_stored(3, s + kHalf + 256, 64);
    }
  }

  static void softmax(const Transform& f, float* s, int64_t keys, const int32_t* limit, float* m, float* l, float* shrink, bf16* probs) {
    // Dwords (p of key k, p of key k + 1) of 16 rows, from their 32 rounded values.
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                                           3, 18, 2, 17, 1, 16, 0);
    vi v[16];
    softmax_down<true>(f, s, keys, limit, m, l, shrink, [&](int64_t k, const vf* x) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int u = 0; u < 8; u += 2)
        v[(k % kLine + u) / 2] = (vi)_mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[u + 1], (__m512)x[u]));
      if ((k + 8) % kLine != 0) return;
      transpose(v);
      bf16* to = probs + (k + 8 - kLine) * 16;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, (__m512i)v[i]);
    });
  }

  // o[N halves, 32] (+)= P V
  template <int N> static void add_values(int64_t count, const bf16* probs, const bf16* v, float* o, int64_t ldo, bool first) {
    const int64_t bytes = ldo * 4;
    float* below = o + 16 * ldo;
    tile_fence();
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (N == 2) {
        _tile_zero(2);
        _tile_zero(3);
      }
    } else {
      _tile_loadd(0, o, bytes);
      _tile_loadd(1, o + 16, bytes);
      if constexpr (N == 2) {
        _tile_loadd(2, below, bytes);
        _tile_loadd(3, below + 16, bytes);
      }
    }
    for (; count; --count, probs += kTile, v += 2 * kTile) {
      _tile_loadd(4, probs, 64);
      _tile_loadd(6, v, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, v + kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (N == 2) {
        _tile_loadd(5, probs + kProbs, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, o, bytes);
    _tile_stored(1, o + 16, bytes);
    if constexpr (N == 2) {
      _tile_stored(2, below, bytes);
      _tile_stored(3, below + 16, bytes);
    }
  }
};
#endif

}  // namespace tk::TK_ISA
