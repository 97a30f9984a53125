// The experts backward (include/moe.h), from x, the pre-activations z of each slot and the routing. s: a slot's weight.
//
//   weight on the output: dA' = dy·W2ᵀ,  ds = <dA', a> + <dy, b2>,  dz = act'(z) s dA',  dW2 = (s a)ᵀ·dy,  db2 = sum of s dy
//   weight on the input:  dz = act'(z) dA',  dx' = dz·W1ᵀ,  ds = <dx', x>,  dx = s dx',  dW1 = (s x)ᵀ·dz,  dW2 = aᵀ·dy
//   dW1 = xᵀ·dz,  db1 = sum of dz,  dx_t = sum over k of dz·W1ᵀ, in k order
//
// a is made again from z. Weights' gradients sum over an expert's slots in token order. Scratch beside the results: dz and s a
// of all slots in x's dtype.
// N tokens, H hidden, I intermediate, E experts, K experts a token, C columns of the first product, M slots that live here.
#include "moe_activation.h"
#include "moe_experts.h"
#include "moe_kernels.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kTileRows = 96;          // a multiple of every MR
constexpr int64_t kSlab = 384;             // slots summed at a time in a weight's gradient: a multiple of every KB but AMX's, which needs none
constexpr int64_t kRightBytes = 1 << 20;   // of its packed right operand

// One slot's row of dA' (columns j .. j + cols - 1 of I) -> dz, s a; the return value is the part of <dA', a>.
template <MoeActivation kind, class S>
float row_backward(const float* da, const S* z, int64_t cols, int64_t inner, int64_t j, float limit, float s, S* dz, S* sa) {
  constexpr bool interleaved = kind == MoeActivation::gpt_oss, single = kind == MoeActivation::relu2;
  vf dot = zero();
  for (int64_t i = 0; i < cols; i += W) {
    const int n = (int)least(W, cols - i);
    const vf d = load_n(da + i, n);
    if constexpr (single) {
      const vf x = max(zero(), load_n(z + j + i, n)), a = x * x;
      store_n(dz + j + i, d * s * (x + x), n);
      store_n(sa + j + i, a * s, n);
      dot = fma(d, a, dot);
      continue;
    }
    Gated y;
    if constexpr (interleaved) {
      const int64_t at = 2 * (j + i);
      const int n0 = (int)least(W, 2 * n), n1 = 2 * n - n0;
      vf gate, up, low, high;
      deinterleave(load_n(z + at, n0), load_n(z + at + W, n1), &gate, &up);
      y = gated<kind>(gate, up, splat(limit), true);
      interleave(y.dgate * (d * s), y.dup * (d * s), &low, &high);
      store_n(dz + at, low, n0);
      store_n(dz + at + W, high, n1);
    } else if constexpr (!single) {
      y = gated<kind>(load_n(z + j + i, n), load_n(z + inner + j + i, n), splat(limit), true);
      store_n(dz + j + i, y.dgate * (d * s), n);
      store_n(dz + inner + j + i, y.dup * (d * s), n);
    }
    store_n(sa + j + i, y.a * s, n);
    dot = fma(d, y.a, dot);  // beyond cols d is 0, and a = act(0) too
  }
  return reduce_add(dot);
}

template <class S> using RowBackward = float (*)(const float*, const S*, int64_t, int64_t, int64_t, float, float, S*, S*);
template <class S> RowBackward<S> row_backward_of(MoeActivation kind) {
  using A = MoeActivation;
  return kind == A::swiglu       ? row_backward<A::swiglu, S>
         : kind == A::gpt_oss    ? row_backward<A::gpt_oss, S>
         : kind == A::geglu      ? row_backward<A::geglu, S>
         : kind == A::geglu_tanh ? row_backward<A::geglu_tanh, S>
                                 : row_backward<A::relu2, S>;
}

// <a, b> in float, in blocks of 64: an order that depends on n alone, and a prefix's blocks are the same.
template <class A, class B> float dot(const A* a, const B* b, int64_t n) {
  float total = 0;
  for (int64_t i = 0; i < n; i += 64) {
    vf sum = zero();
    for (int64_t k = i; k < least(n, i + 64); k += W) sum = fma(load_n(a + k, (int)least(W, n - k)), load_n(b + k, (int)least(W, n - k)), sum);
    total += reduce_add(sum);
  }
  return total;
}

// An expert's slots as rows [slot, columns]: of a matrix in sorted order, or gathered from tokens and scaled.
template <class S> struct SlotRows {
  const S* p;
  int64_t stride;
  const int32_t* order;  // null: row i lies at p + i * stride
  int64_t top_k;
  const float* scale;    // by slot, or null

  // Columns c0 .. c0 + cols - 1 of rows first .. first + count - 1 as an operand summed over rows: left (kLeft) or right.
  template <class T, bool kLeft> void pack(int64_t c0, int64_t cols, int64_t first, int64_t count, T* dst, float* temp) const {
    using G = Gemm<T>;
    constexpr int64_t P = kLeft ? G::MR : G::NR, kRows = 32;
    const int64_t Kp = G::padded_k(count);
    const auto panels = [&](const auto* src, int64_t src_stride, int64_t k, int64_t kn) {
      for (int64_t c = 0; c < cols; c += P) {
        T* to = dst + c * Kp + k * P;
        if constexpr (kLeft) G::pack_a_t(src + c, src_stride, least(P, cols - c), kn, to);
        else G::pack_b_t(src + c, src_stride, least(P, cols - c), kn, to);
      }
    };
    for (int64_t k = 0; k < count; k += kRows) {
      const int64_t kn = least(kRows, count - k);
      if (!order) {
        panels(p + (first + k) * stride + c0, stride, k, kn);
      } else if (scale) {
        for (int64_t i = 0; i < kn; ++i) {
          const int32_t slot = order[first + k + i];
          scale_row(p + slot / top_k * stride + c0, scale[slot], cols, temp + i * cols);
        }
        panels((const float*)temp, cols, k, kn);
      } else {
        for (int64_t i = 0; i < kn; ++i)
          memcpy((void*)((S*)temp + i * cols), p + order[first + k + i] / top_k * stride + c0, cols * sizeof(S));
        panels((const S*)temp, cols, k, kn);
      }
    }
  }
};

// What one thread needs for weight_gradient.
template <class T> struct GradientScratch {
  T *left, *right;
  float *sums, *temp;
  static int64_t left_size() { return Gemm<T>::size_a(kTileRows, Gemm<T>::padded_k(kSlab)); }
  static int64_t columns(int64_t rows) {  // of a right operand
    const int64_t fit = kRightBytes / (least(round_up(rows, 32), kSlab) * (int64_t)sizeof(T)) / 64 * 64;
    return fit < 64 ? 64 : least(fit, 1024);
  }
  static int64_t right_size() { return kRightBytes / (int64_t)sizeof(T) + Gemm<T>::padded_k(kSlab) * 64; }
};

// dst[m, n] = sum over slots first .. first + rows - 1 of left[slot, m] right[slot, n], for m0 <= m < m0 + M and all n < N.
template <class T, class S>
void weight_gradient(const SlotRows<S>& left, const SlotRows<S>& right, int64_t m0, int64_t M, int64_t N, int64_t first, int64_t rows,
                     S* dst, int64_t dst_stride, const GradientScratch<T>& x) {
  using G = Gemm<T>;
  if (rows == 0) {
    for (int64_t m = 0; m < M; ++m) memset((void*)(dst + (m0 + m) * dst_stride), 0, N * sizeof(S));
    return;
  }
  const int64_t block = GradientScratch<T>::columns(rows);
  const bool once = rows <= kSlab;
  for (int64_t n = 0; n < N; n += block) {
    const int64_t cols = least(block, N - n), ld = round_up(cols, 16) + 16;
    for (int64_t k = 0; k < rows; k += kSlab) {
      const int64_t kn = least(kSlab, rows - k), Kp = G::padded_k(kn);
      right.template pack<T, false>(n, cols, first + k, kn, x.right, x.temp);
      for (int64_t m = 0; m < M; m += kTileRows) {
        const int64_t mn = least(kTileRows, M - m);
        left.template pack<T, true>(m0 + m, mn, first + k, kn, x.left, x.temp);
        float* sums = x.sums + (once ? 0 : m * ld);
        for (int64_t i = 0; i < mn; i += G::MR)
          G::gemm(least(G::MR, mn - i), cols, kn, x.left + i * Kp, x.right, sums + i * ld, ld, k > 0);
        if (k + kn == rows) write_block(sums, mn, cols, ld, (const S*)nullptr, dst + (m0 + m) * dst_stride + n, dst_stride);
      }
    }
  }
}

// sum over an expert's slots of s dy, in token order, in double.
template <class S> void bias_gradient(const SlotRows<S>& rows, int64_t first, int64_t count, int64_t columns, float* to) {
  typedef double vd __attribute__((vector_size(W * 8)));
  for (int64_t c = 0; c < columns; c += W) {
    const int n = (int)least(W, columns - c);
    vd sum = {};
    for (int64_t i = first; i < first + count; ++i) {
      const int64_t at = rows.order ? rows.order[i] / rows.top_k : i;
      const vd x = __builtin_convertvector(load_n(rows.p + at * rows.stride + c, n), vd);
      sum += rows.scale ? x * (double)rows.scale[rows.order[i]] : x;
    }
    store_n(to + c, __builtin_convertvector(sum, vf), n);
  }
}

template <class S> void backward(const MoeBackwardParams& p) {
  using T = FastCompute<S>;
  using G = Gemm<T>;
  const int64_t H = p.hidden, I = p.inner, C = columns_of(p), E = p.experts, Hp = G::padded_k(H), Cp = G::padded_k(C);
  const MoePlan plan(p, chunk_rows<T>(most(H, C)), G::MR);
  const bool on_input = p.weight_on_input;
  const S *x = (const S*)p.x, *dy = (const S*)p.dy, *z = (const S*)p.z;
  Scratch<S> dz(plan.slots * C), sa(plan.slots * I);
  if (p.dweights) memset(p.dweights, 0, p.tokens * p.top_k * sizeof(float));
  int64_t longest = 0;
  for (int64_t i = 0; i < plan.chunk_count; ++i) longest = most(longest, plan.chunks[i].rows);

  // ---- dz and s a
  {
    const auto w2 = second_weight_back<T, S>(p);
    const int64_t block = least(block_columns<T>(H), round_up(I, G::NR)), ld = block + 16;
    const int64_t left_size = G::size_a(longest, Hp), w_size = w2.scratch(block);
    Scratch<T> lefts(p.threads * left_size), rights(p.threads * w_size);
    Scratch<float> tiles(p.threads * kTileRows * ld), temps(p.threads * G::MR * H);
    const auto each_row = row_backward_of<S>(p.activation);
    parallel_for(p.threads, plan.chunk_count, [&](int64_t item, int thread) {
      const MoeChunk& c = plan.chunks[item];
      T *left = lefts + thread * left_size, *w = rights + thread * w_size;
      float* sums = tiles + thread * kTileRows * ld;
      pack_gathered<T>(dy, H, plan.order + c.first, p.top_k, c.rows, H, (const float*)nullptr, temps + thread * G::MR * H, left);
      for (int64_t j = 0; j < I; j += block) {
        const int64_t cols = least(block, I - j);
        const T* b = w2.panels(c.expert, 0, j, cols, w);
        for (int64_t m = 0; m < c.rows; m += kTileRows) {
          const int64_t rows = least(kTileRows, c.rows - m);
          G::gemm(rows, cols, H, left + m * Hp, b, sums, ld, false);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = c.first + m + r, slot = plan.order[at];
            const float part = each_row(sums + r * ld, z + at * C, cols, I, j, p.limit, on_input ? 1.0f : p.weights[slot],
                                        dz + at * C, sa + at * I);
            if (p.dweights && !on_input) p.dweights[slot] += part;
          }
        }
      }
      for (int64_t r = 0; p.dweights && !on_input && p.b2 && r < c.rows; ++r) {
        const int64_t slot = plan.order[c.first + r];
        p.dweights[slot] += dot(dy + slot / p.top_k * H, p.b2 + c.expert * H, H);
      }
    });
  }

  // ---- dx, and ds where the weight is on the input
  if (p.dx || (p.dweights && on_input)) {
    const auto w1 = first_weight_back<T, S>(p);
    const int64_t held = held_columns(plan.padded, H), left_size = G::size_a(longest, Cp), w_size = w1.scratch(least(block_columns<T>(C), held));
    Scratch<float> out(plan.padded * held);
    Scratch<T> lefts(p.threads * left_size), rights(p.threads * w_size);
    for (int64_t h0 = 0; h0 < H; h0 += held) {
      const int64_t cols = least(held, H - h0);
      multiply_chunks<T, S>(p.threads, plan, w1, h0, cols, rights, w_size, out, held, [&](const MoeChunk& c, int thread) {
        T* left = lefts + thread * left_size;
        G::pack_a(dz + c.first * C, C, c.rows, C, left);
        return (const T*)left;
      });
      constexpr int64_t kTokens = 32;
      parallel_for(p.threads, ceil_div(p.tokens, kTokens), [&](int64_t item, int) {
        for (int64_t t = item * kTokens; t < least(p.tokens, (item + 1) * kTokens); ++t) {
          for (int64_t h = 0; p.dx && h < cols; h += W) {
            const int n = (int)least(W, cols - h);
            vf sum = zero();
            for (int64_t slot = t * p.top_k; slot < (t + 1) * p.top_k; ++slot) {
              if (plan.place[slot] < 0) continue;
              const vf d = load_n(out + plan.place[slot] * held + h, n);
              sum = on_input ? fma(splat(p.weights[slot]), d, sum) : sum + d;
            }
            store_n((S*)p.dx + t * H + h0 + h, sum, n);
          }
          for (int64_t slot = t * p.top_k; p.dweights && on_input && slot < (t + 1) * p.top_k; ++slot)
            if (plan.place[slot] >= 0) p.dweights[slot] += dot(out + plan.place[slot] * held, x + t * p.x_stride + h0, cols);
        }
      });
    }
  }

  // ---- the weights' and the biases' gradients, expert by expert; of few experts a part of the rows is an item
  int64_t active = 0;
  for (int64_t e = 0; e < E; ++e) active += plan.offsets[e + 1] > plan.offsets[e];
  const int64_t wanted = ceil_div(4 * p.threads, most(2 * active, 1));
  const SlotRows<S> xs{x, p.x_stride, plan.order, p.top_k, on_input ? p.weights : nullptr}, dys{dy, H, plan.order, p.top_k, nullptr},
      scaled_dys{dy, H, plan.order, p.top_k, on_input ? nullptr : p.weights}, dzs{dz, C, nullptr, 1, nullptr}, sas{sa, I, nullptr, 1, nullptr};
  struct Product {
    SlotRows<S> left, right;
    int64_t M, N;
    S* dst;
  } products[2] = {{dzs, xs, C, H, (S*)p.dw1}, {dys, sas, H, I, (S*)p.dw2}};
  int64_t widest = 0, groups[2], sums_size = 0;
  for (int i = 0; i < 2; ++i) {
    Product& w = products[i];
    if (p.in_out) {
      const SlotRows<S> left = w.left;
      w.left = w.right, w.right = left;
      const int64_t m = w.M;
      w.M = w.N, w.N = m;
    }
    widest = most(widest, most(w.M, w.N));
    groups[i] = least(wanted, ceil_div(w.M, kTileRows));
    // The sums of an expert with more slots than one slab stay until its last.
    int64_t long_rows = kTileRows;
    for (int64_t e = 0; e < E; ++e)
      if (plan.offsets[e + 1] - plan.offsets[e] > kSlab) long_rows = round_up(ceil_div(w.M, groups[i]), kTileRows);
    sums_size = most(sums_size, long_rows * (least(round_up(w.N, 16), 1024) + 16));
  }
  using X = GradientScratch<T>;
  Scratch<T> lefts(p.threads * X::left_size()), rights(p.threads * X::right_size());
  Scratch<float> sums(p.threads * sums_size), temps(p.threads * 32 * most(widest, 64));
  const int64_t first_items = p.dw1 ? E * groups[0] : 0, second_items = p.dw2 ? E * groups[1] : 0;
  parallel_for(p.threads, first_items + second_items + (p.db1 || p.db2 ? E : 0), [&](int64_t item, int thread) {
    if (item < first_items + second_items) {
      const int i = item < first_items ? 0 : 1;
      const Product& w = products[i];
      const int64_t at = item - i * first_items, e = at / groups[i], share = round_up(ceil_div(w.M, groups[i]), kTileRows);
      const int64_t m = at % groups[i] * share;
      if (m >= w.M) return;
      const X scratch{lefts + thread * X::left_size(), rights + thread * X::right_size(), sums + thread * sums_size, temps + thread * 32 * most(widest, 64)};
      weight_gradient<T, S>(w.left, w.right, m, least(share, w.M - m), w.N, plan.offsets[e], plan.offsets[e + 1] - plan.offsets[e],
                            w.dst + e * w.M * w.N, w.N, scratch);
    } else {
      const int64_t e = item - first_items - second_items, first = plan.offsets[e], count = plan.offsets[e + 1] - first;
      if (p.db1) bias_gradient(dzs, first, count, C, p.db1 + e * C);
      if (p.db2) bias_gradient(scaled_dys, first, count, H, p.db2 + e * H);
    }
  });
}

}  // namespace

void moe_backward(const MoeBackwardParams& p) {
  if (p.dtype == DType::float32) backward<float>(p);
  else if (p.dtype == DType::bfloat16) backward<bf16>(p);
  else backward<f16>(p);
}

}  // namespace tk::TK_ISA
