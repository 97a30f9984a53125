// What trains the indexer: L[t] = KL(p[t] || softmax(I[t])) over the keys that t sees, p[t] the attention's probabilities, summed over
// heads and normalised. Here the dense stage, over all visible keys; indexer_loss_sparse.cpp has the one over named keys.
//
// Forward goes by blocks of queries, whose scores and sums of probabilities are all that is stored. Without the attention's lse the
// target's products are made twice. Backward makes them once more, block by block of keys, from each head's lse.
//
// B batch, S queries, T keys, H heads of the attention, Hkv key heads, G = H / Hkv, D head dim
#include "indexer_loss.h"

#include "indexer_dense.h"
#include "sparse_kernels.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kQueries = 64;             // of an item at most
constexpr int64_t kRowBytes = 8 << 20;       // of its scores and masses

// The attention's probabilities of some queries, by blocks of keys: m[s] = sum_h factor[h] e^(scale q[h] . k[s] - shift[h]).
template <class S> struct Target {
  using T = FastCompute<S>;
  using Mm = Gemm<T>;
  const IndexerShape& p;
  const IndexerTarget& x;
  const int64_t H = x.target_heads, Hkv = x.target_kv_heads, G = H / Hkv, D = x.target_dim;
  const HeadRows<T> rows{G, D};

  struct Mine {
    T* keys;
    float* product;
    S* copy;
  };
  Mine mine(Pieces& at) const {
    Mine m;
    m.keys = at.take<T>(Mm::size_b(kKeyBlock, D));
    m.product = at.take<float>(rows.product_size());
    m.copy = at.take<S>(rows.copy_size());
    return m;
  }
  void pack(int64_t b, int64_t i, int64_t n, int64_t g, const Mine& m, T* q) const {
    rows.pack((const S*)x.target_q + ((b * p.q_len + i) * H + g * G) * D, H * D, n, m.copy, q);
  }
  // done(r, product): of each query r < n that sees some of the `count` keys from j on
  template <class Done>
  void block(int64_t b, int64_t i, int64_t n, int64_t g, int64_t j, int64_t count, const T* q, const Mine& m, const Done& done) const {
    const S* key = (const S*)x.target_k + b * x.target_stride[0] + j * x.target_stride[1] + g * x.target_stride[2];
    Mm::pack_b(key, x.target_stride[1], count, D, m.keys);
    for (int64_t r = 0; r < n; r += rows.unit) {
      const int64_t some = least(rows.unit, n - r);
      if (keys_seen(p, i + r + some - 1) <= j) continue;
      rows.multiply(q, r, some, m.keys, count, m.product);
      for (int64_t s = r; s < r + some; ++s)
        if (keys_seen(p, i + s) > j) done(s, m.product + (s - r) * G * kLdc);
    }
  }
  // lse: pairs {shift, factor} of G heads
  void add_mass(const float* product, const float* lse, int64_t count, bool first, float* mass) const {
    const vf scale = splat(x.scale);
    for (int64_t c = 0; c < count; c += 4 * W) {
      vf sum[4];
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) sum[u] = first ? zero() : load(mass + c + u * W);
      const float* z = product + c;
      for (int64_t h = 0; h < G; ++h, z += kLdc) {
        const vf shift = splat(lse[2 * h]), factor = splat(lse[2 * h + 1]);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) sum[u] = fma(factor, exp(fms(load(z + u * W), scale, shift)), sum[u]);
      }
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) store(mass + c + u * W, sum[u]);
    }
  }
  // A maximum and a sum of exponentials brought up to date by n scores.
  void add_row(const float* z, int64_t n, float* most, float* sum) const {
    const vf scale = splat(x.scale);
    vf top = splat(-INFINITY), total[2] = {};
    for (int64_t c = 0; c < n; c += W)
      top = max(select(lane_index() + (int32_t)c < splat((int32_t)n), load(z + c) * scale, top), top);
    const float before = *most, now = reduce_max(top) > before ? reduce_max(top) : before;
    const float shift = now == -INFINITY ? 0.0f : now;
    for (int64_t c = 0; c < n; c += W)
      total[c / W % 2] += select(lane_index() + (int32_t)c < splat((int32_t)n), exp(fms(load(z + c), scale, splat(shift))), zero());
    *sum = (before == -INFINITY ? 0.0f : *sum * exp(splat(before - shift))[0]) + reduce_add(total[0] + total[1]);
    *most = now;
  }
};

template <class S> struct DenseLoss {
  using T = FastCompute<S>;
  const IndexerLossParams& p;
  const DenseScores<S> scorer{p};
  const Target<S> target{p, p};
  const int64_t H = target.H, step = round_up(p.k_len, kKeyBlock) + 16;

  struct Mine {
    typename DenseScores<S>::Mine scores;
    typename Target<S>::Mine target;
    T* q;
    float *rows, *mass, *lse;
  };
  Mine mine(Pieces& x, int64_t queries) const {
    Mine m;
    m.scores = scorer.mine(x, queries), m.target = target.mine(x);
    m.q = x.take<T>(target.rows.size(queries));
    m.rows = x.take<float>(queries * step), m.mass = x.take<float>(queries * step), m.lse = x.take<float>(queries * 2 * H);
    return m;
  }

  void item(int64_t b, int64_t i, int64_t n, const Mine& m) const {
    const int64_t G = target.G, end = keys_seen(p, i + n - 1), row = b * p.q_len + i;
    scorer.run(b, i, n, m.scores, m.rows, step);
    const auto blocks = [&](int64_t g, const auto& done) {
      for (int64_t j = 0; j < end; j += kKeyBlock)
        target.block(b, i, n, g, j, least(kKeyBlock, end - j), m.q, m.target, [&](int64_t r, const float* z) {
          done(r, j, least(kKeyBlock, keys_seen(p, i + r) - j), z);
        });
    };
    for (int64_t x = 0; x < n * H; ++x) {
      const float given = p.target_lse ? p.target_lse[row * H + x] : -INFINITY;
      m.lse[2 * x] = p.target_lse && given == -INFINITY ? 0.0f : given;
      m.lse[2 * x + 1] = p.target_lse ? 1.0f : 0.0f;
    }
    for (int64_t g = 0; g < target.Hkv; ++g) {
      target.pack(b, i, n, g, m.target, m.q);
      if (!p.target_lse) {
        blocks(g, [&](int64_t r, int64_t, int64_t count, const float* z) {
          float* lse = m.lse + 2 * (r * H + g * G);
          for (int64_t h = 0; h < G; ++h) target.add_row(z + h * kLdc, count, lse + 2 * h, lse + 2 * h + 1);
        });
        for (int64_t r = 0; r < n; ++r)
          for (int64_t h = g * G; h < (g + 1) * G; ++h) {
            float* lse = m.lse + 2 * (r * H + h);
            if (lse[0] == -INFINITY) lse[0] = 0.0f;
            lse[1] = 1.0f / lse[1];
          }
      }
      blocks(g, [&](int64_t r, int64_t j, int64_t count, const float* z) {
        target.add_mass(z, m.lse + 2 * (r * H + g * G), count, g == 0, m.mass + r * step + j);
      });
    }
    for (int64_t r = 0; r < n; ++r) {
      const int64_t seen = keys_seen(p, i + r);
      const RowLoss x = seen ? row_loss(m.rows + r * step, m.mass + r * step, seen) : RowLoss{0.0f, 0.0f, 0.0f, 0.0f};
      float* kept = p.kept + (row + r) * (3 + 2 * H);
      p.loss[row + r] = x.loss, kept[0] = x.shift, kept[1] = x.factor, kept[2] = x.mass;
      memcpy(kept + 3, m.lse + r * 2 * H, 2 * H * sizeof(float));
    }
  }
  void run() const {
    const int64_t N = p.batch * p.q_len, unit = scorer.index.unit, fit = kRowBytes / (2 * step * (int64_t)sizeof(float));
    const int64_t share = round_up((N + 4 * p.threads - 1) / (4 * p.threads), unit);
    const int64_t queries = least(least(kQueries, share), fit < 1 ? 1 : fit), items = (p.q_len + queries - 1) / queries;
    Pieces measure{0};
    mine(measure, queries);
    const int64_t bytes = round_up((int64_t)measure.at, 4096);
    Scratch<char> scratch(p.threads * bytes);
    parallel_for(p.threads, p.batch * items, [&](int64_t x, int thread) {
      const int64_t i = x % items * queries;
      Pieces at{(uintptr_t)(scratch + thread * bytes)};
      item(x / items, i, least(queries, p.q_len - i), mine(at, queries));
    });
  }
};

// dI = (softmax(I) - m / sum m) dL
template <class S> struct LossGradient {
  using T = FastCompute<S>;
  const IndexerLossBackwardParams& p;
  const Target<S> target{p, p};
  const int64_t H = target.H, chunk;

  struct Mine {
    typename Target<S>::Mine target;
    float* mass;  // [chunk, kLdc]
  };
  Mine mine(Pieces& x) const {
    Mine m;
    m.target = target.mine(x), m.mass = x.take<float>(chunk * kLdc);
    return m;
  }
  const float* kept(int64_t b, int64_t i) const { return p.kept + (b * p.q_len + i) * (3 + 2 * H); }
  int64_t parts() const { return target.Hkv; }
  int64_t size() const { return target.Hkv * target.rows.size(chunk); }
  void pack(int64_t b, int64_t i, int64_t n, int64_t g, const Mine& m, T* to) const {
    target.pack(b, i, n, g, m.target, to + g * target.rows.size(chunk));
  }
  void prepare(int64_t b, int64_t i, int64_t n, int64_t j, int64_t count, const T* packed, const Mine& m) const {
    for (int64_t g = 0; g < target.Hkv; ++g)
      target.block(b, i, n, g, j, count, packed + g * target.rows.size(chunk), m.target, [&](int64_t r, const float* z) {
        target.add_mass(z, kept(b, i + r) + 3 + 2 * g * target.G, least(count, keys_seen(p, i + r) - j), g == 0, m.mass + r * kLdc);
      });
  }
  void gradient(int64_t b, int64_t i, int64_t r, const float* z, int64_t, int64_t valid, const Mine& m, float* di) const {
    const float *row = kept(b, i + r), *mass = m.mass + r * kLdc, dloss = p.dloss[b * p.q_len + i + r];
    const bool any = !(row[2] < 1.17549435e-38f);
    for (int64_t c = 0; c < valid; c += 4 * W) {
      vf sum[4];
      weigh(z + c, p.w + (b * p.q_len + i + r) * p.heads, p.heads, sum);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u)
        store(di + c + u * W, any ? (exp(sum[u] - row[0]) * row[1] - load(mass + c + u * W) / row[2]) * dloss : zero());
    }
  }
};

template <class S> void backward(const IndexerLossBackwardParams& p) {
  using Gradients = DenseGradients<S, LossGradient<S>>;
  Gradients{p, p, LossGradient<S>{.p = p, .chunk = Gradients::chunk_of(p)}}.run();
}

}  // namespace

void indexer_loss(const IndexerLossParams& p) {
  if (p.indices) sparse_indexer_loss(p);
  else switch (p.dtype) {
    case DType::float32: DenseLoss<float>{p}.run(); break;
    case DType::bfloat16: DenseLoss<bf16>{p}.run(); break;
    case DType::float16: DenseLoss<f16>{p}.run(); break;
  }
  if (!p.total) return;
  double sum = 0.0;
  for (int64_t t = 0; t < p.batch * p.q_len; ++t) sum += p.loss[t];
  *p.total = sum;
}
void indexer_loss_backward(const IndexerLossBackwardParams& p) {
  if (p.indices) return sparse_indexer_loss_backward(p);
  switch (p.dtype) {
    case DType::float32: return backward<float>(p);
    case DType::bfloat16: return backward<bf16>(p);
    case DType::float16: return backward<f16>(p);
  }
}

}  // namespace tk::TK_ISA
