// Products of packed panels of bf16 without AMX: VDPBF16PS with the sums in registers.
//
//   dot_block   C[rows, 32] (+)= A B, twelve rows at a time
//     A  panels as Gemm packs them: element (r, k) at a[k / 32 * 1024 + r * 32 + k % 32]
//     B  steps of 32 k: two tiles [16 pairs of k][16 columns][2]
//
// One chain over pairs of k, which C joins by an addition (Join::sum) or is the start of (Join::chain). each() is called once a
// step and group of rows: something to fetch meanwhile.
#pragma once

#include "tiles.h"

namespace tk::TK_ISA {

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

enum class Join { none, sum, chain };  // none: C is not read

inline constexpr int kDotTile = 512;  // elements of a tile; two are a step of a panel

inline __m512bh dot_pair(const bf16* at) {
  int32_t pair;
  memcpy(&pair, at, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

template <int R, class Each>
inline __attribute__((always_inline)) void dot_rows(int64_t steps, const bf16* a, const bf16* b, float* c, int64_t ldc, Join join, const Each& each) {
  __m512 sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) sum[r][n] = join == Join::chain ? _mm512_loadu_ps(c + r * ldc + n * 16) : _mm512_setzero_ps();
  for (int64_t left = steps; left; --left, a += 2 * kDotTile, b += 2 * kDotTile) {
    each();
#pragma GCC unroll 2
    for (int k = 0; k < 16; ++k) {
      __m512bh y[2];
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) y[n] = (__m512bh)_mm512_loadu_si512(b + n * kDotTile + k * 32);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512bh x = dot_pair(a + r * 32 + 2 * k);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], x, y[n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      float* to = c + r * ldc + n * 16;
      _mm512_storeu_ps(to, join == Join::sum ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][n]) : sum[r][n]);
    }
}

template <int R, class Each>
inline void dot_rest(int64_t rows, int64_t steps, const bf16* a, const bf16* b, float* c, int64_t ldc, Join join, const Each& each) {
  if (rows == R) return dot_rows<R>(steps, a, b, c, ldc, join, each);
  if constexpr (R > 1) dot_rest<R - 1>(rows, steps, a, b, c, ldc, join, each);
}

template <class Each>
inline void dot_block(int64_t rows, int64_t steps, const bf16* a, const bf16* b, float* c, int64_t ldc, Join join, const Each& each) {
  constexpr int kMost = 12;
  while (rows > 0) {
    // 32 rows as 12, 12 and 8, 16 as 8 and 8: a group of few rows waits for each sum's last product.
    const int64_t n = rows > kMost && rows < kMost + 6 ? rows / 2 : rows < kMost ? rows : kMost;
    if (n == kMost) dot_rows<kMost>(steps, a, b, c, ldc, join, each);
    else dot_rest<kMost - 1>(n, steps, a, b, c, ldc, join, each);
    rows -= n, a += n * 32, c += n * ldc;
  }
}

#endif

}  // namespace tk::TK_ISA
