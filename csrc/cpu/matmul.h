// Blocked matrix product from unpacked operands, on the packed micro-kernels: C[M, N] = A·Bᵀ (+ bias), any dtypes.
//
// Each operand is a matrix of rows r and summed positions k: `Rows{p, stride}` reads p[r * stride + k], `Columns{p, stride}`
// reads p[k * stride + r]. Work is cut into row chunks of A x column blocks of B; the cut never reaches the bits, which
// follow gemm.h's order along K alone. A is packed once per super-chunk of rows, B once per column block.
#pragma once

#include "parallel.h"
#include "simd/gemm.h"

namespace tk::TK_ISA {

template <class S> struct Rows {
  const S* p;
  int64_t stride;
  template <class G> void pack_a(int64_t r, int64_t rows, int64_t k, int64_t kn, typename G::Type* dst) const {
    G::pack_a(p + r * stride + k, stride, rows, kn, dst);
  }
  template <class G> void pack_b(int64_t r, int64_t rows, int64_t k, int64_t kn, typename G::Type* dst) const {
    G::pack_b(p + r * stride + k, stride, rows, kn, dst);
  }
};
template <class S> struct Columns {
  const S* p;
  int64_t stride;
  template <class G> void pack_a(int64_t r, int64_t rows, int64_t k, int64_t kn, typename G::Type* dst) const {
    G::pack_a_t(p + k * stride + r, stride, rows, kn, dst);
  }
  template <class G> void pack_b(int64_t r, int64_t rows, int64_t k, int64_t kn, typename G::Type* dst) const {
    G::pack_b_t(p + k * stride + r, stride, rows, kn, dst);
  }
  // Into L2, ahead of the packing: positions k to end of these rows.
  void prefetch(int64_t r, int64_t rows, int64_t k, int64_t end) const {
    for (; k < end; ++k)
      for (int64_t i = 0; i < rows; i += 64 / (int64_t)sizeof(S)) __builtin_prefetch(p + k * stride + r + i, 0, 2);
  }
};

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;

// Writes a block of sums to C with an optional bias, in C's dtype: one rounding.
template <class S>
inline void write_block(const float* sums, int64_t rows, int64_t cols, int64_t ld, const S* bias, S* c, int64_t c_stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < cols; j += W) {
      const int n = (int)least(W, cols - j);
      vf x = load_n(sums + r * ld + j, n);
      if (bias) x += load_n(bias + j, n);
      store_n(c + r * c_stride + j, x, n);
    }
}

// The sum over rows of n <= W neighbouring columns, in double: a chain of float additions loses digits.
template <class S> inline vf sum_rows(const S* p, int64_t stride, int64_t rows, int n) {
  typedef double vd __attribute__((vector_size(W * 8)));
  vd sum = {};
  for (int64_t r = 0; r < rows; ++r) sum += __builtin_convertvector(load_n(p + r * stride, n), vd);
  return __builtin_convertvector(sum, vf);
}

// C[M, N] with few columns and a short K: B packed whole stays in L2, A's rows are read where they lie, sums go straight to C.
template <class OperandB>
void matmul_rows(int threads, int64_t M, int64_t N, int64_t K, Rows<float> a, OperandB b, const float* bias, float* c,
                 int64_t c_stride) {
  using G = Gemm<float>;
  Scratch<float> packed(G::size_b(N, K));
  parallel_for(N * K < (1 << 16) ? 1 : threads, (N + G::NR - 1) / G::NR, [&](int64_t item, int) {
    b.template pack_b<G>(item * G::NR, least(G::NR, N - item * G::NR), 0, K, packed + item * G::NR * K);
  });
  const int64_t rows = least(192, round_up(M / (4 * threads) + 1, G::MR));
  parallel_for(threads, (M + rows - 1) / rows, [&](int64_t item, int) {
    const int64_t m = item * rows, mn = least(rows, M - m);
    float* y = c + m * c_stride;
    G::gemm_rows(mn, N, K, a.p + m * a.stride, a.stride, packed, y, c_stride, false);
    if (bias) write_block(y, mn, N, c_stride, bias, y, c_stride);
  });
}

// C[M, N] small, K long (a weight's gradient): every thread keeps its block of C in L2 and streams both operands along K.
template <class T, class S>
void matmul_long(int threads, int64_t M, int64_t N, int64_t K, Columns<S> a, Columns<S> b, S* c, int64_t c_stride) {
  using G = Gemm<T>;
  constexpr int64_t kSlab = sizeof(T) == 4 ? G::KB : 256;  // of K at a time
  int64_t rows = round_up(M, G::MR), cols = round_up(N, G::NR), row_blocks = 1, col_blocks = 1;
  while (row_blocks * col_blocks < threads && (rows > G::MR || cols > G::NR)) {
    if (cols <= G::NR || (rows >= cols && rows > G::MR)) rows = round_up(rows / 2, G::MR);
    else cols = round_up(cols / 2, G::NR);
    row_blocks = (M + rows - 1) / rows, col_blocks = (N + cols - 1) / cols;
  }
  constexpr bool direct = sizeof(S) == 4;  // float: C itself takes the sums
  const int64_t size_a = G::size_a(rows, kSlab), size_b = G::size_b(cols, kSlab);
  Scratch<T> packed(threads * (size_a + size_b));
  Scratch<float> sums(direct ? 0 : threads * rows * cols);
  parallel_for(threads, row_blocks * col_blocks, [&](int64_t item, int thread) {
    const int64_t m = item / col_blocks * rows, n = item % col_blocks * cols;
    const int64_t mn = least(rows, M - m), nn = least(cols, N - n), ld = direct ? c_stride : cols;
    T* pa = packed + thread * (size_a + size_b);
    float* sum = direct ? (float*)(c + m * c_stride + n) : sums + thread * rows * cols;
    for (int64_t k = 0; k < K; k += kSlab) {
      const int64_t kn = least(kSlab, K - k);
      a.template pack_a<G>(m, mn, k, kn, pa);
      b.template pack_b<G>(n, nn, k, kn, pa + size_a);
      // The next slab comes from far away: a share of it with each tile.
      const int64_t tiles = (mn + G::MR - 1) / G::MR * ((nn + G::NR - 1) / G::NR), share = (kSlab + tiles - 1) / tiles;
      int64_t ahead = k + kSlab;
      const int64_t ahead_end = least(K, k + 2 * kSlab), kp = G::padded_k(kn);
      for (int64_t j = 0; j < nn; j += G::NR)
        for (int64_t i = 0; i < mn; i += G::MR, ahead += share) {
          a.prefetch(m, mn, ahead, least(ahead_end, ahead + share));
          b.prefetch(n, nn, ahead, least(ahead_end, ahead + share));
          G::gemm(least(G::MR, mn - i), least(G::NR, nn - j), kn, pa + i * kp, pa + size_a + j * kp, sum + i * ld + j, ld, k > 0);
        }
    }
    if (!direct) write_block(sum, mn, nn, ld, (const S*)nullptr, c + m * c_stride + n, c_stride);
  });
}

template <class T, class OperandA, class OperandB, class S>
void matmul(int threads, int64_t M, int64_t N, int64_t K, OperandA a, OperandB b, const S* bias, S* c, int64_t c_stride) {
  using G = Gemm<T>;
  if (M == 0 || N == 0) return;
  if (M * N * K < (1 << 16)) threads = 1;           // too little to wake anybody
  if constexpr (same<OperandA, Rows<float>> && same<S, float>)
    if (K > 0 && K <= 512 && N * K <= (1 << 18)) return matmul_rows(threads, M, N, K, a, b, bias, c, c_stride);
  if constexpr (same<OperandA, Columns<S>> && same<OperandB, Columns<S>>)
    if (K >= 1024 && M * N <= (1 << 17) && !bias) return matmul_long<T>(threads, M, N, K, a, b, c, c_stride);
  constexpr int64_t kSlab = 512;                    // of K at a time: a multiple of every KB and KU
  // Columns a work item packs: as many as keep them in L2 beside a row chunk, fewer where threads would go hungry.
  const int64_t fit_cols = (1 << 20) / (int64_t)(sizeof(T) * (K > 0 ? K : 1)) / G::NR * G::NR;
  const int64_t share = round_up(N / (4 * threads) + 1, G::NR);
  const int64_t cols = least(share, fit_cols < 64 ? 64 : least(fit_cols, 256));
  constexpr int64_t kRows = 192;                    // rows of a chunk: a multiple of every MR
  constexpr int64_t kSuperBytes = 32 << 20;         // A packed at a time
  const int64_t fit = kSuperBytes / (int64_t)(sizeof(T) * (K > 0 ? K : 1)) / kRows * kRows;
  const int64_t super = least(round_up(M, G::MR), fit < kRows ? kRows : fit);
  const int64_t packs = (super + G::MR * 4 - 1) / (G::MR * 4);  // packing items of four panels
  const int64_t col_blocks = (N + cols - 1) / cols;

  Scratch<T> packed_a(G::size_a(super, round_up(K, G::KU)));
  const bool hold = M > kRows;                      // keep the column block packed for the next row chunk
  const int64_t size_b = G::size_b(cols, hold ? round_up(K, G::KU) : kSlab);
  Scratch<T> packed_b(threads * size_b);
  Scratch<float> sums(threads * kRows * cols);

  for (int64_t m0 = 0; m0 < M; m0 += super) {
    const int64_t mn = least(super, M - m0);
    // packed_a: [K / slab][rows / MR][slab][MR]: each slab is a packed operand of its own
    parallel_for(threads, packs, [&](int64_t item, int) {
      const int64_t r = item * G::MR * 4, rows = least(G::MR * 4, mn - r);
      for (int64_t k = 0; rows > 0 && k < K; k += kSlab) {
        const int64_t kn = least(kSlab, K - k);
        a.template pack_a<G>(m0 + r, rows, k, kn, packed_a + G::size_a(super, k) + r * G::padded_k(kn));
      }
    });
    // Column blocks alone feed the threads when there are enough of them: then B is packed once.
    const int64_t row_chunks = (mn + kRows - 1) / kRows;
    const int64_t wanted = col_blocks >= 4 * threads ? 1 : (4 * threads + col_blocks - 1) / col_blocks;
    const int64_t groups = least(row_chunks, wanted), group = (row_chunks + groups - 1) / groups * kRows;
    parallel_for(threads, col_blocks * groups, [&](int64_t item, int thread) {
      const int64_t n0 = item / groups * cols, nn = least(cols, N - n0);
      const int64_t begin = item % groups * group, end = least(mn, begin + group);
      float* sum = sums + thread * kRows * cols;
      for (int64_t r = begin; r < end; r += kRows) {
        const int64_t rows = least(kRows, end - r);
        if (K == 0) G::gemm(rows, nn, 0, packed_a, packed_b, sum, cols, false);
        for (int64_t k = 0; k < K; k += kSlab) {
          const int64_t kn = least(kSlab, K - k);
          T* pb = packed_b + thread * size_b + (hold ? G::size_b(cols, k) : 0);
          if (!hold || r == begin) b.template pack_b<G>(n0, nn, k, kn, pb);
          G::gemm(rows, nn, kn, packed_a + G::size_a(super, k) + r * G::padded_k(kn), pb, sum, cols, k > 0);
        }
        write_block(sum, rows, nn, cols, bias ? bias + n0 : nullptr, c + (m0 + r) * c_stride + n0, c_stride);
      }
    });
  }
}

}  // namespace tk::TK_ISA
