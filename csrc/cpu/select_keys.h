// Which of many scores are the k largest: sortable keys, the k-th largest of them, the positions of those that stay.
//
// A score's key is an unsigned integer in the order of the scores: NaN 0, below -inf; -0.0 like +0.0. Among equal keys the
// lower position wins, so a selection is the pair {key, equal}: all above `key`, and the first `equal` that have it.
#pragma once

#include "parallel.h"
#include "policy_ops.h"

namespace tk::TK_ISA {

inline vu score_key(vf x) {
  const vi i = as_int(x + zero());  // -0 + 0 is +0
  const vu key = (vu)(i ^ ((i >> 31) | (int32_t)0x80000000));
  return (vu)(x != x ? vi{} : (vi)key);
}

struct Selection {
  uint32_t key;   // the smallest one that stays
  int64_t equal;  // how many of those equal to it stay
  bool all;       // that is all of them
};

// The lanes named by `bits` side by side to `to`, where W may be written; -> how many.
inline int64_t put_lanes(uint32_t bits, vu x, uint32_t* to) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)bits, (__m512i)x));
  return __builtin_popcountll(bits);  // 64 bits: no widening in the chain from one address to the next
#else
  int64_t count = 0;
  for (; bits; bits &= bits - 1) to[count++] = x[__builtin_ctz(bits)];
  return count;
#endif
}

// The k-th largest of n keys, 1 <= k <= n. Overwrites keys [n + W]. Histograms of 256 bins over the range that the keys span, each of
// which leaves the keys of one bin.
inline Selection kth_key(uint32_t* keys, int64_t n, int64_t k) {
  constexpr int kWidth = 8;
  for (;;) {
    vu low = vu{} + ~0u, high{};
    const int64_t whole = n / W * W;
    for (int64_t i = 0; i < whole; i += W) {
      vu x;
      memcpy(&x, keys + i, sizeof x);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    uint32_t first = ~0u, last = 0;
    for (int u = 0; whole && u < W; ++u) first = low[u] < first ? low[u] : first, last = high[u] > last ? high[u] : last;
    for (int64_t i = whole; i < n; ++i) first = keys[i] < first ? keys[i] : first, last = keys[i] > last ? keys[i] : last;
    if (first == last) return {first, k, k == n};

    const int bits = 32 - __builtin_clz(last - first), shift = bits > kWidth ? bits - kWidth : 0;
    alignas(64) uint32_t counts[1 << kWidth] = {};
    for (int64_t i = 0; i < n; ++i) ++counts[(keys[i] - first) >> shift];
    uint32_t bin = (1 << kWidth) - 1;
    for (; counts[bin] < k; --bin) k -= counts[bin];
    int64_t kept = 0;
    for (int64_t i = 0; i < whole; i += W) {
      vu x;
      memcpy(&x, keys + i, sizeof x);
      kept += put_lanes(bits_of((vi)((x - first) >> shift == (vu{} + bin))), x, keys + kept);
    }
    for (int64_t i = whole; i < n; ++i)
      if ((keys[i] - first) >> shift == bin) keys[kept++] = keys[i];
    n = kept;
  }
}

}  // namespace tk::TK_ISA
