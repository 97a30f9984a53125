// The keys that an indexer chooses: I[t, s] = k_scale[s] sum_j w[t, j] relu(q[t, j] . k[s]), of each query the top_k largest among
// the keys it sees, ties to the lower index, in ascending order. Scores are never stored beyond a block.
//
// A block of kKeyBlock keys is packed once for up to kQueries queries; the products of some queries' heads with it are one matrix
// product, heads down, keys across, so that relu, weights and the sum over heads run key by key in the lanes. A query keeps the
// candidates that beat its threshold, in order of position; when their buffer is full the top_k largest stay and the smallest of
// those becomes the threshold. What is kept is the same however the keys are cut, so few queries are spread over ranges of keys and the
// ranges' candidates are put together at the end.
//
// Hi index heads, Di index dim.
#include "indexer.h"
#include "indexer_heads.h"
#include "scratch_pieces.h"
#include "select_keys.h"
#include "sparse_kernels.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kQueries = 64;       // of an item
constexpr int64_t kLeastRange = 2048;  // keys
constexpr int64_t kLeastSlack = 1024;  // candidates beyond top_k

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// What a query has of the keys so far, in ascending order of position.
struct Candidates {
  uint32_t* keys;      // [capacity + W] score_key of each
  int32_t* positions;  // [capacity + W]
  int64_t count = 0;
  uint32_t threshold = 0;  // what comes later must reach it

  // Only the k largest stay.
  void prune(int64_t k, uint32_t* copy) {
    if (count <= k) return;
    memcpy(copy, keys, count * sizeof(uint32_t));
    const Selection s = kth_key(copy, count, k);
    int64_t kept = 0, equal = s.equal;
    const vu key = vu{} + s.key;
    for (int64_t i = 0; i < count; i += W) {
      vu x, at;
      memcpy(&x, keys + i, sizeof x);
      memcpy(&at, positions + i, sizeof at);
      const uint32_t valid = count - i >= W ? (1u << W) - 1 : (1u << (count - i)) - 1;
      uint32_t keep = bits_of((vi)(x > key)) & valid, same = bits_of((vi)(x == key)) & valid;
      for (; same && equal; same &= same - 1, --equal) keep |= same & -same;
      put_lanes(keep, x, keys + kept);
      kept += put_lanes(keep, at, (uint32_t*)positions + kept);
    }
    count = kept;
    threshold = s.key + 1;  // an equal score at a later position loses; no score's key is 2^32 - 1
  }
};

template <class S, class Kv> struct Indexer {
  using T = FastCompute<S>;
  using Copy = Compute<S>;
  using Mm = Gemm<T>;
  static constexpr bool kParts = !same_type<T, Copy>;  // products of sums of three bf16, which know no infinity
  const IndexerTopkParams& p;
  const int64_t Hi = p.heads, Di = p.head_dim, top_k = p.top_k;
  const HeadRows<T> index{Hi, Di};
  const int64_t capacity = top_k + most(top_k, kLeastSlack) + kKeyBlock;

  int64_t keys_of(int64_t b) const {
    if (p.cu_seqlens_k) return p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
    return p.seqlens ? p.seqlens[b] : p.k_len;
  }
  int64_t first_query(int64_t b) const { return p.cu_seqlens_q ? p.cu_seqlens_q[b] : b * p.q_len; }
  int64_t queries_of(int64_t b) const { return p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b] : p.q_len; }
  // Keys that query i of sequence b sees.
  int64_t limit(int64_t b, int64_t i) const {
    const int64_t n = keys_of(b);
    return p.causal ? most(0, n - queries_of(b) + i + 1) : n;
  }
  template <class X> const X* place(const X* base, const int64_t* stride, int64_t b, int64_t j) const {
    if (p.block_table) return base + p.block_table[b * p.max_pages + j / p.page_size] * stride[0] + j % p.page_size * stride[1];
    return base + (p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0) * stride[1] + b * stride[0] + j * stride[1];
  }

  static void read_key(const S* row, int64_t n, Copy* to) { read_latent(row, n, to); }
  static void read_key(const fp8* row, int64_t n, Copy* to) {
    int64_t d = 0;
    for (; d + W <= n; d += W) store(to + d, load_e4m3((const uint8_t*)row + d));
    if (d == n) return;
    uint8_t tail[W] = {};
    memcpy(tail, row + d, n - d);
    store_n(to + d, load_e4m3(tail), (int)(n - d));
  }
  // Keys [j, j + n) as right operands.
  void pack(int64_t b, int64_t j, int64_t n, Copy* copy, T* packed) const {
    if constexpr (same_type<S, Kv>)
      if (!p.block_table) return Mm::pack_b(place((const S*)p.k, p.k_stride, b, j), p.k_stride[1], n, Di, packed);
    for (int64_t i = 0; i < n; ++i) read_key(place((const Kv*)p.k, p.k_stride, b, j + i), Di, copy + i * Di);
    Mm::pack_b(copy, Di, n, Di, packed);
  }

  // A score that came out as NaN, of query t with key j, without parts: an infinity gives one there that it need not be.
  float plain_score(int64_t b, int64_t t, int64_t j, Copy* copy) const {
    read_key(place((const Kv*)p.k, p.k_stride, b, j), Di, copy);
    float sum = 0.0f;
    for (int64_t h = 0; h < Hi; ++h) {
      const S* q = (const S*)p.q + (t * Hi + h) * Di;
      vf z = zero();
      for (int64_t d = 0; d < Di; d += W) z = fma(load_n(q + d, (int)least(W, Di - d)), load_n(copy + d, (int)least(W, Di - d)), z);
      const float product = reduce_add(z);
      sum += p.w[t * Hi + h] * (product <= 0.0f ? 0.0f : product);
    }
    return sum;
  }

  struct Mine {
    T *packed, *q;
    Copy* copy;
    float *product, *scales;
    uint32_t *prune, *keys;
    int32_t* positions;
  };
  Mine mine(Pieces& x) const {
    Mine m;
    m.packed = x.take<T>(Mm::size_b(kKeyBlock, Di)), m.q = x.take<T>(index.size(kQueries)), m.copy = x.take<Copy>(kKeyBlock * Di);
    m.product = x.take<float>(index.product_size()), m.scales = x.take<float>(kKeyBlock), m.prune = x.take<uint32_t>(capacity + W);
    m.keys = x.take<uint32_t>(kQueries * (capacity + W)), m.positions = x.take<int32_t>(kQueries * (capacity + W));
    return m;
  }
  int64_t scratch_bytes() const {
    Pieces x{0};
    mine(x);
    return round_up((int64_t)x.at, 4096);
  }

  // Scores of query t with the n keys from j on -> candidates; product [Hi, kLdc]. What lies past n is not valid.
  void take(int64_t b, int64_t t, const float* product, int64_t j, int64_t n, Candidates& x, const Mine& m) const {
    for (int64_t c = 0; c < n; c += 4 * W) {
      vf sum[4];
      weigh(product + c, p.w + t * Hi, Hi, sum);
      const vu least_key = vu{} + x.threshold;
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const int64_t left = n - c - u * W;
        if (left <= 0) break;
        const uint32_t valid = left >= W ? (1u << W) - 1 : (1u << left) - 1;
        if constexpr (kParts)
          for (uint32_t bad = bits_of((vi)(sum[u] != sum[u])) & valid; bad; bad &= bad - 1)
            sum[u][__builtin_ctz(bad)] = plain_score(b, t, j + c + u * W + __builtin_ctz(bad), m.copy);
        if (p.k_scale) sum[u] *= load(m.scales + c + u * W);
        const vu key = score_key(sum[u]);
        const uint32_t keep = bits_of((vi)(key >= least_key)) & valid;
        if (!keep) continue;
        put_lanes(keep, key, x.keys + x.count);
        x.count += put_lanes(keep, (vu)(lane_index() + (int32_t)(j + c + u * W)), (uint32_t*)x.positions + x.count);
      }
    }
    if (x.count > capacity - kKeyBlock) x.prune(top_k, m.prune);
  }

  // Queries [i, i + n) of sequence b over keys [from, to): their candidates, top_k at most.
  void choose(int64_t b, int64_t i, int64_t n, int64_t from, int64_t to, const Mine& m, Candidates* x) const {
    const int64_t first = first_query(b) + i;
    for (int64_t r = 0; r < n; ++r) x[r] = {m.keys + r * (capacity + W), m.positions + r * (capacity + W)};
    index.pack((const S*)p.q + first * Hi * Di, Hi * Di, n, (S*)nullptr, m.q);
    to = least(to, limit(b, i + n - 1));
    for (int64_t j = from; j < to; j += kKeyBlock) {
      const int64_t count = least(kKeyBlock, to - j);
      pack(b, j, count, m.copy, m.packed);
      if (p.k_scale)
        for (int64_t u = 0; u < count; ++u) m.scales[u] = *place(p.k_scale, p.k_scale_stride, b, j + u);
      for (int64_t r = 0; r < n; r += index.unit) {
        const int64_t some = least(index.unit, n - r);
        if (limit(b, i + r + some - 1) <= j) continue;
        index.multiply(m.q, r, some, m.packed, count, m.product);
        for (int64_t s = r; s < r + some; ++s)
          take(b, first + s, m.product + (s - r) * Hi * kLdc, j, least(count, limit(b, i + s) - j), x[s], m);
      }
    }
    for (int64_t r = 0; r < n; ++r) x[r].prune(top_k, m.prune);
  }
  void write(const Candidates& x, int32_t* to) const {
    memcpy(to, x.positions, x.count * sizeof(int32_t));
    for (int64_t c = x.count; c < top_k; ++c) to[c] = -1;
  }

  void run() const {
    int64_t N = 0, longest = 0;
    for (int64_t b = 0; b < p.batch; ++b) N += queries_of(b), longest = most(longest, queries_of(b) ? keys_of(b) : 0);
    if (N == 0) return;
    const int64_t share = round_up((N + 4 * p.threads - 1) / (4 * p.threads), index.unit), queries = most(1, least(kQueries, share));
    Scratch<int64_t> before(p.batch + 1);  // items of the sequences before b
    before[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) before[b + 1] = before[b] + (queries_of(b) + queries - 1) / queries;
    const int64_t items = before[p.batch], most_ranges = most(1, longest / kLeastRange);
    const int64_t ranges = items >= 2 * p.threads ? 1 : least(most_ranges, (2 * p.threads + items - 1) / items);
    const int64_t range = round_up((longest + ranges - 1) / ranges, kKeyBlock), bytes = scratch_bytes();
    Scratch<char> scratch(p.threads * bytes);
    const auto mine_of = [&](int thread) {
      Pieces x{(uintptr_t)(scratch + thread * bytes)};
      return mine(x);
    };
    struct Part {
      int64_t b, i, n;
    };
    const auto part = [&](int64_t item) {
      int64_t b = 0;
      while (before[b + 1] <= item) ++b;
      const int64_t i = (item - before[b]) * queries;
      return Part{b, i, least(queries, queries_of(b) - i)};
    };
    if (ranges == 1)
      return parallel_for(p.threads, items, [&](int64_t item, int thread) {
        const Part x = part(item);
        Candidates found[kQueries];
        choose(x.b, x.i, x.n, 0, keys_of(x.b), mine_of(thread), found);
        for (int64_t r = 0; r < x.n; ++r) write(found[r], p.indices + (first_query(x.b) + x.i + r) * top_k);
      });

    Scratch<uint32_t> keys(N * ranges * top_k + W);
    Scratch<int32_t> positions(N * ranges * top_k + W);
    Scratch<int64_t> counts(N * ranges);
    parallel_for(p.threads, items * ranges, [&](int64_t item, int thread) {
      const Part x = part(item / ranges);
      const int64_t at = item % ranges;
      Candidates found[kQueries];
      choose(x.b, x.i, x.n, at * range, least(keys_of(x.b), (at + 1) * range), mine_of(thread), found);
      for (int64_t r = 0; r < x.n; ++r) {
        const int64_t to = (first_query(x.b) + x.i + r) * ranges + at;
        memcpy(keys + to * top_k, found[r].keys, found[r].count * sizeof(uint32_t));
        memcpy(positions + to * top_k, found[r].positions, found[r].count * sizeof(int32_t));
        counts[to] = found[r].count;
      }
    });
    Scratch<uint32_t> merged(p.threads * 3 * (ranges * top_k + W));
    parallel_for(p.threads, N, [&](int64_t t, int thread) {
      uint32_t* at = merged + thread * 3 * (ranges * top_k + W);
      Candidates x{at, (int32_t*)(at + ranges * top_k + W)};
      for (int64_t r = t * ranges; r < (t + 1) * ranges; x.count += counts[r++]) {
        memcpy(x.keys + x.count, keys + r * top_k, counts[r] * sizeof(uint32_t));
        memcpy(x.positions + x.count, positions + r * top_k, counts[r] * sizeof(int32_t));
      }
      x.prune(top_k, at + 2 * (ranges * top_k + W));
      write(x, p.indices + t * top_k);
    });
  }
};

template <class S> void run(const IndexerTopkParams& p) {
  if (p.quantised) return Indexer<S, fp8>{p}.run();
  Indexer<S, S>{p}.run();
}

}  // namespace

void indexer_topk(const IndexerTopkParams& p) {
  switch (p.dtype) {
    case DType::float32: return run<float>(p);
    case DType::bfloat16: return run<bf16>(p);
    case DType::float16: return run<f16>(p);
  }
}

}  // namespace tk::TK_ISA
