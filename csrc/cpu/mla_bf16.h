// What a block of keys (mla_block.h) in bf16 is on AMX tiles (mla_tiles.h) and on vectors (mla_dots.h) alike.
//
// Layouts, a tile 16 x 32 bf16:  queries as Gemm<bf16>::pack_b lays them; scores of half a panel [keys][16 rows]; its probabilities
// [lines][16 rows][32 keys]
#pragma once

#include "mla_block.h"

namespace tk::TK_ISA {

#if defined(__AVX512BF16__)

template <class Block> struct RoundedBlock : ByPanels<Block> {
  using Value = bf16;
  using Mm = Gemm<bf16>;
  using ByPanels<Block>::probabilities;
  static constexpr int64_t kKeys = 256;  // of a block
  static constexpr int64_t kPanel = 32, kTile = Mm::kTile;
  static constexpr int64_t kHalf = kKeys * 16;       // floats of the scores of half a panel
  static constexpr int64_t kHalfProbs = kKeys * 16;  // elements
  static constexpr int64_t kProbs = kHalfProbs;      // floats of a panel's probabilities

  static int64_t width(int64_t D) { return round_up(D, 32); }
  static bool takes(int64_t D) { return D % 32 == 0; }  // else a step of a product would reach past the latent
  static int64_t ld_o(int64_t Dv) { return round_up(Dv, 32) + 16; }  // no power of two: the rows of a tile fall in different sets
  static int64_t beats_of_scores(int64_t rows, int64_t D) { return Block::beats(least(rows, kPanel), D, 0); }
  static void unfold(float* o, int64_t Dv) { unpacked_columns(o, Dv); }

  template <class Keys, class Next>
  static void probabilities(const Transform& f, const Keys* lines, int64_t count, int64_t rows, int64_t D, const bf16* q,
                            const int32_t* limit, float* m, float* l, float* o, int64_t ldo, bool first, float* result, float* s,
                            Next& next) {
    const int64_t halves = rows > 16 ? 2 : 1;
    Block::products(lines, count, rows, D, q, s, next);
    for (int64_t h = 0; h < halves; ++h) {
      alignas(64) float shrink[16];
      softmax(f, s + h * kHalf, count * kLine, limit + h * 16, m + h * 16, l + h * 16, shrink, (bf16*)result + h * kHalfProbs);
      if (!first) shrink_rows(shrink, least(16, rows - h * 16), o + h * 16 * ldo, ldo);
    }
  }

 private:
  static void softmax(const Transform& f, float* s, int64_t keys, const int32_t* limit, float* m, float* l, float* shrink, bf16* probs) {
    // Dwords (p of key k, p of key k + 1) of 16 rows, from their 32 rounded values.
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                                           3, 18, 2, 17, 1, 16, 0);
    vi v[16];
    softmax_down<true>(f, s, keys, limit, m, l, shrink, [&](int64_t k, const vf* x) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int u = 0; u < 8; u += 2)
        v[(k % kLine + u) / 2] = (vi)_mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[u + 1], (__m512)x[u]));
      if ((k + 8) % kLine != 0) return;
      transpose(v);
      bf16* to = probs + (k + 8 - kLine) * 16;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, (__m512i)v[i]);
    });
  }
};

#endif

}  // namespace tk::TK_ISA
