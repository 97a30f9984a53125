// Products of bf16 without AMX: VDPBF16PS with the sums in registers.
//
//   dot_rows<R, N>   C[R, 16 N] (+)= A B
//     A  element (r, k) at a[r * row + k / 32 * a_step + k % 32]; packed panels and rows where they lie alike
//     B  steps b_step apart of N tiles [16 pairs of k][16 columns][2], kTile elements apart
//     C  element (r, 16 n + j) at c[r * ldc + n * c_tile + j]
//   dot_block<N>     the same for any number of rows: twelve (N = 2) or sixteen at a time
//
// One chain over pairs of k, which C joins by an addition (Join::sum) or is the start of (Join::chain). each() is called once a
// step and group of rows: something to fetch meanwhile.
#pragma once

#include "tiles.h"

namespace tk::TK_ISA {

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

enum class Join { none, sum, chain };  // none: C is not read

struct DotOperands {
  const bf16* a;
  int64_t row, a_step;
  const bf16* b;
  int64_t b_step;
  float* c;
  int64_t ldc, c_tile;
};

inline constexpr int kDotTile = 512;  // elements of a tile of B

inline __m512bh dot_pair(const bf16* at) {
  int32_t pair;
  memcpy(&pair, at, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

template <int R, int N, int64_t Row, class Each>
inline __attribute__((always_inline)) void dot_rows(const DotOperands& x, int64_t steps, Join join, const Each& each) {
  const int64_t step = Row ? Row : x.row;
  __m512 sum[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[r][n] = join == Join::chain ? _mm512_loadu_ps(x.c + r * x.ldc + n * x.c_tile) : _mm512_setzero_ps();
  const bf16* row[(R + 2) / 3];  // every third row: the two after it are within reach of an address
#pragma GCC unroll 16
  for (int r = 0; r < R; r += 3) row[r / 3] = x.a + r * step;
  const bf16* b = x.b;
  for (int64_t left = steps; left; --left) {
    each();
#pragma GCC unroll 2
    for (int k = 0; k < 16; ++k) {
      __m512bh y[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) y[n] = (__m512bh)_mm512_loadu_si512(b + n * kDotTile + k * 32);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512bh p = dot_pair(row[r / 3] + r % 3 * step + 2 * k);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], p, y[n]);
      }
    }
    b += x.b_step;
#pragma GCC unroll 16
    for (int r = 0; r < R; r += 3) row[r / 3] += x.a_step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      float* c = x.c + r * x.ldc + n * x.c_tile;
      _mm512_storeu_ps(c, join == Join::sum ? _mm512_add_ps(_mm512_loadu_ps(c), sum[r][n]) : sum[r][n]);
    }
}

template <int R, int N, int64_t Row, class Each>
inline void dot_rest(const DotOperands& x, int64_t rows, int64_t steps, Join join, const Each& each) {
  if (rows == R) return dot_rows<R, N, Row>(x, steps, join, each);
  if constexpr (R > 1) dot_rest<R - 1, N, Row>(x, rows, steps, join, each);
}

// Row: x.row where it is known to the compiler, or 0.
template <int N, int64_t Row, class Each>
inline void dot_block(DotOperands x, int64_t rows, int64_t steps, Join join, const Each& each) {
  constexpr int kMost = N == 2 ? 12 : 16;
  while (rows > 0) {
    // 32 rows as 12, 12 and 8, 16 of two tiles as 8 and 8: a group of few rows waits for each sum's last product.
    const int64_t n = rows > kMost && rows < kMost + 6 ? rows / 2 : rows < kMost ? rows : kMost;
    if (n == kMost) dot_rows<kMost, N, Row>(x, steps, join, each);
    else dot_rest<kMost - 1, N, Row>(x, n, steps, join, each);
    rows -= n, x.a += n * (Row ? Row : x.row), x.c += n * x.ldc;
  }
}

#endif

}  // namespace tk::TK_ISA
