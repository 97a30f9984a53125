// What the experts' forward and backward share: slots sorted by expert and cut into chunks, rows gathered into left operands,
// weights as right operands.
//
// N tokens, H hidden, I intermediate, E experts, K experts a token, C columns of the first product, M slots that live here.
// An expert's slots are cut into chunks of whole panels. Each row of each product has gemm.h's order along its sum, so neither the
// chunks nor the cut of columns reach the bits.
#pragma once

#include "matmul.h"
#include "moe.h"
#include "simd/gemm_split.h"

namespace tk::TK_ISA {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct MoeChunk {
  int64_t expert, first, rows;  // sorted slots first .. first + rows - 1
  int64_t padded;               // its first row where every chunk starts a panel
};

// Slots by expert, stable: within an expert in token order.
struct MoePlan {
  int64_t slots = 0, padded = 0, chunk_count = 0;  // M; rows of all chunks, each rounded up to panels
  Scratch<int64_t> offsets;                        // [E + 1] expert e has sorted slots offsets[e] .. offsets[e + 1] - 1
  Scratch<int32_t> order;                          // [M] the slots sorted
  Scratch<int64_t> place;                          // [N * K] a slot's padded row, -1: another rank's
  Scratch<MoeChunk> chunks;

  MoePlan(const MoeShape& p, int64_t most_rows, int panel)
      : offsets(p.experts + 1), order(p.tokens * p.top_k), place(p.tokens * p.top_k),
        chunks(p.experts + p.tokens * p.top_k / panel + 1) {
    const int64_t n = p.tokens * p.top_k, E = p.experts;
    memset(offsets, 0, (E + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < n; ++i)
      if (here(p.chosen[i], E)) ++offsets[p.chosen[i] + 1];
    for (int64_t e = 0; e < E; ++e) offsets[e + 1] += offsets[e];
    slots = offsets[E];
    Scratch<int64_t> next(E);
    memcpy(next, offsets, E * sizeof(int64_t));
    for (int64_t i = 0; i < n; ++i) {
      place[i] = -1;
      if (here(p.chosen[i], E)) order[next[p.chosen[i]]++] = (int32_t)i;
    }
    // Few slots: chunks as short as keep all threads busy.
    const int64_t share = round_up(ceil_div(slots, 4 * p.threads), panel), top = least(round_up(most_rows, panel), share);
    for (int64_t e = 0; e < E; ++e) {
      const int64_t rows = offsets[e + 1] - offsets[e];
      if (rows == 0) continue;
      const int64_t length = round_up(ceil_div(rows, ceil_div(rows, top)), panel);
      for (int64_t r = 0; r < rows; r += length) {
        const MoeChunk c{e, offsets[e] + r, least(length, rows - r), padded};
        for (int64_t i = 0; i < c.rows; ++i) place[order[c.first + i]] = c.padded + i;
        padded += round_up(c.rows, panel);
        chunks[chunk_count++] = c;
      }
    }
  }
  static bool here(int32_t expert, int64_t E) { return expert >= 0 && expert < E; }
};

// Rows that a chunk may have: its left operand of K columns stays in L2.
template <class T> inline int64_t chunk_rows(int64_t K) {
  const int64_t fit = (768 << 10) / (most(K, 64) * (int64_t)sizeof(T));
  return fit < 96 ? 96 : least(fit, 384);
}
// Columns of a right operand of depth K that stay in L2 beside it.
template <class T> inline int64_t block_columns(int64_t K) {
  const int64_t fit = (640 << 10) / (most(K, 64) * (int64_t)sizeof(T)) / 64 * 64;
  return fit < 64 ? 64 : least(fit, 512);
}

// row[k] * scale, in float
template <class S> inline void scale_row(const S* row, float scale, int64_t K, float* to) {
  for (int64_t k = 0; k < K; k += W) store_n(to + k, load_n(row + k, (int)least(W, K - k)) * scale, (int)least(W, K - k));
}

// A left operand of rows[order[i] / top_k], i = 0 .. count - 1, times scale[order[i]] where it is not null. temp: MR * K floats.
template <class T, class S>
void pack_gathered(const S* rows, int64_t stride, const int32_t* order, int64_t top_k, int64_t count, int64_t K, const float* scale,
                   float* temp, T* dst) {
  using G = Gemm<T>;
  for (int64_t i = 0; i < count; i += G::MR, dst += G::MR * G::padded_k(K)) {
    const int64_t left = least(G::MR, count - i);
#if defined(__AVX512BF16__)
    if constexpr (same<T, bf16> && same<S, bf16>) {
      if (!scale) {
        for (int64_t r = 0; r < G::MR; ++r) {
          bf16* to = dst + r * 32;
          if (r >= left) {
            for (int64_t k = 0; k < K; k += 32) _mm512_storeu_si512(to + k * G::MR, _mm512_setzero_si512());
            continue;
          }
          const bf16* row = rows + order[i + r] / top_k * stride;
          for (int64_t k = 0; k < K; k += 32) {
            const __mmask32 mask = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
            _mm512_storeu_si512(to + k * G::MR, _mm512_maskz_loadu_epi16(mask, row + k));
          }
        }
        continue;
      }
    }
#endif
    for (int64_t r = 0; r < left; ++r) {
      const int32_t slot = order[i + r];
      scale_row(rows + slot / top_k * stride, scale ? scale[slot] : 1.0f, K, temp + r * K);
    }
    G::pack_a(temp, K, left, K, dst);
  }
}

// One of the weights as right operands [n, k], one an expert; n in parts that start a panel of their own (gate and up halves).
template <class T, class S> struct MoeWeight {
  using G = Gemm<T>;
  const S* p;
  int64_t expert_stride, row_stride;
  bool columns;          // element (n, k) at p[k * row_stride + n], else at p[n * row_stride + k]
  int64_t n, k, parts;   // n of one part
  const T* packed;       // [E][part][panels], or null

  int64_t part_size() const { return G::size_b(n, G::padded_k(k)); }
  int64_t size() const { return parts * part_size(); }  // of one expert
  int64_t scratch(int64_t cols) const { return packed ? 0 : G::size_b(cols, G::padded_k(k)); }

  void pack(int64_t e, int64_t part, int64_t n0, int64_t cols, T* to) const {
    const S* w = p + e * expert_stride;
    const int64_t at = part * n + n0;
    if (columns) Columns<S>{w, row_stride}.template pack_b<G>(at, cols, 0, k, to);
    else Rows<S>{w, row_stride}.template pack_b<G>(at, cols, 0, k, to);
  }
  // Columns n0 .. n0 + cols - 1 of a part, n0 a multiple of NR; packed to `to` if need be.
  const T* panels(int64_t e, int64_t part, int64_t n0, int64_t cols, T* to) const {
    if (packed) return packed + e * size() + part * part_size() + n0 * G::padded_k(k);
    pack(e, part, n0, cols, to);
    return to;
  }
};

inline bool has_halves(const MoeShape& p) { return p.activation != MoeActivation::gpt_oss && p.activation != MoeActivation::relu2; }
inline int64_t columns_of(const MoeShape& p) { return p.activation == MoeActivation::relu2 ? p.inner : 2 * p.inner; }

// The weights of the forward's products, x·W1 and a·W2, and of the backward's, dy·W2ᵀ and dz·W1ᵀ.
template <class T, class S> MoeWeight<T, S> first_weight(const MoeShape& p, const void* packed) {
  const int64_t parts = has_halves(p) ? 2 : 1;
  return {(const S*)p.w1, p.w1_stride[0], p.w1_stride[1], p.in_out != 0, columns_of(p) / parts, p.hidden, parts, (const T*)packed};
}
template <class T, class S> MoeWeight<T, S> second_weight(const MoeShape& p, const void* packed) {
  return {(const S*)p.w2, p.w2_stride[0], p.w2_stride[1], p.in_out != 0, p.hidden, p.inner, 1, (const T*)packed};
}
template <class T, class S> MoeWeight<T, S> first_weight_back(const MoeShape& p) {
  return {(const S*)p.w1, p.w1_stride[0], p.w1_stride[1], p.in_out == 0, p.hidden, columns_of(p), 1, nullptr};
}
template <class T, class S> MoeWeight<T, S> second_weight_back(const MoeShape& p) {
  return {(const S*)p.w2, p.w2_stride[0], p.w2_stride[1], p.in_out == 0, p.inner, p.hidden, 1, nullptr};
}

// Columns of the hidden dimension whose results for all slots are held at a time, in float.
inline int64_t held_columns(int64_t padded, int64_t H) {
  constexpr int64_t kBytes = 16 << 20;
  const int64_t fit = kBytes / (most(padded, 1) * 4) / 64 * 64;
  return least(round_up(H, 64), fit < 128 ? 128 : fit);
}

// out[padded row, h] = left · W for h0 <= h < h0 + cols, all chunks: items are chunks x blocks of columns.
// left(chunk, thread) gives a chunk's packed rows.
template <class T, class S, class Left>
void multiply_chunks(int threads, const MoePlan& plan, const MoeWeight<T, S>& w, int64_t h0, int64_t cols, T* scratch,
                     int64_t scratch_size, float* out, int64_t ld, const Left& left) {
  using G = Gemm<T>;
  const int64_t block = least(block_columns<T>(w.k), round_up(cols, G::NR));
  parallel_for(threads, plan.chunk_count, [&](int64_t item, int thread) {
    const MoeChunk& c = plan.chunks[item];
    const T* a = left(c, thread);
    for (int64_t h = 0; h < cols; h += block) {
      const int64_t n = least(block, cols - h);
      const T* b = w.panels(c.expert, 0, h0 + h, n, scratch + thread * scratch_size);
      G::gemm(c.rows, n, w.k, a, b, out + c.padded * ld + h, ld, false);
    }
  });
}

// y[t] = sum over k of weight * (out[place] + b2) for columns h0 .. h0 + cols - 1, in k order.
template <class S>
void combine(const MoeForwardParams& p, const MoePlan& plan, const float* out, int64_t ld, int64_t h0, int64_t cols) {
  constexpr int64_t kTokens = 32;
  parallel_for(p.threads, ceil_div(p.tokens, kTokens), [&](int64_t item, int) {
    for (int64_t t = item * kTokens; t < least(p.tokens, (item + 1) * kTokens); ++t) {
      S* y = (S*)p.y + t * p.hidden + h0;
      for (int64_t h = 0; h < cols; h += W) {
        const int n = (int)least(W, cols - h);
        vf sum = zero();
        for (int64_t slot = t * p.top_k; slot < (t + 1) * p.top_k; ++slot) {
          if (plan.place[slot] < 0) continue;
          vf x = load_n(out + plan.place[slot] * ld + h, n);
          if (p.b2) x += load_n(p.b2 + p.chosen[slot] * p.hidden + h0 + h, n);
          sum = p.weight_on_input ? sum + x : fma(splat(p.weights[slot]), x, sum);
        }
        store_n(y + h, sum, n);
      }
    }
  });
}

}  // namespace tk::TK_ISA
