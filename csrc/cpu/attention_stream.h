// One pass over the keys of a split for few query rows, straight from the cache: decode's inner loop.
//
//   Stream<St, T>::scores   S[r, k] for kLine keys of one head      Stream<St, T>::values   o[r] += P[r, k] V[k]
//
// The same sums in the same order as Gemm's on packed operands, so the bits are prefill's: float transposes W keys in
// registers and runs the FMA chain of one key per lane; bf16 takes K's rows as they lie for the left operand of
// S^T = K Q^T (TDPBF16PS treats both operands alike) and interleaves two rows of V for the right operand of P V.
#pragma once

#include "attention_block.h"

namespace tk::TK_ISA {

inline constexpr int64_t kStreamRows = 16;  // query rows a stream can take

// What a pass fetches into L2 while it works on something else: some rows of kStreams places, a line of each in turn. The
// memory delivers four streams a core faster than one, and only if the hardware's prefetcher sees them rise evenly.
struct Ahead {
  static constexpr int kStreams = 4;
  const char* at[kStreams];
  int64_t left = 0, row_bytes = 0, step_bytes = 0;  // rows a stream still has, their bytes, the way to the next
  int64_t done = 0;                                 // bytes of this row

  template <int Lines> void step() {
    if (left == 0) return;
#pragma GCC unroll 8
    for (int i = 0; i < Lines; ++i)
#pragma GCC unroll 4
      for (int u = 0; u < kStreams; ++u) __builtin_prefetch(at[u] + done + i * 64, 0, 2);
    done += Lines * 64;
    if (done < row_bytes) return;
    for (int u = 0; u < kStreams; ++u) at[u] += step_bytes;
    done = 0, --left;
  }
  void rest() {
    while (left) step<1>();
  }
};

template <class St, class T> struct Stream;

// ------------------------------------------------------------------------------------------------ float

template <class St> struct Stream<St, float> {
  static bool takes(int64_t) { return true; }
  static int64_t q_size(int64_t rows, int64_t D) { return rows * D; }
  static int64_t probs_size() { return 0; }
  static int64_t o_size(int64_t rows, int64_t ldo) { return rows * ldo * 2; }  // block sums, then the current block's
  static int64_t buffer_size(int64_t) { return 0; }
  struct Setup {
    explicit Setup(int64_t) {}
  };

  static void pack_q(const St* rows, int64_t count, int64_t D, float* q) {
    for (int64_t i = 0; i < count * D; i += W) store_n(q + i, load_n(rows + i, (int)(count * D - i)), (int)(count * D - i));
  }

  static void scores(const St* k, int64_t stride, int64_t D, const float* q, int64_t rows, float* s, Ahead& next) {
    for (int64_t key = 0; key < kLine; key += W, k += W * stride, s += W)
      by_groups<8>(rows, [&]<int R>(int64_t r) { scores_of<R>(k, stride, D, q + r * D, s + r * kLd, next); });
  }

  // Keys [at, at + kLine) of the split, of which [first, end) is walked in order; both are multiples of kLine.
  static void values(const St* v, int64_t stride, int64_t Dv, const float* s, const float*, int64_t rows, int64_t at, int64_t first,
                     int64_t end, float* o, int64_t ldo, float*, Ahead& next) {
    constexpr int64_t KB = Gemm<float>::KB;
    float* part = o + rows * ldo;
    const bool open = at == first || at % KB == 0;
    by_groups<4>(rows, [&]<int R>(int64_t r) { values_of<R>(v, stride, Dv, s + r * kLd + at, part + r * ldo, ldo, open, next); });
    if (at + kLine != end && (at + kLine) % KB != 0) return;
    // A summation block is complete: its sum joins that of the block before, if there is one.
    const bool joins = first / KB < at / KB;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < Dv; d += W) {
        float* c = o + r * ldo + d;
        const vf x = load(part + r * ldo + d);
        store(c, joins ? load(c) + x : x);
      }
  }
  static void finish(float*, int64_t, int64_t) {}

 private:
  template <int R> static void scores_of(const St* k, int64_t stride, int64_t D, const float* q, float* s, Ahead& next) {
    const int64_t chain = score_chain(D);
    for (int64_t first = 0; first < D; first += chain) {
      const int64_t end = least(D, first + chain);
      vf acc[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] = zero();
      for (int64_t d = first; d < end; d += W) {
        vi v[W];
        if (d + W <= end) {
          next.step<4>();
          const St* row = k + d;
#pragma GCC unroll 4
          for (int i = 0; i < W; i += 4, row += 4 * stride) {  // four at a time: so many rows are within reach of an address
            v[i] = as_int(load(row)), v[i + 1] = as_int(load(row + stride));
            v[i + 2] = as_int(load(row + 2 * stride)), v[i + 3] = as_int(load(row + 3 * stride));
          }
          transpose(v);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r] = fma(splat(q[r * D + d + i]), as_float(v[i]), acc[r]);
        } else {
          for (int i = 0; i < W; ++i) v[i] = as_int(load_n(k + i * stride + d, (int)(end - d)));
          transpose(v);
          for (int64_t i = 0; i < end - d; ++i)
            for (int r = 0; r < R; ++r) acc[r] = fma(splat(q[r * D + d + i]), as_float(v[i]), acc[r]);
        }
      }
      for (int r = 0; r < R; ++r) store(s + r * kLd, first > 0 ? load(s + r * kLd) + acc[r] : acc[r]);
    }
  }

  template <int R>
  static void values_of(const St* v, int64_t stride, int64_t Dv, const float* p, float* part, int64_t ldo, bool open,
                                           Ahead& next) {
    int64_t d = 0;
    for (; d + 4 * W <= Dv; d += 4 * W) {
      vf acc[R][4];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) acc[r][u] = open ? zero() : load(part + r * ldo + d + u * W);
      for (int64_t key = 0; key < kLine; ++key) {
        if (key & 1) next.step<2>();
        vf x[4];
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) x[u] = load(v + key * stride + d + u * W);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const vf weight = splat(p[r * kLd + key]);
#pragma GCC unroll 4
          for (int u = 0; u < 4; ++u) acc[r][u] = fma(weight, x[u], acc[r][u]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) store(part + r * ldo + d + u * W, acc[r][u]);
    }
    for (; d < Dv; d += W) {
      vf acc[R];
      for (int r = 0; r < R; ++r) acc[r] = open ? zero() : load(part + r * ldo + d);
      for (int64_t key = 0; key < kLine; ++key) {
        const vf x = load_n(v + key * stride + d, (int)least(W, Dv - d));
        for (int r = 0; r < R; ++r) acc[r] = fma(splat(p[r * kLd + key]), x, acc[r]);
      }
      for (int r = 0; r < R; ++r) store(part + r * ldo + d, acc[r]);
    }
  }
};

// ------------------------------------------------------------------------------------------------ bf16

#if defined(__AVX512BF16__)
template <> struct Stream<bf16, bf16> {
  using Mm = Gemm<bf16>;
  static constexpr int64_t kTile = Mm::kTile;
  // A tile row is 32 values of a key: with any other width it would read past the row.
  static bool takes(int64_t D) { return D % 32 == 0; }
  static int64_t q_size(int64_t rows, int64_t D) { return rows * D; }
  static int64_t probs_size() { return Mm::MR * kSplit; }
  static int64_t o_size(int64_t rows, int64_t ldo) { return rows * ldo; }
  static int64_t buffer_size(int64_t ldo) { return (kLine * ldo + 4 * kTile) / 2; }  // V of a chunk interleaved, a block of S^T

#if !defined(__AMX_BF16__)
  struct Setup {
    explicit Setup(int64_t) {}
  };
#else
  // Tiles as large as the rows need while it lives: a product takes as many steps as its left operand has rows, and what
  // each head keeps stays in L1. 0, 1: S^T; 2: Q^T; 3: P; 4, 5: K, or V interleaved; 6, 7: P V.
  struct Setup {
    explicit Setup(int64_t rows) {
      const uint8_t n = (uint8_t)rows, wide = (uint8_t)(4 * rows);
      const uint8_t bytes[8] = {wide, wide, wide, 64, 64, 64, 64, 64}, tall[8] = {16, 16, 16, n, 16, 16, n, n};
      configure_tiles(bytes, tall);
    }
    ~Setup() {
      const uint8_t all[8] = {64, 64, 64, 64, 64, 64, 64, 64}, tall[8] = {16, 16, 16, 16, 16, 16, 16, 16};
      configure_tiles(all, tall);
    }
  };
#endif

  // [D / 32][16 pairs of d][rows][2]
  static void pack_q(const bf16* q_rows, int64_t rows, int64_t D, bf16* q) {
    for (int64_t d = 0; d < D; d += 2)
      for (int64_t r = 0; r < rows; ++r, q += 2) memcpy((void*)q, q_rows + r * D + d, 4);
  }

#if !defined(__AMX_BF16__)
  static void scores(const bf16* k, int64_t stride, int64_t D, const bf16* q, int64_t rows, float* s, Ahead& next) {
    for (int64_t t = 0; t < 2; ++t, k += 16 * stride, s += 16)
      by_groups<8>(rows, [&]<int R>(int64_t r) { scores_of<R>(k, stride, D, q + 2 * r, rows, s + r * kLd, next); });
  }
  static void values(const bf16* v, int64_t stride, int64_t Dv, const float*, const bf16* probs, int64_t rows, int64_t at, int64_t first,
                     int64_t, float* o, int64_t ldo, float*, Ahead& next) {
    by_groups<8>(rows, [&]<int R>(int64_t r) { values_of<R>(v, stride, Dv, probs + (at + r) * 32, at > first, o + r * ldo, ldo, next); });
  }
#else
  static void scores(const bf16* k, int64_t stride, int64_t D, const bf16* q, int64_t rows, float* s, Ahead& next) {
    alignas(64) float block[2][16][16];  // S^T, keys down
    tile_fence();
    tile_zero<0>();
    tile_zero<1>();
    for (int64_t d = 0; d < D; d += 32, q += 32 * rows) {
      tile_load<4>(k + d, stride * 2);
      next.step<4>();
      tile_load<5>(k + 16 * stride + d, stride * 2);
      next.step<4>();
      tile_load<2>(q, rows * 4);
      tile_dot<0, 4, 2>();
      tile_dot<1, 5, 2>();
    }
    tile_store<0>(block[0], 64);
    tile_store<1>(block[1], 64);
    for (int64_t r = 0; r < rows; r += 4)
      for (int t = 0; t < 2; ++t) columns(block[t][0] + r, (int)least(4, rows - r), s + r * kLd + t * 16);
  }

  static void values(const bf16* v, int64_t stride, int64_t Dv, const float*, const bf16* probs, int64_t rows, int64_t at, int64_t first,
                     int64_t, float* o, int64_t ldo, float* buffer, Ahead& next) {
    bf16* b = (bf16*)buffer;  // [Dv / 32][2 tiles][16 pairs of keys][16 columns][2], columns in the order of `unpack`
    for (int64_t d = 0; d < Dv; d += 32) {
      const __mmask32 in = Dv - d >= 32 ? ~0u : (1u << (Dv - d)) - 1;
      for (int64_t pair = 0; pair < 16; pair += 4) {
        next.step<1>();
#pragma GCC unroll 4
        for (int64_t i = pair; i < pair + 4; ++i) {
          const bf16* row = v + 2 * i * stride + d;
          const bool whole = Dv - d >= 32;
          const __m512i even = whole ? _mm512_loadu_si512(row) : _mm512_maskz_loadu_epi16(in, row);
          const __m512i odd = whole ? _mm512_loadu_si512(row + stride) : _mm512_maskz_loadu_epi16(in, row + stride);
          _mm512_storeu_si512(b + d * 32 + i * 32, _mm512_unpacklo_epi16(even, odd));
          _mm512_storeu_si512(b + d * 32 + kTile + i * 32, _mm512_unpackhi_epi16(even, odd));
        }
      }
    }
    tile_fence();
    tile_load<3>(probs + at * Mm::MR, 64);
    for (int64_t d = 0; d < Dv; d += 32, b += 2 * kTile) {
      if (at == first) {
        tile_zero<6>();
        tile_zero<7>();
      } else {
        tile_load<6>(o + d, ldo * 4);
        tile_load<7>(o + d + 16, ldo * 4);
      }
      next.step<2>();
      tile_load<4>(b, 64);
      next.step<2>();
      tile_load<5>(b + kTile, 64);
      tile_dot<6, 3, 4>();
      tile_dot<7, 3, 5>();
      tile_store<6>(o + d, ldo * 4);
      tile_store<7>(o + d + 16, ldo * 4);
    }
  }
#endif

  static void finish(float* o, int64_t rows, int64_t ldo) {
    for (int64_t r = 0; r < rows; ++r) unpacked_columns(o + r * ldo, ldo);
  }

 private:
#if !defined(__AMX_BF16__)
  // 16 keys, one a lane
  template <int R>
  static void scores_of(const bf16* k, int64_t stride, int64_t D, const bf16* q, int64_t rows, float* s, Ahead& next) {
    for (int64_t first = 0; first < D; first += Mm::KB) {
      __m512 sum[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] = _mm512_setzero_ps();
      for (int64_t d = first; d < least(D, first + Mm::KB); d += 32, q += 32 * rows) {
        next.step<4>();
        vi v[16];
        const bf16* row = k + d;
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4, row += 4 * stride)
#pragma GCC unroll 4
          for (int u = 0; u < 4; ++u) memcpy(&v[i + u], row + u * stride, 64);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)v[i], dot_pair(q + 2 * (i * rows + r)));
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float* to = s + r * kLd;
        _mm512_storeu_ps(to, first ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r]) : sum[r]);
      }
    }
  }
  template <int R>
  static void values_of(const bf16* v, int64_t stride, int64_t Dv, const bf16* probs, bool add, float* o, int64_t ldo, Ahead& next) {
    for (int64_t d = 0; d < Dv; d += 32) {
      const __mmask32 in = Dv - d >= 32 ? ~0u : (1u << (Dv - d)) - 1;
      __m512 sum[R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) sum[r][h] = add ? _mm512_loadu_ps(o + r * ldo + d + 16 * h) : _mm512_setzero_ps();
      const bf16* row = v + d;
      for (int i = 0; i < 16; ++i, row += 2 * stride) {
        if (i % 4 == 0) next.step<2>();
        const __m512i even = _mm512_maskz_loadu_epi16(in, row), odd = _mm512_maskz_loadu_epi16(in, row + stride);
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd), high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m512bh p = dot_pair(probs + r * 32 + 2 * i);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], p, low), sum[r][1] = _mm512_dpbf16_ps(sum[r][1], p, high);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) _mm512_storeu_ps(o + r * ldo + d + 16 * h, sum[r][h]);
    }
  }
#else
  // The first `count` <= 4 columns of a [16][16] block, each to a row of scores.
  static void columns(const float* block, int count, float* s) {
    __m512 x[4];  // rows i, i + 4, i + 8, i + 12
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_castps128_ps512(_mm_load_ps(block + i * 16));
      x[i] = _mm512_insertf32x4(x[i], _mm_load_ps(block + (i + 4) * 16), 1);
      x[i] = _mm512_insertf32x4(x[i], _mm_load_ps(block + (i + 8) * 16), 2);
      x[i] = _mm512_insertf32x4(x[i], _mm_load_ps(block + (i + 12) * 16), 3);
    }
    const __m512d a = (__m512d)_mm512_unpacklo_ps(x[0], x[1]), b = (__m512d)_mm512_unpackhi_ps(x[0], x[1]);
    const __m512d c = (__m512d)_mm512_unpacklo_ps(x[2], x[3]), d = (__m512d)_mm512_unpackhi_ps(x[2], x[3]);
    _mm512_storeu_pd(s, _mm512_unpacklo_pd(a, c));
    if (count > 1) _mm512_storeu_pd(s + kLd, _mm512_unpackhi_pd(a, c));
    if (count > 2) _mm512_storeu_pd(s + 2 * kLd, _mm512_unpacklo_pd(b, d));
    if (count > 3) _mm512_storeu_pd(s + 3 * kLd, _mm512_unpackhi_pd(b, d));
  }
#endif
};
#endif

}  // namespace tk::TK_ISA
