// The indexer over all keys that a query sees: scores forward, and gradients from dI forward to q, k and w.
//
//   z = q[h] . k[s],  I = sum_h w[h] relu(z),  dz = dI w[h] 1[z > 0]
//   dw[h] = sum_s dI relu(z),  dq[h] = sum_s dz k[s],  dk[s] = sum over queries and heads of dz q[h]
//
// The gradients take a chunk of queries at a time, whose size depends on the shapes alone. An item of work is the chunk and a split of
// keys: it adds to the sums of its own keys, and what it adds to the chunk's queries is put together in the order of the splits. So every
// sum has one order whatever the threads and the batch. Memory beside the results: the sums of k and at most kMostSplits parts of a chunk,
// for as many sequences as keep the threads busy.
#pragma once

#include "indexer.h"
#include "indexer_heads.h"
#include "scratch_pieces.h"

namespace tk::TK_ISA {

// Keys that query i of a sequence sees.
inline int64_t keys_seen(const IndexerShape& p, int64_t i) {
  const int64_t n = p.causal ? p.k_len - p.q_len + i + 1 : p.k_len;
  return n < 0 ? 0 : n;
}
template <class S> inline const S* index_query(const IndexerShape& p, int64_t b, int64_t i) {
  return (const S*)p.q + (b * p.q_len + i) * p.heads * p.head_dim;
}
template <class S> inline const S* index_key(const IndexerShape& p, int64_t b, int64_t j) {
  return (const S*)p.k + b * p.k_stride[0] + j * p.k_stride[1];
}

// Scores of queries [i, i + n) of sequence b with all keys they see -> rows `step` apart, written in whole blocks of keys.
template <class S> struct DenseScores {
  using T = FastCompute<S>;
  using Mm = Gemm<T>;
  const IndexerShape& p;
  const HeadRows<T> index{p.heads, p.head_dim};

  struct Mine {
    T *q, *keys;
    float* product;
  };
  Mine mine(Pieces& x, int64_t queries) const {
    Mine m;
    m.q = x.take<T>(index.size(queries));
    m.keys = x.take<T>(Mm::size_b(kKeyBlock, p.head_dim));
    m.product = x.take<float>(index.product_size());
    return m;
  }
  void run(int64_t b, int64_t i, int64_t n, const Mine& m, float* scores, int64_t step) const {
    index.pack(index_query<S>(p, b, i), p.heads * p.head_dim, n, (S*)nullptr, m.q);
    const int64_t end = keys_seen(p, i + n - 1);
    for (int64_t j = 0; j < end; j += kKeyBlock) {
      const int64_t count = least(kKeyBlock, end - j);
      Mm::pack_b(index_key<S>(p, b, j), p.k_stride[1], count, p.head_dim, m.keys);
      for (int64_t r = 0; r < n; r += index.unit) {
        const int64_t some = least(index.unit, n - r);
        if (keys_seen(p, i + r + some - 1) <= j) continue;
        index.multiply(m.q, r, some, m.keys, count, m.product);
        for (int64_t s = r; s < r + some; ++s)
          for (int64_t c = 0; c < count; c += 4 * W) {
            vf sum[4];
            weigh(m.product + (s - r) * p.heads * kLdc + c, p.w + (b * p.q_len + i + s) * p.heads, p.heads, sum);
            for (int u = 0; u < 4; ++u) store(scores + s * step + j + c + u * W, sum[u]);
          }
      }
    }
  }
};

// Source: what gives dI. mine(Pieces&) -> Source::Mine; size() and pack(b, i, n, part, to), part < parts(): operands of a chunk in T;
// prepare(b, i, n, j, count, packed, mine): what a block of keys needs; gradient(b, i, r, z, j, valid, mine, di): of query i + r.
template <class S, class Source> struct DenseGradients {
  using T = FastCompute<S>;
  using Mm = Gemm<T>;
  static constexpr int64_t kRows = 256, kChunkRows = 1024, kMostQueries = 64, kLeastSplit = 512, kMostSplits = 32;

  static HeadRows<T> rows_of(const IndexerShape& p) {
    return {p.heads, p.head_dim, least(kRows, round_up(kMostQueries * p.heads, Mm::MR))};
  }
  // Queries of a chunk, a multiple of a unit.
  static int64_t chunk_of(const IndexerShape& p) {
    return round_up(p.heads * kMostQueries > kChunkRows ? (kChunkRows + p.heads - 1) / p.heads : kMostQueries, rows_of(p).unit);
  }

  const IndexerShape& p;
  const IndexerGradients& to;
  const Source& source;
  const int64_t Hi = p.heads, Di = p.head_dim, S_ = p.q_len, T_ = p.k_len;
  const HeadRows<T> index = rows_of(p);
  const int64_t ld = round_up(Di, 32);
  const int64_t chunk = chunk_of(p);
  const int64_t split = round_up(T_ > kLeastSplit * kMostSplits ? (T_ + kMostSplits - 1) / kMostSplits : kLeastSplit, kKeyBlock);
  const int64_t splits = (T_ + split - 1) / split;
  const int64_t units = (chunk + index.unit - 1) / index.unit;
  const int64_t across_size = Mm::size_b(Di, round_up(index.unit * Hi, Mm::KU));  // q of a unit as the right operand of dk

  struct Mine {
    T *keys, *keys_across, *left, *left_across;
    float *product, *di, *dw;
    typename Source::Mine source;
  };
  Mine mine(Pieces& x) const {
    Mine m;
    m.keys = x.take<T>(Mm::size_b(kKeyBlock, Di)), m.keys_across = x.take<T>(Mm::size_b(Di, kKeyBlock));
    m.left = x.take<T>(Mm::size_a(index.rows, kKeyBlock)), m.left_across = x.take<T>(Mm::size_a(kKeyBlock, round_up(index.rows, Mm::KU)));
    m.product = x.take<float>(index.product_size()), m.di = x.take<float>(kLdc), m.dw = x.take<float>(chunk * Hi * W);
    m.source = source.mine(x);
    return m;
  }

  // What the items of a chunk of a sequence share.
  struct Chunk {
    T *q, *across, *operands;
    float *dq, *dw;  // [splits, chunk * Hi, ld], [splits, chunk * Hi]
    float* dk;       // [T, ld], all chunks
  };
  Chunk shared(Pieces& x) const {
    Chunk c;
    c.q = x.take<T>(index.size(chunk)), c.across = x.take<T>(units * across_size), c.operands = x.take<T>(source.size());
    c.dq = x.take<float>(splits * chunk * Hi * ld), c.dw = x.take<float>(splits * chunk * Hi), c.dk = x.take<float>(T_ * ld);
    return c;
  }

  // z of one query's heads [Hi, kLdc] -> dz; dw [Hi, W] grows. `width` keys, zeros past those that count.
  void heads(float* z, const float* di, const float* w, int64_t width, float* dw) const {
    for (int64_t h = 0; h < Hi; ++h, z += kLdc) {
      const vf weight = splat(w[h]);
      vf sum[2] = {load(dw + h * W), zero()};
      for (int64_t c = 0; c < width; c += 2 * W)
#pragma GCC unroll 2
        for (int u = 0; u < 2; ++u) {
          const vf x = load(z + c + u * W), g = load(di + c + u * W);
          sum[u] = fma(g, select(g == 0.0f, zero(), max(zero(), x)), sum[u]);
          store(z + c + u * W, select(x <= 0.0f, zero(), g * weight));
        }
      store(dw + h * W, sum[0] + sum[1]);
    }
  }

  void item(int64_t b, int64_t i, int64_t n, int64_t from, int64_t to_key, const Chunk& c, float* dq, float* dw, const Mine& m) const {
    memset(m.dw, 0, n * Hi * W * sizeof(float));
    for (int64_t j = from; j < to_key; j += kKeyBlock) {
      const int64_t count = least(kKeyBlock, to_key - j), width = round_up(count, 2 * W);
      Mm::pack_b(index_key<S>(p, b, j), p.k_stride[1], count, Di, m.keys);
      Mm::pack_b_t(index_key<S>(p, b, j), p.k_stride[1], Di, count, m.keys_across);
      source.prepare(b, i, n, j, count, c.operands, m.source);
      for (int64_t r = 0; r < n; r += index.unit) {
        const int64_t some = least(index.unit, n - r);
        float* part = dq + r * Hi * ld;
        if (keys_seen(p, i + r + some - 1) <= j) {
          if (j == from) memset(part, 0, some * Hi * ld * sizeof(float));
          continue;
        }
        index.multiply(c.q, r, some, m.keys, count, m.product);
        for (int64_t s = 0; s < some; ++s) {
          const int64_t seen = keys_seen(p, i + r + s) - j, valid = seen < 0 ? 0 : least(count, seen);
          float* z = m.product + s * Hi * kLdc;
          source.gradient(b, i, r + s, z, j, valid, m.source, m.di);
          for (int64_t k = valid; k < width; ++k) m.di[k] = 0.0f;
          heads(z, m.di, p.w + (b * S_ + i + r + s) * Hi, width, m.dw + (r + s) * Hi * W);
        }
        Mm::pack_a(m.product, kLdc, some * Hi, count, m.left);
        Mm::gemm(some * Hi, Di, count, m.left, m.keys_across, part, ld, j > from);
        Mm::pack_a_t(m.product, kLdc, count, some * Hi, m.left_across);
        Mm::gemm(count, Di, some * Hi, m.left_across, c.across + r / index.unit * across_size, c.dk + j * ld, ld, true);
      }
    }
    for (int64_t r = 0; r < n * Hi; ++r) dw[r] = reduce_add(load(m.dw + r * W));
  }

  void run() const {
    const int64_t group = least(p.batch, (4 * p.threads + splits - 1) / splits);  // sequences at a time
    Pieces measure{0};
    shared(measure);
    const int64_t shared_bytes = round_up((int64_t)measure.at, 4096);
    measure = {0};
    mine(measure);
    const int64_t bytes = round_up((int64_t)measure.at, 4096);
    Scratch<char> common(group * shared_bytes), scratch(p.threads * bytes);
    const auto common_of = [&](int64_t b) {
      Pieces x{(uintptr_t)(common + b * shared_bytes)};
      return shared(x);
    };
    for (int64_t first = 0; first < p.batch; first += group) {
      const int64_t B = least(group, p.batch - first);
      for (int64_t i = 0; i < S_; i += chunk) {
        const int64_t n = least(chunk, S_ - i), seen = keys_seen(p, i + n - 1), used = (least(T_, seen) + split - 1) / split;
        const bool begin = i == 0, last = i + chunk >= S_;
        const int64_t parts = 1 + source.parts();
        parallel_for(p.threads, B * parts, [&](int64_t x, int thread) {
          const int64_t b = x / parts, part = x % parts;
          const Chunk c = common_of(b);
          if (part > 0) {
            Pieces at{(uintptr_t)(scratch + thread * bytes)};
            return source.pack(first + b, i, n, part - 1, mine(at).source, c.operands);
          }
          index.pack(index_query<S>(p, first + b, i), Hi * Di, n, (S*)nullptr, c.q);
          for (int64_t r = 0; r < n; r += index.unit)
            Mm::pack_b_t(index_query<S>(p, first + b, i + r), Di, Di, least(index.unit, n - r) * Hi, c.across + r / index.unit * across_size);
        });
        parallel_for(p.threads, B * splits, [&](int64_t x, int thread) {
          const int64_t b = x / splits, s = x % splits, from = s * split, end = least(T_, from + split);
          const Chunk c = common_of(b);
          if (begin) memset(c.dk + from * ld, 0, (end - from) * ld * sizeof(float));
          Pieces at{(uintptr_t)(scratch + thread * bytes)};
          if (s < used)
            item(first + b, i, n, from, least(end, seen), c, c.dq + s * chunk * Hi * ld, c.dw + s * chunk * Hi, mine(at));
          if (!last) return;
          for (int64_t j = from; j < end; ++j) write(c.dk + j * ld, (S*)to.dk + ((first + b) * T_ + j) * Di);
        });
        parallel_for(p.threads, B * n, [&](int64_t x, int) {
          const int64_t b = x / n, r = x % n;
          const Chunk c = common_of(b);
          for (int64_t h = 0; h < Hi; ++h) {
            const int64_t row = ((first + b) * S_ + i + r) * Hi + h;
            float *sum = c.dq + (r * Hi + h) * ld, dw = 0.0f;
            for (int64_t s = 0; s < used; ++s) dw += c.dw[(s * chunk + r) * Hi + h];
            if (used == 0) memset(sum, 0, ld * sizeof(float));
            for (int64_t s = 1; s < used; ++s)
              for (int64_t d = 0; d < ld; d += W) store(sum + d, load(sum + d) + load(sum + s * chunk * Hi * ld + d));
            write(sum, (S*)to.dq + row * Di);
            to.dw[row] = dw;
          }
        });
      }
    }
  }
  void write(const float* sum, S* row) const {
    for (int64_t d = 0; d < Di; d += W) store_n(row + d, load_n(sum + d, (int)least(W, Di - d)), (int)least(W, Di - d));
  }
};

}  // namespace tk::TK_ISA
