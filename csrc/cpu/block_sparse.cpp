// Attention over chosen blocks of keys: s = scale q . k, o = softmax(s) v over the keys j <= p of the blocks that a query named.
//
// K and V are packed once for each key head. Queries are taken in chunks whose results stay in L2, and a chunk walks the blocks that
// any of its rows named, in ascending order: the rows that named a block lie scattered, so their q is copied side by side, they
// meet the block as in attention's forward (attention_split.h), and what comes out is merged into each row's result. So a block is
// fetched once for a chunk instead of once for a query. Copying 64 rows of q is 256 lines where their products take 130 steps.
//
// Order of sums: a block is cut into splits of kSplit keys, and a row takes in its splits in ascending order; nothing else matters.
//
// B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim
#include "attention_split.h"
#include "block_sparse_lists.h"
#include "sparse_kernels.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kChunkRows = 1024;          // at Dv = 128 their sums are 512 KiB
constexpr int64_t kPackedBytes = 256 << 20;  // packed keys held at a time

template <class St> struct Forward {
  using T = Compute<St>;
  using Mm = Gemm<T>;
  using Block = SplitBlock<T>;
  static constexpr int64_t kRows = Block::kRows;

  const BlockSparseForwardParams& p;
  const int64_t H = p.heads, Hkv = p.kv_heads, G = H / Hkv, D = p.head_dim, Dv = p.value_dim;
  const int64_t ldo = round_up(Dv, Mm::NR), split_keys = least(p.block, kSplit), splits = (p.block + kSplit - 1) / kSplit;  // of a block
  const int64_t k_split = Mm::size_b(round_up(split_keys, kLine), D), v_split = Mm::size_b(Dv, split_keys);
  const Keys keys = all_keys();
  int64_t chunk = most(1, kChunkRows / G);  // queries

  Keys all_keys() const {
    Keys x{p.k, p.v, p.k_stride, p.v_stride, p.k_len};
    x.cu_seqlens = p.cu_seqlens;
    return x;
  }

  // Scratch of one thread, in floats.
  int64_t rows_floats() const { return kSplit * most(D, Dv); }  // rows of pages or, here, none: pack_split wants them
  int64_t list_size(int64_t longest) const { return BlockLists::size(longest, chunk * (p.choosing / Hkv), p.slots); }
  int64_t floats(int64_t longest) const {
    return round_up(Block::floats(Dv) + kRows * Mm::padded_k(D) + rows_floats() + chunk * G * (2 + ldo) + list_size(longest), 1024);
  }

  void pack(const BlockSequence& x, int64_t b, int64_t g, int64_t j, T* to, float* rows) const {
    for (int64_t first = j * p.block; first < block_end(p, x, j); first += kSplit, to += k_split + v_split)
      pack_split<St>(keys, b, g, first, least(kSplit, block_end(p, x, j) - first), D, Dv, (St*)rows, to, to + k_split);
  }

  void run_chunk(const BlockSequence& x, int64_t g, int64_t t0, const T* packed, float* scratch) const {
    const int64_t t1 = least(x.S, t0 + chunk), rows = (t1 - t0) * G;
    Block block(p, scratch);
    scratch += Block::floats(Dv);
    T* q = (T*)scratch;
    scratch += kRows * Mm::padded_k(D);
    float *m = scratch, *l = m + chunk * G, *o = l + chunk * G;
    const BlockLists lists = BlockLists::make(p, x, g, t0, t1, (int32_t*)(o + chunk * G * ldo));
    for (int64_t r = 0; r < rows; ++r) m[r] = -INFINITY, l[r] = 0.0f;
    for (int64_t j = 0; j < count_blocks(p, x); ++j)
      for (int64_t from = 0, all = lists.count(j); from < all; from += kRows) {
        const int64_t n = least(kRows, all - from);
        int32_t some[kRows];
        lists.take(j, from, n, some);
        for (int64_t i = 0; i < n; ++i)
          Products<T>::pack_row(at<St>(p.q, p.q_stride, x.b, x.q + t0 + some[i] / G, g * G + some[i] % G), i, D, q);
        for (int64_t s = 0, first = j * p.block; first < block_end(p, x, j); ++s, first += kSplit) {
          const int64_t count = least(kSplit, block_end(p, x, j) - first);
          Range seen[kRows];
          for (int64_t i = 0; i < n; ++i) seen[i] = {0, most(0, least(count, x.position(t0 + some[i] / G) + 1 - first))};
          Unit u{0, 0, n, 0, 0};
          if (!block.bounds(u, seen, count)) break;
          const T* k = packed + (j * splits + s) * (k_split + v_split);
          block.scores(u, q, k);
          block.softmax(u, seen, count);
          block.values(u, k + k_split, count, block.o_split);
          for (int64_t i = 0; i < n; ++i)
            if (block.ms[i] != -INFINITY)
              merge_row(block.transform, m + some[i], l + some[i], o + some[i] * ldo, block.ms[i], block.ls[i],
                        block.o_split + i * ldo, ldo);
        }
      }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = (x.row + t0 + r / G) * H + g * G + r % G;
      finish_row(block.transform, m[r], l[r], o + r * ldo, Dv, nullptr, (St*)p.out + row * Dv, p.lse + row);
    }
  }

  void run() {
    const int64_t pairs = p.batch * Hkv;
    int64_t longest = 0, queries = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const BlockSequence x = block_sequence(p, b);
      longest = most(longest, count_blocks(p, x)), queries += x.S;
    }
    if (pairs == 0 || queries == 0) return;
    while (chunk > 16 && queries * Hkv / chunk < 8 * p.threads) chunk /= 2;
    Scratch<float> scratch(p.threads * floats(longest));
    Scratch<int64_t> places(pairs + 1), packs(pairs + 1), items(pairs + 1);  // where a pair's packed keys, packing and chunks begin
    const int64_t size = splits * (k_split + v_split);                        // of a block
    for (int64_t from = 0, to; from < pairs; from = to) {
      int64_t blocks = 0, chunks = 0;
      for (to = from; to < pairs; ++to) {
        const BlockSequence x = block_sequence(p, to / Hkv);
        if (to > from && (blocks + count_blocks(p, x)) * size * (int64_t)sizeof(T) > kPackedBytes) break;
        packs[to] = blocks, items[to] = chunks;
        blocks += count_blocks(p, x), chunks += (x.S + chunk - 1) / chunk;
      }
      packs[to] = blocks, items[to] = chunks;
      Scratch<T> packed(blocks * size);
      const auto pair_of = [&](const int64_t* begins, int64_t i) {
        int64_t pair = from;
        while (begins[pair + 1] <= i) ++pair;
        return pair;
      };
      parallel_for(p.threads, blocks, [&](int64_t i, int thread) {
        const int64_t pair = pair_of(packs, i);
        pack(block_sequence(p, pair / Hkv), pair / Hkv, pair % Hkv, i - packs[pair], packed + i * size, scratch + thread * floats(longest));
      });
      parallel_for(p.threads, chunks, [&](int64_t i, int thread) {
        const int64_t pair = pair_of(items, chunks - 1 - i), c = chunks - 1 - i - items[pair];  // late queries, with the most keys, first
        run_chunk(block_sequence(p, pair / Hkv), pair % Hkv, c * chunk, packed + packs[pair] * size, scratch + thread * floats(longest));
      });
    }
  }
};

}  // namespace

void block_sparse_forward(const BlockSparseForwardParams& p) {
  switch (p.dtype) {
    case DType::float32: return Forward<float>{p}.run();
    case DType::bfloat16: return Forward<bf16>{p}.run();
    case DType::float16: return Forward<f16>{p}.run();
  }
}

}  // namespace tk::TK_ISA
