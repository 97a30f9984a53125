// Attention of a few new queries over a cache, contiguous or paged: the last q_len rows of a prefill, bit for bit.
//
// Few rows (q_len * G <= kStreamRows): an item is one split of kSplit keys of a sequence, for all key heads or a few; all
// query heads of a group share its one pass over K and V. It leaves (m, l, o) of its split, which are then merged in
// order, as prefill does. Heads are the inner loop of that pass where they lie side by side in memory, so that it reads
// the cache front to back. Many rows (a chunk of a prompt): prefill's own loop over the same splits.
//
// B batch, S new queries, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim.
#include "attention_block.h"
#include "attention_kernels.h"
#include "attention_stream.h"

namespace tk::TK_ISA {
namespace {

template <class St> struct Decode {
  using T = Compute<St>;
  using Pass = Stream<St, T>;

  const AttentionDecodeParams& p;
  const Keys& keys;
  const Transform transform{p};
  const int64_t S, D, Dv, G, rows = G * S;
  const int64_t ldo = round_up(Dv, Gemm<T>::NR);

  Decode(const AttentionDecodeParams& params, const Keys& k)
      : p(params), keys(k), S(p.q_len), D(p.head_dim), Dv(p.value_dim), G(p.heads / p.kv_heads) {}

  int64_t splits(int64_t b) const { return (keys.count(b) + kSplit - 1) / kSplit; }

  // What a split leaves of a head's rows: [rows] m, [rows] l, [rows, ldo] o.
  int64_t partial_floats() const { return round_up(2 * rows, 16) + rows * ldo; }

  // Scratch of one thread, in floats.
  int64_t q_floats() const { return round_up(Pass::q_size(D) * (int64_t)sizeof(T) / 4, 16); }
  int64_t probs_floats() const { return Pass::probs_size() * (int64_t)sizeof(T) / 4; }
  int64_t copy_floats() const { return kLine * round_up(most(D, Dv), 16); }
  int64_t scratch_floats(int64_t heads) const {
    return round_up(heads * (q_floats() + rows * kLd + probs_floats() + Pass::o_size(ldo)) + copy_floats() + Pass::buffer_size(ldo), 1024);
  }

  // kLine keys from `at` of the split at `base`: where they lie, or a copy with zeros after the last one.
  const St* chunk(const void* data, const int64_t* stride, int64_t b, int64_t h, int64_t j, int64_t n, int64_t width, St* copy,
                  int64_t* step) const {
    *step = stride[1];
    if (j + kLine <= n && keys.run(j, n) >= kLine) return keys.row<St>(data, stride, b, j, h);
    *step = width;
    for (int64_t i = 0; i < kLine; ++i) {
      if (j + i < n) memcpy((void*)(copy + i * width), keys.row<St>(data, stride, b, j + i, h), width * sizeof(St));
      else memset((void*)(copy + i * width), 0, width * sizeof(St));
    }
    return copy;
  }
  // The chunk that will be read after this one, towards the cache: same keys of the next head, or the next keys.
  void ahead(const void* data, const int64_t* stride, int64_t b, int64_t h, int64_t j, int64_t n, int64_t width, int64_t h0,
             int64_t h1) const {
    if (++h == h1) h = h0, j += kLine;
    if (j < n) prefetch_rows(keys.row<St>(data, stride, b, j, h), stride[1], width, least(kLine, keys.run(j, n)));
  }

  // Split `index` of sequence b for heads [h0, h1); partial: the first head's, `apart` floats from the next.
  void split(int64_t b, int64_t index, int64_t h0, int64_t h1, float* scratch, float* partial, int64_t apart) const {
    const int64_t n = keys.count(b), base = index * kSplit, count = least(kSplit, n - base), heads = h1 - h0;
    float* q = scratch;
    float* scores = q + heads * q_floats();
    float* probs = scores + heads * rows * kLd;
    float* o = probs + heads * probs_floats();
    float* buffer = o + heads * Pass::o_size(ldo);
    St* copy = (St*)(buffer + Pass::buffer_size(ldo));

    Range seen[kStreamRows];  // of this split
    int64_t k0 = count, k1 = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const Range all = visible_keys(p, r % S + n - S, n);
      seen[r] = {most(all.lo - base, 0), least(all.hi - base, count)};
      if (seen[r].lo < seen[r].hi) k0 = least(k0, seen[r].lo), k1 = most(k1, seen[r].hi);
    }
    if (k0 >= k1) {
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t r = 0; r < rows; ++r) partial[h * apart + r] = -INFINITY;
      return;
    }
    k0 = round_down(k0, kLine), k1 = round_up(k1, kLine);

    St* q_rows = (St*)scores;  // [rows, D] pass through the scores' place: D <= 256 < kLd
    for (int64_t h = h0; h < h1; ++h) {
      for (int64_t r = 0; r < rows; ++r)
        memcpy((void*)(q_rows + r * D), at<St>(p.q, p.q_stride, b, r % S, h * G + r / S), D * sizeof(St));
      Pass::pack_q(q_rows, rows, D, (T*)(q + (h - h0) * q_floats()));
    }
    int64_t step;
    for (int64_t k = k0; k < k1; k += kLine)
      for (int64_t h = h0; h < h1; ++h) {
        ahead(p.k, p.k_stride, b, h, base + k, n, D, h0, h1);
        const St* from = chunk(p.k, p.k_stride, b, h, base + k, n, D, copy, &step);
        Pass::scores(from, step, D, (const T*)(q + (h - h0) * q_floats()), rows, scores + (h - h0) * rows * kLd + k);
      }
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t r = 0; r < rows; ++r) {
        float* s = scores + h * rows * kLd;
        T* x = (T*)(probs + h * probs_floats());
        float* m = partial + h * apart + r;
        *m = -INFINITY;
        if (seen[r].lo < seen[r].hi) softmax_row<T>(transform, s, x, r, seen[r].lo, seen[r].hi, k0, k1, m, m + rows);
        else blank_row<T>(s, x, r, k0, k1);
      }
    for (int64_t k = k0; k < k1; k += kLine)
      for (int64_t h = h0; h < h1; ++h) {
        const int64_t i = h - h0;
        ahead(p.v, p.v_stride, b, h, base + k, n, Dv, h0, h1);
        const St* from = chunk(p.v, p.v_stride, b, h, base + k, n, Dv, copy, &step);
        Pass::values(from, step, Dv, scores + i * rows * kLd, (const T*)(probs + i * probs_floats()), rows, k, k0, k1,
                     o + i * Pass::o_size(ldo), ldo, buffer);
      }
    for (int64_t h = 0; h < heads; ++h) {
      Pass::finish(o + h * Pass::o_size(ldo), rows, ldo);
      memcpy(partial + h * apart + round_up(2 * rows, 16), o + h * Pass::o_size(ldo), rows * ldo * sizeof(float));
    }
  }

  void merge(int64_t b, int64_t kv_head, const float* partials, int64_t count, float* o) const {
    for (int64_t r = 0; r < rows; ++r) {
      float m = -INFINITY, l = 0.0f;
      memset(o, 0, ldo * sizeof(float));
      for (int64_t i = 0; i < count; ++i) {
        const float* x = partials + i * partial_floats();
        if (x[r] != -INFINITY) merge_row(transform, &m, &l, o, x[r], x[rows + r], x + round_up(2 * rows, 16) + r * ldo, ldo);
      }
      const int64_t i = r % S, h = kv_head * G + r / S;
      finish_row(transform, m, l, o, Dv, p.sinks ? p.sinks + h : nullptr, at<St>(p.out, p.out_stride, b, i, h),
                 p.lse + (b * S + i) * p.heads + h);
    }
  }

  void run() const {
    if (rows == 0) return;
    Scratch<int64_t> first(p.batch + 1);  // splits of the sequences before b
    first[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) first[b + 1] = first[b] + splits(b);
    const int64_t total = first[p.batch], H = p.kv_heads;
    int64_t heads = p.k_stride[2] <= p.k_stride[1] ? H : 1;  // an item's
    while (heads > 1 && total * ((H + heads - 1) / heads) < 4 * p.threads) heads = (heads + 1) / 2;
    const int64_t parts = (H + heads - 1) / heads, floats = scratch_floats(heads);
    Scratch<float> scratch(p.threads * floats), partials(total * H * partial_floats());
    const auto partial = [&](int64_t b, int64_t h, int64_t i) {
      return partials + (first[b] * H + h * splits(b) + i) * partial_floats();
    };
    parallel_for(p.threads, total * parts, [&](int64_t item, int thread) {
      const int64_t h0 = item % parts * heads, index = item / parts;
      int64_t b = 0;
      while (first[b + 1] <= index) ++b;
      split(b, index - first[b], h0, least(H, h0 + heads), scratch + thread * floats, partial(b, h0, index - first[b]),
            splits(b) * partial_floats());
    });
    parallel_for(p.threads, p.batch * H, [&](int64_t item, int thread) {
      const int64_t b = item / H, h = item % H;
      merge(b, h, partial(b, h, 0), splits(b), scratch + thread * floats);
    });
  }
};

template <class St> void decode(const AttentionDecodeParams& p, const Keys& keys) {
  if (p.batch * p.kv_heads == 0) return;
  if (p.heads / p.kv_heads * p.q_len <= kStreamRows && Stream<St, Compute<St>>::takes(p.head_dim)) return Decode<St>(p, keys).run();
  attention_rows(p, Queries{p.q, p.out, p.lse, p.sinks, p.q_stride, p.out_stride, p.q_len}, keys);
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
