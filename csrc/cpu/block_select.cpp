// Which blocks of keys a query attends to.
//
// NSA:   p_cmp = e^(scale q . kc - lse) over the visible compressed keys, summed over the G heads of a group in their order,
//        p_slc[j] = sum of p_cmp[(l'/d) j + x] times the number of (m, n) with m - n = x, m < l'/d, n < l/d;
//        block 0, the query's own and the one before it, then the largest p_slc
// MoBA:  the query's own block, then the largest q . mean of the keys of a block that ended before it, each head by itself
// Ties go to the lower block, NaN comes last. Nothing of size [S, T]: a chunk of queries holds its probabilities.
//
// In float whatever the dtype, but for NSA's products in bf16, whose sums are float.
//
// B batch, S queries, H query heads, Hkv key heads, G = H / Hkv, D head dim, Tc compressed keys, n blocks of a query
#include "attention_split.h"
#include "block_sparse.h"
#include "sparse_kernels.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kChunkRows = 512;

struct Sequence {
  int64_t b, q, k, row, S, T, keys;  // batch index; first query and key in the tensors; first row of lse; queries; keys chosen from; k's
};

Sequence sequence_at(const BlockSelectParams& p, int64_t b) {
  const auto whole = [&](int64_t n) { return p.compress_block == 0 ? n : most(0, floor_div(n - p.compress_block, p.stride) + 1); };
  if (!p.cu_seqlens) {
    const int64_t n = p.seqlens ? p.seqlens[b] : p.k_len;
    return {b, 0, 0, b * p.q_len, p.q_len, n, whole(n)};
  }
  const int64_t first = p.cu_seqlens[b], n = p.cu_seqlens[b + 1] - first;
  return {0, first, p.compress_block ? p.cu_compressed[b] : first, first, n, n, whole(n)};
}

// The n blocks of `count` with the largest scores, `forced` (ascending, distinct, fewer than n) among them -> ascending, -1 behind.
// Scores, of whole vectors, are lost.
void choose(float* score, int64_t count, const int64_t* forced, int64_t forced_count, int64_t n, int32_t* out) {
  constexpr float kTaken = -INFINITY, kNan = -3e38f;
  for (int64_t j = 0; j < count; j += W) {
    const vf x = load(score + j), number = select(x == x, max(x, splat(kNan)), splat(kNan));
    store(score + j, select(lane_index() + (int32_t)j < (int32_t)count, number, splat(kTaken)));
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < forced_count && kept < n; ++i) score[forced[i]] = kTaken, out[kept++] = (int32_t)forced[i];
  while (kept < least(n, count)) {
    vf top = splat(kTaken);
    for (int64_t j = 0; j < count; j += W) top = max(load(score + j), top);
    const float best = reduce_max(top);
    int64_t j = 0;
    while (score[j] != best) ++j;
    score[j] = kTaken, out[kept++] = (int32_t)j;
  }
  for (int64_t i = 1; i < kept; ++i)  // ascending
    for (int64_t j = i; j > 0 && out[j - 1] > out[j]; --j) {
      const int32_t x = out[j];
      out[j] = out[j - 1], out[j - 1] = x;
    }
  for (; kept < n; ++kept) out[kept] = -1;
}

// Chunks of queries of all (sequence, key head) pairs: body(pair, first query, thread).
template <class F> void each_chunk(const BlockSelectParams& p, int64_t chunk, const F& body) {
  Scratch<int64_t> begin(p.batch + 1);
  begin[0] = 0;
  for (int64_t b = 0; b < p.batch; ++b) begin[b + 1] = begin[b] + (sequence_at(p, b).S + chunk - 1) / chunk;
  const int64_t all = begin[p.batch];
  parallel_for(p.threads, all * p.kv_heads, [&](int64_t i, int thread) {
    const int64_t g = i / all, c = all - 1 - i % all;  // of a pair the late queries, which see most, first
    int64_t b = 0;
    while (begin[b + 1] <= c) ++b;
    body(b, g, (c - begin[b]) * chunk, thread);
  });
}

// ------------------------------------------------------------------------------------------------ NSA

template <class St> struct ByProbability {
  using T = Compute<St>;
  using Mm = Gemm<T>;
  using Block = SplitBlock<T>;
  static constexpr int64_t kRows = Block::kRows;

  const BlockSelectParams& p;
  const int64_t H = p.heads, Hkv = p.kv_heads, G = H / Hkv, D = p.head_dim, k_split = Mm::size_b(kSplit, D);
  const int64_t step = p.block / p.stride, shifts = p.compress_block / p.stride;
  const Transform f{p};

  // Probabilities of a query: shifts - 1 zeros in front, and behind them as many as the last block's sum reads.
  int64_t row_floats(int64_t keys) const { return round_up(shifts + keys + step + shifts + W, 16); }

  int64_t visible(const Sequence& x, int64_t t) const {
    return least(x.keys, most(0, floor_div(t + x.T - x.S + 1 - p.compress_block, p.stride) + 1));
  }

  void run_chunk(const Sequence& x, int64_t g, int64_t t0, int64_t queries, const T* packed, int64_t ld, float* scratch) const {
    Block block(p, scratch);
    scratch += Block::floats(0);
    T* q = (T*)scratch;
    scratch += kRows * Mm::padded_k(D);
    float *probs = scratch, *score = probs + queries * ld;  // [queries, ld]; [ld]
    memset(probs, 0, queries * ld * sizeof(float));
    for (int64_t row = 0; row < queries * G; row += kRows) {
      const int64_t n = least(kRows, queries * G - row);
      for (int64_t i = 0; i < n; ++i)
        Products<T>::pack_row(at<St>(p.q, p.q_stride, x.b, x.q + t0 + (row + i) / G, g * G + (row + i) % G), i, D, q);
      const int64_t seen_by_last = visible(x, t0 + (row + n - 1) / G);
      for (int64_t first = 0; first < seen_by_last; first += kSplit) {
        const int64_t count = least(kSplit, x.keys - first);
        Range seen[kRows];
        for (int64_t i = 0; i < n; ++i) seen[i] = {0, least(count, most(0, visible(x, t0 + (row + i) / G) - first))};
        Unit u{0, 0, n, 0, 0};
        if (!block.bounds(u, seen, count)) continue;
        block.scores(u, q, packed + first / kSplit * k_split);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t t = (row + i) / G;
          add(block.s + i * kLd, seen[i].hi, p.lse[(x.row + t0 + t) * H + g * G + (row + i) % G], probs + t * ld + shifts - 1 + first);
        }
      }
    }
    for (int64_t t = 0; t < queries; ++t) {
      const int64_t position = t0 + t + x.T - x.S, count = position < 0 ? 0 : position / p.block + 1;
      for (int64_t j = 0; j < count; ++j) {
        const float* from = probs + t * ld + j * step;  // offset 1 - shifts
        float sum = 0.0f;
        for (int64_t o = 0; o < step + shifts - 1; ++o) sum += from[o] * (float)least(least(o + 1, step + shifts - 1 - o), least(step, shifts));
        score[j] = sum;
      }
      const int64_t own = count - 1;
      int64_t forced[3], many = 0;
      if (count > 0) forced[many++] = 0;
      if (own > 1) forced[many++] = own - 1;
      if (own > 0) forced[many++] = own;
      choose(score, count, forced, many, p.slots, p.indices + ((x.row + t0 + t) * Hkv + g) * p.slots);
    }
  }
  // to += e^(scale s - lse) of n scores
  void add(const float* s, int64_t n, float lse, float* to) const {
    constexpr bool kExact = sizeof(T) == 4;
    const float shift = kExact ? lse : lse * kLog2e;
    for (int64_t k = 0; k < n; k += W) {
      vf x = load(s + k);
      if (!f.plain) x = f.apply(x);
      x = kExact ? exp(fms(x, splat(f.factor), splat(shift))) : exp2_fast(fms(x, splat(f.c), splat(shift)));
      store_n(to + k, load_n(to + k, (int)least(W, n - k)) + x, (int)least(W, n - k));
    }
  }

  void run() const {
    const int64_t chunk = most(1, kChunkRows / G), pairs = p.batch * Hkv;
    int64_t longest = 0, blocks = 0;
    Scratch<int64_t> begin(p.batch + 1);  // splits of the sequences before
    begin[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence x = sequence_at(p, b);
      longest = most(longest, x.keys), blocks = most(blocks, x.T / p.block + 2);
      begin[b + 1] = begin[b] + (x.keys + kSplit - 1) / kSplit;
    }
    if (pairs == 0) return;
    Scratch<T> packed(begin[p.batch] * Hkv * k_split);
    parallel_for(p.threads, begin[p.batch] * Hkv, [&](int64_t i, int) {
      int64_t b = 0;
      while (begin[b + 1] * Hkv <= i) ++b;
      const Sequence x = sequence_at(p, b);
      const int64_t n = begin[b + 1] - begin[b], g = (i - begin[b] * Hkv) / n, first = (i - begin[b] * Hkv) % n * kSplit;
      Mm::pack_b(at<St>(p.k, p.k_stride, x.b, x.k + first, g), p.k_stride[1], least(kSplit, x.keys - first), D, packed + i * k_split);
    });
    const int64_t ld = most(row_floats(longest), round_up(blocks * step + step + 2 * shifts + W, 16));
    const int64_t floats = round_up(Block::floats(0) + kRows * Mm::padded_k(D) + (chunk + 1) * ld + blocks + 2 * W, 1024);
    Scratch<float> scratch(p.threads * floats);
    each_chunk(p, chunk, [&](int64_t b, int64_t g, int64_t t0, int thread) {
      const Sequence x = sequence_at(p, b);
      const T* mine = packed + (begin[b] * Hkv + g * (begin[b + 1] - begin[b])) * k_split;
      run_chunk(x, g, t0, least(chunk, x.S - t0), mine, ld, scratch + thread * floats);
    });
  }
};

// ------------------------------------------------------------------------------------------------ MoBA

template <class St> struct ByMean {
  using Mm = Gemm<float>;

  const BlockSelectParams& p;
  const int64_t H = p.heads, Hkv = p.kv_heads, G = H / Hkv, D = p.head_dim;

  // The mean of keys [first, last): sums of 32 at a time, in order.
  void mean(const Sequence& x, int64_t g, int64_t first, int64_t last, float* to) const {
    for (int64_t d = 0; d < D; d += W) {
      const int n = (int)least(W, D - d);
      vf sum = zero();
      for (int64_t j = first; j < last; j += 32) {
        vf some = zero();
        for (int64_t i = j; i < least(last, j + 32); ++i) some += load_n(at<St>(p.k, p.k_stride, x.b, x.k + i, g) + d, n);
        sum += some;
      }
      store_n(to + d, sum / (float)(last - first), n);
    }
  }

  void run() const {
    const int64_t chunk = most(1, kChunkRows / G);
    int64_t most_blocks = 0;
    Scratch<int64_t> begin(p.batch + 1);  // whole blocks of the sequences before, rounded to panels
    begin[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t blocks = sequence_at(p, b).T / p.block;
      most_blocks = most(most_blocks, blocks);
      begin[b + 1] = begin[b] + round_up(blocks, Mm::NR);
    }
    Scratch<float> means(begin[p.batch] * D + D), packed(begin[p.batch] * Hkv * D + D);
    for (int64_t g = 0; g < Hkv; ++g)
      for (int64_t b = 0; b < p.batch; ++b) {
        const Sequence x = sequence_at(p, b);
        const int64_t blocks = x.T / p.block;
        parallel_for(p.threads, blocks, [&](int64_t j, int) { mean(x, g, j * p.block, (j + 1) * p.block, means + j * D); });
        Mm::pack_b((const float*)means, D, blocks, D, packed + (begin[b] * Hkv + g * (begin[b + 1] - begin[b])) * D);
      }
    const int64_t ld = round_up(most_blocks + 1, 16) + W, floats = round_up(kChunkRows * (D + ld) + G * (D + ld), 1024);
    Scratch<float> scratch(p.threads * floats);
    each_chunk(p, chunk, [&](int64_t b, int64_t g, int64_t t0, int thread) {
      const Sequence x = sequence_at(p, b);
      const int64_t rows = least(chunk, x.S - t0) * G, last = t0 + (rows - 1) / G + x.T - x.S;
      const int64_t past = last < 0 ? 0 : last / p.block;
      float *q = scratch + thread * floats, *score = q + chunk * G * D;
      for (int64_t r = 0; r < rows; ++r) {
        const St* row = at<St>(p.q, p.q_stride, x.b, x.q + t0 + r / G, g * G + r % G);
        for (int64_t d = 0; d < D; d += W) store_n(q + r * D + d, load_n(row + d, (int)least(W, D - d)), (int)least(W, D - d));
      }
      if (past) Mm::gemm_rows(rows, past, D, q, D, packed + (begin[b] * Hkv + g * (begin[b + 1] - begin[b])) * D, score, ld, false);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t position = t0 + r / G + x.T - x.S, own = position / p.block;
        int32_t* to = p.indices + ((x.row + t0 + r / G) * H + g * G + r % G) * p.slots;
        if (position < 0) choose(nullptr, 0, nullptr, 0, p.slots, to);
        else choose(score + r * ld, own + 1, &own, 1, p.slots, to);
      }
    });
  }
};

template <class St> void run(const BlockSelectParams& p) {
  if (p.compress_block) return ByProbability<St>{p}.run();
  ByMean<St>{p}.run();
}

}  // namespace

void block_select(const BlockSelectParams& p) {
  switch (p.dtype) {
    case DType::float32: return run<float>(p);
    case DType::bfloat16: return run<bf16>(p);
    case DType::float16: return run<f16>(p);
  }
}

}  // namespace tk::TK_ISA
