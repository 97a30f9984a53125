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
