// moe_decode without AMX: a block of W rows of a weight is turned round in registers, so that a lane is an output, and multiplied
// by the expert's tokens a value (a pair of bf16) at a time.
//
// The chains are Gemm<T>'s, so the bits are moe_forward's. Weights are read where they lie, once for up to kTogether tokens and from
// L2 for the rest; while a block is multiplied the next one is fetched, in four streams.
// H hidden, I intermediate, E experts, K experts a token, C columns of the first product.
#pragma once

#include "moe_activation.h"
#include "moe_experts.h"

namespace tk::TK_ISA {

#if !defined(__AMX_BF16__)

// W dwords of a row of weights, and what a chain gains by one of them and the token's dword at x. S: stored, T: computed with.
template <class S, class T> struct Link {
  static constexpr int kUnit = 1;  // values in a dword
  static vi load_row(const S* p) { return as_int(load(p)); }
  static vi load_row(const S* p, int n) { return as_int(load_n(p, n)); }
  static vf add(vf sum, vi w, const float* x) { return fma(splat(*x), as_float(w), sum); }
};
#if defined(__AVX512BF16__)
template <> struct Link<bf16, bf16> {
  static constexpr int kUnit = 2;
  static vi load_row(const bf16* p) { return (vi)_mm512_loadu_si512(p); }
  static vi load_row(const bf16* p, int n) {
    return n >= 32 ? load_row(p) : (vi)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p);
  }
  static vf add(vf sum, vi w, const bf16* x) { return (vf)_mm512_dpbf16_ps((__m512)sum, dot_pair(x), (__m512bh)w); }
};
#endif

// What is fetched while a block is multiplied: n bytes in four streams, a share with each step.
class BlockFetch {
 public:
  BlockFetch(const void* next, int64_t bytes, int64_t steps) : bytes_(next ? bytes / 4 / 64 * 64 : 0), share_(bytes_ / 64 / steps + 1) {
    for (int s = 0; s < 4; ++s) at_[s] = (const char*)next + s * bytes_;
  }
  void step() {
    for (int64_t i = 0; i < share_ && done_ < bytes_; ++i, done_ += 64)
      for (int s = 0; s < 4; ++s) __builtin_prefetch(at_[s] + done_, 0, 2);
  }

 private:
  const char* at_[4];
  int64_t bytes_, share_, done_ = 0;
};

template <class S, class T> struct RowBlock {
  using L = Link<S, T>;
  using G = Gemm<T>;
  static constexpr int64_t kStep = W * L::kUnit;  // values of a row at a time
  static constexpr int64_t kTogether = 8;
  const S* row;       // the first of W rows, n of them real
  int64_t stride, n;

  // out[t * ldo + i] = <row i, x[t]>, over K values; x holds zeros behind them.
  void multiply(int64_t K, const T* const* x, int64_t tokens, float* out, int64_t ldo, BlockFetch fetch) const {
    by_groups<kTogether>(tokens, [&]<int R>(int64_t t) { some<R>(K, x + t, out + t * ldo, ldo, fetch); });
  }

 private:
  template <int R> void some(int64_t K, const T* const* x, float* out, int64_t ldo, BlockFetch& fetch) const {
    for (int64_t first = 0; first < K; first += G::KB) {
      vf sum[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] = zero();
      for (int64_t k = first; k < least(K, first + G::KB); k += kStep) {
        fetch.step();
        vi v[W];
        if (n == W && K - k >= kStep) {
          const S* at = row + k;
#pragma GCC unroll 4
          for (int i = 0; i < W; i += 4, at += 4 * stride) {  // four at a time: so many rows are within reach of an address
            v[i] = L::load_row(at), v[i + 1] = L::load_row(at + stride);
            v[i + 2] = L::load_row(at + 2 * stride), v[i + 3] = L::load_row(at + 3 * stride);
          }
        } else {
          for (int i = 0; i < W; ++i) v[i] = i < n ? L::load_row(row + i * stride + k, (int)least(kStep, K - k)) : vi{};
        }
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r] = L::add(sum[r], v[i], x[r] + k + i * L::kUnit);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float* to = out + r * ldo;
        store_n(to, first ? load_n(to, (int)n) + sum[r] : sum[r], (int)n);
      }
    }
  }
};

// A row of floats as T, as Gemm<T> rounds it, and zeros up to `padded`.
template <class T> void round_row(const float* from, int64_t n, int64_t padded, T* to) {
  for (int64_t k = 0; k < padded; k += W) {
    const vf x = load_n(from + k, (int)most(0, n - k));
#if defined(__AVX512BF16__)
    if constexpr (same<T, bf16>) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)x);
      memcpy((void*)(to + k), &rounded, sizeof rounded);
      continue;
    }
#endif
    store(to + k, x);
  }
}

template <class S> void decode_rows(const MoeForwardParams& p, int64_t most_tokens) {
  using T = Compute<S>;
  using B = RowBlock<S, T>;
  constexpr int64_t kRows = 32;  // outputs of an item
  const int64_t H = p.hidden, I = p.inner, C = columns_of(p), Hp = round_up(H, B::kStep), Ip = round_up(I, B::kStep);
  const MoePlan plan(p, most_tokens, (int)most_tokens);
  const int64_t chunks = plan.chunk_count;
  if (chunks == 0) {
    memset(p.y, 0, p.tokens * H * sizeof(S));
    return;
  }
  // Without weights on them the same row for all of a token's experts.
  const bool shared = !p.weight_on_input;
  const int64_t rows = shared ? p.tokens : plan.slots;
  Scratch<T> tokens(rows * Hp), acts(plan.slots * Ip);
  Scratch<float> out(plan.padded * H);
  parallel_for(rows * H < (1 << 15) ? 1 : p.threads, rows, [&](int64_t i, int) {
    const int64_t slot = shared ? i * p.top_k : plan.order[i];
    Scratch<float> row(H);
    scale_row((const S*)p.x + slot / p.top_k * p.x_stride, shared ? 1.0f : p.weights[slot], H, row);
    round_row(row.get(), H, Hp, tokens + i * Hp);
  });

  const bool halves = has_halves(p);
  const int64_t per = C / I, blocks1 = ceil_div(I, kRows), items1 = chunks * blocks1, runs1 = per * kRows / W;
  constexpr int64_t kLd = 2 * kRows;
  const auto first_run = [&](int64_t item, int64_t run) {
    const int64_t i = item % blocks1 * kRows, half = halves ? run / (kRows / W) : 0, at = (halves ? i : per * i) + run * W - half * kRows;
    const S* w = (const S*)p.w1 + plan.chunks[item / blocks1].expert * p.w1_stride[0];
    const int64_t left = (halves ? I : C) - at;
    return B{w + (half * I + (left > 0 ? at : 0)) * p.w1_stride[1], p.w1_stride[1], most(0, least(W, left))};
  };
  const auto fetch_of = [&](const B& next, int64_t K) {
    return BlockFetch(next.stride == K ? next.row : nullptr, next.n * K * (int64_t)sizeof(S), ceil_div(K, B::kStep));
  };
  parallel_for_near(p.threads, items1, [&](int64_t item, int) {
    const MoeChunk& c = plan.chunks[item / blocks1];
    const T* x[16];
    for (int64_t t = 0; t < c.rows; ++t) x[t] = tokens + (shared ? plan.order[c.first + t] / p.top_k : c.first + t) * Hp;
    alignas(64) float sums[16 * kLd];
    const int64_t last = item + 1 < items1 ? item + 1 : item;
    for (int64_t run = 0; run < runs1; ++run) {
      const B b = first_run(item, run), next = run + 1 < runs1 ? first_run(item, run + 1) : first_run(last, 0);
      if (b.n) b.multiply(H, x, c.rows, sums + run * W, kLd, fetch_of(next, H));
    }
    const int64_t i = item % blocks1 * kRows, n = least(kRows, I - i);
    activate<float>(p.activation, sums, c.rows, n, kLd, kRows, p.b1 ? p.b1 + c.expert * C : nullptr, I, i, p.limit, nullptr, C);
    for (int64_t t = 0; t < c.rows; ++t) round_row(sums + t * kLd, n, least(kRows, Ip - i), acts + (c.first + t) * Ip + i);
  });

  const int64_t blocks2 = ceil_div(H, kRows), items2 = chunks * blocks2, runs2 = kRows / W;
  const auto second_run = [&](int64_t item, int64_t run) {
    const int64_t h = item % blocks2 * kRows + run * W;
    const S* w = (const S*)p.w2 + plan.chunks[item / blocks2].expert * p.w2_stride[0];
    return B{w + (h < H ? h : 0) * p.w2_stride[1], p.w2_stride[1], most(0, least(W, H - h))};
  };
  parallel_for_near(p.threads, items2, [&](int64_t item, int) {
    const MoeChunk& c = plan.chunks[item / blocks2];
    const T* x[16];
    for (int64_t t = 0; t < c.rows; ++t) x[t] = acts + (c.first + t) * Ip;
    const int64_t last = item + 1 < items2 ? item + 1 : item;
    for (int64_t run = 0; run < runs2; ++run) {
      const B b = second_run(item, run), next = run + 1 < runs2 ? second_run(item, run + 1) : second_run(last, 0);
      if (b.n) b.multiply(I, x, c.rows, out + c.padded * H + item % blocks2 * kRows + run * W, H, fetch_of(next, I));
    }
  });
  combine<S>(p, plan, out, H, 0, H);
}

#endif

}  // namespace tk::TK_ISA
