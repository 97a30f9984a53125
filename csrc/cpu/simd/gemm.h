// Packed matrix product, the micro-kernel everything else stands on: C[M, N] (+)= A[M, K] · B[N, K]ᵀ, C in float.
//
//   using G = Gemm<T>;                 T is the compute type: float anywhere, bf16 on the AMX level only.
//   using T = Compute<S>;              the compute type for storage type S: bf16 stays bf16 under AMX, all else is float
//   G::MR, G::NR, G::KU                rows of an A panel, columns of a B panel, granularity of K:
//                                        float  12 x 32 x 1 (AVX-512), 6 x 16 x 1 (AVX2), 6 x 8 x 1 (baseline)
//                                        bf16   32 x 32 x 32 (four accumulator tiles)
//   G::size_a(M, K), G::size_b(N, K)   elements of T a packed operand takes; panel p starts at p * MR * padded_k(K)
//                                      (p * NR * padded_k(K)), so panels may be packed and used one by one
//   G::pack_a  (src, stride, M, K, dst)   src[m * stride + k]   (rows contiguous in k: x, queries)
//   G::pack_a_t(src, stride, M, K, dst)   src[k * stride + m]   (contiguous in m: a transposed left operand)
//   G::pack_b  (src, stride, N, K, dst)   src[n * stride + k]   (weights [V, D], keys [T, D])
//   G::pack_b_t(src, stride, N, K, dst)   src[k * stride + n]   (values [T, D], the right operand of dW)
//                                      src is float, bf16 or f16 and is converted to T; pads with zeros
//   G::gemm(M, N, K, A, B, C, ldc, accumulate)   accumulate: C += A·Bᵀ, else C = A·Bᵀ (C is then never read)
//   G::gemm_panels(M, N, K, A, a_panel, B, b_panel, C, ldc, accumulate)
//                                      the same on panels that lie a_panel and b_panel elements apart: a range of k of longer
//                                      panels (start at A + k * MR, B + k * NR). Float also takes an A that is not packed:
//                                      gemm_panels<RS, CS> reads element (m, k) of a panel at m * RS + k * CS (RS = 0: rows
//                                      a_panel / MR apart; gemm_rows is this for a whole matrix), and gemm_panels<RS, CS, -1>
//                                      element (n, k) of B's at n - k * NR: with a negative CS, a sum from the last k down
//   G::KB                              the summation block, below
//
// All pointers may be unaligned, but packed operands on 64 bytes are faster. On the AMX level a thread calls gemm
// inside a TileRegion (parallel_for opens one). Nothing here allocates or starts threads.
//
// Order of summation, the contract: an element of C is the sum over k in one fixed order that depends on K alone,
// whatever M, N, the element's place in a tile or the caller's split into panels.
//   float: one chain of FMAs within each block of KB = 128 values of k counted from 0, block sums added in order
//          (to the old C first when accumulating). Splitting K into calls is the same sum if the cuts are multiples of KB.
//   bf16:  subnormals are zero. On AMX one chain over pairs of k (TDPBF16PS), continued from the old C when accumulating. Splitting
//          K into calls is the same sum if the cuts are multiples of 32. Elsewhere as float, each link of a chain a pair of k
//          (VDPBF16PS), unless kOneChain asks for AMX's order.
// What pads M and N never mixes with real rows and columns, so a NaN stays in its row.
#pragma once

#include "dots.h"

namespace tk::TK_ISA {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T> struct Gemm;

// ------------------------------------------------------------------------------------------------ float

template <> struct Gemm<float> {
  using Type = float;
  static constexpr int MR = W == 16 ? 12 : 6, NR = 2 * W, KU = 1, KB = 128;

  static int64_t padded_k(int64_t K) { return K; }
  static int64_t size_a(int64_t M, int64_t K) { return round_up(M, MR) * K; }
  static int64_t size_b(int64_t N, int64_t K) { return round_up(N, NR) * K; }

  template <class S> static void pack_a(const S* src, int64_t stride, int64_t M, int64_t K, float* dst) {
    pack_rows<MR>(src, stride, M, K, dst);
  }
  template <class S> static void pack_b(const S* src, int64_t stride, int64_t N, int64_t K, float* dst) {
    pack_rows<NR>(src, stride, N, K, dst);
  }
  template <class S> static void pack_a_t(const S* src, int64_t stride, int64_t M, int64_t K, float* dst) {
    pack_columns<MR>(src, stride, M, K, dst);
  }
  template <class S> static void pack_b_t(const S* src, int64_t stride, int64_t N, int64_t K, float* dst) {
    pack_columns<NR>(src, stride, N, K, dst);
  }

  static void gemm(int64_t M, int64_t N, int64_t K, const float* A, const float* B, float* C, int64_t ldc,
                   bool accumulate) {
    gemm_panels(M, N, K, A, MR * K, B, NR * K, C, ldc, accumulate);
  }
  // A unpacked: element (m, k) at A[m * a_stride + k].
  static void gemm_rows(int64_t M, int64_t N, int64_t K, const float* A, int64_t a_stride, const float* B, float* C,
                        int64_t ldc, bool accumulate) {
    gemm_panels<0, 1>(M, N, K, A, MR * a_stride, B, NR * K, C, ldc, accumulate);
  }
  template <int64_t RS = 1, int64_t CS = MR, int64_t BS = 1>
  static void gemm_panels(int64_t M, int64_t N, int64_t K, const float* A, int64_t a_panel, const float* B,
                          int64_t b_panel, float* C, int64_t ldc, bool accumulate) {
    if (K == 0 && !accumulate) {
      for (int64_t m = 0; m < M; ++m) memset(C + m * ldc, 0, N * sizeof(float));
      return;
    }
    for (int64_t k = 0; k < K; k += KB) {
      const int64_t kn = least(KB, K - k);
      const bool add = accumulate || k > 0;
      // A block of a B panel (16 KiB) stays in L1 while the A panels stream past it; the next block of B is fetched into
      // L2 meanwhile, a share with each tile.
      const int64_t lines = M > 4 * MR ? kn * NR / 16 * MR / M + 1 : 0;
      for (int64_t n = 0; n < N; n += NR) {
        const float* b = B + n / NR * b_panel + k * BS * NR;
        const float* next = (n + NR < N ? b + b_panel : B + (k + KB) * BS * NR) - (BS < 0 ? kn - 1 : 0) * NR;
        const int cols = (int)least(NR, N - n);
        for (int64_t m = 0; m < M; m += MR, next += lines * 16) {
          for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(next + i * 16, 0, 2);
          tile_of<MR, RS, CS, BS>((int)least(MR, M - m), kn, A + m / MR * a_panel + k * CS, a_panel / MR, b, C + m * ldc + n, ldc,
                              cols, add, n == 0 ? a_panel : 0);
        }
      }
    }
  }

 private:
  // dst[panel][k][P] from rows contiguous in k, W x W blocks at a time.
  template <int P, class S> static void pack_rows(const S* src, int64_t stride, int64_t rows, int64_t K, float* dst) {
    for (int64_t r = 0; r < rows; r += P, dst += P * K) {
      const int64_t left = least(P, rows - r);
      for (int64_t k = 0; k < K; k += W) strips<P, 0>(src + r * stride + k, stride, left, (int)least(W, K - k), dst + k * P);
    }
  }
  template <int P, int R, class S> static void strips(const S* src, int64_t stride, int64_t rows, int kn, float* dst) {
    constexpr int lanes = P - R < W ? P - R : W;
    vi v[W];
    if (rows >= lanes && kn == W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = i < lanes ? as_int(load(src + i * stride)) : vi{};
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) memcpy(dst + i * P, &v[i], lanes * 4);
    } else {
      for (int i = 0; i < W; ++i) v[i] = i < rows && i < lanes ? as_int(load_n(src + i * stride, kn)) : vi{};
      transpose(v);
      for (int i = 0; i < kn; ++i) memcpy(dst + i * P, &v[i], lanes * 4);
    }
    if constexpr (R + W < P) strips<P, R + W>(src + W * stride, stride, rows - W, kn, dst + W);
  }

  // dst[panel][k][P] from columns: row k of a panel is P neighbours in memory.
  template <int P, class S> static void pack_columns(const S* src, int64_t stride, int64_t cols, int64_t K, float* dst) {
    for (int64_t k = 0; k < K; ++k, src += stride)  // a whole row at a time: the source comes from far away
      for (int64_t c = 0; c < cols; c += P) {
        const int left = (int)least(P + W, cols - c);  // a strip's last vector may read into the next panel's columns
        float* to = dst + c * K + k * P;
        for (int i = 0; i < P; i += W) {
          const vf x = left - i >= W ? load(src + c + i) : load_n(src + c + i, left - i);
          memcpy(to + i, &x, (P - i < W ? P - i : W) * 4);
        }
      }
  }

  // R x NR of C from one panel of each; 2R accumulators, all in registers.
  template <int R, int64_t RS, int64_t CS, int64_t BS>
  static void tile(int64_t K, const float* a, int64_t stride, const float* b, float* c, int64_t ldc, int cols, bool add,
                   int64_t ahead) {
    vf acc[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
    const int64_t step = RS ? RS : stride;
    const float* row[(R + 2) / 3];  // every third row: the two after it are within reach of an address
#pragma GCC unroll 16
    for (int r = 0; r < R; r += 3) row[r / 3] = a + r * step;
#pragma GCC unroll 4
    for (int64_t k = 0; k < K; ++k, b += BS * NR) {
      if constexpr (R == MR && RS == 1) __builtin_prefetch(row[0] + ahead, 0, 2);  // the next panel of A, into L2
      const vf b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf x = splat(row[r / 3][r % 3 * step]);
        acc[r][0] = fma(x, b0, acc[r][0]);
        acc[r][1] = fma(x, b1, acc[r][1]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r += 3) row[r / 3] += CS;
    }
    if (cols == NR) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        float* row = c + r * ldc;
        store(row, add ? load(row) + acc[r][0] : acc[r][0]);
        store(row + W, add ? load(row + W) + acc[r][1] : acc[r][1]);
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) {
          const int n = cols - h * W;
          if (n <= 0) break;
          float* row = c + r * ldc + h * W;
          store_n(row, add ? load_n(row, n) + acc[r][h] : acc[r][h], n);
        }
    }
  }
  template <int R, int64_t RS, int64_t CS, int64_t BS>
  static void tile_of(int rows, int64_t K, const float* a, int64_t stride, const float* b, float* c, int64_t ldc, int cols,
                      bool add, int64_t ahead) {
    if (rows == R) return tile<R, RS, CS, BS>(K, a, stride, b, c, ldc, cols, add, ahead);
    if constexpr (R > 1) tile_of<R - 1, RS, CS, BS>(rows, K, a, stride, b, c, ldc, cols, add, ahead);
  }
};

// ------------------------------------------------------------------------------------------------ bf16

#if defined(__AVX512BF16__)

template <> struct Gemm<bf16> {
  using Type = bf16;
  static constexpr int MR = 32, NR = 32, KU = 32;
#if defined(__AMX_BF16__)
  static constexpr int KB = 512;
  // K is cut into blocks of about KB, whose A panel (32 KiB) stays in L1 while B streams past it from L2: a step of four tile
  // products takes 64 cycles and two lines a tile row, 96 where both come from L2. A cut costs a pass over C through L2.
  static constexpr int64_t kDeepest = 576;
#else
  static constexpr int KB = 128;  // of such blocks both operands' panels stay in L1
  static constexpr int64_t kDeepest = 256;  // the same where sums are one chain
#endif
  static constexpr int kFar = 16;                            // rows
  static constexpr int kTile = 512;                          // elements of one tile, 1 KiB

  static int64_t padded_k(int64_t K) { return round_up(K, KU); }
  static int64_t size_a(int64_t M, int64_t K) { return round_up(M, MR) * padded_k(K); }
  static int64_t size_b(int64_t N, int64_t K) { return round_up(N, NR) * padded_k(K); }
  template <bool kOneChain = true> static int64_t depth_of(int64_t N, int64_t K) {  // of a block of K
#if !defined(__AMX_BF16__)
    if (!kOneChain) return least(KB, padded_k(K));
#endif
    const int64_t Kp = padded_k(K), blocks = N > NR ? (Kp + kDeepest - 1) / kDeepest : 1;
    return blocks > 1 ? round_up((Kp + blocks - 1) / blocks, KU) : Kp;
  }

  // A panel: [k / 32][2 tiles][16 rows][32 k]
  template <class S> static void pack_a(const S* src, int64_t stride, int64_t M, int64_t K, bf16* dst) {
    for (int64_t m = 0; m < round_up(M, MR); m += MR)
      for (int64_t k = 0; k < K; k += KU)
        for (int r = 0; r < MR; ++r, dst += 32)
          _mm512_storeu_si512(dst, m + r < M ? load32(src + (m + r) * stride + k, least(32, K - k)) : _mm512_setzero_si512());
  }
  template <class S> static void pack_a_t(const S* src, int64_t stride, int64_t M, int64_t K, bf16* dst) {
    for (int64_t m = 0; m < round_up(M, MR); m += MR)
      for (int64_t k = 0; k < K; k += KU)
        for (int t = 0; t < MR; t += 16, dst += kTile) {
          vi v[16];
          for (int i = 0; i < 16; ++i) v[i] = pairs(src, stride, k + 2 * i, K, m + t, M);
          transpose(v);
          for (int i = 0; i < 16; ++i) memcpy(dst + 32 * i, &v[i], 64);
        }
  }
  // Columns k to k + 31 of one row of an A panel lie at panel + k * MR + row % MR * 32.
  static void store_a(bf16* to, vf low, vf high) { _mm512_storeu_si512(to, round_pair(low, high)); }
  // 32 x 32 of a panel of A the other way round, as a panel of its transpose holds them.
  static void transpose_a(const bf16* src, bf16* dst) {
    vi low[16], high[16];  // pairs of rows, each of 16 columns: unpack takes four of every eight
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const __m512i even = load32(src + 64 * i), odd = load32(src + 64 * i + 32);
      low[i] = (vi)_mm512_unpacklo_epi16(even, odd), high[i] = (vi)_mm512_unpackhi_epi16(even, odd);
    }
    transpose(low);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) memcpy((void*)(dst + 32 * (i / 4 * 8 + i % 4)), &low[i], 64);
    transpose(high);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) memcpy((void*)(dst + 32 * (i / 4 * 8 + i % 4 + 4)), &high[i], 64);
  }
  // B panel: [k / 32][2 tiles][16 pairs of k][16 columns][2]
  template <class S> static void pack_b(const S* src, int64_t stride, int64_t N, int64_t K, bf16* dst) {
    for (int64_t n = 0; n < round_up(N, NR); n += NR)
      for (int64_t k = 0; k < K; k += KU)
        for (int t = 0; t < NR; t += 16, dst += kTile) {
          vi v[16];
          if (n + t + 16 <= N && k + 32 <= K) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) v[i] = (vi)load32(src + (n + t + i) * stride + k);
          } else {
            for (int i = 0; i < 16; ++i)
              v[i] = n + t + i < N ? (vi)load32(src + (n + t + i) * stride + k, least(32, K - k)) : vi{};
          }
          transpose(v);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) memcpy(dst + 32 * i, &v[i], 64);
        }
  }
  template <class S> static void pack_b_t(const S* src, int64_t stride, int64_t N, int64_t K, bf16* dst) {
    const int64_t Kp = padded_k(K);
    for (int64_t k = 0; k < Kp; k += 2)  // whole rows at a time, the next ones fetched meanwhile: they come from far away
      for (int64_t n = 0; n < round_up(N, NR); n += 16) {
        if (n % 32 == 0 && k + kFar + 1 < K && n < N) {
          __builtin_prefetch(src + (k + kFar) * stride + n, 0, 2);
          __builtin_prefetch(src + (k + kFar + 1) * stride + n, 0, 2);
        }
        const vi v = pairs(src, stride, k, K, n, N);
        memcpy(dst + n / NR * (NR * Kp) + k / KU * (2 * kTile) + n % NR / 16 * kTile + k % KU * 16, &v, 64);
      }
  }

  static void gemm(int64_t M, int64_t N, int64_t K, const bf16* A, const bf16* B, float* C, int64_t ldc,
                   bool accumulate) {
    gemm_panels(M, N, K, A, MR * padded_k(K), B, NR * padded_k(K), C, ldc, accumulate);
  }
  template <bool kOneChain = false>
  static void gemm_panels(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t a_panel, const bf16* B,
                          int64_t b_panel, float* C, int64_t ldc, bool accumulate) {
    if (K == 0 && !accumulate) {
      for (int64_t m = 0; m < M; ++m) memset(C + m * ldc, 0, N * sizeof(float));
      return;
    }
    const int64_t Kp = padded_k(K), block = depth_of<kOneChain>(N, K);
    const bool stream = N > NR && N * block > (1 << 13);  // what fits L1 beside A may stay there
    for (int64_t k = 0; k < Kp; k += block) {
      const int64_t steps = least(block, Kp - k) / KU;
      const bool add = accumulate || k > 0;
      for (int64_t m = 0; m < M; m += MR) {
        const bf16* a = A + m / MR * a_panel + k * MR;
        const int rows = (int)least(MR, M - m);
        // The next A panel is fetched into L2 meanwhile, a few lines a step: it comes from far away, and the hardware's
        // prefetcher alone does not keep up.
        const int64_t panels = (N + NR - 1) / NR;
        const int per_step = (int)((32 + panels - 1) / panels);
        const int64_t share = per_step * steps * 32;
        const bf16* ahead = m + MR < M ? a + a_panel : A + (k + block) * MR;
        for (int64_t n = 0; n < N; n += NR) {
          const bf16* b = B + n / NR * b_panel + k * NR;
          const int cols = (int)least(NR, N - n);
          float* c = C + m * ldc + n;
          if (rows == MR && cols == NR) {
            const float* below = accumulate && k == 0 && steps >= 16 && m + 2 * MR <= M ? c + MR * ldc : nullptr;
            if (stream) tiles_2x2<true, kOneChain>(steps, a, b, c, ldc, add, ahead + n / NR * share, per_step, below);
            else tiles_2x2<false, kOneChain>(steps, a, b, c, ldc, add, ahead + n / NR * share, per_step, below);
          } else {
            alignas(64) float edge[MR * NR];
            if (add) copy(rows, cols, c, ldc, edge, NR);
            if (rows > 16) tiles_2x2<false, kOneChain>(steps, a, b, edge, NR, add, ahead + n / NR * share, per_step, nullptr);
            else tiles_1x2<kOneChain>(steps, rows, a, b, edge, NR, add);
            copy(rows, cols, edge, NR, c, ldc);
          }
        }
      }
    }
  }

 private:
  static __m512i load32(const bf16* p) { return _mm512_loadu_si512(p); }
  static __m512i load32(const bf16* p, int64_t n) {
    return n >= 32 ? load32(p) : _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
  }
  template <class S> static __m512i load32(const S* p) { return round_pair(load(p), load(p + 16)); }
  template <class S> static __m512i load32(const S* p, int64_t n) {
    return n >= 32 ? load32(p) : round_pair(load_n(p, (int)n), n > 16 ? load_n(p + 16, (int)n - 16) : zero());
  }
  static __m512i round_pair(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

  static __m256i load16(const bf16* p, int64_t n) {
    return n >= 16 ? _mm256_loadu_si256((const __m256i*)p) : n <= 0 ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
  }
  template <class S> static __m256i load16(const S* p, int64_t n) {
    return n <= 0 ? _mm256_setzero_si256() : (__m256i)_mm512_cvtneps_pbh((__m512)load_n(p, (int)least(16, n)));
  }
  // 16 neighbours c of rows k and k + 1, interleaved: lane = (src[k][c], src[k + 1][c]).
  template <class S> static vi pairs(const S* src, int64_t stride, int64_t k, int64_t K, int64_t c, int64_t C) {
    const __m256i even = load16(src + k * stride + c, k < K ? C - c : 0);
    const __m256i odd = load16(src + (k + 1) * stride + c, k + 1 < K ? C - c : 0);
    return (vi)_mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }

  static void copy(int rows, int cols, const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; c += W) store_n(dst + r * dst_stride + c, load_n(src + r * src_stride + c, cols - c), cols - c);
  }

#if defined(__AMX_BF16__)
  // below: the tile of C behind this one, fetched into L2 meanwhile where it is not null.
  template <bool kStream, bool kOneChain>
  static void tiles_2x2(int64_t steps, const bf16* a, const bf16* b, float* c, int64_t ldc, bool add, const bf16* ahead,
                        int per_step, const float* below) {
    tile_fence();
    const float* last = below ? below + MR * ldc : nullptr;
    const int64_t bytes = ldc * 4;
    float* half = c + 16 * ldc;
    if (add) {
      tile_load<0>(c, bytes);
      tile_load<1>(c + 16, bytes);
      tile_load<2>(half, bytes);
      tile_load<3>(half + 16, bytes);
    } else {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    for (; steps; --steps, a += 2 * kTile, b += 2 * kTile) {
      for (int i = 0; i < per_step; ++i, ahead += 32) _mm_prefetch((const char*)ahead, _MM_HINT_T1);
      for (int i = 0; i < 2 && below < last; ++i, below += ldc) {
        _mm_prefetch((const char*)below, _MM_HINT_T1);
        _mm_prefetch((const char*)(below + 16), _MM_HINT_T1);
      }
      tile_load<4>(a, 64);
      if (kStream) tile_stream_load<6>(b, 64);
      else tile_load<6>(b, 64);
      tile_load<5>(a + kTile, 64);
      if (kStream) tile_stream_load<7>(b + kTile, 64);
      else tile_load<7>(b + kTile, 64);
      tile_dot<0, 4, 6>();
      tile_dot<2, 5, 6>();
      tile_dot<1, 4, 7>();
      tile_dot<3, 5, 7>();
    }
    tile_store<0>(c, bytes);
    tile_store<1>(c + 16, bytes);
    tile_store<2>(half, bytes);
    tile_store<3>(half + 16, bytes);
  }
  template <bool kOneChain>
  static void tiles_1x2(int64_t steps, int, const bf16* a, const bf16* b, float* c, int64_t ldc, bool add) {
    tile_fence();
    const int64_t bytes = ldc * 4;
    if (add) {
      tile_load<0>(c, bytes);
      tile_load<1>(c + 16, bytes);
    } else {
      tile_zero<0>();
      tile_zero<1>();
    }
    for (; steps; --steps, a += 2 * kTile, b += 2 * kTile) {
      tile_load<4>(a, 64);
      tile_load<6>(b, 64);
      tile_load<7>(b + kTile, 64);
      tile_dot<0, 4, 6>();
      tile_dot<1, 4, 7>();
    }
    tile_store<0>(c, bytes);
    tile_store<1>(c + 16, bytes);
  }
#else
  template <bool kOneChain> static Join join(bool add) { return !add ? Join::none : kOneChain ? Join::chain : Join::sum; }
  template <bool, bool kOneChain>
  static void tiles_2x2(int64_t steps, const bf16* a, const bf16* b, float* c, int64_t ldc, bool add, const bf16* ahead,
                        int per_step, const float*) {
    const int lines = (per_step + 2) / 3;  // 32 rows are three groups
    dot_block(32, steps, a, b, c, ldc, join<kOneChain>(add), [&] {
      for (int i = 0; i < lines; ++i, ahead += 32) _mm_prefetch((const char*)ahead, _MM_HINT_T1);
    });
  }
  template <bool kOneChain>
  static void tiles_1x2(int64_t steps, int rows, const bf16* a, const bf16* b, float* c, int64_t ldc, bool add) {
    dot_block(rows, steps, a, b, c, ldc, join<kOneChain>(add), [] {});
  }
#endif
};

template <class S> struct ComputeOf { using type = float; };
template <> struct ComputeOf<bf16> { using type = bf16; };

#else

template <class S> struct ComputeOf { using type = float; };

#endif

template <class S> using Compute = typename ComputeOf<S>::type;

}  // namespace tk::TK_ISA
