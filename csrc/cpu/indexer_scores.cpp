// The indexer's dense scores I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]), -inf where t does not see s, and their gradients.
#include "indexer_dense.h"
#include "sparse_kernels.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kQueries = 64;  // of an item

template <class S> void forward(const IndexerScoresParams& p) {
  const DenseScores<S> scorer{p};
  const int64_t N = p.batch * p.q_len, T = p.k_len, step = round_up(T, kKeyBlock) + 16;
  const int64_t share = round_up((N + 4 * p.threads - 1) / (4 * p.threads), scorer.index.unit);
  const int64_t fit = (int64_t(8) << 20) / (step * (int64_t)sizeof(float));  // rows are written whole: 8 MiB of them
  const int64_t queries = least(least(kQueries, share), fit < 1 ? 1 : fit), items = (p.q_len + queries - 1) / queries;
  const auto pieces = [&](Pieces& x, float** rows) {
    *rows = x.take<float>(queries * step);
    return scorer.mine(x, queries);
  };
  Pieces measure{0};
  float* rows;
  pieces(measure, &rows);
  const int64_t bytes = round_up((int64_t)measure.at, 4096);
  Scratch<char> scratch(p.threads * bytes);
  parallel_for(p.threads, p.batch * items, [&](int64_t x, int thread) {
    const int64_t b = x / items, i = x % items * queries, n = least(queries, p.q_len - i);
    Pieces at{(uintptr_t)(scratch + thread * bytes)};
    float* rows;
    const typename DenseScores<S>::Mine m = pieces(at, &rows);
    scorer.run(b, i, n, m, rows, step);
    for (int64_t r = 0; r < n; ++r) {
      float* to = p.scores + (b * p.q_len + i + r) * T;
      const int64_t seen = least(T, keys_seen(p, i + r));
      memcpy(to, rows + r * step, seen * sizeof(float));
      for (int64_t j = seen; j < T; ++j) to[j] = -INFINITY;
    }
  });
}

struct GivenGradient {
  struct Mine {};
  const IndexerScoresBackwardParams& p;
  Mine mine(Pieces&) const { return {}; }
  int64_t parts() const { return 0; }
  int64_t size() const { return 0; }
  template <class T> void pack(int64_t, int64_t, int64_t, int64_t, const Mine&, T*) const {}
  template <class T> void prepare(int64_t, int64_t, int64_t, int64_t, int64_t, const T*, const Mine&) const {}
  void gradient(int64_t b, int64_t i, int64_t r, const float*, int64_t j, int64_t valid, const Mine&, float* di) const {
    memcpy(di, p.dscores + (b * p.q_len + i + r) * p.k_len + j, valid * sizeof(float));
  }
};

template <class S> void backward(const IndexerScoresBackwardParams& p) {
  DenseGradients<S, GivenGradient>{p, p, GivenGradient{p}}.run();
}

}  // namespace

void indexer_scores(const IndexerScoresParams& p) {
  switch (p.dtype) {
    case DType::float32: return forward<float>(p);
    case DType::bfloat16: return forward<bf16>(p);
    case DType::float16: return forward<f16>(p);
  }
}
void indexer_scores_backward(const IndexerScoresBackwardParams& p) {
  switch (p.dtype) {
    case DType::float32: return backward<float>(p);
    case DType::bfloat16: return backward<bf16>(p);
    case DType::float16: return backward<f16>(p);
  }
}

}  // namespace tk::TK_ISA
