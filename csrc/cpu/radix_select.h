// Order statistics of many floats, by three rounds of histograms over a sortable key: 11, 11 and 10 bits.
// Counts are integers, so the result depends on no thread count. NaN sorts behind +inf.
#pragma once

#include "parallel.h"
#include "policy_ops.h"

namespace tk::TK_ISA {

// Floats in order as unsigned integers in order; -0 comes right before +0, which compare equal again as floats.
inline vu sort_key(vf x) {
  const vi i = as_int(x);
  const vu key = (vu)(i ^ ((i >> 31) | (int32_t)0x80000000));
  return (vu)(x != x ? (vi)(vu{} + 0xffffffffu) : (vi)key);
}
inline float float_of_key(uint32_t key) { return bits_to_float(key >> 31 ? key ^ 0x80000000u : ~key); }

// a, b: the first-th and the second-th smallest (from 0), second being first or first + 1. values(block, body) calls
// body(vf x, uint32_t bits) for every W values of a block, bits naming the lanes that count. With nothing to choose from
// both are +inf.
template <class Values>
void radix_select(int threads, int64_t blocks, int64_t group, int64_t first, int64_t second, float* a, float* b, const Values& values) {
  constexpr int kBins = 2048, kCopies = 4;  // copies: neighbours that hit one bin do not wait for one another
  Scratch<uint32_t> counts((int64_t)threads * kBins * kCopies);
  const int64_t items = (blocks + group - 1) / group;
  const auto over = [&](const auto& body) {
    parallel_for(threads, items, [&](int64_t item, int thread) {
      for (int64_t i = item * group; i < least(blocks, (item + 1) * group); ++i)
        values(i, [&](vf x, uint32_t bits) { body(sort_key(x), bits, thread); });
    });
  };

  *a = *b = INFINITY;
  uint32_t prefix = 0;  // of the first-th key
  int64_t below = 0;    // keys smaller than every one with this prefix
  int64_t equal = 0;    // keys with this prefix
  int shift = 32;
  constexpr int kWidths[3] = {11, 11, 10};
  for (const int width : kWidths) {
    const int former = shift;
    shift -= width;
    memset(counts.get(), 0, (size_t)threads * kBins * kCopies * sizeof(uint32_t));
    over([&](vu keys, uint32_t bits, int thread) {
      uint32_t* mine = counts + (int64_t)thread * kBins * kCopies;
      if (former < 32) bits &= bits_of((keys >> former) == (vu{} + prefix));
      for (uint32_t left = bits; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        const uint32_t bin = keys[lane] >> shift & ((1u << width) - 1);
        ++mine[bin * kCopies + lane % kCopies];
      }
    });
    int bin = 0;
    for (int64_t sum = below;; ++bin) {
      if (bin == 1 << width) return;  // fewer values than first
      int64_t here = 0;
      for (int thread = 0; thread < threads; ++thread)
        for (int copy = 0; copy < kCopies; ++copy) here += counts[((int64_t)thread * kBins + bin) * kCopies + copy];
      if (sum + here > first) {
        below = sum;
        equal = here;
        break;
      }
      sum += here;
    }
    prefix = prefix << width | (uint32_t)bin;
  }
  *a = *b = prefix == 0xffffffffu ? INFINITY : float_of_key(prefix);
  if (below + equal > second) return;

  uint32_t* next = counts;  // the smallest key beyond, thread by thread
  for (int thread = 0; thread < threads; ++thread) next[thread * 16] = 0xffffffffu;
  over([&](vu keys, uint32_t bits, int thread) {
    bits &= bits_of(keys > prefix);
    for (; bits; bits &= bits - 1) {
      const uint32_t key = keys[__builtin_ctz(bits)];
      if (key < next[thread * 16]) next[thread * 16] = key;
    }
  });
  uint32_t least_key = 0xffffffffu;
  for (int thread = 0; thread < threads; ++thread) least_key = next[thread * 16] < least_key ? next[thread * 16] : least_key;
  *b = least_key == 0xffffffffu ? INFINITY : float_of_key(least_key);
}

}  // namespace tk::TK_ISA
