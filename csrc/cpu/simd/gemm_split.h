// Float products on AMX: Gemm<bf16x3> (gemm.h's contract), each float as the sum of three bf16.
//
//   x = high + middle + low, each the nearest bf16 to what the ones before leave: 24 bits, so nothing is lost
//   a·b = ah·bh + ah·bm + am·bh + am·bm + ah·bl + al·bh   (what is left out is below 2^-24 of a·b)
//
// Products of two bf16 are exact in float, and a tile product adds 32 of them before it rounds into the sum, so six of them err
// less than a chain of 32 FMAs, at two and a half times its speed (measured: 24 tile products a step of 384 cycles, where the
// FMAs take 1024). Subnormal parts count as zero: below 2^-110 a float loses digits. An infinity becomes NaN.
//
// Order of summation: one chain of tile products within each block of KB values of k counted from 0, block sums added in order
// (to the old C first when accumulating), as Gemm<float> does. Splitting K into calls is the same sum if the cuts are multiples
// of KB.
#pragma once

#include "gemm.h"

namespace tk::TK_ISA {

#if defined(__AMX_BF16__)

struct bf16x3 {
  bf16 part[3];  // the unit packed operands are counted in; they hold whole tiles of highs, of middles, of lows
};

template <> struct Gemm<bf16x3> {
  using Type = bf16x3;
  static constexpr int MR = 32, NR = 32, KU = 32;
  static constexpr int KB = 384;
  static constexpr int kTile = 512; // bf16 of one tile, 1 KiB
  static constexpr int kFar = 16;  // rows
  static constexpr int kPart = 2 * kTile, kStep = 3 * kPart;

  static int64_t padded_k(int64_t K) { return round_up(K, KU); }
  static int64_t size_a(int64_t M, int64_t K) { return round_up(M, MR) * padded_k(K); }
  static int64_t size_b(int64_t N, int64_t K) { return round_up(N, NR) * padded_k(K); }

  // A panel: [k / 32][3 parts][2 tiles][16 rows][32 k]
  template <class S> static void pack_a(const S* src, int64_t stride, int64_t M, int64_t K, bf16x3* to) {
    bf16* dst = (bf16*)to;
    for (int64_t m = 0; m < round_up(M, MR); m += MR)
      for (int64_t k = 0; k < K; k += KU, dst += kStep)
        for (int r = 0; r < MR; ++r) {
          const Parts x = m + r < M ? split(src + (m + r) * stride + k, (int)least(32, K - k)) : Parts{};
          for (int p = 0; p < 3; ++p) _mm512_storeu_si512(dst + p * kPart + r * 32, x.part[p]);
        }
  }
  template <class S> static void pack_a_t(const S* src, int64_t stride, int64_t M, int64_t K, bf16x3* to) {
    bf16* dst = (bf16*)to;
    for (int64_t m = 0; m < round_up(M, MR); m += MR)
      for (int64_t k = 0; k < K; k += KU, dst += kStep)
        for (int t = 0; t < 2; ++t) {
          vi v[3][16];
          for (int i = 0; i < 16; ++i) {
            const Parts x = pairs(src, stride, k + 2 * i, K, m + 16 * t, M);
            for (int p = 0; p < 3; ++p) v[p][i] = (vi)x.part[p];
          }
          for (int p = 0; p < 3; ++p) store_transposed(v[p], dst + p * kPart + t * kTile);
        }
  }
  // n <= 32 neighbours in k of one row: its line in a tile of highs at dst, those of middles and lows `part` elements on.
  template <class S> static void pack_row(const S* src, int n, bf16* dst, int64_t part) {
    const Parts x = split(src, n);
    for (int p = 0; p < 3; ++p) _mm512_storeu_si512(dst + p * part, x.part[p]);
  }
  // B panel: [k / 32][3 parts][2 tiles][16 pairs of k][16 columns][2]
  template <class S> static void pack_b(const S* src, int64_t stride, int64_t N, int64_t K, bf16x3* to) {
    bf16* dst = (bf16*)to;
    for (int64_t n = 0; n < round_up(N, NR); n += NR)
      for (int64_t k = 0; k < K; k += KU, dst += kStep)
        for (int t = 0; t < 2; ++t) {
          vi v[3][16];
          for (int i = 0; i < 16; ++i) {
            const int64_t row = n + 16 * t + i;
            const Parts x = row < N ? split(src + row * stride + k, (int)least(32, K - k)) : Parts{};
            for (int p = 0; p < 3; ++p) v[p][i] = (vi)x.part[p];
          }
          for (int p = 0; p < 3; ++p) store_transposed(v[p], dst + p * kPart + t * kTile);
        }
  }
  template <class S> static void pack_b_t(const S* src, int64_t stride, int64_t N, int64_t K, bf16x3* to) {
    const int64_t Kp = padded_k(K);
    for (int64_t k = 0; k < Kp; k += 2)  // whole rows at a time, the next ones fetched meanwhile: they come from far away
      for (int64_t n = 0; n < round_up(N, NR); n += 16) {
        if (k + kFar + 1 < K && n < N) {
          __builtin_prefetch(src + (k + kFar) * stride + n, 0, 2);
          __builtin_prefetch(src + (k + kFar + 1) * stride + n, 0, 2);
        }
        const Parts x = pairs(src, stride, k, K, n, N);
        bf16* dst = (bf16*)(to + n / NR * (NR * Kp) + k / KU * KU * NR) + n % NR / 16 * kTile + k % KU * 16;
        for (int p = 0; p < 3; ++p) _mm512_storeu_si512(dst + p * kPart, x.part[p]);
      }
  }

  static void gemm(int64_t M, int64_t N, int64_t K, const bf16x3* A, const bf16x3* B, float* C, int64_t ldc, bool accumulate) {
    gemm_panels(M, N, K, A, MR * padded_k(K), B, NR * padded_k(K), C, ldc, accumulate);
  }
  // Direction -1: the sum runs over the steps of 32 from the last one down, K <= KB. kFetch: A comes from beyond L2. kHighsLast:
  // the products of highs, by far the largest, follow all others within a block of KB, so that only they meet the whole sum's
  // rounding; K <= KB.
  template <int Direction = 1, bool kFetch = true, bool kHighsLast = false>
  static void gemm_panels(int64_t M, int64_t N, int64_t K, const bf16x3* A, int64_t a_panel, const bf16x3* B, int64_t b_panel,
                          float* C, int64_t ldc, bool accumulate) {
    if (K == 0 && !accumulate) {
      for (int64_t m = 0; m < M; ++m) memset(C + m * ldc, 0, N * sizeof(float));
      return;
    }
    const int64_t Kp = padded_k(K);
    const int64_t panels = (N + NR - 1) / NR, per_step = kFetch ? (96 + panels - 1) / panels : 0;  // lines of the next A panel
    for (int64_t k = 0; k < Kp; k += KB) {
      const int64_t steps = least(KB, Kp - k) / KU, first = Direction < 0 ? (steps - 1) * KU : k;
      const bool add = accumulate || k > 0;
      for (int64_t m = 0; m < M; m += MR) {
        const bf16x3* a = A + m / MR * a_panel + first * MR;
        const int rows = (int)least(MR, M - m);
        const bf16* ahead = (const bf16*)(m + MR < M ? a + a_panel : A + (k + KB) * MR);
        for (int64_t n = 0; n < N; n += NR, ahead += per_step * steps * 32) {
          const bf16x3* b = B + n / NR * b_panel + first * NR;
          const int cols = (int)least(NR, N - n);
          float* c = C + m * ldc + n;
          if (!add && rows == MR && cols == NR) {
            tiles<Direction, kHighsLast>(steps, (const bf16*)a, (const bf16*)b, c, ldc, ahead, (int)per_step);
          } else {
            alignas(64) float sums[MR * NR];
            tiles<Direction, kHighsLast>(steps, (const bf16*)a, (const bf16*)b, sums, NR, ahead, (int)per_step);
            if (rows == MR && cols == NR) join(MR, NR, sums, c, ldc, true);
            else join(rows, cols, sums, c, ldc, add);
          }
        }
      }
    }
  }

  struct Parts {
    __m512i part[3];  // 32 bf16 each
  };
  // Of 32 neighbours in k: those in low and then those in high.
  __attribute__((always_inline)) static Parts split(vf low, vf high) {
    Parts out;
    for (int i = 0; i < 3; ++i) {
      out.part[i] = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      if (i == 2) break;
      low -= (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(out.part[i])), 16);
      high -= (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(out.part[i], 1)), 16);
    }
    return out;
  }
  // Columns k to k + 31 of one row of an A panel lie at panel + k * MR bf16x3, the row's part of that at row % MR * 32 bf16.
  __attribute__((always_inline)) static void store_a(bf16* to, const Parts& x) {
    for (int p = 0; p < 3; ++p) _mm512_storeu_si512(to + p * kPart, x.part[p]);
  }

 private:
  template <class S> static Parts split(const S* p, int n) {
    return split(n >= 16 ? load(p) : load_n(p, n), n >= 32 ? load(p + 16) : n > 16 ? load_n(p + 16, n - 16) : zero());
  }
  // Of 16 neighbours c of rows k and k + 1, interleaved: lane = (src[k][c], src[k + 1][c]).
  template <class S> static Parts pairs(const S* src, int64_t stride, int64_t k, int64_t K, int64_t c, int64_t C) {
    const int n = (int)least(16, C - c);
    vf even = k < K ? load_n(src + k * stride + c, n) : zero(), odd = k + 1 < K ? load_n(src + (k + 1) * stride + c, n) : zero();
    Parts out;
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                                           3, 18, 2, 17, 1, 16, 0);
    for (int i = 0; i < 3; ++i) {
      const __m512i both = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
      out.part[i] = both;
      if (i == 2) break;
      even -= (vf)_mm512_slli_epi32(both, 16);
      odd -= (vf)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
    }
    return out;
  }
  static void store_transposed(vi* v, bf16* dst) {
    transpose(v);
    for (int i = 0; i < 16; ++i) memcpy((void*)(dst + 32 * i), &v[i], 64);
  }
  __attribute__((always_inline)) static void join(int rows, int cols, const float* sums, float* c, int64_t ldc, bool add) {
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < cols; j += W) {
        const vf x = load(sums + r * NR + j);
        store_n(c + r * ldc + j, add ? load_n(c + r * ldc + j, cols - j) + x : x, cols - j);
      }
  }

  __attribute__((always_inline)) static void load_a(const bf16* a) {
    tile_load<4>(a, 64);
    tile_load<5>(a + kTile, 64);
  }
  __attribute__((always_inline)) static void load_b(const bf16* b) {
    tile_load<6>(b, 64);
    tile_load<7>(b + kTile, 64);
  }
  __attribute__((always_inline)) static void multiply() {
    tile_dot<0, 4, 6>();
    tile_dot<2, 5, 6>();
    tile_dot<1, 4, 7>();
    tile_dot<3, 5, 7>();
  }

  template <int Direction, bool kHighsLast>
  static void tiles(int64_t steps, const bf16* a, const bf16* b, float* c, int64_t ldc, const bf16* ahead, int per_step) {
    tile_fence();
    const int64_t bytes = ldc * 4;
    float* half = c + 16 * ldc;
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    const bf16 *const a_first = a, *const b_first = b;
    for (int64_t left = steps; left; --left, a += Direction * kStep, b += Direction * kStep) {
      for (int i = 0; i < per_step; ++i, ahead += 32) _mm_prefetch((const char*)ahead, _MM_HINT_T1);
      const bf16 *a1 = a + kPart, *a2 = a1 + kPart, *b1 = b + kPart, *b2 = b1 + kPart;
      load_a(a), load_b(b2), multiply();
      load_b(b1), multiply();
      load_a(a1), multiply();
      load_b(b), multiply();
      load_a(a2), multiply();
      if constexpr (!kHighsLast) load_a(a), multiply();
    }
    if constexpr (kHighsLast)
      for (a = a_first, b = b_first; steps; --steps, a += Direction * kStep, b += Direction * kStep) load_a(a), load_b(b), multiply();
    tile_store<0>(c, bytes);
    tile_store<1>(c + 16, bytes);
    tile_store<2>(half, bytes);
    tile_store<3>(half + 16, bytes);
    tile_fence();
  }
};

// The compute type of families that do not promise Gemm<float>'s order of summation.
template <class S> struct FastComputeOf { using type = bf16x3; };
template <> struct FastComputeOf<bf16> { using type = bf16; };
template <class S> using FastCompute = typename FastComputeOf<S>::type;

#else

template <class S> using FastCompute = Compute<S>;

#endif

}  // namespace tk::TK_ISA
