// Attention of a few new queries over a cache, contiguous or paged: the last q_len rows of a prefill, bit for bit.
//
// Few rows (q_len * G <= kStreamRows): an item is one split of kSplit keys of a sequence, for all key heads or a few; all
// query heads of a group share its one pass over K and V. It leaves (m, l, o) of its split, which are then merged in
// order, as prefill does. Heads are the inner loop of that pass where they lie side by side in memory, so that it reads
// the cache front to back. Many rows (a chunk of a prompt): prefill's own loop over the same splits.
//
// Shared prefix: its keys are the first of every sequence, so its whole splits are splits of every sequence. Each is packed
// once per key head and prefill's block kernel takes the rows of all sequences through it. The keys after the last whole
// split of the prefix go with each sequence's own, from where they lie: the bits are those of a cache that holds both.
//
// B batch, S new queries, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim.
#include "attention_block.h"
#include "attention_kernels.h"
#include "attention_split.h"
#include "attention_stream.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kBlockRows = 128;  // rows of a sequence up to which a shared prefix is computed apart

template <class St> struct Decode {
  using T = Compute<St>;
  using Mm = Gemm<T>;
  using Block = SplitBlock<T>;
  using Pass = Stream<St, T>;

  const AttentionDecodeParams& p;
  const Keys& keys;
  const Transform transform{p};
  const int64_t S, D, Dv, H, G, rows = G * S;  // H: key heads
  const bool streams = rows <= kStreamRows && Pass::takes(D);  // a split's pass; else it is packed
  const int64_t shared;                        // whole splits of the prefix
  const int64_t ldo = round_up(Dv, Mm::NR);

  Decode(const AttentionDecodeParams& params, const Keys& k)
      : p(params), keys(k), S(p.q_len), D(p.head_dim), Dv(p.value_dim), H(p.kv_heads), G(p.heads / p.kv_heads),
        shared(p.batch > 1 ? k.prefix_length / kSplit : 0) {}

  // Splits of a sequence after the shared ones.
  int64_t splits(int64_t b) const { return (keys.count(b) + kSplit - 1) / kSplit - shared; }
  Range seen(int64_t b, int64_t r) const { return visible_keys(p, r % S + keys.count(b) - S, keys.count(b)); }

  // What n rows of a key head have so far, of one split or of several: [n] m, [n] l, [n, ldo] o.
  struct Partial {
    float *m, *l, *o;
  };
  static int64_t head_floats(int64_t n) { return round_up(2 * n, 16); }
  Partial partial(float* base, int64_t n) const { return {base, base + n, base + head_floats(n)}; }
  int64_t stream_floats() const { return head_floats(rows) + (streams ? rows : round_up(rows, Mm::MR)) * ldo; }
  int64_t shared_floats() const { return head_floats(p.batch * rows) + round_up(p.batch * rows, Mm::MR) * ldo; }

  // Scratch of one thread, in floats.
  int64_t q_floats() const { return round_up(Pass::q_size(rows, D) * (int64_t)sizeof(T) / 4, 16); }
  int64_t probs_floats() const { return Pass::probs_size() * (int64_t)sizeof(T) / 4; }
  int64_t copy_floats() const { return kLine * round_up(most(D, Dv), 16); }
  int64_t scratch_floats(int64_t heads) const {
    const int64_t head = q_floats() + rows * kLd + probs_floats() + Pass::o_size(rows, ldo);
    const int64_t stream = heads * head + copy_floats() + Pass::buffer_size(ldo);
    const int64_t blocks = of(Mm::size_b(kSplit, D) + Mm::size_b(Dv, kSplit) + Mm::size_a(kBlockRows, D)) +
                           kSplit * round_up(most(D, Dv), 16) + Block::floats(Dv);
    return round_up(most(streams ? stream : 0, streams && !shared ? 0 : blocks), 1024);
  }
  static int64_t of(int64_t elements) { return round_up(elements * (int64_t)sizeof(T) / 4, 16); }

  // kLine keys from `at` of the split at `base`: where they lie, or a copy with zeros after the last one.
  const St* chunk(const void* data, const int64_t* stride, int64_t b, int64_t h, int64_t j, int64_t n, int64_t width, St* copy,
                  int64_t* step) const {
    *step = keys.step(stride, j);
    if (j + kLine <= n && keys.run(j, n) >= kLine) return keys.row<St>(data, stride, b, j, h);
    *step = width;
    for (int64_t i = 0; i < kLine; ++i) {
      if (j + i < n) memcpy((void*)(copy + i * width), keys.row<St>(data, stride, b, j + i, h), width * sizeof(St));
      else memset((void*)(copy + i * width), 0, width * sizeof(St));
    }
    return copy;
  }

  // Share `part` of `parts` of the chunk of kLine keys from j on, for heads [h0, h1): what to fetch while that many units of
  // the chunk before are worked on. Rows that end a page lead astray, which costs nothing but their fetching.
  Ahead ahead(const void* data, const int64_t* stride, int64_t b, int64_t j, int64_t end, int64_t width, int64_t h0, int64_t h1,
              int64_t part, int64_t parts) const {
    constexpr int64_t kRows = kLine / Ahead::kStreams;  // a stream's
    Ahead x;
    const int64_t first = part * kRows / parts, last = (part + 1) * kRows / parts;
    if (j + kLine > end || first == last) return x;
    for (int u = 0; u < Ahead::kStreams; ++u) x.at[u] = (const char*)keys.row<St>(data, stride, b, j + u * kRows + first, h0);
    x.step_bytes = keys.step(stride, j) * (int64_t)sizeof(St);
    x.row_bytes = ((h1 - h0 - 1) * stride[2] + width) * (int64_t)sizeof(St);
    x.left = last - first;
    return x;
  }

  struct Item {  // split `index` of sequence b, for heads [h0, h1)
    int64_t b, index, h0, h1;
  };
  // An item, streamed, at whose end the next one's first keys are fetched; result: the first head's partial, `apart` floats
  // from the next.
  void split(const Item& item, const Item* next_item, float* scratch, float* result, int64_t apart) const {
    const int64_t b = item.b, index = item.index, h0 = item.h0, h1 = item.h1;
    const int64_t n = keys.count(b), base = index * kSplit, count = least(kSplit, n - base), heads = h1 - h0;
    float* q = scratch;
    float* scores = q + heads * q_floats();
    float* probs = scores + heads * rows * kLd;
    float* o = probs + heads * probs_floats();
    float* buffer = o + heads * Pass::o_size(rows, ldo);
    St* copy = (St*)(buffer + Pass::buffer_size(ldo));

    Range here[kStreamRows];  // what a row sees of this split
    int64_t k0 = count, k1 = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const Range all = seen(b, r);
      here[r] = {most(all.lo - base, 0), least(all.hi - base, count)};
      if (here[r].lo < here[r].hi) k0 = least(k0, here[r].lo), k1 = most(k1, here[r].hi);
    }
    if (k0 >= k1) {
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t r = 0; r < rows; ++r) result[h * apart + r] = -INFINITY;
      return;
    }
    k0 = round_down(k0, kLine), k1 = round_up(k1, kLine);
    const int64_t end = least(base + k1, n);

    const typename Pass::Setup setup(rows);
    St* q_rows = (St*)scores;  // [rows, D] pass through the scores' place: D <= 256 < kLd
    for (int64_t h = h0; h < h1; ++h) {
      for (int64_t r = 0; r < rows; ++r)
        memcpy((void*)(q_rows + r * D), at<St>(p.q, p.q_stride, b, r % S, h * G + r / S), D * sizeof(St));
      Pass::pack_q(q_rows, rows, D, (T*)(q + (h - h0) * q_floats()));
    }
    int64_t step;
    for (int64_t k = k0; k < k1; k += kLine)
      for (int64_t h = h0; h < h1; ++h) {
        Ahead next = ahead(p.k, p.k_stride, b, base + k + kLine, end, D, h0, h1, h - h0, heads);
        const St* from = chunk(p.k, p.k_stride, b, h, base + k, n, D, copy, &step);
        Pass::scores(from, step, D, (const T*)(q + (h - h0) * q_floats()), rows, scores + (h - h0) * rows * kLd + k, next);
        next.rest();
      }
    for (int64_t h = 0; h < heads; ++h) {
      Ahead next = ahead(p.v, p.v_stride, b, base + k0, end, Dv, h0, h1, h, heads);  // while the memory is idle
      next.rest();
      for (int64_t r = 0; r < rows; ++r) {
        float* s = scores + h * rows * kLd;
        T* x = (T*)(probs + h * probs_floats());
        float* m = result + h * apart + r;
        *m = -INFINITY;
        if (here[r].lo < here[r].hi) softmax_row<T>(transform, s, x, r, here[r].lo, here[r].hi, k0, k1, m, m + rows);
        else blank_row<T>(s, x, r, k0, k1);
      }
    }
    for (int64_t k = k0; k < k1; k += kLine)
      for (int64_t h = h0; h < h1; ++h) {
        const int64_t i = h - h0;
        Ahead next = ahead(p.v, p.v_stride, b, base + k + kLine, end, Dv, h0, h1, i, heads);
        if (k + kLine == k1 && next_item) {
          const Item& x = *next_item;
          next = ahead(p.k, p.k_stride, x.b, x.index * kSplit, keys.count(x.b), D, x.h0, x.h1, i, heads);
        }
        const St* from = chunk(p.v, p.v_stride, b, h, base + k, n, Dv, copy, &step);
        Pass::values(from, step, Dv, scores + i * rows * kLd, (const T*)(probs + i * probs_floats()), rows, k, k0, k1,
                     o + i * Pass::o_size(rows, ldo), ldo, buffer, next);
        next.rest();
      }
    for (int64_t h = 0; h < heads; ++h) {
      Pass::finish(o + h * Pass::o_size(rows, ldo), rows, ldo);
      memcpy(result + h * apart + head_floats(rows), o + h * Pass::o_size(rows, ldo), rows * ldo * sizeof(float));
    }
  }

  // n rows of packed queries q over `count` keys of sequence b and head h from `base` on, which are packed here.
  void blocks(int64_t b, int64_t h, int64_t base, int64_t count, int64_t n, const T* q, const Range* sees, float* scratch,
              const Partial& result) const {
    T* k = (T*)scratch;
    T* v = k + Mm::size_b(kSplit, D);
    scratch += of(Mm::size_b(kSplit, D) + Mm::size_b(Dv, kSplit));
    pack_split<St>(keys, b, h, base, count, D, Dv, (St*)scratch, k, v);
    Block block(p, scratch + kSplit * round_up(most(D, Dv), 16));
    for (int64_t r = 0; r < n; r += Block::kRows) {
      Unit u{base / kSplit, r, least(Block::kRows, n - r), 0, 0};
      const bool any = Block::bounds(u, sees, count);
      if (any) {
        block.scores(u, q + r * Mm::padded_k(D), k);
        block.softmax(u, sees, count);
        block.values(u, v, count, result.o + r * ldo);
      }
      for (int64_t i = 0; i < u.rows; ++i) result.m[r + i] = any ? block.ms[i] : -INFINITY, result.l[r + i] = any ? block.ls[i] : 0.0f;
    }
  }
  // The queries of head h's rows [first, first + n), counted through all sequences, as left operands.
  void pack_queries(int64_t h, int64_t first, int64_t n, T* q) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t b = (first + i) / rows, r = (first + i) % rows;
      Products<T>::pack_row(at<St>(p.q, p.q_stride, b, r % S, h * G + r / S), i, D, q);
    }
  }
  void packed_split(int64_t b, int64_t index, int64_t h, float* scratch, float* result) const {
    const int64_t base = index * kSplit;
    T* q = (T*)scratch;
    scratch += of(Mm::size_a(kBlockRows, D));
    pack_queries(h, b * rows, rows, q);
    Range sees[kBlockRows];
    for (int64_t r = 0; r < rows; ++r) sees[r] = seen(b, r);
    blocks(b, h, base, least(kSplit, keys.count(b) - base), rows, q, sees, scratch, partial(result, rows));
  }

  void take_in(const Partial& x, int64_t i, float* m, float* l, float* o) const {
    if (x.m[i] != -INFINITY) merge_row(transform, m, l, o, x.m[i], x.l[i], x.o + i * ldo, ldo);
  }

  // The prefix's whole splits, for all rows of all sequences: what each has after them, shared_floats() apart by head.
  void run_shared(Scratch<float>& scratch, int64_t floats, float* state) const {
    const int64_t n = p.batch * rows, wave = least(shared, (4 * p.threads + H - 1) / H), panels = round_up(n, Mm::MR);
    Scratch<T> q(H * panels * Mm::padded_k(D));
    Scratch<Range> sees(n);
    for (int64_t i = 0; i < n; ++i) sees[i] = seen(i / rows, i % rows);
    const int64_t strips = (n + Block::kRows - 1) / Block::kRows;
    parallel_for(p.threads, H * strips, [&](int64_t item, int) {
      const int64_t h = item / strips, r = item % strips * Block::kRows;
      pack_queries(h, r, least(Block::kRows, n - r), q + (h * panels + r) * Mm::padded_k(D));
    });
    Scratch<float> results(wave * H * shared_floats());
    for (int64_t done = 0; done < shared; done += wave) {  // some at a time: their results stay in cache
      const int64_t now = least(wave, shared - done);
      parallel_for(p.threads, now * H, [&](int64_t item, int thread) {
        const int64_t i = item / H, h = item % H;
        blocks(0, h, (done + i) * kSplit, kSplit, n, q + h * panels * Mm::padded_k(D), sees, scratch + thread * floats,
               partial(results + item * shared_floats(), n));
      });
      parallel_for(p.threads, H * p.batch, [&](int64_t item, int) {
        const int64_t h = item / p.batch, b = item % p.batch;
        const Partial x = partial(state + h * shared_floats(), n);
        for (int64_t r = b * rows; r < (b + 1) * rows; ++r) {
          if (done == 0) x.m[r] = -INFINITY, x.l[r] = 0.0f, memset(x.o + r * ldo, 0, ldo * sizeof(float));
          for (int64_t i = 0; i < now; ++i)
            take_in(partial(results + (i * H + h) * shared_floats(), n), r, x.m + r, x.l + r, x.o + r * ldo);
        }
      });
    }
  }

  // Results of sequence b and head h, from the state after the prefix and `count` partials of its own splits.
  void finish(int64_t b, int64_t h, float* state, float* partials, int64_t count, float* o) const {
    for (int64_t r = 0; r < rows; ++r) {
      float m = -INFINITY, l = 0.0f;
      if (shared) {
        const Partial x = partial(state + h * shared_floats(), p.batch * rows);
        m = x.m[b * rows + r], l = x.l[b * rows + r], o = x.o + (b * rows + r) * ldo;
      } else {
        memset(o, 0, ldo * sizeof(float));
      }
      for (int64_t i = 0; i < count; ++i) take_in(partial(partials + i * stream_floats(), rows), r, &m, &l, o);
      const int64_t i = r % S, head = h * G + r / S;
      finish_row(transform, m, l, o, Dv, p.sinks ? p.sinks + head : nullptr, at<St>(p.out, p.out_stride, b, i, head),
                 p.lse + (b * S + i) * p.heads + head);
    }
  }

  void run() const {
    if (rows == 0) return;
    Scratch<int64_t> first(p.batch + 1);  // own splits of the sequences before b
    first[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) first[b + 1] = first[b] + splits(b);
    const int64_t total = first[p.batch];
    int64_t heads = streams && p.k_stride[2] <= p.k_stride[1] ? H : 1;  // an item's
    while (heads > 1 && total * ((H + heads - 1) / heads) < 4 * p.threads) heads = (heads + 1) / 2;
    const int64_t parts = (H + heads - 1) / heads, floats = scratch_floats(heads);
    Scratch<float> scratch(p.threads * floats), partials(total * H * stream_floats()), state(shared ? H * shared_floats() : 0);
    if (shared) run_shared(scratch, floats, state);
    const auto own = [&](int64_t b, int64_t h, int64_t i) {
      return partials + (first[b] * H + h * splits(b) + i) * stream_floats();
    };
    const auto item_at = [&](int64_t i) {
      int64_t b = 0;
      while (first[b + 1] <= i / parts) ++b;
      const int64_t h0 = i % parts * heads;
      return Item{b, shared + i / parts - first[b], h0, least(H, h0 + heads)};
    };
    parallel_for(p.threads, total * parts, [&](int64_t i, int thread) {
      const Item item = item_at(i);
      float* result = own(item.b, item.h0, item.index - shared);
      if (!streams) return packed_split(item.b, item.index, item.h0, scratch + thread * floats, result);
      const bool more = i + p.threads < total * parts;  // threads take items in turn, about
      const Item next = more ? item_at(i + p.threads) : item;
      split(item, more ? &next : nullptr, scratch + thread * floats, result, splits(item.b) * stream_floats());
    });
    parallel_for(p.threads, p.batch * H, [&](int64_t item, int thread) {
      const int64_t b = item / H, h = item % H;
      finish(b, h, state, own(b, h, 0), splits(b), scratch + thread * floats);
    });
  }
};

template <class St> void decode(const AttentionDecodeParams& p, const Keys& keys) {
  if (p.batch * p.kv_heads == 0) return;
  const Decode<St> x(p, keys);
  if (x.streams || (x.shared > 0 && x.rows <= kBlockRows)) return x.run();
  attention_rows(p, Queries{p.q, p.out, p.lse, p.sinks, p.q_stride, p.out_stride, p.q_len}, keys);
}

}  // namespace

void attention_decode(const AttentionDecodeParams& p) {
  Keys keys{p.k, p.v, p.k_stride, p.v_stride, 0, nullptr, p.seqlens, p.block_table, p.page_size, p.max_pages};
  keys.prefix = &p;
  keys.prefix_length = p.prefix_k ? p.prefix_length : 0;
  switch (p.dtype) {
    case DType::float32: return decode<float>(p, keys);
    case DType::bfloat16: return decode<bf16>(p, keys);
    case DType::float16: return decode<f16>(p, keys);
  }
}

}  // namespace tk::TK_ISA
