// Attention, forward: O = softmax(mask(scale Q K^T)) V and its log-sum-exp, for MHA, GQA and MQA.
//
//   s_ij = scale q_i . k_j,  lse_i = log sum_j e^(s_ij),  o_i = sum_j e^(s_ij - lse_i) v_j        (csrc/include/attention.h)
//
// One pair (sequence, key head) has R = S * G rows: query i of head g of the group is row i * G + g, as they lie in memory,
// so that a block's rows are few positions and see nearly the same keys. K and V are packed once per pair; then every item
// takes a chunk of a pair's rows over all splits of keys they see:
//   for each split:  for each block of kRows rows:  S = Q K^T, softmax, O_split = P V, merge      (attention_split.h)
// so that a split (256 KiB of K and V at D = 128 in bf16) stays in L2 while the chunk's blocks pass over it.
// Large pairs are packed by all threads and worked on in chunks, heavy chunks first. A pair that is a small part of the
// whole is one thread's, which packs it into memory still in its cache from the pair before. Packed sequences of any mix
// of lengths come out even that way; S and T are each sequence's own.
//
// B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim.
#include "attention_kernels.h"
#include "attention_split.h"

namespace tk::TK_ISA {
namespace {

template <class St> struct Forward {
  using T = Compute<St>;
  using Mm = Gemm<T>;
  using Block = SplitBlock<T>;
  static constexpr int64_t kRows = Block::kRows, kMaxRows = 8 * kRows;  // rows of a block and of the largest chunk
  static constexpr int64_t kPackedBytes = 256 << 20;                    // packed K and V held at a time

  const AttentionShape& p;
  const Queries& io;
  const Keys& keys;
  const int64_t D, Dv, H, G;  // H: key heads
  const int64_t k_split = Mm::size_b(kSplit, D), v_split = Mm::size_b(Dv, kSplit);  // elements of a packed split
  const int64_t ldo = round_up(Dv, Mm::NR);

  Forward(const AttentionShape& shape, const Queries& queries, const Keys& k)
      : p(shape), io(queries), keys(k), D(p.head_dim), Dv(p.value_dim), H(p.kv_heads), G(H ? p.heads / H : 0) {}

  int64_t rows(int64_t b) const { return G * io.length(b); }
  int64_t splits(int64_t b) const { return (keys.count(b) + kSplit - 1) / kSplit; }
  double cost(int64_t b) const { return (double)rows(b) * (double)(keys.count(b) + kLine); }

  // Scratch of one thread.
  struct Local {
    T* q;          // packed rows of the chunk
    St* rows;      // [kSplit, max(D, Dv)] of a split in pages
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

  // A packed pair: all its splits of K, then those of V.
  struct Packed {
    T *k, *v;
  };
  Packed packed_at(T* base, int64_t b) const { return {base, base + splits(b) * k_split}; }

  void pack(int64_t b, int64_t kv_head, int64_t split, const Packed& x, const Local& scratch) const {
    const int64_t first = split * kSplit, count = least(kSplit, keys.count(b) - first);
    pack_split<St>(keys, b, kv_head, first, count, D, Dv, scratch.rows, x.k + split * k_split, x.v + split * v_split);
  }

  // Rows [r0, r1) of a pair against its packed splits.
  void chunk(int64_t b, int64_t kv_head, int64_t r0, int64_t r1, const Packed& packed, const Local& x) const {
    const int64_t S = io.length(b), n = keys.count(b), rows = r1 - r0;
    // body(row, position, head) for rows [from, end)
    const auto each_row = [&](int64_t from, int64_t end, const auto& body) {
      int64_t i = (r0 + from) / G, g = (r0 + from) % G;  // counted on: a division takes as long as a row's packing
      for (int64_t r = from; r < end; ++r) {
        body(r, i, kv_head * G + g);
        if (++g == G) g = 0, ++i;
      }
    };
    Range seen[kMaxRows];
    float m[kMaxRows], l[kMaxRows];
    int64_t first = n, last = 0, last_split[kMaxRows / kRows];  // of each block of rows; -1: none of its rows sees a key
    for (int64_t& x : last_split) x = -1;
    for (int64_t r = 0, i = r0 / G; r < rows; ++i) {
      const Range here = visible_keys(p, i + n - S, n);
      const bool any = here.lo < here.hi;
      if (any) first = least(first, here.lo), last = most(last, here.hi);
      for (const int64_t end = least(rows, (i + 1) * G - r0); r < end; ++r) {
        seen[r] = here, m[r] = -INFINITY, l[r] = 0.0f;
        if (any) last_split[r / kRows] = most(last_split[r / kRows], (here.hi - 1) / kSplit);
      }
    }

    Block block(p, x.block);
    const auto finish = [&](int64_t row, int64_t end, const float* o) {
      each_row(row, end, [&](int64_t r, int64_t i, int64_t h) {
        finish_row(block.transform, m[r], l[r], o + (r - row) * ldo, Dv, io.sinks ? io.sinks + h : nullptr,
                   at<St>(io.out, io.out_stride, b, io.first(b) + i, h), io.lse + io.lse_row(b, i) * p.heads + h);
      });
    };
    for (int64_t split = first / kSplit; split * kSplit < last; ++split)
      for (int64_t row = 0; row < rows; row += kRows) {
        Unit u{split, row, least(kRows, rows - row), 0, 0};
        const int64_t end = row + u.rows, count = least(kSplit, n - split * kSplit);
        if (!block.bounds(u, seen, count)) continue;
        bool fresh = true;  // no row of the block has a result yet: the split's is the result
        for (int64_t r = row; r < end; ++r) fresh &= m[r] == -INFINITY;
        T* q = x.q + row * Mm::padded_k(D);
        if (fresh)
          each_row(row, end, [&](int64_t r, int64_t i, int64_t h) {
            Products<T>::pack_row(at<St>(io.q, io.q_stride, b, io.first(b) + i, h), r - row, D, q);
          });
        float* o = fresh ? x.o + row * ldo : block.o_split;
        block.scores(u, q, packed.k + split * k_split);
        block.softmax(u, seen, count);
        block.values(u, packed.v + split * v_split, count, o);
        for (int64_t i = 0, r = row; r < end; ++i, ++r) {
          if (fresh) m[r] = block.ms[i], l[r] = block.ls[i];
          else if (block.ms[i] != -INFINITY)
            merge_row(block.transform, m + r, l + r, x.o + r * ldo, block.ms[i], block.ls[i], o + i * ldo, ldo);
        }
        if (split == last_split[row / kRows]) finish(row, end, x.o + row * ldo);
      }
    for (int64_t row = 0; row < rows; row += kRows)
      if (last_split[row / kRows] < 0) finish(row, least(row + kRows, rows), x.o + row * ldo);  // no key seen
  }

  // A single split stays in L2 anyway, and so do queries and results of small chunks (4 % at 512 tokens).
  static int64_t chunk_rows_of(int64_t splits) { return splits > 1 ? kMaxRows : kRows; }
  template <class F> void each_chunk(int64_t b, int64_t chunk_rows, const F& body) const {
    for (int64_t r = 0; r < rows(b); r += chunk_rows) body(r, least(rows(b), r + chunk_rows));
  }
  int64_t count_chunks(int64_t b, int64_t chunk_rows) const { return (rows(b) + chunk_rows - 1) / chunk_rows; }

  void run() const {
    if (H == 0 || G == 0) return;
    double total = 0;
    for (int64_t b = 0; b < p.batch; ++b) total += H * cost(b);
    const int64_t floats = round_up(local_floats(), 1024);
    Scratch<float> scratch(p.threads * floats);
    const auto mine = [&](int thread) { return local(scratch + thread * floats); };

    Scratch<int64_t> order(p.batch);  // sequences: large ones from the front, small ones from the back
    int64_t large = 0, small = 0, small_splits = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      if (rows(b) == 0) continue;
      if (8 * p.threads * cost(b) > total) order[large++] = b;
      else order[p.batch - ++small] = b, small_splits = most(small_splits, splits(b));
    }
    // There are at most 8 * threads large pairs, and they are held packed together as far as kPackedBytes go.
    for (int64_t at = 0, end; at < large * H; at = end) {
      int64_t held = 0;
      for (end = at; end < large * H; ++end) {
        const int64_t more = splits(order[end / H]);
        if (end > at && (held + more) * (k_split + v_split) * (int64_t)sizeof(T) > kPackedBytes) break;
        held += more;
      }
      run_large(order, at, end, held, mine);
    }
    if (small == 0) return;
    const int64_t buffer = small_splits * (k_split + v_split);
    Scratch<T> packed(p.threads * buffer);
    parallel_for(p.threads, small * H, [&](int64_t item, int thread) {
      const int64_t b = order[p.batch - 1 - item / H], h = item % H;
      const Packed x = packed_at(packed + thread * buffer, b);
      for (int64_t split = 0; split < splits(b); ++split) pack(b, h, split, x, mine(thread));
      each_chunk(b, chunk_rows_of(splits(b)), [&](int64_t r0, int64_t r1) { chunk(b, h, r0, r1, x, mine(thread)); });
    });
  }

  // Pairs [begin, end), pair i being key head i % H of sequence order[i / H], of `held` splits together.
  template <class F> void run_large(const int64_t* order, int64_t begin, int64_t end, int64_t held, const F& mine) const {
    struct Item {
      int64_t pair, r0, r1;
    };
    struct Split {
      int64_t pair, split;
    };
    const auto chunks = [&](int64_t chunk_rows) {
      int64_t n = 0;
      for (int64_t i = begin; i < end; ++i) n += count_chunks(order[i / H], chunk_rows);
      return n;
    };
    int64_t longest = 0;
    for (int64_t i = begin; i < end; ++i) longest = most(longest, splits(order[i / H]));
    int64_t chunk_rows = chunk_rows_of(longest);
    // 12 a thread: with 8, the last ones to end cost two threads 3-6 % at 512 tokens.
    while (chunk_rows > kRows && chunks(chunk_rows) < 12 * p.threads) chunk_rows = round_up(chunk_rows / 2, kRows);

    Scratch<T> packed(held * (k_split + v_split));
    Scratch<Packed> pairs(end - begin);
    Scratch<Split> packs(held);
    Scratch<Item> items(chunks(chunk_rows));
    Scratch<int64_t> places(longest + 2);  // items by the splits up to their last row's last key, most first
    memset(places, 0, (longest + 2) * sizeof(int64_t));
    const auto each = [&](const auto& body) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = order[i / H], S = io.length(b), n = keys.count(b);
        each_chunk(b, chunk_rows, [&](int64_t r0, int64_t r1) {
          body(i - begin, r0, r1, longest - (visible_keys(p, (r1 - 1) / G + n - S, n).hi + kSplit - 1) / kSplit);
        });
      }
    };
    each([&](int64_t, int64_t, int64_t, int64_t rank) { ++places[rank + 1]; });
    for (int64_t i = 0; i <= longest; ++i) places[i + 1] += places[i];
    each([&](int64_t pair, int64_t r0, int64_t r1, int64_t rank) { items[places[rank]++] = {pair, r0, r1}; });
    for (int64_t i = begin, done = 0; i < end; ++i) {
      const int64_t b = order[i / H], n = splits(b);
      pairs[i - begin] = packed_at(packed + done * (k_split + v_split), b);
      for (int64_t split = 0; split < n; ++split) packs[done + split] = {i - begin, split};
      done += n;
    }
    parallel_for_near(p.threads, held, [&](int64_t item, int thread) {
      const Split& x = packs[item];
      pack(order[(begin + x.pair) / H], (begin + x.pair) % H, x.split, pairs[x.pair], mine(thread));
    });
    const auto work = [&](int64_t item, int thread) {
      const Item& x = items[item];
      chunk(order[(begin + x.pair) / H], (begin + x.pair) % H, x.r0, x.r1, pairs[x.pair], mine(thread));
    };
    // Items of one split go pair by pair: each thread's are of the pairs it packed.
    if (longest == 1) parallel_for_near(p.threads, chunks(chunk_rows), work);
    else parallel_for(p.threads, chunks(chunk_rows), work);
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
  const Queries queries{p.q, p.out, p.lse, p.sinks, p.q_stride, p.out_stride, p.q_len, p.cu_seqlens_q};
  Keys keys{p.k, p.v, p.k_stride, p.v_stride, p.k_len, p.key_start};
  keys.cu_seqlens = p.cu_seqlens_k;
  attention_rows(p, queries, keys);
}

}  // namespace tk::TK_ISA
