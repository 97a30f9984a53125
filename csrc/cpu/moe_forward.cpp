// The experts forward (include/moe.h): y_t = sum over k of w_tk expert(x_t), expert(x) = act(x·W1 + b1)·W2 + b2.
//
// First, chunk by chunk of an expert's slots: tokens gathered into a left operand, W1 in blocks of columns, the activation on sums
// that lie in L2, straight into the left operand of the second product. Then W2 in blocks of columns of y: all slots' results of
// a block are held in float and combined token by token in k order.
// N tokens, H hidden, I intermediate, E experts, K experts a token, C columns of the first product, M slots that live here.
#include "moe_activation.h"
#include "moe_experts.h"
#include "moe_kernels.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kTileRows = 96;  // whose sums are made and activated at a time: a multiple of every MR

// z as it is kept: rounding must not carry a value across the limit, where the gradient jumps. Values beyond it stay beyond.
template <class S> struct Kept {
  vf limit, low, high;  // the greatest S that is not above the limit, and the next one
  explicit Kept(float x) : limit(splat(x)), low(limit), high(limit) {
    if constexpr (sizeof(S) == 2) {
      if (isinf(x)) return;
      S s = from_float<S>(x);
      if (to_float(s) > x) --s.bits;
      low = splat(to_float(s));
      ++s.bits;
      high = splat(to_float(s));
    }
  }
  vf gate(vf x) const { return select((vi)(x > limit), max(high, x), min(low, x)); }
  vf up(vf x) const { return select((vi)(x < -limit), min(-high, x), max(-low, gate(x))); }
};

// sums [rows, ld] -> activations in place, columns 0 .. cols - 1; pre-activations to z. Halves: up lies half columns on.
template <MoeActivation kind, class S>
void activate_tile(float* sums, int64_t rows, int64_t cols, int64_t ld, int64_t half, const float* b1, int64_t inner, int64_t j, float limit,
                   S* z, int64_t z_stride) {
  constexpr bool interleaved = kind == MoeActivation::gpt_oss, single = kind == MoeActivation::relu2;
  const int64_t at = interleaved ? 2 * j : j, up_at = inner + j;  // columns of z
  const Kept<S> kept(limit);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = sums + r * ld;
    S* to = z ? z + r * z_stride : nullptr;
    for (int64_t i = 0; i < cols; i += W) {
      const int n = (int)least(W, cols - i);
      if constexpr (single) {
        vf x = load_n(row + i, n);
        if (b1) x += load_n(b1 + at + i, n);
        if (to) store_n(to + at + i, x, n);
        const vf positive = max(zero(), x);
        store_n(row + i, positive * positive, n);
      } else if constexpr (interleaved) {
        const int n0 = (int)least(W, 2 * n), n1 = 2 * n - n0;
        vf x = load_n(row + 2 * i, n0), y = load_n(row + 2 * i + W, n1), gate, up;
        if (b1) x += load_n(b1 + at + 2 * i, n0), y += load_n(b1 + at + 2 * i + W, n1);
        deinterleave(x, y, &gate, &up);
        if (to) {
          interleave(kept.gate(gate), kept.up(up), &x, &y);
          store_n(to + at + 2 * i, x, n0);
          store_n(to + at + 2 * i + W, y, n1);
        }
        store_n(row + i, gated<kind>(gate, up, splat(limit), false).a, n);  // behind what is still to be read
      } else {
        vf gate = load_n(row + i, n), up = load_n(row + half + i, n);
        if (b1) gate += load_n(b1 + at + i, n), up += load_n(b1 + up_at + i, n);
        if (to) {
          store_n(to + at + i, kept.gate(gate), n);
          store_n(to + up_at + i, kept.up(up), n);
        }
        store_n(row + i, gated<kind>(gate, up, splat(limit), false).a, n);
      }
    }
  }
}

template <class S>
void activate(MoeActivation kind, float* sums, int64_t rows, int64_t cols, int64_t ld, int64_t half, const float* b1, int64_t inner,
              int64_t j, float limit, S* z, int64_t z_stride) {
  using A = MoeActivation;
  const auto run = kind == A::swiglu     ? activate_tile<A::swiglu, S>
                   : kind == A::gpt_oss  ? activate_tile<A::gpt_oss, S>
                   : kind == A::geglu    ? activate_tile<A::geglu, S>
                   : kind == A::geglu_tanh ? activate_tile<A::geglu_tanh, S>
                                         : activate_tile<A::relu2, S>;
  run(sums, rows, cols, ld, half, b1, inner, j, limit, z, z_stride);
}

template <class S> void forward(const MoeForwardParams& p) {
  using T = FastCompute<S>;
  using G = Gemm<T>;
  if (moe_decode_covers(p)) return moe_decode(p);
  const int64_t H = p.hidden, I = p.inner, C = columns_of(p), Hp = G::padded_k(H), Ip = G::padded_k(I);
  const MoePlan plan(p, chunk_rows<T>(H), G::MR);
  if (plan.slots == 0) {
    memset(p.y, 0, p.tokens * H * sizeof(S));
    return;
  }
  const auto w1 = first_weight<T, S>(p, p.packed1);
  const auto w2 = second_weight<T, S>(p, p.packed2);
  int64_t longest = 0;
  for (int64_t i = 0; i < plan.chunk_count; ++i) longest = most(longest, plan.chunks[i].rows);

  const int64_t per = C / I;                                                    // columns of W1 for one of the activation
  const int64_t block = least(round_up(block_columns<T>(H) / per, G::NR), round_up(I, G::NR)), half = has_halves(p) ? block : 0;
  const int64_t ld = per * block + 16, w_size = w1.parts * w1.scratch(w1.parts == 2 ? block : per * block);
  Scratch<T> act(plan.padded * Ip);                                             // left operands of the second product
  {
    const int64_t x_size = G::size_a(longest, Hp);
    Scratch<T> lefts(p.threads * x_size), rights(p.threads * w_size);
    Scratch<float> tiles(p.threads * kTileRows * ld), temps(p.threads * G::MR * H);
    parallel_for(p.threads, plan.chunk_count, [&](int64_t item, int thread) {
      const MoeChunk& c = plan.chunks[item];
      T *x = lefts + thread * x_size, *w = rights + thread * w_size;
      float* sums = tiles + thread * kTileRows * ld;
      pack_gathered<T>((const S*)p.x, p.x_stride, plan.order + c.first, p.top_k, c.rows, H, p.weight_on_input ? p.weights : nullptr,
                       temps + thread * G::MR * H, x);
      const float* b1 = p.b1 ? p.b1 + c.expert * C : nullptr;
      for (int64_t j = 0; j < I; j += block) {
        const int64_t cols = least(block, I - j), width = half ? cols : per * cols;
        const T* gate = w1.panels(c.expert, 0, half ? j : per * j, width, w);
        const T* up = half ? w1.panels(c.expert, 1, j, cols, w + w_size / 2) : nullptr;
        for (int64_t m = 0; m < c.rows; m += kTileRows) {
          const int64_t rows = least(kTileRows, c.rows - m);
          G::gemm(rows, width, H, x + m * Hp, gate, sums, ld, false);
          if (half) G::gemm(rows, cols, H, x + m * Hp, up, sums + half, ld, false);
          activate(p.activation, sums, rows, cols, ld, half, b1, I, j, p.limit, p.z ? (S*)p.z + (c.first + m) * C : nullptr, C);
          for (int64_t i = 0; i < rows; i += G::MR)
            G::pack_a(sums + i * ld, ld, least(G::MR, rows - i), cols, act + (c.padded + m + i) * Ip + j * G::MR);
        }
      }
    });
  }

  const int64_t held = held_columns(plan.padded, H), w2_size = w2.scratch(least(block_columns<T>(I), held));
  Scratch<float> out(plan.padded * held);
  Scratch<T> rights(p.threads * w2_size);
  for (int64_t h = 0; h < H; h += held) {
    const int64_t cols = least(held, H - h);
    multiply_chunks<T, S>(p.threads, plan, w2, h, cols, rights, w2_size, out, held,
                          [&](const MoeChunk& c, int) { return act + c.padded * Ip; });
    combine<S>(p, plan, out, held, h, cols);
  }
}

template <class S> void pack(const MoePackParams& p) {
  using T = FastCompute<S>;
  using G = Gemm<T>;
  const auto w1 = first_weight<T, S>(p, nullptr);
  const auto w2 = second_weight<T, S>(p, nullptr);
  if (p.bytes) {
    p.bytes[0] = p.experts * w1.size() * (int64_t)sizeof(T);
    p.bytes[1] = p.experts * w2.size() * (int64_t)sizeof(T);
  }
  if (!p.packed1) return;
  constexpr int64_t kColumns = 4 * G::NR;
  const auto all = [&](const auto& w, T* to) {
    const int64_t blocks = ceil_div(w.n, kColumns);
    parallel_for(p.threads, p.experts * w.parts * blocks, [&](int64_t item, int) {
      const int64_t e = item / blocks / w.parts, part = item / blocks % w.parts, n = item % blocks * kColumns;
      w.pack(e, part, n, least(kColumns, w.n - n), to + e * w.size() + part * w.part_size() + n * G::padded_k(w.k));
    });
  };
  all(w1, (T*)p.packed1);
  all(w2, (T*)p.packed2);
}

}  // namespace

void moe_pack(const MoePackParams& p) {
  if (p.dtype == DType::float32) pack<float>(p);
  else if (p.dtype == DType::bfloat16) pack<bf16>(p);
  else pack<f16>(p);
}

void moe_forward(const MoeForwardParams& p) {
  if (p.dtype == DType::float32) forward<float>(p);
  else if (p.dtype == DType::bfloat16) forward<bf16>(p);
  else forward<f16>(p);
}

}  // namespace tk::TK_ISA
