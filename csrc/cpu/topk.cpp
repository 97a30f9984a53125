// The k largest scores of each row, in ascending order of position (include/topk.h).
//
// A row is read twice. Before that, a sample of it (kSample scores, evenly spread) gives two keys between which the k-th
// largest lies, save for bad luck. The first reading counts what is above both and collects what is between them, a few percent of
// the row, from which the k-th is chosen exactly; the second writes the positions that stay. Where the sample misled, all keys of the
// row are collected. So the work may depend on luck, the result does not.
//
// N rows · L scores a row · k kept a row
#include "select_keys.h"
#include "sparse_kernels.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kSample = 512;

template <class S> struct Row {
  const S* scores;
  int64_t n, k;     // 1 <= k < n
  uint32_t* keys;   // [n + W]

  // body(keys, the lanes that count, their first position) over the row
  template <class F> void each(const F& body) const {
    const int64_t whole = n / W * W;
    for (int64_t i = 0; i < whole; i += W) body(score_key(load(scores + i)), (1u << W) - 1, i);
    if (whole < n) body(score_key(load_n(scores + whole, (int)(n - whole))), (1u << (n - whole)) - 1, whole);
  }

  // Keys in [low, high] to `keys`; *above: how many are larger.
  int64_t collect(uint32_t low, uint32_t high, int64_t* above) const {
    int64_t count = 0, larger = 0;
    each([&](vu x, uint32_t valid, int64_t) {
      const uint32_t over = bits_of((vi)(x > (vu{} + high))) & valid, from = bits_of((vi)(x >= (vu{} + low))) & valid;
      larger += __builtin_popcountll(over);
      count += put_lanes(from & ~over, x, keys + count);
    });
    *above = larger;
    return count;
  }

  Selection select() const {
    if (n >= 8 * kSample) {
      uint32_t sample[kSample + W], copy[kSample + W];
      const int64_t apart = n / (kSample / W);
      for (int64_t i = 0; i < kSample / W; ++i) {
        const vu key = score_key(load(scores + i * apart));
        memcpy(sample + i * W, &key, sizeof key);
      }
      const double share = (double)k / n, slack = 2 + 3 * ::sqrt(kSample * share * (1 - share));
      const int64_t upper = (int64_t)(share * kSample - slack), lower = (int64_t)(share * kSample + slack) + 1;
      memcpy(copy, sample, sizeof sample);
      const uint32_t high = upper >= 1 ? kth_key(copy, kSample, upper).key : ~0u;
      const uint32_t low = lower <= kSample ? kth_key(sample, kSample, lower).key : 0;
      int64_t above;
      const int64_t count = collect(low, high, &above);
      if (above < k && k <= above + count) return kth_key(keys, count, k - above);
    }
    int64_t above;
    return kth_key(keys, collect(0, ~0u, &above), k);
  }

  void write(const Selection& s, int32_t* indices) const {
    int64_t count = 0, equal = s.equal;
    const vu key = vu{} + s.key;
    const auto put = [&](uint32_t keep, int64_t i) {
      const vu position = (vu)(lane_index() + (int32_t)i);
      if (count + W <= k) {
        count += put_lanes(keep, position, (uint32_t*)indices + count);
      } else {
        uint32_t last[W];
        const int64_t more = put_lanes(keep, position, last);
        memcpy(indices + count, last, more * sizeof(uint32_t));
        count += more;
      }
    };
    if (s.all) return each([&](vu x, uint32_t valid, int64_t i) { put(bits_of((vi)(x >= key)) & valid, i); });
    each([&](vu x, uint32_t valid, int64_t i) {
      uint32_t keep = bits_of((vi)(x > key)) & valid, same = bits_of((vi)(x == key)) & valid;
      for (; same && equal; same &= same - 1, --equal) keep |= same & -same;
      put(keep, i);
    });
  }
};

int64_t clamp(int64_t x, int64_t high) { return x < 0 ? 0 : least(x, high); }

template <class S> void run(const TopkParams& p) {
  Scratch<uint32_t> keys(p.threads * (p.length + W));
  parallel_for(p.threads, p.rows, [&](int64_t r, int thread) {
    const S* scores = (const S*)p.scores + r * p.row_stride;
    const int64_t n = p.lengths ? clamp(p.lengths[r], p.length) : p.length, count = least(n, p.k);
    int32_t* indices = p.indices + r * p.k;
    if (n <= p.k) {
      for (int64_t i = 0; i < n; ++i) indices[i] = (int32_t)i;
    } else {
      const Row<S> row{scores, n, p.k, keys + thread * (p.length + W)};
      row.write(row.select(), indices);
    }
    for (int64_t i = count; i < p.k; ++i) indices[i] = -1;
    if (!p.values) return;
    S* values = (S*)p.values + r * p.k;
    for (int64_t i = 0; i < count; ++i) values[i] = scores[indices[i]];
    for (int64_t i = count; i < p.k; ++i) values[i] = from_float<S>(-INFINITY);
  });
}

}  // namespace

void topk(const TopkParams& p) {
  if (p.rows == 0 || p.k == 0) return;
  switch (p.dtype) {
    case DType::float32: return run<float>(p);
    case DType::bfloat16: return run<bf16>(p);
    case DType::float16: return run<f16>(p);
  }
}

}  // namespace tk::TK_ISA
