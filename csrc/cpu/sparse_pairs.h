// Gradients of keys that queries name: the sum over pairs of a query and a key, deterministic and without atomics.
//
// Every pair has one row of 2W values, and every query a matrix [2W, C]: their product is what the pair adds to its key's row of sums.
// Sums of kKeys keys x kColumns columns stay in L2 while the queries of a chunk pass by in ascending order; since a query's keys are
// sorted, its pairs among these keys are neighbours. So a key's sum runs over its queries in ascending order, whatever the chunks and the
// threads. Where 2W values are not all there is, a query has several such rows and matrices.
//
// C columns of sums
#pragma once

#include "attention_block.h"

namespace tk::TK_ISA {

inline constexpr int64_t kSumKeys = 1024, kSumColumns = 192;  // of sums in L2
inline constexpr int64_t kPairs = 64;                         // rows of a product

// n non-negative numbers in ascending order.
inline void sort_keys(int32_t* x, int32_t* other, int64_t n) {
  int32_t top = 0;
  for (int64_t i = 0; i < n; ++i) top |= x[i];
  for (int shift = 0; shift < 32 && top >> shift; shift += 8) {
    int64_t place[257] = {};
    for (int64_t i = 0; i < n; ++i) ++place[(x[i] >> shift & 255) + 1];
    for (int d = 0; d < 256; ++d) place[d + 1] += place[d];
    for (int64_t i = 0; i < n; ++i) other[place[x[i] >> shift & 255]++] = x[i];
    memcpy(x, other, n * sizeof(int32_t));
  }
}
// How many of n ascending numbers are below x.
inline int64_t below(const int32_t* list, int64_t n, int64_t x) {
  int64_t low = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    if (list[low + half] < x) low += half + 1, n -= half + 1;
    else n = half;
  }
  return low;
}

// Rows [a | b] of n pairs; a of 32 keys x W values as the left operand of a product over keys.
inline void put_pairs(const vf* a, const vf* b, int64_t n, float* pairs) {
  for (int64_t u = 0; u < n; ++u) store(pairs + u * 2 * W, a[u]), store(pairs + u * 2 * W + W, b[u]);
}
inline void put_left(const vf* a, float* to) {
  for (int64_t u = 0; u < kLine; ++u) store(to + u * W, a[u]);
}
// c [m, n] = a b^T of packed b; rows of a are 2W long. bf16 reads and writes whole 32 rows.
inline void pair_product(int64_t m, int64_t n, const float* a, const float* b, float* c, bool add) {
  Gemm<float>::gemm_rows(m, n, 2 * W, a, 2 * W, b, c, kSumColumns, add);
}
#if defined(__AVX512BF16__)
inline void put_pairs(const vf* a, const vf* b, int64_t n, bf16* pairs) {
  for (int64_t u = 0; u < n; ++u) store_pair(pairs + u * 2 * W, a[u], b[u]);
}
inline void put_left(const vf* a, bf16* to) {
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                         18, 2, 17, 1, 16, 0);
  vi v[16];
#pragma GCC unroll 16
  for (int u = 0; u < 16; ++u)
    v[u] = (vi)_mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh((__m512)a[2 * u + 1], (__m512)a[2 * u]));
  transpose(v);
#pragma GCC unroll 16
  for (int u = 0; u < 16; ++u) _mm512_storeu_si512(to + u * 32, (__m512i)v[u]);
}
inline void pair_product(int64_t m, int64_t n, const bf16* a, const bf16* b, float* c, bool add) {
  Gemm<bf16>::gemm(round_up(m, 32), n, 32, a, b, c, kSumColumns, add);
}
#endif

// The pairs of a chunk of queries.
template <class T> struct Pairs {
  int64_t list_size, parts, rows, C;  // parts: rows of a pair and matrices of a query; rows: that a query's pairs may take, and 32 more
  int32_t* lists;                     // [chunk, list_size] keys in ascending order
  int64_t* counts;                    // [chunk]
  T* pairs;                           // [chunk, parts, rows, 2W]
  T* across;                          // [chunk, parts] packed matrices, [C, 2W]

  T* row(int64_t query, int64_t part, int64_t k) const { return pairs + ((query * parts + part) * rows + k) * 2 * W; }
  T* matrix(int64_t query, int64_t part) const { return across + (query * parts + part) * C * 2 * W; }

  // What n queries add to the sums [keys, C] of keys [key, end), columns [column, column + columns). product: [kPairs, kSumColumns]
  void collect(int64_t n, int64_t key, int64_t end, int64_t column, int64_t columns, float* product, float* sums) const {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t* list = lists + i * list_size;
      const int64_t from = below(list, counts[i], key), to = from + below(list + from, counts[i] - from, end);
      for (int64_t k = from; k < to; k += kPairs) {
        const int64_t some = least(kPairs, to - k);
        for (int64_t h = 0; h < parts; ++h) pair_product(some, columns, row(i, h, k), matrix(i, h) + column * 2 * W, product, h > 0);
        for (int64_t j = 0; j < some; ++j) {
          float* sum = sums + list[k + j] * C + column;
          const float* add = product + j * kSumColumns;
          for (int64_t c = 0; c < columns; c += W) store(sum + c, load(sum + c) + load(add + c));
        }
      }
    }
  }
};

// Columns [from, from + columns) of a key's sums into `size` gradients that begin at column `first`.
template <class S> inline void put_sums(const float* sum, int64_t from, int64_t columns, S* row, int64_t first, int64_t size) {
  const int64_t begin = most(from, first), end = least(from + columns, first + size);
  for (int64_t c = begin; c < end; c += W) store_n(row + c - first, load_n(sum + c, (int)least(W, end - c)), (int)least(W, end - c));
}

}  // namespace tk::TK_ISA
