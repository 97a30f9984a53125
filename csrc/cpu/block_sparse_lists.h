// Which queries of a chunk named which block: what attention over chosen blocks is walked by, forward and backward.
//
// G query heads of a key head, U choosing heads of it, R = G / U rows of a choosing head; row r of a chunk is query r / G, head r % G.
#pragma once

#include "attention_block.h"
#include "block_sparse.h"

namespace tk::TK_ISA {

// A sequence, dense or packed.
struct BlockSequence {
  int64_t b, q, k, row;  // batch index; its first query and key in the tensors; its first query among all rows of lse and indices
  int64_t S, T;
  int64_t position(int64_t i) const { return i + T - S; }
};
inline BlockSequence block_sequence(const BlockSparseShape& p, int64_t b) {
  if (!p.cu_seqlens) return {b, 0, 0, b * p.q_len, p.q_len, p.k_len};
  const int64_t first = p.cu_seqlens[b], n = p.cu_seqlens[b + 1] - first;
  return {0, first, first, first, n, n};
}
inline int64_t count_blocks(const BlockSparseShape& p, const BlockSequence& x) { return (x.T + p.block - 1) / p.block; }
inline int64_t block_end(const BlockSparseShape& p, const BlockSequence& x, int64_t j) { return least(x.T, (j + 1) * p.block); }

// The (query, choosing head) pairs that named each block, ascending.
struct BlockLists {
  int32_t *begin, *pairs;  // [blocks + 1]; [queries U n] query U + head
  int64_t R;

  static int64_t size(int64_t blocks, int64_t pairs, int64_t slots) { return round_up(blocks + 2 + pairs * slots, 16); }

  // Queries [t0, t1) of key head g.
  static BlockLists make(const BlockSparseShape& p, const BlockSequence& x, int64_t g, int64_t t0, int64_t t1, int32_t* memory) {
    const int64_t U = p.choosing / p.kv_heads, blocks = count_blocks(p, x);
    const BlockLists out{memory, memory + blocks + 2, p.heads / p.choosing};
    int32_t* at = memory + 1;
    memset((void*)memory, 0, (blocks + 2) * sizeof(int32_t));
    const auto each = [&](const auto& body) {
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t seen = x.position(t) < 0 ? 0 : x.position(t) / p.block + 1;
        for (int64_t u = 0; u < U; ++u) {
          const int32_t* named = p.indices + ((x.row + t) * p.choosing + g * U + u) * p.slots;
          for (int64_t i = 0; i < p.slots; ++i)
            if (named[i] >= 0 && named[i] < seen) body(named[i], (t - t0) * U + u);
        }
      }
    };
    each([&](int64_t j, int64_t) { ++at[j + 1]; });
    for (int64_t j = 0; j < blocks; ++j) at[j + 1] += at[j];
    each([&](int64_t j, int64_t pair) { out.pairs[at[j]++] = (int32_t)pair; });  // at[j] runs on to where block j + 1 begins
    return out;                                                                  // so begin, one place before at, is right now
  }
  int64_t count(int64_t j) const { return (begin[j + 1] - begin[j]) * R; }  // rows
  // Rows [from, from + n) of block j.
  void take(int64_t j, int64_t from, int64_t n, int32_t* rows) const {
    int64_t i = begin[j] + from / R, r = from % R;
    for (int64_t k = 0; k < n; ++k) {
      rows[k] = (int32_t)(pairs[i] * R + r);
      if (++r == R) r = 0, ++i;
    }
  }
};

}  // namespace tk::TK_ISA
