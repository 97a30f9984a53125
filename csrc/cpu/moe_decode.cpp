// The experts forward for up to 16 tokens (weights whose rows are outputs): the chosen experts' weights are read once, where they
// lie. Here on AMX, elsewhere moe_decode_rows.h.
//
// A product is turned round: 16 rows of a weight are the left operand as they are, an expert's tokens the 16 columns of the right
// one. Multiplication commutes and the steps along k are gemm.h's and gemm_split.h's, so the bits are moe_forward's. While a block
// of 32 rows is multiplied the next one is fetched, in four streams. float32 and float16 rows are split on the way.
// H hidden, I intermediate, E experts, K experts a token, C columns of the first product.
#include "moe_activation.h"
#include "moe_decode_rows.h"
#include "moe_experts.h"
#include "moe_kernels.h"

namespace tk::TK_ISA {

namespace {

constexpr int64_t kTokens = 16;

#if defined(__AMX_BF16__)
constexpr int64_t kRows = 32;  // of a weight in a block

// Two runs of 16 rows of a weight, n[i] of them real.
template <class S> struct Block {
  const S* rows[2];
  int n[2];
};

// The next block's lines, asked for a share at a time.
template <class S> class Fetch {
 public:
  Fetch(const Block<S>* next, int64_t stride, int64_t K, int64_t steps) {
    if (!next || stride != K) return;
    for (int i = 0; i < 2; ++i) {  // two streams a run
      const int64_t lines = next->n[i] * K * (int64_t)sizeof(S) / 64;
      at_[2 * i] = (const char*)next->rows[i], at_[2 * i + 1] = at_[2 * i] + lines / 2 * 64;
      most_ = most(most_, lines / 2 + 1);
    }
    share_ = ceil_div(most_, steps);
  }
  void step() {
    for (int64_t i = 0; i < share_; ++i)
      for (int s = 0; s < 4; ++s) _mm_prefetch(at_[s], _MM_HINT_T1), at_[s] += 64;
  }

 private:
  const char* at_[4] = {};
  int64_t most_ = 0, share_ = 0;
};

// sums[32 rows][16 tokens] of a block times the packed tokens (a right operand of one panel).
void multiply(const Block<bf16>& w, int64_t stride, int64_t K, const bf16* tokens, float* sums, Fetch<bf16> fetch) {
  alignas(64) bf16 tail[2][512];  // rows that end within the last step, or are too few for a tile
  tile_fence();
  tile_zero<0>();
  tile_zero<1>();
  for (int64_t k = 0; k < K; k += 32, tokens += 1024) {
    fetch.step();
    const bf16* rows[2] = {w.rows[0] + k, w.rows[1] + k};
    int64_t step[2] = {stride, stride};
    for (int i = 0; i < 2; ++i)
      if (w.n[i] < 16 || K - k < 32) {
        const __mmask32 mask = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
        for (int r = 0; r < 16; ++r)
          _mm512_store_si512(tail[i] + 32 * r, r < w.n[i] ? _mm512_maskz_loadu_epi16(mask, rows[i] + r * stride) : _mm512_setzero_si512());
        rows[i] = tail[i], step[i] = 32;
      }
    tile_fence();
    tile_load<4>(rows[0], step[0] * 2);
    tile_load<5>(rows[1], step[1] * 2);
    tile_load<6>(tokens, 64);
    tile_dot<0, 4, 6>();
    tile_dot<1, 5, 6>();
  }
  tile_store<0>(sums, 64);
  tile_store<1>(sums + 256, 64);
  tile_fence();
}

// The same of floats, in gemm_split.h's order: tokens' part first, high with low, high with middle, ...
template <class S>
void multiply(const Block<S>& w, int64_t stride, int64_t K, const bf16x3* packed, float* sums, Fetch<S> fetch) {
  using G = Gemm<bf16x3>;
  alignas(64) bf16 split[2][2][3 * 512];  // [turn][run][part][row][32]: the next step's parts are made while this one's are multiplied
  alignas(64) float block[512];
  const bf16* tokens = (const bf16*)packed;
  const auto make = [&](int64_t k) {
    for (int i = 0; i < 2; ++i)
      for (int r = 0; r < 16; ++r) {
        bf16* to = split[k / 32 & 1][i] + r * 32;
        if (r < w.n[i]) G::pack_row(w.rows[i] + r * stride + k, (int)least(32, K - k), to, 512);
        else for (int p = 0; p < 3; ++p) _mm512_store_si512(to + p * 512, _mm512_setzero_si512());
      }
  };
  make(0);
  for (int64_t k0 = 0; k0 < K; k0 += G::KB) {
    tile_zero<0>();
    tile_zero<1>();
    for (int64_t k = k0; k < least(K, k0 + G::KB); k += 32, tokens += G::kStep) {
      tile_fence();
      tile_load<4>(tokens, 64);
      tile_load<5>(tokens + G::kPart, 64);
      tile_load<6>(tokens + 2 * G::kPart, 64);
      const bf16 *a = split[k / 32 & 1][0], *b = split[k / 32 & 1][1];
      tile_load<2>(a + 1024, 64);
      tile_load<3>(b + 1024, 64);
      tile_dot<0, 2, 4>();
      tile_dot<1, 3, 4>();
      tile_load<2>(a + 512, 64);
      tile_load<3>(b + 512, 64);
      tile_dot<0, 2, 4>();
      tile_dot<1, 3, 4>();
      tile_dot<0, 2, 5>();
      tile_dot<1, 3, 5>();
      tile_load<2>(a, 64);
      tile_load<3>(b, 64);
      tile_dot<0, 2, 5>();
      tile_dot<1, 3, 5>();
      tile_dot<0, 2, 6>();
      tile_dot<1, 3, 6>();
      tile_dot<0, 2, 4>();
      tile_dot<1, 3, 4>();
      fetch.step();
      if (k + 32 < K) make(k + 32);
    }
    float* to = k0 ? block : sums;
    tile_store<0>(to, 64);
    tile_store<1>(to + 256, 64);
    tile_fence();
    for (int i = 0; k0 && i < 512; i += W) store(sums + i, load(sums + i) + load(block + i));
  }
}

// Lines k and k + 1 of a right operand from the values of its tokens.
void store_pair_of_k(vf even, vf odd, int64_t k, bf16* panel) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
  _mm512_storeu_si512(panel + k / 32 * 1024 + k % 32 * 16, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

template <MoeActivation kind> vf activated(vf x, vf y, float limit) {
  if constexpr (kind == MoeActivation::relu2) {
    const vf positive = max(zero(), x);
    return positive * positive;
  } else {
    return gated<kind>(x, y, splat(limit), false).a;
  }
}

// What a block's sums give: out[i][token], the activations of 16 outputs (32: relu2), i from 0.
template <MoeActivation kind> void activate_block(const float* sums, const float* b1, const int64_t* columns, int n, float limit, float* out) {
  for (int i = 0; i < n; ++i) {
    constexpr bool single = kind == MoeActivation::relu2, pairs = kind == MoeActivation::gpt_oss;
    const int first = pairs ? 2 * i : i, second = pairs ? 2 * i + 1 : i + 16;
    vf x = load(sums + first * 16), y = single ? zero() : load(sums + second * 16);
    if (b1) x += b1[columns[0] + (pairs ? 2 * i : i)];
    if (b1 && !single) y += b1[columns[1] + (pairs ? 2 * i + 1 : i)];
    store(out + i * 16, activated<kind>(x, y, limit));
  }
}

template <class S> void decode(const MoeForwardParams& p) {
  using T = FastCompute<S>;
  using G = Gemm<T>;
  const int64_t H = p.hidden, I = p.inner, C = columns_of(p), Hp = G::padded_k(H), Ip = G::padded_k(I);
  const MoePlan plan(p, kTokens, kTokens);
  const int64_t chunks = plan.chunk_count, E1 = p.w1_stride[0], E2 = p.w2_stride[0];
  if (chunks == 0) {
    memset(p.y, 0, p.tokens * H * sizeof(S));
    return;
  }
  // Without weights on them the same rows for every expert: all tokens are the columns.
  const bool shared = !p.weight_on_input;
  const int64_t operands = shared ? 1 : chunks, token_size = G::NR * Hp;
  Scratch<T> tokens(operands * token_size), acts(chunks * G::NR * Ip);
  Scratch<float> activations(chunks * 16 * round_up(I, 32)), out(chunks * kTokens * H);
  parallel_for(operands * H < (1 << 15) ? 1 : p.threads, operands, [&](int64_t item, int) {
    if (shared) return G::pack_b((const S*)p.x, p.x_stride, p.tokens, H, tokens.get());
    const MoeChunk& c = plan.chunks[item];
    Scratch<float> rows(c.rows * H);
    for (int64_t i = 0; i < c.rows; ++i) {
      const int32_t slot = plan.order[c.first + i];
      scale_row((const S*)p.x + slot / p.top_k * p.x_stride, p.weights[slot], H, rows + i * H);
    }
    G::pack_b(rows.get(), H, c.rows, H, tokens + item * token_size);
  });

  using A = MoeActivation;
  const auto activate = p.activation == A::swiglu       ? activate_block<A::swiglu>
                        : p.activation == A::gpt_oss    ? activate_block<A::gpt_oss>
                        : p.activation == A::geglu      ? activate_block<A::geglu>
                        : p.activation == A::geglu_tanh ? activate_block<A::geglu_tanh>
                                                        : activate_block<A::relu2>;
  const bool halves = has_halves(p);
  const int64_t made = p.activation == A::relu2 ? 32 : 16, blocks1 = ceil_div(I, made), items1 = chunks * blocks1;
  const auto first_block = [&](int64_t item) {
    const int64_t i = item % blocks1 * made, at = halves ? i : i * (C / I);
    const S* w = (const S*)p.w1 + plan.chunks[item / blocks1].expert * E1;
    const int64_t second = halves ? I + i : least(at + 16, C - 1);
    Block<S> b{{w + at * p.w1_stride[1], w + second * p.w1_stride[1]}, {(int)least(16, (halves ? I : C) - at), 0}};
    b.n[1] = (int)least(16, C - (halves ? I + i : at + 16));
    if (b.n[1] < 0) b.n[1] = 0;
    return b;
  };
  parallel_for_near(p.threads, items1, [&](int64_t item, int) {
    alignas(64) float sums[512];
    const int64_t chunk = item / blocks1, i = item % blocks1 * made, columns[2] = {halves ? i : i * (C / I), halves ? I + i : i * (C / I)};
    const Block<S> b = first_block(item), next = item + 1 < items1 ? first_block(item + 1) : b;
    multiply(b, p.w1_stride[1], H, tokens + (shared ? 0 : chunk * token_size), sums, Fetch<S>(item + 1 < items1 ? &next : nullptr, p.w1_stride[1], H, Hp / 32));
    const int n = (int)least(made, I - i);
    float* to = activations + chunk * 16 * round_up(I, 32) + i * 16;
    activate(sums, p.b1 ? p.b1 + plan.chunks[chunk].expert * C : nullptr, columns, n, p.limit, to);
    if constexpr (sizeof(T) == 2) {
      for (int k = n; k < made; ++k) store(to + k * 16, zero());
      for (int k = 0; k < made; k += 2) store_pair_of_k(load(to + k * 16), load(to + k * 16 + 16), i + k, acts + chunk * G::NR * Ip);
    }
  });
  if (sizeof(T) > 2 || round_up(I, made) < Ip) parallel_for(chunks * I < (1 << 15) ? 1 : p.threads, chunks, [&](int64_t chunk, int) {
    const float* from = activations + chunk * 16 * round_up(I, 32);
    T* to = acts + chunk * G::NR * Ip;
    if constexpr (sizeof(T) == 2) {  // what is left of the last step
      for (int64_t k = round_up(I, made); k < Ip; k += 2) store_pair_of_k(zero(), zero(), k, to);
    } else {
      G::pack_b_t(from, 16, 16, I, to);
    }
  });

  const int64_t blocks2 = ceil_div(H, kRows), items2 = chunks * blocks2;
  const auto second_block = [&](int64_t item) {
    const int64_t h = item % blocks2 * kRows;
    const S* w = (const S*)p.w2 + plan.chunks[item / blocks2].expert * E2 + h * p.w2_stride[1];
    const int64_t left = H - h;
    return Block<S>{{w, left > 16 ? w + 16 * p.w2_stride[1] : w}, {(int)least(16, left), (int)most(0, least(16, left - 16))}};
  };
  parallel_for_near(p.threads, items2, [&](int64_t item, int) {
    alignas(64) float sums[512];
    const int64_t chunk = item / blocks2, h = item % blocks2 * kRows;
    const Block<S> b = second_block(item), next = item + 1 < items2 ? second_block(item + 1) : b;
    multiply(b, p.w2_stride[1], I, acts + chunk * G::NR * Ip, sums, Fetch<S>(item + 1 < items2 ? &next : nullptr, p.w2_stride[1], I, Ip / 32));
    const MoeChunk& c = plan.chunks[chunk];
    for (int half = 0; half < 2; ++half) {
      vi v[16];
      for (int r = 0; r < 16; ++r) v[r] = as_int(load(sums + half * 256 + r * 16));
      transpose(v);
      for (int64_t i = 0; i < c.rows; ++i) {
        const int64_t column = shared ? plan.order[c.first + i] / p.top_k : i;
        store_n(out + (c.padded + i) * H + h + half * 16, as_float(v[column]), b.n[half]);
      }
    }
  });
  combine<S>(p, plan, out, H, 0, H);
}

#else

template <class S> void decode(const MoeForwardParams& p) { decode_rows<S>(p, kTokens); }

#endif

}  // namespace

bool moe_decode_covers(const MoeForwardParams& p) { return p.tokens <= kTokens && !p.z && !p.in_out; }

void moe_decode(const MoeForwardParams& p) {
  if (p.dtype == DType::float32) decode<float>(p);
  else if (p.dtype == DType::bfloat16) decode<bf16>(p);
  else decode<f16>(p);
}

}  // namespace tk::TK_ISA
