// mla_block.h's block of keys in bf16 without AMX: VDPBF16PS with the sums in registers, keys and values where they lie.
//
// Order of sums: a score is the sum of chains of kChain steps of 32 values of D, a block's part of o goes on in one chain over pairs
// of keys.
#pragma once

#include "mla_bf16.h"
#include "simd/dots.h"

namespace tk::TK_ISA {

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

template <> struct LatentBlock<bf16> : RoundedBlock<LatentBlock<bf16>> {
  using Keys = Places<bf16>;
  static constexpr int64_t kChain = 6;
  static constexpr int64_t kWork = 2 * kHalf;  // floats: scores of a panel

  static int64_t beats(int64_t rows, int64_t D, int64_t Dv) {
    const int64_t panels = (rows + kPanel - 1) / kPanel;
    return kKeys / kLine * (3 * panels * (D / 32) + (rows + 15) / 16 * (rows > 8 ? 4 : 2) * (Dv / 32));
  }

  template <class Next>
  static void products(const Keys* lines, int64_t count, int64_t rows, int64_t D, const bf16* q, float* s, Next& next) {
    const int64_t steps = Mm::padded_k(D) / 32;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < steps; j += kChain) {
        float* to = s + i * kLine * 16;
        if (rows > 16) scores<2>(lines[i], j, least(kChain, steps - j), q + j * 2 * kTile, to, next);
        else scores<1>(lines[i], j, least(kChain, steps - j), q + j * 2 * kTile, to, next);
      }
  }
  template <class Next>
  static void values(const Keys* lines, int64_t count, int64_t rows, const bool* sees, int64_t Dv, const float* probs, float* o,
                     int64_t ldo, bool first, float*, Next& next) {
    constexpr int64_t kLines = 4;  // whose 32 columns stay in L1 for all rows
    for (int64_t d = 0; d < Dv; d += 32)
      for (int64_t i = 0; i < count; i += kLines)
        for (int64_t r = 0; r < rows; r += 16) {
          if (!sees[r / kPanel]) continue;
          const bf16* p = (const bf16*)(probs + r / kPanel * kProbs) + r % kPanel / 16 * kHalfProbs + i * kTile;
          value_rows<16>(lines + i, least(kLines, count - i), least(16, rows - r), d, p, o + r * ldo + d, ldo, first && i == 0, next);
        }
  }

 private:
  // S^T of kLine keys and N halves of a panel of rows: what `steps` steps of D from `step` on add to it.
  template <int N, class Next>
  static void scores(const Keys& line, int64_t step, int64_t steps, const bf16* q, float* s, Next& next) {
    static_assert(kLine == 32);
    some_scores<12, N>(line.at, step, steps, q, s, next);
    some_scores<12, N>(line.at + 12, step, steps, q, s + 12 * 16, next);
    some_scores<8, N>(line.at + 24, step, steps, q, s + 24 * 16, next);
  }
  template <int K, int N, class Next>
  static __attribute__((noinline)) void some_scores(const bf16* const* at, int64_t step, int64_t steps, const bf16* q, float* s, Next& next) {
    __m512 sum[K][N];
    const bf16* row[K];
#pragma GCC unroll 16
    for (int i = 0; i < K; ++i) {
      row[i] = at[i] + step * 32;
#pragma GCC unroll 2
      for (int h = 0; h < N; ++h) sum[i][h] = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < steps * 32; d += 32, q += 2 * kTile) {
      next.beat();
#pragma GCC unroll 2
      for (int64_t k = 0; k < 32; k += 2) {
        __m512bh y[N];
#pragma GCC unroll 2
        for (int h = 0; h < N; ++h) y[h] = (__m512bh)_mm512_loadu_si512(q + h * kTile + k * 16);
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) {
          const __m512bh x = dot_pair(row[i] + d + k);
#pragma GCC unroll 2
          for (int h = 0; h < N; ++h) sum[i][h] = _mm512_dpbf16_ps(sum[i][h], x, y[h]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 2
      for (int h = 0; h < N; ++h) {
        float* to = s + h * kHalf + i * 16;
        _mm512_storeu_ps(to, step ? _mm512_add_ps(_mm512_loadu_ps(to), sum[i][h]) : sum[i][h]);
      }
  }

  // o[R, 32] (+)= P V over `count` lines, R <= 16, 16 columns of them at a time where there are many rows. Pairs of keys are
  // interleaved on their way from the cache, which gives columns 0-3, 8-11, ... and the others (unfold() undoes it): shuffles go beside
  // the products, stores of what they give would not.
  template <int R, class Next>
  static void value_rows(const Keys* lines, int64_t count, int64_t rows, int64_t d, const bf16* probs, float* o, int64_t ldo, bool first,
                         Next& next) {
    if constexpr (R > 1) {
      if (rows < R) return value_rows<R - 1>(lines, count, rows, d, probs, o, ldo, first, next);
    }
    if constexpr (R > 8) {
      value_columns<R, 1, 0>(lines, count, d, probs, o, ldo, first, next);
      value_columns<R, 1, 1>(lines, count, d, probs, o + 16, ldo, first, next);
    } else {
      value_columns<R, 2, 0>(lines, count, d, probs, o, ldo, first, next);
    }
  }
  template <int R, int N, int Tile, class Next>
  static void value_columns(const Keys* lines, int64_t count, int64_t d, const bf16* probs, float* o, int64_t ldo, bool first, Next& next) {
    __m512 sum[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[r][n] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(o + r * ldo + n * 16);
    for (; count; --count, ++lines) {
      const bf16* const* at = lines->at;
      for (int64_t k = 0; k < 32; k += 2) {
        if (k % 16 == 0) next.beat();
        const __m512i even = _mm512_loadu_si512(at[k] + d), odd = _mm512_loadu_si512(at[k + 1] + d);
        __m512bh y[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) y[n] = (__m512bh)(Tile + n ? _mm512_unpackhi_epi16(even, odd) : _mm512_unpacklo_epi16(even, odd));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const __m512bh p = dot_pair(probs + r * 32 + k);
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], p, y[n]);
        }
      }
      probs += kTile;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) _mm512_storeu_ps(o + r * ldo + n * 16, sum[r][n]);
  }
};

#endif

}  // namespace tk::TK_ISA
