// mla_block.h's block of keys in float32 on AMX: products of floats as six products of their three bf16 parts (simd/gemm_split.h).
//
//   x = high + middle + low,   a·b = ah·bl + ah·bm + am·bm + am·bh + al·bh + ah·bh   (in this order)
//
// Latents are split twice, from where they lie: for the scores as left operands, for the values as right ones. 32 x 32 of them
// take 260 cycles, the tile products of 16 rows with them 192: they run side by side, the parts in a few KiB that go round.
//
// Order of sums: a score is the sum of chains of kChain steps of 32 values of D, a block's part of o is one chain over its keys;
// chains start from zero and their results are added in order. Nothing depends on how many rows or lines there are.
//
// Layouts, a tile 16 x 32 bf16:  planes of 32 keys x 32 d   [3 parts][2 tiles of 16 keys][16 keys][16 pairs (d, d + 16)]
//   queries, a panel of 32 rows  [d / 32][3 parts][2 tiles of 16 rows][16 pairs (d, d + 16)][16 rows][2]
//   probabilities, a panel       [lines][3 parts][2 tiles of 16 rows][16 rows][16 pairs (k, k + 16)]
//   32 columns of a line         [3 parts][2 tiles of 16 columns][16 pairs (k, k + 16)][16 columns][2]
#pragma once

#include "mla_block.h"
#include "simd/gemm_split.h"

namespace tk::TK_ISA {

#if defined(__AMX_BF16__)

template <> struct LatentBlock<bf16x3> {
  using Value = float;
  using Mm = Gemm<bf16x3>;
  using Keys = Line<float>;
  static constexpr int64_t kKeys = 128, kPanel = 32;  // with blocks of 256 not all stays in L2: 1.07 to 1.11 times as long
  static constexpr int64_t kTile = Mm::kTile, kPart = Mm::kPart, kStep = Mm::kStep;  // kStep: planes of 32 x 32
  static constexpr int64_t kChain = 6;               // steps of 32 values of D
  static constexpr int64_t kHalf = kKeys * 16;       // floats of the scores of half a panel, [keys, 16 rows]

  static int64_t width(int64_t D) { return round_up(D, 32); }
  static bool takes(int64_t D) { return D % 32 == 0; }  // else a split would reach past the latent
  static int64_t ld_o(int64_t Dv) { return round_up(Dv, 32) + 16; }
  static constexpr int64_t kProbs = kKeys / kLine * kStep / 2;  // floats
  static constexpr int64_t kBuffer = kStep * (kChain > kKeys / kLine ? kChain : kKeys / kLine);  // bf16: one of two, of parts
  static int64_t work_floats(int64_t rows) { return kBuffer + round_up(rows, kPanel) * kKeys; }
  static int64_t beats(int64_t rows, int64_t D, int64_t Dv) {
    const int64_t panels = (rows + kPanel - 1) / kPanel;
    return kKeys / kLine * (rows <= 16 ? 12 : 2 * panels) * ((D + 31) / 32 + (Dv + 31) / 32);
  }
  static int64_t beats_of_scores(int64_t rows, int64_t D) { return beats(rows, D, 0); }
  static void unfold(float*, int64_t) {}

  // 32 rows of queries, of which `rows` are there.
  template <class S> static void pack_queries(const S* src, int64_t stride, int64_t rows, int64_t D, bf16x3* to) {
    bf16* dst = (bf16*)to;
    for (int64_t d = 0; d < D; d += 32, dst += kStep)
      for (int t = 0; t < 2; ++t) {
        alignas(64) vi v[3][16];
        memset((void*)v, 0, sizeof v);
        for (int i = 0; i < 16 && 16 * t + i < rows; ++i) {
          const S* row = src + (16 * t + i) * stride + d;
          const int64_t left = D - d;
          split(load_n(row, (int)least(16, left)), left > 16 ? load_n(row + 16, (int)least(16, left - 16)) : zero(), (bf16*)&v[0][i], 512);
        }
        for (int p = 0; p < 3; ++p) {
          transpose(v[p]);
          for (int i = 0; i < 16; ++i) memcpy((void*)(dst + p * kPart + t * kTile + 32 * i), &v[p][i], 64);
        }
      }
  }

  // Probabilities of `rows` rows, in panels of which those whose flag is not set see nothing; q: panels of `per_row` elements a row.
  template <class Next>
  static void probabilities(const Transform& f, const Line<float>* lines, int64_t count, int64_t rows, const bool* sees, int64_t D,
                            const bf16x3* q, int64_t per_row, const int32_t* limit, float* m, float* l, float* o, int64_t ldo, bool first,
                            float* result, float* work, Next& next) {
    bf16* planes = (bf16*)work;
    float* s = work + kBuffer;
    const int64_t steps = (D + 31) / 32;
    if (rows > 16) many_scores(lines, count, steps, rows, sees, (const bf16*)q, per_row * 3 * kPanel, s, planes, next);
    else if (sees[0]) few_scores(lines, count, steps, (const bf16*)q, s, planes, next);
    tile_fence();
    for (int64_t r = 0; r < rows; r += 16) {
      if (!sees[r / kPanel]) continue;
      alignas(64) float shrink[16];
      bf16* to = (bf16*)(result + r / kPanel * kProbs) + r % kPanel / 16 * kTile;
      softmax(f, s + r / 16 * kHalf, count * kLine, limit + r, m + r, l + r, shrink, to);
      if (!first) shrink_rows(shrink, least(16, rows - r), o + r * ldo, ldo);
    }
  }

  // o (+)= P V
  template <class Next>
  static void values(const Line<float>* lines, int64_t count, int64_t rows, const bool* sees, int64_t Dv, const float* probs, float* o,
                     int64_t ldo, bool first, float* work, Next& next) {
    bf16* v = (bf16*)work;
    const bf16* p = (const bf16*)probs;
    const int64_t panels = seeing(rows, sees);
    if (!panels) return;
    if (rows <= 16) {
      const int64_t end = round_up(Dv, 32), whole = round_down(end, 64);
      few_values<2>(lines, count, 0, whole, rows, p, v, o, ldo, first, next);
      few_values<1>(lines, count, whole, end, rows, p, v, o, ldo, first, next);
      return tile_fence();
    }
    const int64_t share = (16 + panels - 1) / panels;
    Split<true> now(lines, false, count, 0, v);
    now.some(count * 32);
    for (int64_t d = 0; d < Dv; d += 32) {
      now = Split<true>(lines, false, d + 32 < Dv ? count : 0, d + 32, v + (d / 32 + 1) % 2 * kBuffer);
      for (int64_t r = 0; r < rows; r += kPanel) {
        if (!sees[r / kPanel]) continue;
        products(count, p + r / kPanel * kProbs * 2, v + d / 32 % 2 * kBuffer, now, share, next);
        alignas(64) float sums[32 * 32];
        tile_store<0>(sums, 128);
        tile_store<1>(sums + 16, 128);
        tile_store<2>(sums + 512, 128);
        tile_store<3>(sums + 528, 128);
        tile_fence();
        add<2>(least(kPanel, rows - r), sums, o + r * ldo + d, ldo, first);
      }
      now.some(count * 32);
    }
    tile_fence();
  }

 private:
  // Part i of x and y goes to to + i * part, lanes (x, y).
  static __attribute__((always_inline)) void split(vf x, vf y, bf16* to, int64_t part) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i, to += part) {
      // Rounded half up: an instruction less than to even. A NaN may get lost here, but not in what is left of it.
      const vf a = i < 2 ? (vf)(((vu)x + 0x8000) & 0xffff0000) : x, b = i < 2 ? (vf)(((vu)y + 0x8000) & 0xffff0000) : y;
      _mm512_store_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)a, 16), (__m512i)b));
      x -= a, y -= b;
    }
  }

  // Pieces of 32 x 32 latents on their way into kStep bf16 each, a pair of vectors after the other: from as many lines, or from
  // neighbouring columns of one. kPairs: as right operands, whose pairs are of keys.
  template <bool kPairs> struct Split {
    const Line<float>* line;
    int64_t d, left, row = 0;
    bool along;
    const float* from = nullptr;
    bf16* to;
    Split(const Line<float>* line, bool along, int64_t pieces, int64_t d, bf16* to)
        : line(line), d(d), left(pieces * 32), along(along), to(to) {
      if (left) from = line->at + d;
    }
    __attribute__((always_inline)) void some(int64_t n) {
      for (; n && left; --n, --left) {
        if (kPairs) {
          split(load(from), load(from + 16 * line->step), to, kPart);
          if (row % 2) from += line->step - 16, to += 32 - kTile;
          else from += 16, to += kTile;
        } else {
          split(load(from), load(from + 16), to, kPart);
          from += line->step, to += 32;
        }
        if (++row < 32) continue;
        to += kStep - (kPairs ? kTile : 2 * kTile);
        row = 0;
        if (left == 1) return void(left = 0);
        if (along) d += 32;
        else ++line;
        from = line->at + d;
      }
    }
  };

  static __attribute__((always_inline)) void clear() {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }

  // S^T of all lines and up to 16 rows, two lines at a time. The planes of a step are split while the step before is multiplied.
  template <class Next>
  static void few_scores(const Line<float>* lines, int64_t count, int64_t steps, const bf16* q, float* s, bf16* planes, Next& next) {
    Split<false> now(lines, false, least(2, count), 0, planes);
    now.some(64);
    int64_t turn = 0;
    for (int64_t i = 0; i < count; i += 2, s += 2 * kLine * 16) {  // a missing line's products are not read
      const bf16* b = q;
      for (int64_t t = 0; t < steps; ++t, turn ^= 1, b += kStep) {
        const bf16* a = planes + turn * 2 * kStep;
        const bool last = t + 1 == steps;
        const int64_t then = last ? i + 2 : i;
        now = Split<false>(lines + then, false, most(0, least(2, count - then)), last ? 0 : (t + 1) * 32, planes + (turn ^ 1) * 2 * kStep);
        const auto phase = [&](const bf16* a) __attribute__((always_inline)) {
          tile_load<5>(a, 64);
          tile_dot<0, 5, 4>();
          now.some(3), next.beat();
          tile_load<6>(a + kTile, 64);
          tile_dot<1, 6, 4>();
          now.some(3), next.beat();
          tile_load<7>(a + kStep, 64);
          tile_dot<2, 7, 4>();
          now.some(3), next.beat();
          tile_load<5>(a + kStep + kTile, 64);
          tile_dot<3, 5, 4>();
          now.some(2), next.beat();
        };
        tile_fence();
        if (t % kChain == 0) clear();
        tile_load<4>(b + 2 * kPart, 64);
        phase(a);
        tile_load<4>(b + kPart, 64);
        phase(a);
        phase(a + kPart);
        tile_load<4>(b, 64);
        phase(a + kPart);
        phase(a + 2 * kPart);
        phase(a);
        if ((t + 1) % kChain != 0 && !last) continue;
        alignas(64) float sums[2 * kLine * 16];
        float* to = t < kChain ? s : sums;
        tile_store<0>(to, 64);
        tile_store<1>(to + 256, 64);
        tile_store<2>(to + 512, 64);
        tile_store<3>(to + 768, 64);
        tile_fence();
        if (t >= kChain)
          for (int64_t j = 0; j < 2 * kLine * 16; j += 16) store(s + j, load(s + j) + load(sums + j));
      }
    }
  }

  // o[rows, 32 C] (+)= P V for up to 16 rows and columns d to `end`, 32 C at a time.
  template <int C, class Next>
  static void few_values(const Line<float>* lines, int64_t count, int64_t d, int64_t end, int64_t rows, const bf16* probs, bf16* planes,
                         float* o, int64_t ldo, bool first, Next& next) {
    if (d >= end) return;
    Split<true> now(lines, true, C, d, planes);
    now.some(32 * C);
    int64_t turn = 0;
    for (; d < end; d += 32 * C) {
      clear();
      for (int64_t i = 0; i < count; ++i, turn ^= 1) {
        const bf16 *a = probs + i * kStep, *b = planes + turn * C * kStep;
        const int64_t then = i + 1 < count ? d : d + 32 * C;
        now = Split<true>(lines + (i + 1 < count ? i + 1 : 0), true, then < end ? C : 0, then, planes + (turn ^ 1) * C * kStep);
        const auto phase = [&](const bf16* b) __attribute__((always_inline)) {
          tile_load<5>(b, 64);
          tile_dot<0, 4, 5>();
          now.some(3), next.beat();
          tile_load<6>(b + kTile, 64);
          tile_dot<1, 4, 6>();
          now.some(3), next.beat();
          if constexpr (C == 2) {
            tile_load<7>(b + kStep, 64);
            tile_dot<2, 4, 7>();
            now.some(3), next.beat();
            tile_load<5>(b + kStep + kTile, 64);
            tile_dot<3, 4, 5>();
            now.some(2), next.beat();
          }
        };
        tile_fence();
        tile_load<4>(a, 64);
        phase(b + 2 * kPart);
        phase(b + kPart);
        tile_load<4>(a + kPart, 64);
        phase(b + kPart);
        phase(b);
        tile_load<4>(a + 2 * kPart, 64);
        phase(b);
        tile_load<4>(a, 64);
        phase(b);
      }
      alignas(64) float sums[16 * 32 * C];
      tile_store<0>(sums, 128 * C);
      tile_store<1>(sums + 16, 128 * C);
      if constexpr (C == 2) {
        tile_store<2>(sums + 32, 128 * C);
        tile_store<3>(sums + 48, 128 * C);
      }
      tile_fence();
      add<2 * C>(rows, sums, o + d, ldo, first);
    }
  }

  // c [rows, 16 N] (+)= sums
  template <int N> static __attribute__((always_inline)) void add(int64_t rows, const float* sums, float* c, int64_t ldc, bool first) {
    for (int64_t r = 0; r < rows; ++r, sums += 16 * N, c += ldc)
#pragma GCC unroll 4
      for (int j = 0; j < 16 * N; j += 16) store(c + j, first ? load(sums + j) : load(c + j) + load(sums + j));
  }

  // Tiles 0 to 3 = A B of `steps` steps. Between the products 2 `share` pairs of vectors of what comes next are split a step.
  template <class Next, bool kPairs>
  static __attribute__((always_inline)) void products(int64_t steps, const bf16* a, const bf16* b, Split<kPairs>& after, int64_t share,
                                                      Next& next) {
    tile_fence();
    clear();
    for (; steps; --steps, a += kStep, b += kStep) {
      const auto load_a = [&](const bf16* a) __attribute__((always_inline)) {
        tile_load<4>(a, 64);
        tile_load<5>(a + kTile, 64);
      };
      const auto load_b = [&](const bf16* b) __attribute__((always_inline)) {
        tile_stream_load<6>(b, 64);  // past L1, where the left operand is
        tile_stream_load<7>(b + kTile, 64);
      };
      const auto multiply = [&]() __attribute__((always_inline)) {
        tile_dot<0, 4, 6>();
        tile_dot<2, 5, 6>();
        tile_dot<1, 4, 7>();
        tile_dot<3, 5, 7>();
      };
      load_a(a), load_b(b + 2 * kPart), multiply();
      load_b(b + kPart), multiply();
      load_a(a + kPart), multiply();
      after.some(share), next.beat();
      tile_fence();
      load_b(b), multiply();
      load_a(a + 2 * kPart), multiply();
      load_a(a), multiply();
      after.some(share), next.beat();
      tile_fence();
    }
  }

  // The same for any number of rows: planes of a line and of kChain steps against all panels, while the next ones are split.
  template <class Next>
  static void many_scores(const Line<float>* lines, int64_t count, int64_t steps, int64_t rows, const bool* sees, const bf16* q,
                          int64_t q_panel, float* s, bf16* planes, Next& next) {
    const int64_t panels = seeing(rows, sees), share = panels ? (16 + panels - 1) / panels : 0;
    if (!panels) return;
    Split<false> now(lines, true, least(kChain, steps), 0, planes);
    now.some(kChain * 32);
    int64_t turn = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t t = 0; t < steps; t += kChain, turn ^= 1) {
        const int64_t then = t + kChain < steps ? t + kChain : 0, line = i + (then == 0);
        now = Split<false>(lines + line, true, line < count ? least(kChain, steps - then) : 0, then * 32, planes + (turn ^ 1) * kBuffer);
        for (int64_t r = 0; r < rows; r += kPanel) {
          if (!sees[r / kPanel]) continue;
          products(least(kChain, steps - t), planes + turn * kBuffer, q + r / kPanel * q_panel + t * kStep, now, share, next);
          alignas(64) float sums[2][kLine * 16];
          float* to = s + r / 16 * kHalf + i * kLine * 16;
          tile_store<0>(sums[0], 64);
          tile_store<2>(sums[0] + 256, 64);
          tile_store<1>(sums[1], 64);
          tile_store<3>(sums[1] + 256, 64);
          tile_fence();
          add<1>(kLine, sums[0], to, 16, t == 0);
          add<1>(kLine, sums[1], to + kHalf, 16, t == 0);
        }
        now.some(kChain * 32);
      }
  }
  static int64_t seeing(int64_t rows, const bool* sees) {
    int64_t panels = 0;
    for (int64_t r = 0; r < rows; r += kPanel) panels += sees[r / kPanel];
    return panels;
  }

  static void softmax(const Transform& f, float* s, int64_t keys, const int32_t* limit, float* m, float* l, float* shrink, bf16* probs) {
    vi v[32];  // of a line of keys
    softmax_down<false>(f, s, keys, limit, m, l, shrink, [&](int64_t k, const vf* x) __attribute__((always_inline)) {
      memcpy((void*)(v + k % kLine), x, 8 * sizeof(vf));
      if ((k + 8) % kLine != 0) return;
      transpose(v);
      transpose(v + 16);
      bf16* to = probs + k / kLine * kStep;
      for (int i = 0; i < 16; ++i) split((vf)v[i], (vf)v[16 + i], to + i * 32, kPart);
    });
  }
};

#endif

}  // namespace tk::TK_ISA
