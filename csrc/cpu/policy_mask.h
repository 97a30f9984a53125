// Masks of any dtype as bits: W of them, one per token, in a 16-bit word.
#pragma once

#include "policy_ops.h"

namespace tk::TK_ISA {

// W mask elements of `bytes` each as bits; n < W at the end of a row. keep: the bits of an element that count.
template <int bytes> inline uint32_t mask_bits(const void* mask, int64_t at, int n, uint64_t keep) {
  if constexpr (bytes == 1) {
    uint64_t x[2] = {0, 0};
    const uint8_t* p = (const uint8_t*)mask + at;
    if (n == W) memcpy(x, p, W);
    else memcpy(x, p, n);
#if defined(__AVX512F__)
    const __m128i all = _mm_set_epi64x((int64_t)x[1], (int64_t)x[0]);
    return (uint32_t)_mm_test_epi8_mask(all, all);
#else
    uint32_t bits = 0;
    for (int i = 0; i < (W + 7) / 8; ++i) {
      uint64_t y = x[i] | x[i] >> 4;
      y |= y >> 2;
      y = (y | y >> 1) & 0x0101010101010101u;
      bits |= (uint32_t)((y * 0x0102040810204080u) >> 56) << 8 * i;
    }
    return bits;
#endif
  }
  if (n == W && bytes == 4) {
    vi x;
    memcpy(&x, (const int32_t*)mask + at, sizeof x);
    return bits_of((x & (int32_t)keep) != 0);
  }
#if defined(__AVX512F__)
  if (n == W && bytes == 8) {
    const int64_t* p = (const int64_t*)mask + at;
    const __m512i all = _mm512_set1_epi64((int64_t)keep);
    return (uint32_t)_mm512_test_epi64_mask(_mm512_loadu_si512(p), all) |
           (uint32_t)_mm512_test_epi64_mask(_mm512_loadu_si512(p + 8), all) << 8;
  }
#endif
  uint32_t bits = 0;
  for (int i = 0; i < n; ++i) {
    uint64_t x = 0;
    memcpy(&x, (const char*)mask + (at + i) * bytes, bytes);  // little-endian
    bits |= (uint32_t)((x & keep) != 0) << i;
  }
  return bits;
}

// The mask bits of n tokens, W in a word, in whole VectorOps::kWords; returns how many are set.
template <int bytes> int64_t pack_mask(const void* mask, int64_t at, int64_t n, bool is_float, uint16_t* words) {
  const uint64_t keep = is_float ? ~(uint64_t)0 >> (65 - 8 * bytes) : ~(uint64_t)0;  // a float's sign does not count
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += W) {
    const uint32_t bits = mask_bits<bytes>(mask, at + i, (int)least(W, n - i), keep);
    *words++ = (uint16_t)bits;
    count += count_bits(bits);
  }
  for (int64_t i = (n + W - 1) / W; i % VectorOps::kWords; ++i) *words++ = 0;
  return count;
}
inline int64_t pack_mask(int bytes, const void* mask, int64_t at, int64_t n, bool is_float, uint16_t* words) {
  if (bytes == 1) return pack_mask<1>(mask, at, n, is_float, words);
  if (bytes == 2) return pack_mask<2>(mask, at, n, is_float, words);
  if (bytes == 4) return pack_mask<4>(mask, at, n, is_float, words);
  return pack_mask<8>(mask, at, n, is_float, words);
}

}  // namespace tk::TK_ISA
