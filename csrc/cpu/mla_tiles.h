// mla_block.h's block of keys in bf16 on AMX tiles.
//
// Layouts beside mla_bf16.h's:  32 columns of values of a line [2 tiles][16 pairs of keys][16 columns][2], the columns in the order of
// Packing below
#pragma once

#include "mla_bf16.h"

namespace tk::TK_ISA {

#if defined(__AMX_BF16__)

template <> struct LatentBlock<bf16> : RoundedBlock<LatentBlock<bf16>> {
  using Keys = Line<bf16>;
  static constexpr int64_t kColumns = kKeys * 32;   // elements of 32 columns of values
  static constexpr int64_t kFew = 16;               // rows whose values are packed a line of keys at a time
  static constexpr int64_t kWork = 2 * kHalf;       // floats: scores of a panel, or twice 32 columns of values

  static int64_t beats(int64_t rows, int64_t D, int64_t Dv) {
    const int64_t panels = (rows + kPanel - 1) / kPanel;
    return kKeys / kLine * (panels * D / 32 + (rows <= kFew ? Dv / 8 : panels * Dv / 32));
  }

  template <class Next>
  static void products(const Line<bf16>* lines, int64_t count, int64_t rows, int64_t D, const bf16* q, float* s, Next& next) {
    const int64_t steps = Mm::padded_k(D) / 32;
    for (int64_t i = 0; i < count; ++i) {
      if (rows > 16) scores<2>(lines[i], steps, q, s + i * kLine * 16, next);
      else scores<1>(lines[i], steps, q, s + i * kLine * 16, next);
    }
    tile_fence();
  }
  template <class Next>
  static void values(const Line<bf16>* lines, int64_t count, int64_t rows, const bool* sees, int64_t Dv, const float* probs, float* o,
                     int64_t ldo, bool first, float* work, Next& next) {
    bf16* v = (bf16*)work;
    if (rows <= kFew) {
      int64_t d = sees[0] ? 0 : Dv;
      for (; d + 64 <= Dv; d += 64) few_rows<2>(lines, count, d, (const bf16*)probs, v, o + d, ldo, first, next);
      for (; d < Dv; d += 32) few_rows<1>(lines, count, d, (const bf16*)probs, v, o + d, ldo, first, next);
      return tile_fence();
    }
    int64_t panels = 0;
    for (int64_t r = 0; r < rows; r += kPanel) panels += sees[r / kPanel];
    if (!panels) return;
    const int64_t share = (16 + panels - 1) / panels;  // pairs of the next columns packed with each step of the product
    Packing pack(lines, count, 0, v);
    pack.some(count * 16);
    for (int64_t d = 0; d < Dv; d += 32) {
      const bf16* now = v + d / 32 % 2 * kColumns;
      pack = Packing(lines, d + 32 < Dv ? count : 0, d + 32, v + (d / 32 + 1) % 2 * kColumns);
      for (int64_t r = 0; r < rows; r += kPanel) {
        if (!sees[r / kPanel]) continue;
        const bf16* p = (const bf16*)(probs + r / kPanel * kProbs);
        if (rows - r > 16) add_values<2>(count, p, now, o + r * ldo + d, ldo, first, pack, share, next);
        else add_values<1>(count, p, now, o + r * ldo + d, ldo, first, pack, share, next);
      }
    }
    tile_fence();
  }

 private:
  // S^T of kLine keys and N halves of a panel of rows.
  template <int N, class Next> static void scores(const Line<bf16>& line, int64_t steps, const bf16* q, float* s, Next& next) {
    const bf16 *a = line.at, *below = a + 16 * line.step;
    const int64_t bytes = line.step * 2;
    tile_fence();
    tile_zero<0>();
    tile_zero<2>();
    if constexpr (N == 2) {
      tile_zero<1>();
      tile_zero<3>();
    }
    for (; steps; --steps, a += 32, below += 32, q += 2 * kTile) {
      next.beat();
      tile_stream_load<4>(a, bytes);  // past L1, where the queries stay
      tile_load<6>(q, 64);
      tile_dot<0, 4, 6>();
      tile_stream_load<5>(below, bytes);
      tile_dot<2, 5, 6>();
      if constexpr (N == 2) {
        tile_load<7>(q + kTile, 64);
        tile_dot<1, 4, 7>();
        tile_dot<3, 5, 7>();
      }
    }
    tile_store<0>(s, 64);
    tile_store<2>(s + 256, 64);
    if constexpr (N == 2) {
      tile_store<1>(s + kHalf, 64);
      tile_store<3>(s + kHalf + 256, 64);
    }
  }

  // Columns d to d + 32 of some lines of values as right operands, pairs of keys interleaved: [lines][2 tiles][16 pairs]
  // [16 columns][2], the columns in the order that the instruction gives: tile 0 holds 0-3, 8-11, ..., tile 1 the others.
  // unfold() undoes it.
  struct Packing {
    const Line<bf16>* line;
    int64_t d, left, pair = 0;
    const bf16* row = nullptr;
    bf16* to;
    Packing(const Line<bf16>* lines, int64_t count, int64_t d, bf16* to) : line(lines), d(d), left(count * 16), to(to) {
      if (left) row = line->at + d;
    }
    // The next n pairs.
    __attribute__((always_inline)) void some(int64_t n) {
      for (; n && left; --n, to += 32, row += 2 * line->step) {
        if (pair == 16) pair = 0, ++line, row = line->at + d, to += kTile;
        ++pair, --left;
        const __m512i even = _mm512_loadu_si512(row), odd = _mm512_loadu_si512(row + line->step);
        _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(to + kTile, _mm512_unpackhi_epi16(even, odd));
      }
    }
  };

  // o[16, 32 C] (+)= P V for one half of a panel. Each value is needed once: a line of keys is packed while the one before it is
  // multiplied, into 8 KiB that go round. With more of them, or with the lines after it fetched into L1, this took half again as
  // long: latents lie 1152 bytes apart and share a few sets of L1.
  template <int C, class Next>
  static void few_rows(const Line<bf16>* lines, int64_t count, int64_t d, const bf16* probs, bf16* v, float* o, int64_t ldo, bool first,
                       Next& next) {
    constexpr int64_t kRing = 2, kAhead = 1, kSize = C * 2 * kTile;
    const int64_t bytes = ldo * 4;
    tile_fence();
    if (first) {
      tile_zero<0>();
      tile_zero<1>();
      if constexpr (C == 2) {
        tile_zero<2>();
        tile_zero<3>();
      }
    } else {
      tile_load<0>(o, bytes);
      tile_load<1>(o + 16, bytes);
      if constexpr (C == 2) {
        tile_load<2>(o + 32, bytes);
        tile_load<3>(o + 48, bytes);
      }
    }
    for (int64_t i = 0; i < count + kAhead; ++i) {
      if (i < count) pack_line<C>(lines[i], d, v + i % kRing * kSize, next);
      if (i < kAhead) continue;
      tile_fence();
      const bf16* x = v + (i - kAhead) % kRing * kSize;
      tile_load<4>(probs + (i - kAhead) * kTile, 64);
      tile_load<6>(x, 64);
      tile_dot<0, 4, 6>();
      tile_load<7>(x + kTile, 64);
      tile_dot<1, 4, 7>();
      if constexpr (C == 2) {
        tile_load<5>(x + 2 * kTile, 64);
        tile_dot<2, 4, 5>();
        tile_load<6>(x + 3 * kTile, 64);
        tile_dot<3, 4, 6>();
      }
    }
    tile_store<0>(o, bytes);
    tile_store<1>(o + 16, bytes);
    if constexpr (C == 2) {
      tile_store<2>(o + 32, bytes);
      tile_store<3>(o + 48, bytes);
    }
  }
  // 32 C columns of a line of keys, each 32 as Packing lays them.
  template <int C, class Next> static void pack_line(const Line<bf16>& line, int64_t d, bf16* to, Next& next) {
    const bf16* row = line.at + d;
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < 16; ++pair, row += 2 * line.step, to += 32) {
      if (pair % 2 == 0) next.beat();
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        const __m512i even = _mm512_loadu_si512(row + 32 * c), odd = _mm512_loadu_si512(row + line.step + 32 * c);
        _mm512_store_si512(to + 2 * c * kTile, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(to + (2 * c + 1) * kTile, _mm512_unpackhi_epi16(even, odd));
      }
    }
  }

  // o[N halves, 32] (+)= P V. Between the products `share` pairs of the next values are packed a step.
  template <int N, class Next>
  static void add_values(int64_t count, const bf16* probs, const bf16* v, float* o, int64_t ldo, bool first,
                         Packing& pack, int64_t share, Next& next) {
    const int64_t bytes = ldo * 4;
    float* below = o + 16 * ldo;
    tile_fence();
    if (first) {
      tile_zero<0>();
      tile_zero<1>();
      if constexpr (N == 2) {
        tile_zero<2>();
        tile_zero<3>();
      }
    } else {
      tile_load<0>(o, bytes);
      tile_load<1>(o + 16, bytes);
      if constexpr (N == 2) {
        tile_load<2>(below, bytes);
        tile_load<3>(below + 16, bytes);
      }
    }
    for (; count; --count, probs += kTile, v += 2 * kTile) {
      next.beat();
      tile_stream_load<4>(probs, 64);  // past L1, where the values stay
      tile_load<6>(v, 64);
      tile_dot<0, 4, 6>();
      tile_load<7>(v + kTile, 64);
      tile_dot<1, 4, 7>();
      if constexpr (N == 2) {
        tile_stream_load<5>(probs + kHalfProbs, 64);
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
      }
      pack.some(share);
      tile_fence();
    }
    tile_store<0>(o, bytes);
    tile_store<1>(o + 16, bytes);
    if constexpr (N == 2) {
      tile_store<2>(below, bytes);
      tile_store<3>(below + 16, bytes);
    }
  }
};

#endif

}  // namespace tk::TK_ISA
