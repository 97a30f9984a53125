// The indexer's loss over named keys: L[t] = KL(p[t] || softmax(I[t])), p[t] the attention's probabilities over the keys that t's indices
// name, summed over heads and normalised; and its gradients.
//
// Forward goes query by query: the named rows are copied side by side as for sparse_attention, keys down and a lane a head, so that
// maxima and sums over keys run down the lanes. It keeps softmax(I) - p of each slot, from which the gradients follow without the target:
//
//   dI = dL (softmax(I) - p),  dz = dI w 1[z > 0],  dw = sum_s dI relu(z),  dq = sum_s dz k[s],  dk[idx] += dz q
//
// dk is summed as in sparse_backward.cpp: sparse_pairs.h.
//
// B batch, H heads of the attention, Hkv key heads, G = H / Hkv, D head dim, Hi index heads, Di index dim, K slots of a query
#include "indexer_loss.h"
#include "scratch_pieces.h"
#include "sparse_gather.h"
#include "sparse_kernels.h"
#include "sparse_pairs.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kChunkBytes = 16 << 20;  // of pairs

// Keys of all sequences as sparse_gather.h reads them.
SparseShape rows_shape(const IndexerShape& p) {
  SparseShape s;
  s.batch = p.batch, s.q_len = p.q_len, s.k_len = p.k_len;
  return s;
}

// Heads of a query against named rows, in blocks of keys.
template <class S> struct NamedRows {
  using T = Compute<S>;
  using Mm = Gemm<T>;
  using Block = LatentBlock<T>;
  static constexpr int64_t kPanel = Block::kPanel, kKeys = Block::kKeys;

  int64_t heads, dim;
  const int64_t kp = Mm::padded_k(dim), width = Block::width(dim), panels = (heads + kPanel - 1) / kPanel;
  int64_t halves() const { return 2 * panels; }
  int64_t block_floats() const { return halves() * Block::kHalf; }  // products of a block of keys: [half][keys, W]
  int64_t q_size() const { return panels * kPanel * kp; }

  void pack(const S* q, T* to) const {
    for (int64_t r = 0; r < heads; r += kPanel) Mm::pack_b(q + r * dim, dim, least(kPanel, heads - r), dim, to + r * kp);
  }
  // Products with n rows of list, and the rows side by side in lines; those after them (up to `left` in all) are fetched meanwhile.
  int64_t products(const KeyRows<S>& rows, int64_t b, int64_t g, const int32_t* list, int64_t n, int64_t left, const T* q, T* copy, typename Block::Keys* lines,
                   float* s) const {
    const int64_t count = gather(rows, b, g, list, n, dim, width, copy, lines);
    GatherAhead<S> next(rows, nullptr, {b, g, list + n, least(kKeys, left - n), 1 << 30}, dim, 0);
    next.spread(Block::beats(heads, dim, 0));
    for (int64_t r = 0; r < heads; r += kPanel)
      Block::products(lines, count, least(kPanel, heads - r), dim, q + r * kp, s + r / W * Block::kHalf, next);
    return count;
  }
  vi valid(int64_t half) const { return lane_index() + (int32_t)(half * W) < splat((int32_t)heads); }
};

// Sums over the lanes of n vectors, n a multiple of W.
inline void sum_lanes(const float* x, int64_t n, float* to) {
  for (int64_t k = 0; k < n; k += W) {
    vi v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) memcpy(&v[i], x + (k + i) * W, sizeof(vi));
    transpose(v);
    vf sum[4] = {};
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) sum[i % 4] += as_float(v[i]);
    store(to + k, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

template <class S> struct Loss {
  using T = Compute<S>;
  using Rows = NamedRows<S>;
  static constexpr int64_t kKeys = Rows::kKeys, kHalf = Rows::Block::kHalf;

  const IndexerLossParams& p;
  const SparseShape shape = rows_shape(p);
  const int64_t key_stride[3] = {p.k_stride[0], p.k_stride[1], 0};
  const KeyRows<S> index_keys{shape, (const S*)p.k, key_stride}, target_keys{shape, (const S*)p.target_k, p.target_stride};
  const int64_t H = p.target_heads, Hkv = p.target_kv_heads, G = H / Hkv, D = p.target_dim, Hi = p.heads, Di = p.head_dim, K = p.slots;
  const Rows index{Hi, Di}, target{G, D};
  const int64_t blocks = (K + kKeys - 1) / kKeys;

  struct Mine {
    int32_t* list;
    T *copy, *q;
    float *s, *sum, *mass, *scores;
  };
  Mine mine(Pieces& x) const {
    Mine m;
    m.list = x.take<int32_t>(K + 1);
    m.copy = x.take<T>(kKeys * most(index.width, target.width));
    m.q = x.take<T>(most(index.q_size(), target.q_size()));
    m.s = x.take<float>(blocks * most(index.block_floats(), target.block_floats()));
    m.sum = x.take<float>(kHalf), m.mass = x.take<float>(blocks * kKeys), m.scores = x.take<float>(blocks * kKeys);
    return m;
  }

  // Products of all named keys with the heads of one group: s [block][half][keys, W].
  void products(const Rows& rows, const KeyRows<S>& keys, int64_t b, int64_t g, int64_t count, const Mine& m) const {
    for (int64_t k = 0; k < count; k += kKeys) {
      typename Rows::Block::Keys lines[kKeys / kLine];
      rows.products(keys, b, g, m.list + k, least(kKeys, count - k), count - k, m.q, m.copy, lines, m.s + k / kKeys * rows.block_floats());
    }
  }
  // What W heads subtract from their scores, and by what their exponentials are multiplied.
  void normaliser(const float* given, int64_t half, int64_t count, const Mine& m, vf* shift, vf* factor) const {
    const vf scale = splat(p.scale);
    if (given) {
      const vf lse = load_n(given + half * W, (int)least(W, G - half * W));
      *shift = lse == -INFINITY ? zero() : lse, *factor = splat(1.0f);
      return;
    }
    vf top[2] = {splat(-INFINITY), splat(-INFINITY)}, sum[4] = {};
    const auto score = [&](int64_t k) {
      return m.s + k / kKeys * target.block_floats() + half * kHalf + k % kKeys * W;
    };
    for (int64_t k = 0; k < count; ++k) top[k % 2] = max(load(score(k)) * scale, top[k % 2]);
    const vf high = max(top[0], top[1]);
    *shift = high == -INFINITY ? zero() : high;
    for (int64_t k = 0; k < count; ++k) sum[k % 4] += exp(fms(load(score(k)), scale, *shift));
    *factor = 1.0f / ((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  void query(int64_t t, const Mine& m) const {
    const int64_t b = t / p.q_len;
    float* kept = p.kept + t * K;
    bool ascending;
    const int64_t count = named_keys(p.indices + t * K, K, p.k_len, m.list, &ascending);
    memset(kept, 0, K * sizeof(float));
    p.loss[t] = 0.0f;
    if (count == 0) return;

    const vf scale = splat(p.scale);
    for (int64_t g = 0; g < Hkv; ++g) {
      target.pack((const S*)p.target_q + (t * H + g * G) * D, m.q);
      products(target, target_keys, b, g, count, m);
      for (int64_t half = 0; half * W < G; ++half) {
        vf shift, factor;
        normaliser(p.target_lse ? p.target_lse + t * H + g * G : nullptr, half, count, m, &shift, &factor);
        factor = select(target.valid(half), factor, zero());
        for (int64_t k = 0; k < count; k += kKeys) {  // probabilities of the half, added up in those of the first half
          const int64_t n = least(kKeys, count - k);
          float *first = m.s + k / kKeys * target.block_floats(), *s = first + half * kHalf;
          for (int64_t u = 0; u < n; ++u) {
            const vf e = exp(fms(load(s + u * W), scale, shift)), x = select(target.valid(half), e * factor, zero());
            store(first + u * W, half == 0 ? x : load(first + u * W) + x);
          }
        }
      }
      for (int64_t k = 0; k < count; k += kKeys) {
        float sums[kKeys];
        sum_lanes(m.s + k / kKeys * target.block_floats(), round_up(least(kKeys, count - k), W), sums);
        for (int64_t u = 0; u < kKeys; u += W) store(m.mass + k + u, g == 0 ? load(sums + u) : load(m.mass + k + u) + load(sums + u));
      }
    }

    index.pack((const S*)p.q + t * Hi * Di, m.q);
    products(index, index_keys, b, 0, count, m);
    for (int64_t k = 0; k < count; k += kKeys) {
      const int64_t n = round_up(least(kKeys, count - k), W);
      const float* z = m.s + k / kKeys * index.block_floats();
      for (int64_t half = 0; half * W < Hi; ++half, z += kHalf) {
        const vf w = load_n(p.w + t * Hi + half * W, (int)least(W, Hi - half * W));
        for (int64_t u = 0; u < n; ++u) {
          const vf x = select(index.valid(half), w * max(zero(), load(z + u * W)), zero());
          store(m.sum + u * W, half == 0 ? x : load(m.sum + u * W) + x);
        }
      }
      sum_lanes(m.sum, n, m.scores + k);
    }

    const RowLoss row = row_loss(m.scores, m.mass, count);
    p.loss[t] = row.loss;
    if (row.mass < 1.17549435e-38f) return;
    for (int64_t k = 0; k < count; k += W) store(m.scores + k, exp(load(m.scores + k) - row.shift) * row.factor - load(m.mass + k) / row.mass);
    for (int64_t slot = 0, k = 0; k < count; ++slot)
      if (p.indices[t * K + slot] == m.list[k]) kept[slot] = m.scores[k++];
  }
  void run() const {
    Pieces measure{0};
    mine(measure);
    const int64_t bytes = round_up((int64_t)measure.at, 4096);
    Scratch<char> scratch(p.threads * bytes);
    parallel_for(p.threads, p.batch * p.q_len, [&](int64_t t, int thread) {
      Pieces at{(uintptr_t)(scratch + thread * bytes)};
      query(t, mine(at));
    });
  }
};

template <class S> struct Gradients {
  using T = Compute<S>;
  using Mm = Gemm<T>;
  using Rows = NamedRows<S>;
  using Block = LatentBlock<T>;
  static constexpr int64_t kKeys = Block::kKeys, kHalf = Block::kHalf, kPanel = Block::kPanel;

  const IndexerLossBackwardParams& p;
  const SparseShape shape = rows_shape(p);
  const int64_t key_stride[3] = {p.k_stride[0], p.k_stride[1], 0};
  const KeyRows<S> index_keys{shape, (const S*)p.k, key_stride};
  const int64_t Hi = p.heads, Di = p.head_dim, K = p.slots, T_ = p.k_len;
  const Rows index{Hi, Di};
  const int64_t ldo = Block::ld_o(Di), C = round_up(Di, 32), list_size = round_up(K + 1, 16), pair_rows = round_up(K, kLine) + kLine;
  const int64_t fit = kChunkBytes / (index.panels * pair_rows * 2 * W * (int64_t)sizeof(T));
  const int64_t chunk = fit < 8 ? 8 : least(fit, 128);

  struct Mine {
    T *copy, *q, *across;
    float *s, *probs, *work, *dq, *di;
    int32_t* order;
  };
  Mine mine(Pieces& x) const {
    Mine m;
    m.copy = x.take<T>(kKeys * index.width), m.q = x.take<T>(index.q_size()), m.across = x.take<T>(2 * W * C);
    m.s = x.take<float>(most(index.block_floats(), kPairs * kSumColumns));
    m.probs = x.take<float>(index.panels * Block::kProbs), m.work = x.take<float>(Block::kWork);
    m.dq = x.take<float>(index.panels * kPanel * ldo), m.di = x.take<float>(list_size + kLine), m.order = x.take<int32_t>(2 * list_size);
    return m;
  }

  // The named keys in ascending order with their dI -> how many.
  int64_t named(int64_t t, int32_t* list, const Mine& m) const {
    const int32_t* slots = p.indices + t * K;
    const float* kept = p.kept + t * K;
    bool ascending;
    const int64_t count = named_keys(slots, K, T_, list, &ascending);
    if (!ascending) sort_keys(list, m.order, count);
    for (int64_t slot = 0, k = 0; slot < K; ++slot) {
      if (slots[slot] < 0 || slots[slot] >= T_) continue;
      m.di[ascending ? k++ : below(list, count, slots[slot])] = kept[slot] * p.dloss[t];
    }
    for (int64_t k = count; k < count + kLine; ++k) m.di[k] = 0.0f;
    return count;
  }

  void query(int64_t t, int64_t place, const Pairs<T>& kept, const Mine& m) const {
    const int64_t b = t / p.q_len;
    int32_t* list = kept.lists + place * list_size;
    const int64_t count = named(t, list, m);
    kept.counts[place] = count;
    const S* q = (const S*)p.q + t * Hi * Di;
    index.pack(q, m.q);
    for (int64_t h = 0; h < Hi; ++h) p.dw[t * Hi + h] = 0.0f;
    bool sees[64];
    for (bool& any : sees) any = true;
    for (int64_t k = 0; k < count; k += kKeys) {
      typename Block::Keys lines[kKeys / kLine];
      const int64_t n = least(kKeys, count - k), line_count = index.products(index_keys, b, 0, list + k, n, count - k, m.q, m.copy, lines, m.s);
      for (int64_t half = 0; half < 2 * index.panels; half += 2) {
        vf w[2], dw[2] = {};
        for (int u = 0; u < 2; ++u) w[u] = load_n(p.w + t * Hi + (half + u) * W, (int)most(0, least(W, Hi - (half + u) * W)));
        for (int64_t i = 0; i < n; i += kLine) {
          vf dz[2][kLine], sum[2][4] = {};
          for (int u = 0; u < 2; ++u) {
            const float* s = m.s + (half + u) * kHalf + i * W;
            const bool none = (half + u) * W >= Hi;
            for (int64_t j = 0; j < kLine; ++j) {
              const vf z = none ? zero() : load(s + j * W), di = splat(m.di[k + i + j]);
              const vi in = index.valid(half + u);
              sum[u][j % 4] = fma(di, i + j < n ? max(zero(), z) : zero(), sum[u][j % 4]);
              dz[u][j] = select((z <= 0.0f) | ~in, zero(), i + j < n ? di * w[u] : zero());
            }
            dw[u] += (sum[u][0] + sum[u][1]) + (sum[u][2] + sum[u][3]);
            put_left(dz[u], (T*)(m.probs + half / 2 * Block::kProbs) + u * kKeys * W + i * W);
          }
          put_pairs(dz[0], dz[1], least(kLine, n - i), kept.row(place, half / 2, k + i));
        }
        for (int u = 0; u < 2; ++u) {
          const int some = (int)most(0, least(W, Hi - (half + u) * W));
          float* to = p.dw + t * Hi + (half + u) * W;
          if (some) store_n(to, load_n(to, some) + dw[u], some);
        }
      }
      GatherAhead<S> none;
      for (int64_t h = 0; h < Hi; h += 64 * kPanel)
        Block::values(lines, line_count, least(64 * kPanel, Hi - h), sees, Di, m.probs + h / kPanel * Block::kProbs, m.dq + h * ldo, ldo, k == 0, m.work, none);
    }
    for (int64_t h = 0; h < Hi; ++h) {
      S* to = (S*)p.dq + (t * Hi + h) * Di;
      if (count) Block::unfold(m.dq + h * ldo, Di);
      for (int64_t d = 0; d < Di; d += W) store_n(to + d, count ? load(m.dq + h * ldo + d) : zero(), (int)least(W, Di - d));
    }
    for (int64_t part = 0; part < index.panels; ++part) {  // q of 2W heads
      memset((void*)m.across, 0, 2 * W * C * sizeof(T));
      for (int64_t i = 0; i < least(2 * W, Hi - part * 2 * W); ++i)
        for (int64_t d = 0; d < Di; d += W) {
          const int n = (int)least(W, Di - d);
          store_n(m.across + i * C + d, load_n(q + (part * 2 * W + i) * Di + d, n), n);
        }
      Mm::pack_b_t(m.across, C, C, 2 * W, kept.matrix(place, part));
    }
  }

  void run() const {
    Pieces measure{0};
    mine(measure);
    const int64_t bytes = round_up((int64_t)measure.at, 4096), parts = (C + kSumColumns - 1) / kSumColumns;
    Scratch<char> scratch(p.threads * bytes);
    Scratch<float> sums(T_ * C + 1);
    Scratch<int32_t> lists(chunk * list_size);
    Scratch<int64_t> counts(chunk);
    Scratch<T> pairs(chunk * index.panels * pair_rows * 2 * W), across(chunk * index.panels * C * 2 * W);
    const Pairs<T> kept{list_size, index.panels, pair_rows, C, lists, counts, pairs, across};
    const auto scratch_of = [&](int thread) {
      Pieces at{(uintptr_t)(scratch + thread * bytes)};
      return mine(at);
    };
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t done = 0; done < p.q_len; done += chunk) {
        const int64_t n = least(chunk, p.q_len - done);
        parallel_for(p.threads, n, [&](int64_t i, int thread) { query(b * p.q_len + done + i, i, kept, scratch_of(thread)); });
        parallel_for(p.threads, (T_ + kSumKeys - 1) / kSumKeys * parts, [&](int64_t i, int thread) {
          const int64_t key = i / parts * kSumKeys, end = least(T_, key + kSumKeys);
          const int64_t column = i % parts * kSumColumns, columns = least(kSumColumns, C - column);
          if (done == 0)
            for (int64_t j = key; j < end; ++j) memset(sums + j * C + column, 0, columns * sizeof(float));
          kept.collect(n, key, end, column, columns, scratch_of(thread).s, sums);
          if (done + chunk < p.q_len) return;
          for (int64_t j = key; j < end; ++j) put_sums(sums + j * C, column, columns, (S*)p.dk + (b * T_ + j) * Di, 0, Di);
        });
      }
  }
};

}  // namespace

void sparse_indexer_loss(const IndexerLossParams& p) {
  switch (p.dtype) {
    case DType::float32: return Loss<float>{p}.run();
    case DType::bfloat16: return Loss<bf16>{p}.run();
    case DType::float16: return Loss<f16>{p}.run();
  }
}
void sparse_indexer_loss_backward(const IndexerLossBackwardParams& p) {
  switch (p.dtype) {
    case DType::float32: return Gradients<float>{p}.run();
    case DType::bfloat16: return Gradients<bf16>{p}.run();
    case DType::float16: return Gradients<f16>{p}.run();
  }
}

}  // namespace tk::TK_ISA
