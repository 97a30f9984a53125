// Attention, forward: O = softmax(mask(scale Q K^T)) V and its log-sum-exp, for MHA, GQA and MQA.
//
//   s_ij = scale q_i . k_j,  lse_i = log sum_j e^(s_ij),  o_i = sum_j e^(s_ij - lse_i) v_j        (csrc/include/attention.h)
//
// One pair (sequence, key head) has R = G * S rows: query i of head g of the group is row g * S + i. K and V are packed
// once per pair; then every item takes a chunk of a pair's rows over all splits of keys they see:
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
    Range seen[kMaxRows];
    float m[kMaxRows], l[kMaxRows];
    int64_t first = n, last = 0, last_split[kMaxRows / kRows];  // of each block of rows; -1: none of its rows sees a key
    for (int64_t& x : last_split) x = -1;
    for (int64_t r = 0, i = r0 % S; r < rows; ++r, i = i + 1 == S ? 0 : i + 1) {
      seen[r] = visible_keys(p, i + n - S, n);
      m[r] = -INFINITY, l[r] = 0.0f;
      if (seen[r].lo == seen[r].hi) continue;
      first = least(first, seen[r].lo), last = most(last, seen[r].hi);
      last_split[r / kRows] = most(last_split[r / kRows], (seen[r].hi - 1) / kSplit);
    }

    // Units: for each split, for each block of kRows rows. While one is in its softmax, the one before multiplies its
    // values and the one after its scores.
    Block block(p, x.block);
    const auto count = [&](const Unit& u) { return least(kSplit, n - u.split * kSplit); };
    const auto next = [&](Unit& u) {
      do {
        u.row += kRows;
        if (u.row >= rows) u.row = 0, ++u.split;
        if (u.split * kSplit >= last) return false;
        u.rows = least(kRows, rows - u.row);
      } while (!block.bounds(u, seen, count(u)));
      return true;
    };
    int64_t packed_rows = 0;
    const auto scores = [&](const Unit& u, int place) {
      if (u.row + u.rows > packed_rows) {
        pack_queries(b, kv_head, r0 + packed_rows, u.row + u.rows - packed_rows, x.rows, x.q + packed_rows * Mm::padded_k(D));
        packed_rows = u.row + u.rows;
        fetch_queries(b, kv_head, r0 + packed_rows, least(kRows, rows - packed_rows));
      }
      block.scores(u, block.places[place], x.q, packed.k + u.split * k_split);
    };
    bool fresh = false;  // no row of the unit has a result yet: the split's is the result
    const auto values = [&](const Unit& u, int place) {
      fresh = true;
      for (int64_t r = u.row; r < u.row + u.rows; ++r) fresh &= m[r] == -INFINITY;
      block.values(u, block.places[place], packed.v + u.split * v_split, count(u), fresh ? x.o + u.row * ldo : block.o_split);
    };
    const auto finish = [&](int64_t row, int64_t count) {
      int64_t i = (r0 + row) % S, h = kv_head * G + (r0 + row) / S;
      for (int64_t r = row; r < row + count; ++r, ++i) {
        if (i == S) i = 0, ++h;
        finish_row(block.transform, m[r], l[r], x.o + r * ldo, Dv, io.sinks ? io.sinks + h : nullptr,
                   at<St>(io.out, io.out_stride, b, io.first(b) + i, h), io.lse + io.lse_row(b, i) * p.heads + h);
      }
    };
    const auto merge = [&](const Unit& u, int place) {
      const typename Block::Place& y = block.places[place];
      for (int64_t i = 0, r = u.row; i < u.rows; ++i, ++r) {
        if (fresh) m[r] = y.ms[i], l[r] = y.ls[i];
        else if (y.ms[i] != -INFINITY)
          merge_row(block.transform, m + r, l + r, x.o + r * ldo, y.ms[i], y.ls[i], block.o_split + i * ldo, ldo);
      }
      if (u.split == last_split[u.row / kRows]) finish(u.row, u.rows);
    };
    Unit before{}, now{first / kSplit, -kRows, 0, 0, 0}, after{};
    int place = 0;
    bool going = next(now), any = false;
    if (going) scores(now, place), block.products.finish();
    for (; going; place ^= 1, any = true) {
      after = now;
      going = next(after);
      if (any) values(before, place ^ 1);
      if (going) scores(after, place ^ 1);
      block.softmax(now, block.places[place], seen, count(now));
      block.products.finish();
      if (any) merge(before, place ^ 1);
      before = now, now = after;
    }
    if (any) values(before, place ^ 1), block.products.finish(), merge(before, place ^ 1);
    for (int64_t i = 0; i * kRows < rows; ++i)
      if (last_split[i] < 0) finish(i * kRows, least(kRows, rows - i * kRows));  // no key seen
  }

  const St* query(int64_t b, int64_t kv_head, int64_t r) const {
    return at<St>(io.q, io.q_stride, b, io.first(b) + r % io.length(b), kv_head * G + r / io.length(b));
  }
  // Into L2, while something else is worked on: rows lie far apart, where the hardware's prefetcher does not follow.
  void fetch_queries(int64_t b, int64_t kv_head, int64_t r0, int64_t rows) const {
    const char* row = (const char*)query(b, kv_head, r0);
    rows = least(rows, io.length(b) - r0 % io.length(b));  // those of one head
    for (int64_t r = 0; r < rows; ++r, row += io.q_stride[1] * (int64_t)sizeof(St))
      for (int64_t d = 0; d < D * (int64_t)sizeof(St); d += 64) __builtin_prefetch(row + d, 0, 2);
  }
  void pack_queries(int64_t b, int64_t kv_head, int64_t r0, int64_t rows, St* copy, T* to) const {
    const int64_t S = io.length(b);
    if (r0 % S + rows <= S) return Products<T>::pack_q(query(b, kv_head, r0), io.q_stride[1], rows, D, to);
    for (int64_t r = 0; r < rows; ++r) memcpy((void*)(copy + r * D), query(b, kv_head, r0 + r), D * sizeof(St));
    Products<T>::pack_q(copy, D, rows, D, to);
  }

  // Chunks of a pair's rows: they lie within a head where a head has enough rows, else they run across the group's heads.
  template <class F> void each_chunk(int64_t b, int64_t chunk_rows, const F& body) const {
    const int64_t S = io.length(b), R = rows(b), span = S > chunk_rows ? S : R;
    for (int64_t first = 0; first < R; first += span)
      for (int64_t r = 0; r < span; r += chunk_rows) body(first + r, first + least(span, r + chunk_rows));
  }
  int64_t count_chunks(int64_t b, int64_t chunk_rows) const {
    int64_t n = 0;
    each_chunk(b, chunk_rows, [&](int64_t, int64_t) { ++n; });
    return n;
  }

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
      each_chunk(b, kMaxRows, [&](int64_t r0, int64_t r1) { chunk(b, h, r0, r1, x, mine(thread)); });
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
    int64_t chunk_rows = kMaxRows, longest = 0;
    // 12 a thread: with 8, the last ones to end cost two threads 3-6 % at 512 tokens.
    while (chunk_rows > kRows && chunks(chunk_rows) < 12 * p.threads) chunk_rows = round_up(chunk_rows / 2, kRows);
    for (int64_t i = begin; i < end; ++i) longest = most(longest, splits(order[i / H]));

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
          const int64_t p1 = r0 / S == (r1 - 1) / S ? (r1 - 1) % S + n - S : n - 1;
          body(i - begin, r0, r1, longest - (visible_keys(p, p1, n).hi + kSplit - 1) / kSplit);
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
    parallel_for(p.threads, held, [&](int64_t item, int thread) {
      const Split& x = packs[item];
      pack(order[(begin + x.pair) / H], (begin + x.pair) % H, x.split, pairs[x.pair], mine(thread));
    });
    parallel_for(p.threads, chunks(chunk_rows), [&](int64_t item, int thread) {
      const Item& x = items[item];
      chunk(order[(begin + x.pair) / H], (begin + x.pair) % H, x.r0, x.r1, pairs[x.pair], mine(thread));
    });
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
