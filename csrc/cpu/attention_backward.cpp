// Attention, backward: dQ, dK, dV (and dsinks) from the forward's lse, without atomics and without an [S, T] buffer.
//
//   P = e^(s - L)          L = lse, or logaddexp(lse, sink): recomputed block by block, as gate e^(s - lse)
//   dS = P o (dO V^T - <dO_i, O_i> + dlse_i)    a sink's gate e^(lse - L) divides dlse; softcap: times 1 - (s/c)^2
//   dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K,  dsink = -sum_i e^(sink - L_i) <dO_i, O_i>
//
// Everything is computed transposed, keys down and queries across, so that lse and <dO, O> are plain vector loads and P^T, dS^T
// are left operands as they stand. For bf16 dQ^T = K^T dS^T is accumulated, for which dS^T is written a second time as a
// right operand: one unpack instruction instead of a transpose.
//
// Canonical order: a sequence's queries are counted from the first one that can see a key and cut into blocks of kQueries,
// its keys from the first valid one into blocks of kKeys. dK and dV of a key block sum over the group's heads, then over
// query blocks, in the order of ascending(); dQ of a query block over key blocks, ascending. How blocks are spread over threads
// changes no bits:
//   many pairs:  one item per (sequence, key head) does all of it, five products a block
//   few pairs:   dK, dV by key block, then dQ by query block, seven products, any number of threads
// Packed sequences of unequal length do both: the longest ones by blocks, then the others by pairs, the long before the short.
//
// B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim.
#include "attention_backward.h"
#include "attention_backward_split.h"
#include "attention_kernels.h"

#include <stdlib.h>

namespace tk::TK_ISA {
namespace {

// A row of the batch, or one of the packed sequences.
struct Sequence {
  int64_t b, row;    // index in the batch dimension; of its first query among all rows of lse
  int64_t q, k;      // where its queries and its keys begin in the tensors
  int64_t start;     // keys before the first valid one
  int64_t S, n;      // queries, valid keys
  int64_t first;     // the first query that sees a key; those before it get zero gradients
  int64_t q_blocks, k_blocks;
  int64_t cost;      // (query, key) pairs it computes for a head, and something for the rows themselves
};

int heavier(const void* a, const void* b) {
  const Sequence *x = (const Sequence*)a, *y = (const Sequence*)b;
  if (x->cost != y->cost) return x->cost > y->cost ? -1 : 1;
  return x->row < y->row ? -1 : x->row > y->row;
}

template <class St> struct Backward {
  using T = FastCompute<St>;
  using Mm = Gemm<T>;
  using Block = GradBlock<T>;
  using Scores = Block::Scores;
  using ST = Scores::Type;
  static constexpr int64_t kQueries = Block::kQueries, kKeys = Block::kKeys, kGroup = Block::kGroup;
  static constexpr int64_t kGroups = kQueries / kGroup;
  static constexpr int64_t kTogether = Block::kTogether;
  static constexpr int64_t kPackedBytes = 512 << 20;  // packed operands held at a time

  const AttentionBackwardParams& p;
  const int64_t D, Dv, G;
  const int64_t ldk = round_up(D, Mm::NR), ldv = round_up(Dv, Mm::NR);
  const int64_t dq_size = Block::dq_size(D);
  // elements of the packed forms of a block: queries across, queries down (the same for dO); keys down, and K for dQ
  const int64_t q_across = scores(Scores::size_b(kQueries, D)), q_down = Mm::size_b(D, kQueries);
  const int64_t o_across = Mm::size_b(kQueries, Dv), o_down = Mm::size_b(Dv, kQueries);
  const int64_t q_size = q_across + q_down + o_across + o_down;
  const int64_t k_down = scores(Scores::size_a(kKeys, D)), v_down = Mm::size_a(kKeys, Dv);
  const int64_t k_size = k_down + v_down + Block::key_size(D);
  const int64_t sum_size = kTogether * kKeys * (ldk + ldv);
  const Transform transform{p};

  explicit Backward(const AttentionBackwardParams& params)
      : p(params), D(p.head_dim), Dv(p.value_dim), G(p.kv_heads ? p.heads / p.kv_heads : 0) {}

  // An operand of K Q^T in elements of T, on a cache line.
  static int64_t scores(int64_t size) { return round_up((size * (int64_t)sizeof(ST) + sizeof(T) - 1) / sizeof(T), 32); }

  // ---- sequences and the blocks of theirs that see each other

  Sequence sequence(int64_t b) const {
    Sequence x{b, b * p.q_len, 0, 0, 0, p.q_len, p.k_len, 0, 0, 0, 0};
    if (p.cu_seqlens_q) {
      x.row = x.q = p.cu_seqlens_q[b], x.k = p.cu_seqlens_k[b];
      x.S = p.cu_seqlens_q[b + 1] - x.q, x.n = p.cu_seqlens_k[b + 1] - x.k;
    } else if (p.key_start) {
      x.start = p.key_start[b], x.n -= x.start;
    }
    if (p.causal) x.first = least(x.S, most(0, x.S - x.n));
    else if (p.window_right >= 0) x.first = least(x.S, most(0, x.S - x.n - p.window_right));
    x.q_blocks = (x.S - x.first + kQueries - 1) / kQueries, x.k_blocks = (x.n + kKeys - 1) / kKeys;
    x.cost = 64 * (x.S + x.n);
    for (int64_t qb = 0; qb < x.q_blocks; ++qb) {
      const Range seen = hull(x, qb);
      x.cost += queries(x, qb) * (seen.hi - seen.lo);
    }
    return x;
  }
  // The order in which dK and dV sum their queries: those that see the fewest keys have the largest p and come last, so that small
  // terms are not rounded at the size of the sum. They are the first ones but under a window that looks ahead further than back.
  bool ascending() const { return !p.causal && p.window_left >= 0 && (p.window_right < 0 || p.window_left < p.window_right); }
  int64_t queries(const Sequence& x, int64_t qb) const { return least(kQueries, x.S - x.first - qb * kQueries); }
  // Both ends of what a query sees rise from query to query.
  Range hull(const Sequence& x, int64_t qb) const {
    const int64_t i = x.first + qb * kQueries + x.n - x.S;
    return {visible_keys(p, i, x.n).lo, visible_keys(p, i + queries(x, qb) - 1, x.n).hi};
  }
  Range key_blocks_seen(const Sequence& x, int64_t qb) const {
    const Range seen = hull(x, qb);
    return {seen.lo / kKeys, (seen.hi + kKeys - 1) / kKeys};
  }
  Range query_blocks(const Sequence& x, int64_t kb) const {
    const auto first = [&](int64_t a, const auto& holds) {
      for (int64_t b = x.q_blocks; a < b;) {
        const int64_t middle = (a + b) / 2;
        if (holds(key_blocks_seen(x, middle))) b = middle;
        else a = middle + 1;
      }
      return a;
    };
    const int64_t lo = first(0, [&](Range seen) { return seen.hi > kb; });
    return {lo, first(lo, [&](Range seen) { return seen.lo > kb; })};
  }

  // What one (sequence, key head) pair holds while it is worked on.
  struct Pair {
    const Sequence& s;
    int64_t head;      // key head
    int64_t rows;      // q_blocks * kQueries
    bool fresh;        // queries are packed just before each use, in one place
    T* q;              // [G, q_blocks] of q_size, or that place
    T* k;              // [k_blocks] of k_size
    float* logit;      // [G, rows] lse, as Grad<T> wants it
    float* rest;       // [G, rows] what it lacks, where that is known
    float* dot;        // [G, rows] <dO, O>
    float* dlse;       // [G, rows]
    float* gate;       // [G, rows]
    QueryRanges seen;  // [rows], and per kGroup of them
  };
  // Whether by_pairs packs queries just before each use: where that is the only one, nothing is to be said for packing all first.
  static bool is_fresh(const Sequence& s) { return Block::kFresh || s.k_blocks <= kTogether; }
  int64_t pair_bytes(int64_t q_blocks, int64_t k_blocks, bool fresh) const {
    const int64_t rows = q_blocks * kQueries;
    return round_up(((fresh ? 1 : G * q_blocks) * q_size + k_blocks * k_size) * (int64_t)sizeof(T) + 5 * G * rows * 4 +
                    QueryRanges::floats(rows, kGroup) * 4, 4096);
  }
  Pair pair_at(const Sequence* order, int64_t pair, bool one_pass, char* base) const {
    const Sequence& s = order[pair / p.kv_heads];
    const bool fresh = one_pass && is_fresh(s);
    const int64_t rows = s.q_blocks * kQueries;
    T* q = (T*)base;
    T* k = q + (fresh ? 1 : G * s.q_blocks) * q_size;
    float* logit = (float*)(k + s.k_blocks * k_size);
    Pair x{s, pair % p.kv_heads, rows, fresh, q, k, logit, logit + G * rows, logit + 2 * G * rows,
           logit + 3 * G * rows, logit + 4 * G * rows, {}};
    x.seen.place((int32_t*)(x.gate + G * rows), rows, kGroup);
    return x;
  }

  // ---- preparation

  T* queries_at(const Pair& x, int64_t g, int64_t block) const { return x.q + (x.fresh ? 0 : g * x.s.q_blocks + block) * q_size; }
  void pack_queries(const Pair& x, int64_t g, int64_t block) const {
    const int64_t h = x.head * G + g, b = x.s.b, i0 = x.s.q + x.s.first + block * kQueries, count = queries(x.s, block);
    T *q = queries_at(x, g, block), *q_rows = q + q_across, *o = q_rows + q_down, *o_rows = o + o_across;
    const St* src = at<St>(p.q, p.q_stride, b, i0, h);
    Mm::pack_b_t(src, p.q_stride[1], D, count, q_rows);  // first: it takes whole rows, which come from far away
    Scores::pack_b(src, p.q_stride[1], count, D, (ST*)q);
    clear_b<Scores>((ST*)q, count, D);
    src = at<St>(p.dout, p.dout_stride, b, i0, h);
    Mm::pack_b_t(src, p.dout_stride[1], Dv, count, o_rows);
    Mm::pack_b(src, p.dout_stride[1], count, Dv, o);
    clear_b<Mm>(o, count, Dv);
  }
  void prepare_queries(const Pair& x, int64_t g, int64_t block) const {
    const int64_t h = x.head * G + g, b = x.s.b, i0 = x.s.first + block * kQueries, count = queries(x.s, block);
    if (g == 0) x.seen.fill(p, block * kQueries, count, i0 + x.s.n - x.s.S, x.s.n, kGroup);
    pack_queries(x, g, block);

    const int64_t offset = g * x.rows + block * kQueries;
    float *logit = x.logit + offset, *rest = x.rest + offset, *dot = x.dot + offset, *dlse = x.dlse + offset, *gate = x.gate + offset;
    int32_t one_key[kQueries] = {};
    for (int64_t r = 0; r < count; ++r) {
      const Range seen = visible_keys(p, i0 + r + x.s.n - x.s.S, x.s.n);
      one_key[r] = -(seen.hi - seen.lo == 1);
    }
    const St *dout = at<St>(p.dout, p.dout_stride, b, x.s.q + i0, h), *out = at<St>(p.out, p.out_stride, b, x.s.q + i0, h);
    Block::dots(queries_at(x, g, block) + q_across + q_down, dout, p.dout_stride[1], out, p.out_stride[1], count, Dv, one_key, dot);
    for (int64_t r = 0; r < round_up(count, kGroup); ++r) {
      const int64_t row = (x.s.row + i0 + r) * p.heads + h;
      const float lse = r < count ? p.lse[row] : -INFINITY;
      if (lse == -INFINITY) {
        logit[r] = rest[r] = dot[r] = dlse[r] = gate[r] = 0.0f;
        continue;
      }
      logit[r] = Grad<T>::logit(lse);
      rest[r] = Grad<T>::natural && one_key[r] ? only_score(x, h, i0 + r, logit[r]) : 0.0f;
      gate[r] = p.sinks ? 1.0f / (1.0f + expf(p.sinks[h] - lse)) : 1.0f;
      dlse[r] = p.dlse ? p.dlse[row] : 0.0f;
    }
  }
  // A row that sees one key has p = 1, but lse is its score rounded, and e^(s - lse) would be off by what that took (2e-7 at
  // lse = 4): this is s - lse, s computed as the product does.
  float only_score(const Pair& x, int64_t h, int64_t i, float lse) const {
    const int64_t j = visible_keys(p, i + x.s.n - x.s.S, x.s.n).lo;
    const St *q = at<St>(p.q, p.q_stride, x.s.b, x.s.q + i, h), *k = at<St>(p.k, p.k_stride, x.s.b, x.s.k + x.s.start + j, x.head);
    const int64_t length = score_chain(D);
    vf sum = zero(), chain = zero(), slope;
    for (int64_t d = 0; d < D; d += W) {
      const vf a = load_n(q + d, (int)least(W, D - d)), b = load_n(k + d, (int)least(W, D - d));
      for (int u = 0; u < least(W, D - d); ++u) chain = fma(splat(a[u]), splat(b[u]), chain);
      if ((d + W) % length == 0 || d + W >= D) sum = d < length ? chain : sum + chain, chain = zero();
    }
    return Grad<T>(transform).exponent(sum, splat(lse), &slope)[0];
  }
  // Panels past `count` columns of a block's right operand, as far as its last group reaches: zeros.
  template <class M> static void clear_b(M::Type* packed, int64_t count, int64_t K) {
    const int64_t used = M::size_b(count, K);
    memset((void*)(packed + used), 0, (M::size_b(round_up(count, kGroup), K) - used) * sizeof(typename M::Type));
  }
  static float dot_row(const St* a, const St* b, int64_t n) {
    vf sum = zero();
    for (int64_t d = 0; d < n; d += W) sum = fma(load_n(a + d, (int)(n - d)), load_n(b + d, (int)(n - d)), sum);
    return reduce_add(sum);
  }

  void prepare_keys(const Pair& x, int64_t block) const {
    const int64_t b = x.s.b, h = x.head, j = x.s.k + x.s.start + block * kKeys, keys = least(kKeys, x.s.n - block * kKeys);
    T* k = x.k + block * k_size;
    const St* src = at<St>(p.k, p.k_stride, b, j, h);
    Scores::pack_a(src, p.k_stride[1], keys, D, (ST*)k);
    Block::pack_key(src, p.k_stride[1], keys, D, k + k_down + v_down);
    Mm::pack_a(at<St>(p.v, p.v_stride, b, j, h), p.v_stride[1], keys, Dv, k + k_down);
  }

  // ---- one block of queries against one block of keys

  void block(const Pair& x, int64_t g, int64_t qb, int64_t kb, Block& scratch, float* dk, float* dv, float* dq,
             bool* dq_started) const {
    BlockOperands<T> o;
    o.keys = least(kKeys, x.s.n - kb * kKeys);
    o.queries = queries(x.s, qb);
    o.D = D, o.Dv = Dv, o.ldk = ldk, o.ldv = ldv;
    o.first_key = kb * kKeys;
    o.ascending = ascending();
    o.q_across = queries_at(x, g, qb);
    o.q_down = o.q_across + q_across;
    o.o_across = o.q_down + q_down;
    o.o_down = o.o_across + o_across;
    o.k_down = x.k + kb * k_size;
    o.v_down = o.k_down + k_down;
    o.key = o.v_down + v_down;
    o.logit = x.logit + g * x.rows + qb * kQueries;
    o.rest = x.rest + g * x.rows + qb * kQueries;
    o.dot = x.dot + g * x.rows + qb * kQueries;
    o.dlse = p.dlse ? x.dlse + g * x.rows + qb * kQueries : nullptr;
    o.gate = p.sinks ? x.gate + g * x.rows + qb * kQueries : nullptr;
    o.seen = x.seen.from(qb * kQueries, kGroup);
    scratch.run(transform, o, dk, dv, dq, dq_started);
  }

  // ---- results

  void write_keys(const Pair& x, int64_t kb, const float* dk, const float* dv) const {
    const int64_t j0 = x.s.k + x.s.start + kb * kKeys;
    for (int64_t r = 0; r < least(kKeys, x.s.n - kb * kKeys); ++r) {
      write_row(dk + r * ldk, p.scale, D, at<St>(p.dk, p.dk_stride, x.s.b, j0 + r, x.head));
      write_row(dv + r * ldv, 1.0f, Dv, at<St>(p.dv, p.dv_stride, x.s.b, j0 + r, x.head));
    }
  }
  void write_queries(const Pair& x, int64_t g, int64_t qb, const float* dq, const bool* started, Block& scratch) const {
    const int64_t i0 = x.s.q + x.s.first + qb * kQueries;
    for (int64_t r = 0; r < queries(x.s, qb); ++r) {
      St* out = at<St>(p.dq, p.dq_stride, x.s.b, i0 + r, x.head * G + g);
      if (started[r / kGroup]) write_row(scratch.dq_row(dq, r, D), p.scale, D, out);
      else memset((void*)out, 0, D * sizeof(St));
    }
  }
  static void write_row(const float* x, float factor, int64_t n, St* out) {
    for (int64_t d = 0; d < n; d += W) store_n(out + d, load(x + d) * factor, (int)(n - d));
  }
  // Queries before the first that sees a key, and keys before the first valid one.
  void write_blanks(const Pair& x) const {
    for (int64_t j = x.s.k; j < x.s.k + x.s.start; ++j) {
      memset((void*)at<St>(p.dk, p.dk_stride, x.s.b, j, x.head), 0, D * sizeof(St));
      memset((void*)at<St>(p.dv, p.dv_stride, x.s.b, j, x.head), 0, Dv * sizeof(St));
    }
    for (int64_t i = x.s.q; i < x.s.q + x.s.first; ++i)
      for (int64_t g = 0; g < G; ++g) memset((void*)at<St>(p.dq, p.dq_stride, x.s.b, i, x.head * G + g), 0, D * sizeof(St));
  }
  void write_dsinks() const {
    parallel_for(p.threads, p.heads, [&](int64_t h, int) {
      double total = 0.0;  // a chain of float additions loses digits
      for (int64_t b = 0; b < p.batch; ++b) {
        const Sequence x = sequence(b);
        double sum = 0.0;
        for (int64_t i = 0; i < x.S; ++i) {
          const float lse = p.lse[(x.row + i) * p.heads + h];
          if (lse == -INFINITY) continue;
          const float dot =
              dot_row(at<St>(p.dout, p.dout_stride, b, x.q + i, h), at<St>(p.out, p.out_stride, b, x.q + i, h), Dv);
          sum -= dot / (1.0f + expf(lse - p.sinks[h]));
        }
        total += sum;
      }
      p.dsinks[h] = (float)total;
    });
  }

  // ---- items

  void prepare(const Pair& x, int64_t step) const {
    const int64_t j = step - x.s.k_blocks - 1;
    if (step < x.s.k_blocks) prepare_keys(x, step);
    else if (j < 0) write_blanks(x);
    else if (!x.fresh && j < G * x.s.q_blocks) prepare_queries(x, j / x.s.q_blocks, j % x.s.q_blocks);
  }
  // dK and dV of `count` neighbouring key blocks, and what they add to dQ. sums: [kTogether] of dK and dV.
  void key_blocks(const Pair& x, int64_t kb, int64_t count, Block& scratch, float* sums, float* dq, bool* dq_started) const {
    Range seen[kTogether];
    float *dk[kTogether], *dv[kTogether];
    for (int64_t u = 0; u < count; ++u) {
      const int64_t rows = round_up(least(kKeys, x.s.n - (kb + u) * kKeys), Block::kPanel);
      seen[u] = query_blocks(x.s, kb + u);
      dk[u] = sums + u * kKeys * (ldk + ldv), dv[u] = dk[u] + kKeys * ldk;
      memset(dk[u], 0, rows * ldk * sizeof(float));
      memset(dv[u], 0, rows * ldv * sizeof(float));
    }
    for (int64_t g = 0; g < G; ++g)
      for (int64_t n = seen[0].lo; n < seen[count - 1].hi; ++n) {
        const int64_t qb = ascending() ? n : seen[0].lo + seen[count - 1].hi - 1 - n;
        const int64_t at_dq = g * x.s.q_blocks + qb;
        if (x.fresh && key_blocks_seen(x.s, qb).lo >= kb) prepare_queries(x, g, qb);  // the first of its uses
        else if (x.fresh) pack_queries(x, g, qb);
        for (int64_t u = 0; u < count; ++u)
          if (seen[u].lo <= qb && qb < seen[u].hi)
            block(x, g, qb, kb + u, scratch, dk[u], dv[u], dq ? dq + at_dq * dq_size : nullptr,
                  dq ? dq_started + at_dq * kGroups : nullptr);
      }
    for (int64_t u = 0; u < count; ++u) write_keys(x, kb + u, dk[u], dv[u]);
  }
  void query_block(const Pair& x, int64_t g, int64_t qb, Block& scratch, float* dq) const {
    bool started[kGroups] = {};
    const Range seen = key_blocks_seen(x.s, qb);
    for (int64_t kb = seen.lo; kb < seen.hi; ++kb) block(x, g, qb, kb, scratch, nullptr, nullptr, dq, started);
    write_queries(x, g, qb, dq, started, scratch);
  }

  // Memory for pairs of sequences order[0 .. count): the packed operands of one, and what a thread needs, which is the
  // block's scratch, dK and dV of kTogether key blocks, dQ of `dq_blocks` query blocks, and which groups of it have begun.
  struct Sizes {
    int64_t q_blocks = 0, k_blocks = 0, bytes = 0, dq_blocks = 1, local = 0;
  };
  Sizes sizes(const Sequence* order, int64_t count, bool one_pass) const {
    Sizes m;
    for (int64_t i = 0; i < count; ++i) {
      m.q_blocks = most(m.q_blocks, order[i].q_blocks), m.k_blocks = most(m.k_blocks, order[i].k_blocks);
      m.bytes = most(m.bytes, pair_bytes(order[i].q_blocks, order[i].k_blocks, one_pass && is_fresh(order[i])));
    }
    if (one_pass) m.dq_blocks = G * m.q_blocks;
    m.local = round_up(Block::floats() + sum_size + m.dq_blocks * dq_size + m.dq_blocks * kGroups / 4 + 1, 1024);
    return m;
  }

  // A pair is packed by the thread that needs it, into memory still in its cache from the pair before.
  void by_pairs(const Sequence* order, int64_t count) const {
    const Sizes m = sizes(order, count, true);
    const int64_t threads = least(p.threads, count * p.kv_heads);
    Scratch<char> packed(threads * m.bytes);
    Scratch<float> scratch(threads * m.local);
    parallel_for(p.threads, count * p.kv_heads, [&](int64_t item, int thread) {
      const Pair x = pair_at(order, item, true, packed + thread * m.bytes);
      float* base = scratch + thread * m.local;
      Block block(base);
      float *sums = base + Block::floats(), *dq = sums + sum_size;
      bool* started = (bool*)(dq + m.dq_blocks * dq_size);
      const int64_t dq_blocks = G * x.s.q_blocks;
      memset(started, 0, dq_blocks * kGroups);
      for (int64_t step = 0; step < x.s.k_blocks + 1 + dq_blocks; ++step) prepare(x, step);
      for (int64_t kb = 0; kb < x.s.k_blocks; kb += kTogether)
        key_blocks(x, kb, least(kTogether, x.s.k_blocks - kb), block, sums, dq, started);
      for (int64_t j = 0; j < dq_blocks; ++j)
        write_queries(x, j / x.s.q_blocks, j % x.s.q_blocks, dq + j * dq_size, started + j * kGroups, block);
    });
  }

  void by_blocks(const Sequence* order, int64_t count) const {
    const Sizes m = sizes(order, count, false);
    const int64_t pairs = count * p.kv_heads;
    const int64_t wave = least(pairs, most(p.threads, kPackedBytes / most(1, m.bytes)));  // no bytes: nobody sees a key
    const int64_t most_q = G * m.q_blocks;
    Scratch<char> packed(wave * m.bytes);
    Scratch<float> scratch(p.threads * m.local);
    for (int64_t done = 0; done < pairs; done += wave) {
      const int64_t here = least(wave, pairs - done), steps = m.k_blocks + 1 + most_q;
      parallel_for(p.threads, here * steps, [&](int64_t item, int) {
        prepare(pair_at(order, done + item / steps, false, packed + item / steps * m.bytes), item % steps);
      });
      // Under a causal mask the first key blocks and the last query blocks are the heavy ones: those first.
      parallel_for(p.threads, here * (m.k_blocks + most_q), [&](int64_t item, int thread) {
        const Pair x = pair_at(order, done + item % here, false, packed + item % here * m.bytes);
        float* base = scratch + thread * m.local;
        Block block(base);
        float *sums = base + Block::floats(), *dq = sums + sum_size;
        const int64_t kb = item / here, j = most_q - 1 - (kb - m.k_blocks);
        if (kb < m.k_blocks) {
          if (kb < x.s.k_blocks) key_blocks(x, kb, 1, block, sums, nullptr, nullptr);
        } else if (j / G < x.s.q_blocks) {
          query_block(x, j % G, j / G, block, dq);
        }
      });
    }
  }

  void run() const {
    if (p.sinks) write_dsinks();
    if (p.batch == 0 || G == 0) return;
    Scratch<Sequence> order(p.batch);
    int64_t left = 0;  // cost of the sequences still to be given out
    for (int64_t b = 0; b < p.batch; ++b) order[b] = sequence(b), left += order[b].cost;
    if (p.cu_seqlens_q || p.key_start) qsort(order, p.batch, sizeof(Sequence), heavier);
    // By pairs unless that leaves threads idle for longer than two products more take: pairs handed out heaviest first end
    // no later than whole rounds of the heaviest would, and no later than (threads - 1) / threads of it after an even split.
    int64_t by_block = 0;
    for (; by_block < p.batch; left -= order[by_block++].cost) {
      const double pair = (double)order[by_block].cost, even = (double)left * p.kv_heads / p.threads;
      if (pair == 0) break;  // only empty sequences from here on
      const double rounds = pair * ceil(even / pair), spread = even + pair * (p.threads - 1) / p.threads;
      if (5 * (rounds < spread ? rounds : spread) <= 7 * even) break;
    }
    if (by_block) by_blocks(order, by_block);
    if (by_block < p.batch) by_pairs(order + by_block, p.batch - by_block);
  }
};

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
  switch (p.dtype) {
    case DType::float32: return Backward<float>(p).run();
    case DType::bfloat16: return Backward<bf16>(p).run();
    case DType::float16: return Backward<f16>(p).run();
  }
}

}  // namespace tk::TK_ISA
