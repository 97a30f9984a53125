// linear_logprob and its gradients (include/grpo.h). N rows, n of them active, D hidden, V vocabulary.
//
//   y = h·Wᵀ + b,  u = c·tanh(y / c)  (no softcap: u = y),  z = u / τ,  p = softmax(z)
//   logprob = z[target] − lse,  entropy = lse − Σ p z
//   dz = g_lp (1[target] − p) − g_H p (log p + H),  dy = dz / τ · (1 − (u / c)²)
//   dh = dy·W,  dW = dyᵀ·h,  db = Σ_rows dy
//
// Logits live as tiles of kRows x kBlock in L2 and are stored beyond only where `kept` asks for them. The vocabulary is cut
// into blocks of kBlock from 0; each block gives a row its statistics (softmax_rows.h), merged in order inside a super-block
// and then over super-blocks: an order that depends on V alone. Rows never meet but in dW and db, whose sums run
// over the active rows in order.
#include "grpo_kernels.h"

#include "matmul.h"
#include "simd/gemm_split.h"
#include "simd/gemm_steps.h"
#include "softmax_rows.h"

namespace tk::TK_ISA {

namespace {

constexpr int64_t kBlock = 384;              // vocabulary columns of a logits tile: a multiple of every MR and NR
constexpr int64_t kChunk = 192;              // rows of a product of dh or dW
constexpr int64_t kSuper = 4 * kBlock;       // columns of one partial result (forward)
constexpr int64_t kStep = 2 * kBlock;        // the backward's super-blocks are multiples of it, so of gemm.h's KB too
constexpr int64_t kMaxSuper = 4 * kStep;
constexpr int64_t kGradientBytes = 12 << 20; // dy kept at a time, in both layouts together (24 MiB is no faster)
constexpr int64_t kDepth = 192;              // at most: columns of D in a work item of dh and dW (256: 5-10 % slower at D 896)

// Rows of a logits tile: a multiple of every MR and KU. A thread's tiles take kTileFloats in all, and so may one of dW.
template <class T> constexpr int64_t kRows = kChunk / GemmSteps<T>::kBuffers;
constexpr int64_t kTileFloats = kChunk * kBlock;
static_assert(kDepth <= kBlock);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The rows that are not ignored.
struct ActiveRows {
  Scratch<int64_t> index;
  int64_t n = 0;
  ActiveRows(const int64_t* target, int64_t N, int64_t ignore_index) : index(N) {
    for (int64_t i = 0; i < N; ++i)
      if (target[i] != ignore_index) index[n++] = i;
  }
};

// count active rows from the first-th on as a matrix: in place if they are neighbours, else copied to temp [count, D].
template <class S> struct RowBlock {
  const S* p;
  int64_t stride;
  RowBlock(const S* hidden, int64_t hidden_stride, const int64_t* index, int64_t first, int64_t count, int64_t D, S* temp) {
    if (index[first + count - 1] - index[first] == count - 1) {
      p = hidden + index[first] * hidden_stride;
      stride = hidden_stride;
      return;
    }
    for (int64_t i = 0; i < count; ++i) memcpy(temp + i * D, hidden + index[first + i] * hidden_stride, D * sizeof(S));
    p = temp;
    stride = D;
  }
};

// The active rows of hidden as a left operand [n, D] and, if right is given, as the right operand of dW: [D, n].
template <class T, class S>
void pack_hidden(int threads, const S* hidden, int64_t stride, const ActiveRows& rows, int64_t D, T* left, T* right) {
  using G = Gemm<T>;
  const int64_t Dp = G::padded_k(D), np = G::padded_k(rows.n);
  Scratch<S> temp(threads * kRows<T> * D);
  parallel_for(threads, ceil_div(rows.n, kRows<T>), [&](int64_t item, int thread) {
    const int64_t r = item * kRows<T>, count = least(kRows<T>, rows.n - r);
    const RowBlock<S> block(hidden, stride, rows.index, r, count, D, temp + thread * kRows<T> * D);
    G::pack_a(block.p, block.stride, count, D, left + r * Dp);
    for (int64_t d = 0; right && d < D; d += G::NR)
      G::pack_b_t(block.p + d, block.stride, least(G::NR, D - d), count, right + d * np + r * G::NR);
  });
}

// A thread's tiles of logits: while it works on one, the product of the next runs beside (gemm_steps.h).
template <class T> struct LogitTiles {
  GemmSteps<T> product;
  float* const tiles;
  LogitTiles(float* all, int thread) : tiles(all + thread * kTileFloats) {}
  float* at(int64_t chunk) const { return tiles + chunk % GemmSteps<T>::kBuffers * kRows<T> * kBlock; }
  // Rows of `chunk`, of n, by cols words: hidden [n, D] and weight [cols, D] packed.
  void begin(int64_t chunk, int64_t n, int64_t cols, int64_t D, const T* hidden, const T* weight) {
    const int64_t r = chunk * kRows<T>;
    product.begin(least(kRows<T>, n - r), cols, D, hidden + r * Gemm<T>::padded_k(D), weight, at(chunk), kBlock);
  }
  float* finish(int64_t chunk) {
    product.finish();
    return at(chunk);
  }
};

// Per row: max u, Σ e^x, Σ x e^x with x = (u − max) / τ.
struct Partial {
  float *m, *s, *t;
};

// Statistics of one row of a tile; u is left in the row. bias is null where there is none.
template <class Product>
inline void row_statistics(float* row, int64_t cols, const Head& head, const float* bias, bool entropy, float* m, float* s,
                           float* t, Product& product) {
  vf peak = minus_infinity();
  const bool changes = bias || head.softcap > 0;
  const int64_t whole = cols / W * W;
  for (int64_t j = 0; j < whole && !changes; j += W) peak = max(peak, load(row + j));
  for (int64_t j = changes ? 0 : whole; j < cols; j += W) {
    vf u = load(row + j), slope;
    if (bias) u += load(bias + j);
    if (head.softcap > 0) u = soft_capped<false>(u, head, &slope);
    if (cols - j < W) u = lane_index() < (int32_t)(cols - j) ? u : minus_infinity();
    store(row + j, u);
    peak = max(peak, u);
  }
  const float top = reduce_max(peak);
  const vf base = splat(finite_max(top));
  vf sum = zero(), weighted = zero();
  for (int64_t j = 0; j < cols; j += W) {
    accumulate((load(row + j) - base) * head.inverse_temperature, entropy, &sum, &weighted);
    if (j & W) product.tick();
  }
  *m = top;
  *s = reduce_add(sum);
  *t = reduce_add(weighted);
}

// a ← a merged with b, W rows at a time; the arrays are padded to W.
inline void merge(const Partial& a, const Partial& b, int64_t rows, const Head& head) {
  for (int64_t i = 0; i < rows; i += W) {
    const vf ma = load(a.m + i), mb = load(b.m + i), sa = load(a.s + i), sb = load(b.s + i);
    const vf m = max(ma, mb), base = finite_max(m);
    const vf xa = (ma - base) * head.inverse_temperature, xb = (mb - base) * head.inverse_temperature;
    const vf wa = exp(xa), wb = exp(xb);
    const vf shift_a = wa > 0.0f ? xa : zero(), shift_b = wb > 0.0f ? xb : zero();
    store(a.m + i, m);
    store(a.s + i, sa * wa + sb * wb);
    store(a.t + i, wa * fma(shift_a, sa, load(a.t + i)) + wb * fma(shift_b, sb, load(b.t + i)));
  }
}

// bias[first : first + cols] in float with zeros beyond, in dst; null where there is none.
template <class S> const float* load_bias(const S* bias, int64_t first, int64_t cols, float* dst) {
  if (!bias) return nullptr;
  for (int64_t j = 0; j < kBlock; j += W) store(dst + j, j < cols ? load_n(bias + first + j, (int)least(W, cols - j)) : zero());
  return dst;
}

// Kept logits: [block][N][kKeptRow], rows in the order of the active ones; a row is u − center of its block's words, then the
// center as a float. In 16 bits they are centered on their mean under p: what carries the probability is then rounded least
// (uncentered, a certain word's p would be off by 2 %), and float32 keeps its bits (center 0).
constexpr int64_t kKeptRow = kBlock + 16;
template <class S> S* kept_row(const void* kept, int64_t N, int64_t v, int64_t row) {
  return (S*)kept + (v / kBlock * N + row) * kKeptRow;
}
template <class S> void keep_row(const float* u, int64_t cols, const Head& head, float m, float s, float t, S* kept) {
  float center = sizeof(S) == 4 ? 0 : m + head.temperature * t / s;
  if (!isfinite(center)) center = 0;
  for (int64_t j = 0; j < cols; j += W) store_flushed(kept + j, load(u + j) - center);
  const int64_t end = round_up(cols, W);
  memset((void*)(kept + end), 0, (kKeptRow - end) * sizeof(S));
  memcpy((void*)(kept + kBlock), &center, sizeof center);
}

template <class S> void forward(const LinearLogprobForwardParams& p) {
  using T = FastCompute<S>;
  using G = Gemm<T>;
  const ActiveRows rows(p.target, p.n, p.ignore_index);
  const int64_t n = rows.n, D = p.d, V = p.v, Dp = G::padded_k(D);
  memset(p.logprob, 0, p.n * sizeof(float));
  memset(p.lse, 0, p.n * sizeof(double));
  if (p.entropy) memset(p.entropy, 0, p.n * sizeof(float));
  const Head head(p.temperature, p.softcap);
  for (int64_t block = 0; block < p.kept_blocks && n < p.n; ++block)
    memset((void*)kept_row<S>(p.kept, p.n, block * kBlock, n), 0, (p.n - n) * kKeptRow * sizeof(S));
  if (n == 0) return;
  const bool entropy = p.entropy != nullptr;

  const int64_t supers = ceil_div(V, kSuper), chunks = ceil_div(n, kRows<T>), padded = chunks * kRows<T>;
  Scratch<T> left(G::size_a(n, Dp));
  Scratch<T> right(p.threads * G::size_b(kBlock, Dp));
  Scratch<float> tiles(p.threads * kTileFloats);
  Scratch<float> partials(supers * 3 * padded);  // [super-block][m, s, t][row]
  Scratch<float> target_u(n);
  pack_hidden<T, S>(p.threads, (const S*)p.hidden, p.hidden_stride, rows, D, left, (T*)nullptr);

  for (int64_t i = 0; i < n; ++i) target_u[i] = -INFINITY;  // stays so where the target is none of these words

  const auto partial = [&](int64_t super, int64_t row) {
    float* at = partials + super * 3 * padded + row;
    return Partial{at, at + padded, at + 2 * padded};
  };
  const int64_t groups = least(chunks, ceil_div(4 * p.threads, supers)), group = ceil_div(chunks, groups);
  parallel_for(p.threads, supers * groups, [&](int64_t item, int thread) {
    const int64_t super = item / groups, first = item % groups * group, last = least(chunks, first + group);
    T* packed = right + thread * G::size_b(kBlock, Dp);
    LogitTiles<T> logits(tiles, thread);
    alignas(64) float biases[kBlock], stats[3][kRows<T>];
    for (int64_t v = super * kSuper; v < least(V, (super + 1) * kSuper); v += kBlock) {
      const int64_t cols = least(kBlock, V - v);
      G::pack_b((const S*)p.weight + v * p.weight_stride, p.weight_stride, cols, D, packed);
      const float* bias = load_bias((const S*)p.bias, v, cols, biases);
      const bool keep = v < p.kept_blocks * kBlock;
      logits.begin(first, n, cols, D, left, packed);
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t r = chunk * kRows<T>, count = least(kRows<T>, n - r);
        float* tile = logits.finish(chunk);
        if (chunk + 1 < last) logits.begin(chunk + 1, n, cols, D, left, packed);
        const bool opens = v == super * kSuper;
        const Partial out = partial(super, r);
        const Partial block = opens ? out : Partial{stats[0], stats[1], stats[2]};
        for (int64_t i = 0; i < round_up(count, W); ++i) {
          if (i >= count) {  // keeps the padding quiet
            block.m[i] = block.s[i] = block.t[i] = 0;
            continue;
          }
          float* row = tile + i * kBlock;
          row_statistics(row, cols, head, bias, entropy || keep, block.m + i, block.s + i, block.t + i, logits.product);
          if (keep) keep_row(row, cols, head, block.m[i], block.s[i], block.t[i], kept_row<S>(p.kept, p.n, v, r + i));
          const int64_t column = p.target[rows.index[r + i]] - v;
          if (column >= 0 && column < cols) target_u[r + i] = row[column];
        }
        if (!opens) merge(out, block, count, head);
      }
    }
  });

  parallel_for(p.threads, chunks, [&](int64_t chunk, int) {
    const int64_t r = chunk * kRows<T>, count = least(kRows<T>, n - r);
    const Partial total = partial(0, r);
    for (int64_t super = 1; super < supers; ++super) merge(total, partial(super, r), count, head);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows.index[r + i];
      const double m = total.m[i], log_sum = ::log((double)total.s[i]);
      p.lse[row] = m / head.temperature + log_sum;
      p.logprob[row] = (float)((target_u[r + i] - m) / head.temperature - log_sum);
      if (entropy) p.entropy[row] = (float)(log_sum - (double)total.t[i] / total.s[i]);
    }
  });
}

// Where a row of dy goes. In float it stays in its tile until that is packed.
struct FloatRow {
  float* dy;
  void put(int64_t j, vf low, vf high) const {
    store(dy + j, low);
    store(dy + j + W, high);
  }
  void set(int64_t j, float x) const { dy[j] = x; }
};
// In bfloat16 it goes to its place in a panel of dh's left operand at once (0 beyond cols), and to dy as well for dbias.
template <class T> struct PackedRow;
#if defined(__AVX512BF16__)
template <> struct PackedRow<bf16> {
  using G = Gemm<bf16>;
  bf16* packed;
  float* dy;
  int64_t cols;
  void put(int64_t j, vf low, vf high) const {
    if (cols - j < 32) {
      low = lane_index() < (int32_t)(cols - j) ? low : zero();
      high = lane_index() < (int32_t)(cols - j - W) ? high : zero();
    }
    G::store_a(packed + j * G::MR, low, high);
    if (dy) FloatRow{dy}.put(j, low, high);
  }
  void set(int64_t j, float x) const {
    store_flushed_one(packed + j / 32 * 32 * G::MR + j % 32, x);
    if (dy) dy[j] = x;
  }

 private:
  static void store_flushed_one(bf16* to, float x) {
    bf16 rounded[W];
    store_flushed(rounded, splat(x));
    *to = rounded[0];
  }
};
#endif

// dy of one row of a tile from its sums h·w, or from its kept logits; `column` is the target's, or anything outside the tile.
template <bool kExact, bool kKept, class S, class Row, class Product>
inline void row_gradient(const S* row, const Row& to, int64_t cols, const Head& head, const float* bias, const RowGradient& g,
                         int64_t column, Product& product) {
  float center = 0;
  if (kKept) memcpy(&center, row + kBlock, sizeof center);
  const auto gradient = [&](vf x, float one) {
    vf slope, u = kKept ? x + center : head.softcap > 0 ? soft_capped<false>(x, head, &slope) : x;
    const vf du = g.of<kExact>(u, head) + one;
    if (head.softcap == 0) return du;
    u *= head.inverse_softcap;
    return du * (1.0f - u * u);
  };
  const bool here = column >= 0 && column < cols, biased = !kKept && bias;
  float at_target = 0;
  if (here) at_target = gradient(splat(to_float(row[column]) + (biased ? bias[column] : 0)), g.g_logprob)[0];
  const auto all = [&](const auto& logits) {
    for (int64_t j = 0; j < cols; j += 2 * W) {
      to.put(j, gradient(logits(j), 0), gradient(logits(j + W), 0));
      product.tick();
    }
  };
  if (biased) all([&](int64_t j) { return load(row + j) + load(bias + j); });
  else all([&](int64_t j) { return load(row + j); });
  if (here) to.set(column, at_target);
}

// A block of sums into C: added to a float C, or rounded once into C's dtype.
template <class S>
inline void write_gradient(const float* sums, int64_t rows, int64_t cols, int64_t ld, bool add, void* c, int64_t at, int64_t stride) {
  if (!add) return write_block(sums, rows, cols, ld, (const S*)nullptr, (S*)c + at, stride);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < cols; j += W) {
      const int n = (int)least(W, cols - j);
      float* to = (float*)c + at + r * stride + j;
      store_n(to, load_n(to, n) + load_n(sums + r * ld + j, n), n);
    }
}

template <class S> void backward(const LinearLogprobBackwardParams& p) {
  using T = FastCompute<S>;
  using G = Gemm<T>;
  constexpr bool kPacks = sizeof(T) == 2;  // the gradient's loop packs dy itself
  const S *hidden = (const S*)p.hidden, *weight = (const S*)p.weight;
  S* dbias = (S*)p.dbias;
  void *dhidden = p.dhidden, *dweight = p.dweight;
  const ActiveRows rows(p.target, p.n, p.ignore_index);
  const int64_t n = rows.n, D = p.d, V = p.v, Dp = G::padded_k(D), np = G::padded_k(n);
  const int64_t dh_bytes = D * (p.dhidden_float ? sizeof(float) : sizeof(S));
  if (n == 0) {
    if (dhidden) memset(dhidden, 0, p.n * dh_bytes);
    if (dweight && !p.dweight_add) memset(dweight, 0, V * D * sizeof(S));
    if (dbias) memset((void*)dbias, 0, V * sizeof(S));
    return;
  }
  const Head head(p.temperature, p.softcap);
  const int64_t chunks = ceil_div(n, kRows<T>), depths = ceil_div(D, kDepth);
  const int64_t depth = round_up(ceil_div(D, depths), G::NR);  // columns of D in an item of dh or dW
  const int64_t fit = kGradientBytes / (2 * (int64_t)sizeof(T) * n) / kStep * kStep;
  const int64_t super = least(round_up(V, kStep), least(kMaxSuper, fit < kStep ? kStep : fit));

  Scratch<T> left(G::size_a(n, Dp));
  Scratch<T> right(dweight ? G::size_b(D, np) : 0);
  Scratch<T> dy(dhidden ? G::size_a(n, super) : 0);       // left operand of dh: [n, super]
  Scratch<T> dy_t(dweight ? G::size_a(super, np) : 0);    // left operand of dW: [super, n]
  const int64_t dh_stride = D + 32;                       // rows of a tile 4 KiB apart would share one set of L1
  Scratch<float> dh(dhidden ? n * dh_stride : 0);         // [n, D], summed over super-blocks
  Scratch<float> db(dbias ? chunks * super : 0);          // [chunk, super]
  const int64_t size_block = G::size_b(kBlock, Dp), size_depth = G::size_b(depth, super);
  const int64_t size_packed = size_block > size_depth ? size_block : size_depth;
  Scratch<T> packed(p.threads * size_packed);             // W: a block [kBlock, D], later a slice [depth, super]
  Scratch<float> tiles(p.threads * kTileFloats);
  Scratch<T> panels(kPacks && !dhidden ? p.threads * G::MR * kBlock : 0);  // dy of MR rows where `dy` does not take it
  pack_hidden<T, S>(p.threads, hidden, p.hidden_stride, rows, D, left, dweight ? right.get() : nullptr);

  for (int64_t v0 = 0; v0 < V; v0 += super) {
    const int64_t width = least(super, V - v0), width_p = G::padded_k(width), blocks = ceil_div(width, kBlock);

    // ---- dy of this super-block, in both layouts (each group of rows packs W anew, so as few as feed the threads)
    const int64_t groups = least(chunks, ceil_div(2 * p.threads, blocks)), group = ceil_div(chunks, groups);
    parallel_for(p.threads, blocks * groups, [&](int64_t item, int thread) {
      const int64_t at = item / groups * kBlock, v = v0 + at, cols = least(kBlock, V - v);
      const int64_t first = item % groups * group, last = least(chunks, first + group);
      T* w = packed + thread * size_packed;
      LogitTiles<T> logits(tiles, thread);
      alignas(64) float biases[kBlock];
      const bool kept = v < p.kept_blocks * kBlock;
      if (!kept) {
        G::pack_b(weight + v * p.weight_stride, p.weight_stride, cols, D, w);
        logits.begin(first, n, cols, D, left, w);
      }
      const float* bias = load_bias((const S*)p.bias, v, cols, biases);
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t r = chunk * kRows<T>, count = least(kRows<T>, n - r);
        float* tile = kept ? logits.at(chunk) : logits.finish(chunk);
        if (!kept && chunk + 1 < last) logits.begin(chunk + 1, n, cols, D, left, w);
        const auto gradient = [&](int64_t i, const auto& to) {
          const int64_t row = rows.index[r + i], column = p.target[row] - v;
          const RowGradient g(head, p.dlogprob[row], p.dentropy ? p.dentropy[row] : 0, p.lse[row], p.dentropy ? p.entropy[row] : 0);
          constexpr bool exact = sizeof(S) == 4;
          if (kept) row_gradient<exact, true>(kept_row<S>(p.kept, p.n, v, r + i), to, cols, head, bias, g, column, logits.product);
          else row_gradient<exact, false>(tile + i * kBlock, to, cols, head, bias, g, column, logits.product);
        };
        if constexpr (kPacks) {
          for (int64_t i = 0; i < count; i += G::MR) {
            T* panel = dhidden ? dy + (r + i) * width_p + at * G::MR : panels + thread * G::MR * kBlock;
            for (int64_t k = i; k < i + G::MR; ++k) {
              const PackedRow<T> to{panel + k % G::MR * 32, dbias ? tile + k * kBlock : nullptr, k < count ? cols : 0};
              if (k < count) gradient(k, to);
              for (int64_t j = 0; k >= count && j < cols; j += 2 * W) to.put(j, zero(), zero());
            }
            for (int64_t j = 0; dweight && j < cols; j += G::MR)
              G::transpose_a(panel + j * G::MR, dy_t + (at + j) * np + (r + i) * G::MR);
          }
        } else {
          for (int64_t i = 0; i < count; ++i) gradient(i, FloatRow{tile + i * kBlock});
          for (int64_t i = 0; dhidden && i < count; i += G::MR)
            G::pack_a(tile + i * kBlock, kBlock, least(G::MR, count - i), cols, dy + (r + i) * width_p + at * G::MR);
          for (int64_t j = 0; dweight && j < cols; j += G::MR)
            G::pack_a_t(tile + j, kBlock, least(G::MR, cols - j), count, dy_t + (at + j) * np + r * G::MR);
        }
        if (dbias) {
          float* sums = db + chunk * super + at;
          for (int64_t j = 0; j < cols; j += W) {
            store_n(sums + j, sum_rows(tile + j, kBlock, count, (int)least(W, cols - j)), (int)least(W, cols - j));
          }
        }
      }
    });

    // ---- dh += dy·W and dW = dyᵀ·h: the short items last, so that no thread waits long for another
    const int64_t row_chunks = ceil_div(n, kChunk), row_groups = least(row_chunks, ceil_div(2 * p.threads, depths));
    const int64_t row_group = ceil_div(row_chunks, row_groups);
    const int64_t strip = least(kChunk, round_up(ceil_div(width, ceil_div(p.threads, depths)), G::MR));  // a narrow one feeds all
    const int64_t strips = ceil_div(width, strip), dh_items = dhidden ? depths * row_groups : 0;
    parallel_for(p.threads, dh_items + (dweight ? depths * strips : 0), [&](int64_t item, int thread) {
      if (item < dh_items) {
        const int64_t d = item / row_groups * depth, cols = least(depth, D - d);
        const int64_t first = item % row_groups * row_group, last = least(row_chunks, first + row_group);
        T* w = packed + thread * size_packed;
        G::pack_b_t(weight + v0 * p.weight_stride + d, p.weight_stride, cols, width, w);
        for (int64_t r = first * kChunk; r < least(n, last * kChunk); r += kChunk)
          G::gemm(least(kChunk, n - r), cols, width, dy + r * width_p, w, dh + r * dh_stride + d, dh_stride, v0 > 0);
      } else {
        const int64_t d = (item - dh_items) / strips * depth, cols = least(depth, D - d);  // its h stays in L2
        const int64_t at = (item - dh_items) % strips * strip, count = least(strip, width - at);
        float* tile = tiles + thread * kTileFloats;
        G::gemm(count, cols, n, dy_t + at * np, right + d * np, tile, depth, false);
        write_gradient<S>(tile, count, cols, depth, p.dweight_add, dweight, (v0 + at) * D + d, D);
      }
    });
    for (int64_t j = 0; dbias && j < width; j += W) {
      const int cols = (int)least(W, width - j);
      store_n(dbias + v0 + j, sum_rows(db + j, super, chunks, cols), cols);
    }
  }
  if (dhidden)
    parallel_for(p.threads, chunks, [&](int64_t chunk, int) {
      for (int64_t i = chunk * kRows<T>; i < least(n, (chunk + 1) * kRows<T>); ++i) {
        // The ignored rows before this one, and behind the last one, are zeroed here, by all threads.
        const int64_t row = rows.index[i], before = i > 0 ? rows.index[i - 1] + 1 : 0;
        if (before < row) memset((char*)dhidden + before * dh_bytes, 0, (row - before) * dh_bytes);
        if (p.dhidden_float) write_block(dh + i * dh_stride, 1, D, D, (const float*)nullptr, (float*)dhidden + row * D, D);
        else write_block(dh + i * dh_stride, 1, D, D, (const S*)nullptr, (S*)dhidden + row * D, D);
        if (i == n - 1) memset((char*)dhidden + (row + 1) * dh_bytes, 0, (p.n - row - 1) * dh_bytes);
      }
    });
}

}  // namespace

void linear_logprob_forward(const LinearLogprobForwardParams& p) {
  if (p.dtype == DType::float32) forward<float>(p);
  else if (p.dtype == DType::bfloat16) forward<bf16>(p);
  else forward<f16>(p);
}

void linear_logprob_backward(const LinearLogprobBackwardParams& p) {
  if (p.dtype == DType::float32) backward<float>(p);
  else if (p.dtype == DType::bfloat16) backward<bf16>(p);
  else backward<f16>(p);
}

}  // namespace tk::TK_ISA
