// Attention of a few new queries over a cache, contiguous or paged: the last q_len rows of a prefill, bit for bit.
//
// Few rows (q_len * G <= one block): an item is one split of kSplit keys of one (sequence, key head) pair; all query heads
// of the group share its one pass over K and V. Each leaves (m, l, o) of its split, which are then merged in order,
// as prefill does. Many rows (a chunk of a prompt): prefill's own loop over the same splits.
//
// B batch, S new queries, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim.
#include "attention_block.h"
#include "attention_kernels.h"

namespace tk::TK_ISA {
namespace {

template <class St> struct Decode {
  using T = Compute<St>;
  using Mm = Gemm<T>;
  using Block = SplitBlock<T>;

  const AttentionDecodeParams& p;
  const Keys& keys;
  const int64_t S, D, Dv, G, rows = G * S;
  const int64_t ldo = round_up(Dv, Mm::NR);

  Decode(const AttentionDecodeParams& params, const Keys& k)
      : p(params), keys(k), S(p.q_len), D(p.head_dim), Dv(p.value_dim), G(p.heads / p.kv_heads) {}

  int64_t splits(int64_t b) const { return (keys.count(b) + kSplit - 1) / kSplit; }

  // What a split leaves of a pair's rows: [rows] m, [rows] l, [rows, ldo] o.
  int64_t partial_floats() const { return round_up(2 * rows, 16) + rows * ldo; }

  void split(int64_t b, int64_t kv_head, int64_t index, float* scratch, float* partial) const {
    const int64_t n = keys.count(b), base = index * kSplit, count = least(kSplit, n - base);
    Range seen[Block::kRows];
    for (int64_t r = 0; r < rows; ++r) seen[r] = visible_keys(p, r % S + n - S, n);
    T* q = (T*)scratch;
    St* gathered = (St*)(scratch + q_floats());
    T* k = (T*)(scratch + q_floats() + kSplit * round_up(most(D, Dv), 16));
    T* v = k + Mm::size_b(kSplit, D);
    for (int64_t r = 0; r < rows; ++r)
      memcpy((void*)(gathered + r * D), at<St>(p.q, p.q_stride, b, r % S, kv_head * G + r / S), D * sizeof(St));
    Mm::pack_a(gathered, D, rows, D, q);
    pack_split<St>(keys, b, kv_head, base, count, D, Dv, gathered, k, v);

    Block block(p, (float*)(v + Mm::size_b(Dv, kSplit)));
    const bool any = block.run(rows, seen, base, count, q, k, v);
    for (int64_t r = 0; r < rows; ++r) partial[r] = any ? block.ms[r] : -INFINITY, partial[rows + r] = any ? block.ls[r] : 0.0f;
    if (any) memcpy(partial + round_up(2 * rows, 16), block.o_split, rows * ldo * sizeof(float));
  }
  int64_t q_floats() const { return round_up(Mm::size_a(Block::kRows, D) * (int64_t)sizeof(T) / 4, 64); }
  int64_t scratch_floats() const {
    const int64_t kv = (Mm::size_b(kSplit, D) + Mm::size_b(Dv, kSplit)) * (int64_t)sizeof(T) / 4;
    return round_up(q_floats() + kSplit * round_up(most(D, Dv), 16) + kv + Block::floats(Dv), 1024);
  }

  void merge(int64_t b, int64_t kv_head, const float* partials, int64_t count, float* o) const {
    for (int64_t r = 0; r < rows; ++r) {
      float m = -INFINITY, l = 0.0f;
      memset(o, 0, ldo * sizeof(float));
      for (int64_t i = 0; i < count; ++i) {
        const float* x = partials + i * partial_floats();
        if (x[r] != -INFINITY) merge_row(&m, &l, o, x[r], x[rows + r], x + round_up(2 * rows, 16) + r * ldo, ldo);
      }
      const int64_t i = r % S, h = kv_head * G + r / S;
      finish_row(m, l, o, Dv, p.sinks ? p.sinks + h : nullptr, at<St>(p.out, p.out_stride, b, i, h),
                 p.lse + (b * S + i) * p.heads + h);
    }
  }

  void run() const {
    if (rows == 0) return;
    Scratch<int64_t> first(p.batch + 1);  // splits of the sequences before b
    first[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) first[b + 1] = first[b] + splits(b);
    const int64_t total = first[p.batch], floats = scratch_floats();
    Scratch<float> scratch(p.threads * floats), partials(total * p.kv_heads * partial_floats());
    const auto partial = [&](int64_t b, int64_t h, int64_t i) {
      return partials + (first[b] * p.kv_heads + h * splits(b) + i) * partial_floats();
    };
    parallel_for(p.threads, total * p.kv_heads, [&](int64_t item, int thread) {
      const int64_t h = item % p.kv_heads, index = item / p.kv_heads;
      int64_t b = 0;
      while (first[b + 1] <= index) ++b;
      split(b, h, index - first[b], scratch + thread * floats, partial(b, h, index - first[b]));
    });
    parallel_for(p.threads, p.batch * p.kv_heads, [&](int64_t item, int thread) {
      const int64_t b = item / p.kv_heads, h = item % p.kv_heads;
      merge(b, h, partial(b, h, 0), splits(b), scratch + thread * floats);
    });
  }
};

template <class St> void decode(const AttentionDecodeParams& p, const Keys& keys) {
  if (p.batch * p.kv_heads == 0) return;
  if (p.heads / p.kv_heads * p.q_len <= SplitBlock<Compute<St>>::kRows) return Decode<St>(p, keys).run();
  attention_rows(p, Queries{p.q, p.out, p.lse, p.sinks, p.q_stride, p.out_stride}, keys);
}

}  // namespace

void attention_decode(const AttentionDecodeParams& p) {
  const Keys keys{p.k, p.v, p.k_stride, p.v_stride, 0, nullptr, p.seqlens, p.block_table, p.page_size, p.max_pages};
  switch (p.dtype) {
    case DType::float32: return decode<float>(p, keys);
    case DType::bfloat16: return decode<bf16>(p, keys);
    case DType::float16: return decode<f16>(p, keys);
  }
}

}  // namespace tk::TK_ISA
