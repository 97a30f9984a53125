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
  static constexpr int64_t kRows = W < 16 ? 4 * Mm::MR : 64 / Mm::MR * Mm::MR;  // 64 (bf16), 60 (AVX-512), 24
  static constexpr int64_t kBlocks = 4;                                         // blocks in the largest chunk
  static constexpr int64_t kPackedBytes = 256 << 20;                            // packed K and V held at a time

  const AttentionForwardParams& p;
  const int64_t S, T_, D, Dv, G;
  const int64_t splits = (T_ + kSplit - 1) / kSplit;
  const int64_t k_split = Mm::size_b(kSplit, D), v_split = Mm::size_b(Dv, kSplit);  // elements of a packed split
  const int64_t ldo = round_up(Dv, Mm::NR);
  const Transform transform{p};

  explicit Forward(const AttentionForwardParams& params)
      : p(params), S(p.q_len), T_(p.k_len), D(p.head_dim), Dv(p.value_dim), G(p.kv_heads ? p.heads / p.kv_heads : 0) {}

  int64_t start(int64_t b) const { return p.key_start ? p.key_start[b] : 0; }

  void pack(int64_t pair, int64_t split, T* k, T* v) const {
    const int64_t b = pair / p.kv_heads, h = pair % p.kv_heads, j = start(b) + split * kSplit;
    const int64_t keys = least(kSplit, T_ - j);
    if (keys <= 0) return;
    Mm::pack_b(at<St>(p.k, p.k_stride, b, j, h), p.k_stride[1], keys, D, k);
    Mm::pack_b_t(at<St>(p.v, p.v_stride, b, j, h), p.v_stride[1], Dv, keys, v);
  }

  // Scratch of one thread.
  struct Local {
    T* q;            // packed rows of the chunk
    St* rows;        // [kRows * kBlocks, D] rows of a chunk that spans heads
    float* scores;   // [kRows, kLd]
    T* probs;        // bf16: packed [kRows, kSplit]
    float* o_split;  // [kRows, ldo]
    float* o;        // [kRows * kBlocks, ldo]
  };
  static constexpr int64_t kMaxRows = kRows * kBlocks;
  int64_t local_floats() const {
    return round_up(Mm::size_a(kMaxRows, D) * (int64_t)sizeof(T), 256) / 4 + round_up(kMaxRows * D, 64) + kRows * kLd +
           Probs<T>::size(kRows) / 2 + (kRows + kMaxRows) * ldo;
  }
  Local local(float* base) const {
    Local x;
    x.q = (T*)base;
    base += round_up(Mm::size_a(kMaxRows, D) * (int64_t)sizeof(T), 256) / 4;
    x.rows = (St*)base;
    base += round_up(kMaxRows * D, 64);
    x.scores = base;
    base += kRows * kLd;
    x.probs = (T*)base;
    base += Probs<T>::size(kRows) / 2;
    x.o_split = base;
    x.o = base + kRows * ldo;
    return x;
  }

  // Rows [r0, r1) of a pair against the packed splits k, v of that pair.
  void chunk(int64_t pair, int64_t r0, int64_t r1, const T* k, const T* v, const Local& x) const {
    const int64_t b = pair / p.kv_heads, kv_head = pair % p.kv_heads, n = T_ - start(b), rows = r1 - r0;
    Range seen[kMaxRows];
    float m[kMaxRows], l[kMaxRows];
    int64_t first = n, last = 0;
    for (int64_t r = 0; r < rows; ++r) {
      seen[r] = visible_keys(p, (r0 + r) % S + T_ - S - start(b), n);
      m[r] = -INFINITY, l[r] = 0.0f;
      if (seen[r].lo == seen[r].hi) continue;
      first = least(first, seen[r].lo), last = most(last, seen[r].hi);
    }
    memset(x.o, 0, rows * ldo * sizeof(float));
    if (last > first) pack_queries(b, kv_head, r0, rows, x);

    for (int64_t split = first / kSplit; split * kSplit < last; ++split) {
      const int64_t base = split * kSplit, keys = least(kSplit, n - base);
      for (int64_t r = 0; r < rows; r += kRows)
        block(least(kRows, rows - r), seen + r, base, keys, x.q + r * Mm::padded_k(D), k + split * k_split,
              v + split * v_split, x, m + r, l + r, x.o + r * ldo);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = (r0 + r) % S, h = kv_head * G + (r0 + r) / S;
      finish_row(m[r], l[r], x.o + r * ldo, Dv, p.sinks ? p.sinks + h : nullptr, at<St>(p.out, p.out_stride, b, i, h),
                 p.lse + (b * S + i) * p.heads + h);
    }
  }

  void pack_queries(int64_t b, int64_t kv_head, int64_t r0, int64_t rows, const Local& x) const {
    const int64_t h = kv_head * G + r0 / S;
    if (r0 % S + rows <= S) return Mm::pack_a(at<St>(p.q, p.q_stride, b, r0 % S, h), p.q_stride[1], rows, D, x.q);
    for (int64_t r = 0; r < rows; ++r)
      memcpy(x.rows + r * D, at<St>(p.q, p.q_stride, b, (r0 + r) % S, kv_head * G + (r0 + r) / S), D * sizeof(St));
    Mm::pack_a(x.rows, D, rows, D, x.q);
  }

  // A block of rows against the keys [base, base + keys) of one split.
  void block(int64_t rows, const Range* seen, int64_t base, int64_t keys, const T* q, const T* k, const T* v,
             const Local& x, float* m, float* l, float* o) const {
    int64_t k0 = keys, k1 = 0;
    const auto clip = [&](int64_t r) { return Range{most(seen[r].lo - base, 0), least(seen[r].hi - base, keys)}; };
    for (int64_t r = 0; r < rows; ++r) {
      const Range c = clip(r);
      if (c.lo < c.hi) k0 = least(k0, c.lo), k1 = most(k1, c.hi);
    }
    if (k0 >= k1) return;
    k0 = round_down(k0, kLine), k1 = round_up(k1, kLine);

    const int64_t M = round_up(rows, Mm::MR), kp = Mm::padded_k(D), keys_p = Mm::padded_k(keys);
    Mm::gemm_panels(M, k1 - k0, D, q, Mm::MR * kp, k + k0 * kp, Mm::NR * kp, x.scores + k0, kLd, false);

    float ms[kRows], ls[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      const Range c = clip(r);
      ms[r] = -INFINITY;
      if (c.lo < c.hi) softmax_row<T>(transform, x.scores, x.probs, r, c.lo, c.hi, k0, k1, ms + r, ls + r);
      else blank_row<T>(x.scores, x.probs, r, k0, k1);
    }
    Probs<T>::times(M, ldo, k0, least(k1, keys_p), x.scores, x.probs, v, Mm::NR * keys_p, x.o_split, ldo);
    for (int64_t r = 0; r < rows; ++r)
      if (ms[r] != -INFINITY) merge_row(m + r, l + r, o + r * ldo, ms[r], ls[r], x.o_split + r * ldo, ldo);
  }

  void run() const {
    const int64_t pairs = p.batch * p.kv_heads, R = G * S;
    if (pairs == 0 || R == 0) return;
    // Chunks lie within a head where a head has enough rows, else they run across the group's heads.
    int64_t chunk_rows = kMaxRows;
    while (chunk_rows > kRows && pairs * ((R + chunk_rows - 1) / chunk_rows) < 4 * p.threads) chunk_rows -= kRows;
    const int64_t span = S > chunk_rows ? S : R, chunks = (span + chunk_rows - 1) / chunk_rows, spans = R / span;
    const int64_t pair_bytes = most(1, splits * (k_split + v_split) * (int64_t)sizeof(T));
    const int64_t wave = least(pairs, most(p.threads, kPackedBytes / pair_bytes));

    Scratch<T> packed(wave * splits * (k_split + v_split));
    const int64_t floats = round_up(local_floats(), 1024);
    Scratch<float> scratch(p.threads * floats);
    const auto k_of = [&](int64_t i) { return packed + i * splits * (k_split + v_split); };
    for (int64_t done = 0; done < pairs; done += wave) {
      const int64_t here = least(wave, pairs - done);
      parallel_for(p.threads, here * splits, [&](int64_t item, int) {
        const int64_t i = item / splits, split = item % splits;
        pack(done + i, split, k_of(i) + split * k_split, k_of(i) + splits * k_split + split * v_split);
      });
      parallel_for(p.threads, here * spans * chunks, [&](int64_t item, int thread) {
        // Late chunks first: under a causal mask they are the heavy ones.
        const int64_t c = chunks - 1 - item / (here * spans), i = item / spans % here, s = item % spans;
        const int64_t r0 = s * span + c * chunk_rows, r1 = s * span + least(span, (c + 1) * chunk_rows);
        chunk(done + i, r0, r1, k_of(i), k_of(i) + splits * k_split, local(scratch + thread * floats));
      });
    }
  }
};

}  // namespace

void attention_forward(const AttentionForwardParams& p) {
  switch (p.dtype) {
    case DType::float32: return Forward<float>(p).run();
    case DType::bfloat16: return Forward<bf16>(p).run();
    case DType::float16: return Forward<f16>(p).run();
  }
}

}  // namespace tk::TK_ISA
