// Attention, backward: dQ, dK, dV (and dsinks) from the forward's lse, without atomics and without an [S, T] buffer.
//
//   P = e^(s - L)          L = lse, or logaddexp(lse, sink): recomputed block by block, as gate e^(s - lse)
//   dS = P o (dO V^T - D') D'_i = <dO_i, O_i> - dlse_i (a sink's gate g = e^(lse - L) divides dlse), softcap: times 1 - (s/c)^2
//   dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K,  dsink = -sum_i e^(sink - L_i) <dO_i, O_i>
//
// Everything is computed transposed, keys down and queries across, so that L and D' are plain vector loads and P^T, dS^T
// are left operands as they stand. For bf16 dQ^T = K^T dS^T is accumulated, for which dS^T is written a second time as a
// right operand: one unpack instruction instead of a transpose.
//
// Canonical order: queries are counted from the first one that can see a key and cut into blocks of kQueries, keys from
// the first valid one into blocks of kKeys. dK and dV of a key block sum over the group's heads, then over query blocks,
// ascending; dQ of a query block over key blocks, ascending. How the blocks are spread over threads changes no bits:
//   many pairs:  one item per (batch, key head) does all of it, five products a block
//   few pairs:   dK, dV by key block, then dQ by query block, seven products, any number of threads
//
// B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim.
#include "attention_backward.h"
#include "attention_kernels.h"

namespace tk::TK_ISA {
namespace {

template <class St> struct Backward {
  using T = Compute<St>;
  using Mm = Gemm<T>;
  using Block = GradBlock<T>;
  static constexpr int64_t kQueries = Block::kQueries, kKeys = Block::kKeys, kGroup = Block::kGroup;
  static constexpr int64_t kPackedBytes = 512 << 20;  // packed operands held at a time

  const AttentionBackwardParams& p;
  const int64_t S, T_, D, Dv, G;
  const int64_t q_blocks = (S + kQueries - 1) / kQueries, k_blocks = (T_ + kKeys - 1) / kKeys;
  const int64_t rows = q_blocks * kQueries;
  const int64_t ldk = round_up(D, Mm::NR), ldv = round_up(Dv, Mm::NR);
  const int64_t dq_size = Block::dq_size(D);
  // elements of the packed forms of a block: queries across, queries down (the same for dO); keys down, and K for dQ
  const int64_t q_across = Mm::size_b(kQueries, D), q_down = Mm::size_b(D, kQueries);
  const int64_t o_across = Mm::size_b(kQueries, Dv), o_down = Mm::size_b(Dv, kQueries);
  const int64_t q_size = q_across + q_down + o_across + o_down;
  const int64_t k_down = Mm::size_a(kKeys, D), v_down = Mm::size_a(kKeys, Dv);
  const int64_t k_size = k_down + v_down + Block::key_size(D);
  const Transform transform{p};

  explicit Backward(const AttentionBackwardParams& params)
      : p(params), S(p.q_len), T_(p.k_len), D(p.head_dim), Dv(p.value_dim), G(p.kv_heads ? p.heads / p.kv_heads : 0) {}

  int64_t start(int64_t b) const { return p.key_start ? p.key_start[b] : 0; }
  // The first query that can see a key; queries before it get zero gradients, blocks are counted from it.
  int64_t first_query(int64_t b) const {
    const int64_t n = T_ - start(b);
    if (p.causal) return least(S, most(0, S - n));
    return p.window_right >= 0 ? least(S, most(0, S - n - p.window_right)) : 0;
  }

  // What one (batch, key head) pair holds while it is worked on.
  struct Pair {
    T* q;          // [G, q_blocks] of q_size
    T* k;          // [k_blocks] of k_size
    float* logit;  // [G, rows] lse, as Grad<T> wants it
    float* delta;  // [G, rows]
    float* gate;   // [G, rows]
    QueryRanges seen;  // [rows], and per kGroup of them
  };
  int64_t pair_bytes() const {
    return round_up((G * q_blocks * q_size + k_blocks * k_size) * (int64_t)sizeof(T) + 3 * G * rows * 4 +
                    QueryRanges::floats(rows, kGroup) * 4, 4096);
  }
  Pair pair_at(char* base) const {
    Pair x;
    x.q = (T*)base;
    x.k = x.q + G * q_blocks * q_size;
    x.logit = (float*)(x.k + k_blocks * k_size);
    x.delta = x.logit + G * rows;
    x.gate = x.delta + G * rows;
    x.seen.place((int32_t*)(x.gate + G * rows), rows, kGroup);
    return x;
  }

  // ---- preparation

  void prepare_queries(int64_t pair, int64_t g, int64_t block, const Pair& x) const {
    const int64_t b = pair / p.kv_heads, h = pair % p.kv_heads * G + g;
    const int64_t i0 = first_query(b) + block * kQueries, count = most(0, least(kQueries, S - i0)), n = T_ - start(b);
    float* logit = x.logit + g * rows + block * kQueries;
    float* delta = x.delta + g * rows + block * kQueries;
    float* gate = x.gate + g * rows + block * kQueries;
    for (int64_t r = 0; r < kQueries; ++r) {
      logit[r] = delta[r] = gate[r] = 0.0f;
      if (r >= count) continue;
      const int64_t i = i0 + r, row = (b * S + i) * p.heads + h;
      const float lse = p.lse[row], dlse = p.dlse ? p.dlse[row] : 0.0f;
      if (lse == -INFINITY) continue;
      const float dot = dot_row(at<St>(p.dout, p.dout_stride, b, i, h), at<St>(p.out, p.out_stride, b, i, h), Dv);
      const float ungate = p.sinks ? 1.0f + expf(p.sinks[h] - lse) : 1.0f;  // 1 / gate = e^(L - lse)
      logit[r] = Grad<T>::logit(lse);
      gate[r] = 1.0f / ungate;
      delta[r] = dot - (dlse == 0.0f ? 0.0f : dlse * ungate);
    }
    if (g == 0) x.seen.fill(p, block * kQueries, kQueries, count, i0 + T_ - S - start(b), n, kGroup);
    if (count == 0) return;
    T* q = x.q + (g * q_blocks + block) * q_size;
    const St* src = at<St>(p.q, p.q_stride, b, i0, h);
    Mm::pack_b(src, p.q_stride[1], count, D, q);
    clear_b(q, count, D);
    Mm::pack_b_t(src, p.q_stride[1], D, count, q + q_across);
    src = at<St>(p.dout, p.dout_stride, b, i0, h);
    Mm::pack_b(src, p.dout_stride[1], count, Dv, q + q_across + q_down);
    clear_b(q + q_across + q_down, count, Dv);
    Mm::pack_b_t(src, p.dout_stride[1], Dv, count, q + q_across + q_down + o_across);
  }
  // Panels past `count` columns of a block's right operand: zeros.
  void clear_b(T* packed, int64_t count, int64_t K) const {
    const int64_t used = Mm::size_b(count, K);
    memset((void*)(packed + used), 0, (Mm::size_b(kQueries, K) - used) * sizeof(T));
  }
  static float dot_row(const St* a, const St* b, int64_t n) {
    vf sum = zero();
    for (int64_t d = 0; d < n; d += W) sum = fma(load_n(a + d, (int)(n - d)), load_n(b + d, (int)(n - d)), sum);
    return reduce_add(sum);
  }

  void prepare_keys(int64_t pair, int64_t block, const Pair& x) const {
    const int64_t b = pair / p.kv_heads, h = pair % p.kv_heads, j = start(b) + block * kKeys;
    const int64_t keys = least(kKeys, T_ - j);
    if (keys <= 0) return;
    T* k = x.k + block * k_size;
    const St* src = at<St>(p.k, p.k_stride, b, j, h);
    Mm::pack_a(src, p.k_stride[1], keys, D, k);
    Block::pack_key(src, p.k_stride[1], keys, D, k + k_down + v_down);
    Mm::pack_a(at<St>(p.v, p.v_stride, b, j, h), p.v_stride[1], keys, Dv, k + k_down);
  }

  // ---- one block of queries against one block of keys

  void block(int64_t pair, const Pair& x, int64_t g, int64_t qb, int64_t kb, Block& scratch, float* dk, float* dv,
             float* dq, bool* dq_started) const {
    const int64_t n = T_ - start(pair / p.kv_heads), S0 = first_query(pair / p.kv_heads);
    BlockOperands<T> o;
    o.keys = least(kKeys, n - kb * kKeys);
    o.queries = least(kQueries, S - S0 - qb * kQueries);
    if (o.keys <= 0 || o.queries <= 0) return;
    o.D = D, o.Dv = Dv, o.ldk = ldk, o.ldv = ldv;
    o.first_key = kb * kKeys;
    o.q_across = x.q + (g * q_blocks + qb) * q_size;
    o.q_down = o.q_across + q_across;
    o.o_across = o.q_down + q_down;
    o.o_down = o.o_across + o_across;
    o.k_down = x.k + kb * k_size;
    o.v_down = o.k_down + k_down;
    o.key = o.v_down + v_down;
    o.logit = x.logit + g * rows + qb * kQueries;
    o.delta = x.delta + g * rows + qb * kQueries;
    o.gate = p.sinks ? x.gate + g * rows + qb * kQueries : nullptr;
    o.seen = x.seen.from(qb * kQueries, kGroup);
    scratch.run(transform, o, dk, dv, dq, dq_started);
  }

  // ---- results

  void write_keys(int64_t pair, int64_t kb, const float* dk, const float* dv) const {
    const int64_t b = pair / p.kv_heads, h = pair % p.kv_heads, j0 = start(b) + kb * kKeys;
    for (int64_t r = 0; r < least(kKeys, T_ - j0); ++r) {
      write_row(dk + r * ldk, p.scale, D, at<St>(p.dk, p.dk_stride, b, j0 + r, h));
      write_row(dv + r * ldv, 1.0f, Dv, at<St>(p.dv, p.dv_stride, b, j0 + r, h));
    }
  }
  void write_queries(int64_t pair, int64_t g, int64_t qb, const float* dq, bool started, Block& scratch) const {
    const int64_t b = pair / p.kv_heads, h = pair % p.kv_heads * G + g, i0 = first_query(b) + qb * kQueries;
    for (int64_t r = 0; r < least(kQueries, S - i0); ++r) {
      St* out = at<St>(p.dq, p.dq_stride, b, i0 + r, h);
      if (started) write_row(scratch.dq_row(dq, r, D), p.scale, D, out);
      else memset((void*)out, 0, D * sizeof(St));
    }
  }
  static void write_row(const float* x, float factor, int64_t n, St* out) {
    for (int64_t d = 0; d < n; d += W) store_n(out + d, load(x + d) * factor, (int)(n - d));
  }
  // Queries before the first that sees a key, and keys before the first valid one.
  void write_blanks(int64_t pair) const {
    const int64_t b = pair / p.kv_heads, kv = pair % p.kv_heads;
    for (int64_t j = 0; j < start(b); ++j) {
      memset((void*)at<St>(p.dk, p.dk_stride, b, j, kv), 0, D * sizeof(St));
      memset((void*)at<St>(p.dv, p.dv_stride, b, j, kv), 0, Dv * sizeof(St));
    }
    for (int64_t i = 0; i < first_query(b); ++i)
      for (int64_t g = 0; g < G; ++g) memset((void*)at<St>(p.dq, p.dq_stride, b, i, kv * G + g), 0, D * sizeof(St));
  }
  void write_dsinks() const {
    parallel_for(p.threads, p.heads, [&](int64_t h, int) {
      float total = 0.0f;
      for (int64_t b = 0; b < p.batch; ++b) {
        float sum = 0.0f;
        for (int64_t i = 0; i < S; ++i) {
          const float lse = p.lse[(b * S + i) * p.heads + h];
          if (lse == -INFINITY) continue;
          const float dot = dot_row(at<St>(p.dout, p.dout_stride, b, i, h), at<St>(p.out, p.out_stride, b, i, h), Dv);
          sum -= dot / (1.0f + expf(lse - p.sinks[h]));
        }
        total += sum;
      }
      p.dsinks[h] = total;
    });
  }

  // ---- items

  // Scratch of one thread: the block's, then dK and dV of a key block, then dQ.
  void key_block(int64_t pair, const Pair& x, int64_t kb, Block& scratch, float* sums, float* dq, bool* dq_started) const {
    float* dk = sums;
    float* dv = sums + kKeys * ldk;
    memset(sums, 0, kKeys * (ldk + ldv) * sizeof(float));
    for (int64_t g = 0; g < G; ++g)
      for (int64_t qb = 0; qb < q_blocks; ++qb) {
        const int64_t at_dq = g * q_blocks + qb;
        block(pair, x, g, qb, kb, scratch, dk, dv, dq ? dq + at_dq * dq_size : nullptr, dq ? dq_started + at_dq : nullptr);
      }
    write_keys(pair, kb, dk, dv);
  }

  void run() const {
    const int64_t pairs = p.batch * p.kv_heads;
    if (p.sinks) write_dsinks();
    if (pairs == 0 || G == 0) return;
    const int64_t threads = p.threads;
    const bool one_pass = (pairs + threads - 1) / threads * 5 * threads <= pairs * 7;
    const int64_t bytes = pair_bytes(), sums = kKeys * (ldk + ldv), dq_blocks = one_pass ? G * q_blocks : 1;
    const int64_t local = round_up(Block::floats() + sums + dq_blocks * dq_size + dq_blocks / 4 + 1, 1024);
    // In one pass a pair is packed by the thread that needs it, into memory still in its cache from the pair before.
    const int64_t wave = one_pass ? threads : least(pairs, most(threads, kPackedBytes / bytes));
    const int64_t steps = G * q_blocks + k_blocks + 1;
    Scratch<char> packed(wave * bytes);
    Scratch<float> scratch(threads * local);
    const auto prepare = [&](int64_t pair, int64_t step, const Pair& x) {
      if (step < k_blocks) prepare_keys(pair, step, x);
      else if (step == k_blocks) write_blanks(pair);
      else prepare_queries(pair, (step - k_blocks - 1) / q_blocks, (step - k_blocks - 1) % q_blocks, x);
    };
    const auto with = [&](int64_t pair, const Pair& x, int thread, const auto& body) {
      float* base = scratch + thread * local;
      Block block(base);
      float* sum = base + Block::floats();
      float* dq = sum + sums;
      body(pair, x, block, sum, dq, (bool*)(dq + dq_blocks * dq_size));
    };
    if (one_pass)
      return parallel_for(p.threads, pairs, [&](int64_t i, int thread) {
        const Pair at = pair_at(packed + thread * bytes);
        for (int64_t step = 0; step < steps; ++step) prepare(i, step, at);
        with(i, at, thread, [&](int64_t pair, const Pair& x, Block& block, float* sum, float* dq, bool* started) {
          memset(started, 0, dq_blocks);
          for (int64_t kb = 0; kb < k_blocks; ++kb) key_block(pair, x, kb, block, sum, dq, started);
          for (int64_t j = 0; j < dq_blocks; ++j)
            write_queries(pair, j / q_blocks, j % q_blocks, dq + j * dq_size, started[j], block);
        });
      });
    for (int64_t done = 0; done < pairs; done += wave) {
      const int64_t here = least(wave, pairs - done);
      parallel_for(p.threads, here * steps, [&](int64_t item, int) {
        prepare(done + item / steps, item % steps, pair_at(packed + item / steps * bytes));
      });
      parallel_for(p.threads, here * (k_blocks + G * q_blocks), [&](int64_t item, int thread) {
        const int64_t i = item % here;
        with(done + i, pair_at(packed + i * bytes), thread,
             [&](int64_t pair, const Pair& x, Block& block_, float* sum, float* dq, bool* started) {
               const int64_t step = item / here;
               if (step < k_blocks) return key_block(pair, x, step, block_, sum, nullptr, nullptr);
               const int64_t j = step - k_blocks;
               *started = false;
               for (int64_t kb = 0; kb < k_blocks; ++kb)
                 block(pair, x, j / q_blocks, j % q_blocks, kb, block_, nullptr, nullptr, dq, started);
               write_queries(pair, j / q_blocks, j % q_blocks, dq, *started, block_);
             });
      });
    }
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
