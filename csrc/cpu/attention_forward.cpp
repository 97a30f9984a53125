// Attention, forward: O = softmax(mask(scale Q K^T)) V and its log-sum-exp, for MHA, GQA and MQA.
//
//   s_ij = scale q_i . k_j,  lse_i = log sum_j e^(s_ij),  o_i = sum_j e^(s_ij - lse_i) v_j        (csrc/include/attention.h)
//
// One (batch, key head) pair has R = G * S rows: query i of head g of the group is row g * S + i. K and V are packed
// once per pair, in parallel; then every item takes a chunk of a pair's rows over all splits of keys they see:
//   for each split:  for each block of kRows rows:  S = Q K^T, softmax in place, O_split = P V, merge
// so that a split (256 KiB of K and V at D = 128 in bf16) stays in L2 while the chunk's blocks pass over it.
//
// B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim.
#include "attention_block.h"
#include "attention_kernels.h"

namespace tk::TK_ISA {
namespace {

template <class St> struct Forward {
  using T = Compute<St>;
  using Mm = Gemm<T>;
  using Block = SplitBlock<T>;
  static constexpr int64_t kRows = Block::kRows, kMaxRows = 4 * kRows;  // rows of a block and of the largest chunk
  static constexpr int64_t kPackedBytes = 256 << 20;                    // packed K and V held at a time

  const AttentionShape& p;
  const Queries& io;
  const Keys& keys;
  const int64_t S, D, Dv, G;
  const int64_t splits;                                                             // of the longest row
  const int64_t k_split = Mm::size_b(kSplit, D), v_split = Mm::size_b(Dv, kSplit);  // elements of a packed split
  const int64_t ldo = round_up(Dv, Mm::NR);

  Forward(const AttentionShape& shape, const Queries& queries, const Keys& k)
      : p(shape), io(queries), keys(k), S(p.q_len), D(p.head_dim), Dv(p.value_dim), G(p.kv_heads ? p.heads / p.kv_heads : 0),
        splits(longest()) {}

  int64_t longest() const {
    int64_t n = 0;
    for (int64_t b = 0; b < p.batch; ++b) n = most(n, keys.count(b));
    return (n + kSplit - 1) / kSplit;
  }

  // Scratch of one thread.
  struct Local {
    T* q;          // packed rows of the chunk
    St* rows;      // [kMaxRows, D] rows of a chunk that spans heads; [kSplit, max(D, Dv)] of a split in pages
    float* o;      // [kMaxRows, ldo]
    float* block;  // SplitBlock's
  };
  int64_t local_floats() const {
    return round_up(Mm::size_a(kMaxRows, D) * (int64_t)sizeof(T) / 4, 64) + kSplit * round_up(most(D, Dv), 16) + kMaxRows * ldo +
           Block::floats(Dv);
  }
  Local local(float* base) const {
    Local x;
    x.q = (T*)base;
    base += round_up(Mm::size_a(kMaxRows, D) * (int64_t)sizeof(T) / 4, 64);
    x.rows = (St*)base;
    base += kSplit * round_up(most(D, Dv), 16);
    x.o = base;
    x.block = base + kMaxRows * ldo;
    return x;
  }

  // Rows [r0, r1) of a pair against the packed splits k, v of that pair.
  void chunk(int64_t pair, int64_t r0, int64_t r1, const T* k, const T* v, const Local& x) const {
    const int64_t b = pair / p.kv_heads, kv_head = pair % p.kv_heads, n = keys.count(b), rows = r1 - r0;
    Range seen[kMaxRows];
    float m[kMaxRows], l[kMaxRows];
    int64_t first = n, last = 0;
    for (int64_t r = 0; r < rows; ++r) {
      seen[r] = visible_keys(p, (r0 + r) % S + n - S, n);
      m[r] = -INFINITY, l[r] = 0.0f;
      if (seen[r].lo == seen[r].hi) continue;
      first = least(first, seen[r].lo), last = most(last, seen[r].hi);
    }
    memset(x.o, 0, rows * ldo * sizeof(float));
    if (last > first) pack_queries(b, kv_head, r0, rows, x);

    Block block(p, x.block);
    for (int64_t split = first / kSplit; split * kSplit < last; ++split) {
      const int64_t base = split * kSplit, count = least(kSplit, n - base);
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t here = least(kRows, rows - r);
        if (!block.run(here, seen + r, base, count, x.q + r * Mm::padded_k(D), k + split * k_split, v + split * v_split)) continue;
        for (int64_t i = 0; i < here; ++i)
          if (block.ms[i] != -INFINITY)
            merge_row(block.transform, m + r + i, l + r + i, x.o + (r + i) * ldo, block.ms[i], block.ls[i], block.o_split + i * ldo, ldo);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = (r0 + r) % S, h = kv_head * G + (r0 + r) / S;
      finish_row(block.transform, m[r], l[r], x.o + r * ldo, Dv, io.sinks ? io.sinks + h : nullptr, at<St>(io.out, io.out_stride, b, i, h),
                 io.lse + (b * S + i) * p.heads + h);
    }
  }

  void pack_queries(int64_t b, int64_t kv_head, int64_t r0, int64_t rows, const Local& x) const {
    const int64_t h = kv_head * G + r0 / S;
    if (r0 % S + rows <= S) return Mm::pack_a(at<St>(io.q, io.q_stride, b, r0 % S, h), io.q_stride[1], rows, D, x.q);
    for (int64_t r = 0; r < rows; ++r)
      memcpy(x.rows + r * D, at<St>(io.q, io.q_stride, b, (r0 + r) % S, kv_head * G + (r0 + r) / S), D * sizeof(St));
    Mm::pack_a(x.rows, D, rows, D, x.q);
  }

  void run() const {
    const int64_t pairs = p.batch * p.kv_heads, R = G * S;
    if (pairs == 0 || R == 0) return;
    // Chunks lie within a head where a head has enough rows, else they run across the group's heads.
    int64_t chunk_rows = kMaxRows;
    while (chunk_rows > kRows && pairs * ((R + chunk_rows - 1) / chunk_rows) < 4 * p.threads) chunk_rows -= kRows;
    const int64_t span = S > chunk_rows ? S : R, chunks = (span + chunk_rows - 1) / chunk_rows, spans = R / span;
    const int64_t pair_bytes = most(1, splits * (k_split + v_split) * (int64_t)sizeof(T));
    // With many pairs a thread packs the pair it works on, into memory still in its cache from the pair before.
    const bool many = pairs >= 8 * p.threads;
    const int64_t wave = many ? p.threads : least(pairs, most(p.threads, kPackedBytes / pair_bytes));

    Scratch<T> packed(wave * splits * (k_split + v_split));
    const int64_t floats = round_up(local_floats(), 1024);
    Scratch<float> scratch(p.threads * floats);
    const auto k_of = [&](int64_t i) { return packed + i * splits * (k_split + v_split); };
    const auto pack = [&](int64_t pair, int64_t split, T* k, int thread) {
      const int64_t b = pair / p.kv_heads, count = least(kSplit, keys.count(b) - split * kSplit);
      if (count <= 0) return;
      pack_split<St>(keys, b, pair % p.kv_heads, split * kSplit, count, D, Dv, local(scratch + thread * floats).rows,
                     k + split * k_split, k + splits * k_split + split * v_split);
    };
    // A pair's item: late chunks first, under a causal mask they are the heavy ones.
    const auto run_chunk = [&](int64_t pair, int64_t item, T* k, int thread) {
      const int64_t c = chunks - 1 - item / spans, s = item % spans;
      const int64_t r0 = s * span + c * chunk_rows, r1 = s * span + least(span, (c + 1) * chunk_rows);
      chunk(pair, r0, r1, k, k + splits * k_split, local(scratch + thread * floats));
    };
    if (many)
      return parallel_for(p.threads, pairs, [&](int64_t pair, int thread) {
        T* k = k_of(thread);
        for (int64_t split = 0; split < splits; ++split) pack(pair, split, k, thread);
        for (int64_t item = 0; item < spans * chunks; ++item) run_chunk(pair, item, k, thread);
      });
    for (int64_t done = 0; done < pairs; done += wave) {
      const int64_t here = least(wave, pairs - done);
      parallel_for(p.threads, here * splits, [&](int64_t item, int thread) {
        pack(done + item / splits, item % splits, k_of(item / splits), thread);
      });
      parallel_for(p.threads, here * spans * chunks, [&](int64_t item, int thread) {
        const int64_t i = item / spans % here;
        run_chunk(done + i, item / (here * spans) * spans + item % spans, k_of(i), thread);
      });
    }
  }
};

}  // namespace

void attention_rows(const AttentionShape& s, const Queries& q, const Keys& k) {
  switch (s.dtype) {
    case DType::float32: return Forward<float>(s, q, k).run();
    case DType::bfloat16: return Forward<bf16>(s, q, k).run();
    case DType::float16: return Forward<f16>(s, q, k).run();
  }
}

void attention_forward(const AttentionForwardParams& p) {
  const Queries queries{p.q, p.out, p.lse, p.sinks, p.q_stride, p.out_stride};
  attention_rows(p, queries, Keys{p.k, p.v, p.k_stride, p.v_stride, p.k_len, p.key_start});
}

}  // namespace tk::TK_ISA
