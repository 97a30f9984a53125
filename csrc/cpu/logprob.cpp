// logprob from given logits and its gradient (include/grpo.h, formulas: softmax_rows.h). B x S rows, V vocabulary.
//
// One read forward; one read and one write backward. A row is cut into chunks of kChunk columns from 0, which are what
// threads share out, and a chunk into blocks of kBlock that stay in L1 between the maximum and the exponentials. The sums of a
// block are floats, everything across blocks is double, in order: so a row's bits depend on the row alone.
#include "grpo_kernels.h"

#include "matmul.h"
#include "softmax_rows.h"

namespace tk::TK_ISA {

namespace {

constexpr int64_t kBlock = 2048;         // columns: 8 KiB of floats
constexpr int64_t kChunk = 16 * kBlock;  // columns of one partial result
constexpr int64_t kItem = 8 * kBlock;    // elements of a work item, at least, where rows are short

template <class S> constexpr bool kExact = sizeof(S) == 4;

// max u, Σ e^x and Σ x e^x of a chunk, x = (u − m) / τ.
struct Partial {
  float m;
  double s, t;
  // Moves the reference point from `m` to `to`.
  void shift(float to, const Head& head) {
    if (m == to) return;
    const double x = (double)(m - finite_max(to)) * head.inverse_temperature, w = m == -INFINITY ? 0 : ::exp(x);
    if (w > 0) t = w * (t + x * s);
    else t *= 0;  // and NaN stays
    s *= w;
    m = to;
  }
  void add(Partial other, const Head& head) {
    const float to = m > other.m ? m : other.m;
    shift(to, head);
    other.shift(to, head);
    s += other.s;
    t += other.t;
  }
};

// Adds n <= kBlock columns to `total`.
template <bool kEntropy, class S> void add_block(const S* y, int64_t n, const Head& head, Partial* total) {
  alignas(64) float u[kBlock];
  constexpr bool in_place = sizeof(S) == 4;
  const bool capped = head.softcap > 0;
  const float* at = u;
  vf peaks[4] = {minus_infinity(), minus_infinity(), minus_infinity(), minus_infinity()};
  const int64_t whole = n / (4 * W) * (4 * W), padded = round_up(n, 4 * W);
  for (int64_t j = 0; j < padded; j += 4 * W) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t k = j + i * W;
      vf x = j < whole ? load(y + k) : load_n(y + k, (int)(n - k)), slope;
      if (capped) x = soft_capped<kExact<S>>(x, head, &slope);
      if (j >= whole) x = lane_index() < (int32_t)(n - k) ? x : minus_infinity();
      peaks[i] = max(peaks[i], x);
      if (!in_place || capped || n != padded) store(u + k, x);
    }
  }
  if constexpr (in_place)
    if (!capped && n == padded) at = (const float*)y;
  const float peak = reduce_max(max(max(peaks[0], peaks[1]), max(peaks[2], peaks[3])));
  if (peak > total->m) total->shift(peak, head);
  const vf base = splat(finite_max(total->m));
  vf sum[4] = {}, weighted[4] = {};
  for (int64_t j = 0; j < padded; j += 4 * W) {
    for (int64_t i = 0; i < 4 * W; i += 64 / sizeof(S)) __builtin_prefetch(y + n + j + i, 0, 3);  // the next block meanwhile
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i)
      accumulate((load(at + j + i * W) - base) * head.inverse_temperature, kEntropy, &sum[i], &weighted[i]);
  }
  total->s += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (kEntropy) total->t += reduce_add((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
}

// Rows and chunks as work items: several short rows, or one chunk of one row.
struct Items {
  int64_t rows, chunks, group;
  explicit Items(int64_t rows, int64_t V)
      : rows(rows), chunks((V + kChunk - 1) / kChunk), group(chunks == 1 ? (kItem + V - 1) / V : 1) {}
  int64_t count() const { return (rows + group - 1) / group * chunks; }
  template <class F> void each(int threads, const F& body) const {  // body(row, chunk)
    parallel_for(threads, count(), [&](int64_t item, int) {
      const int64_t first = item / chunks * group;
      for (int64_t row = first; row < least(rows, first + group); ++row) body(row, item % chunks);
    });
  }
};

template <class P> const char* row_of(const P& p, int64_t row, int64_t size) {
  return (const char*)p.logits + (row / p.s * p.stride[0] + row % p.s * p.stride[1]) * size;
}

template <class S> void forward(const LogprobForwardParams& p) {
  const Head head(p.temperature, p.softcap);
  const Items items(p.b * p.s, p.v);
  Scratch<Partial> partials(items.chunks == 1 ? 0 : items.rows * items.chunks);
  const auto finish = [&](int64_t row, const Partial& total) {
    vf u = splat(to_float(((const S*)row_of(p, row, sizeof(S)))[p.target[row]])), slope;
    if (head.softcap > 0) u = soft_capped<kExact<S>>(u, head, &slope);
    const double log_sum = ::log(total.s);
    p.lse[row] = (double)total.m / head.temperature + log_sum;
    p.logprob[row] = (float)(((double)u[0] - total.m) / head.temperature - log_sum);
    if (p.entropy) p.entropy[row] = (float)(log_sum - total.t / total.s);
  };
  items.each(p.threads, [&](int64_t row, int64_t chunk) {
    if (p.target[row] == p.ignore_index) {
      if (chunk > 0) return;
      p.logprob[row] = 0;
      p.lse[row] = 0;
      if (p.entropy) p.entropy[row] = 0;
      return;
    }
    const S* y = (const S*)row_of(p, row, sizeof(S));
    Partial total{-INFINITY, 0, 0};
    for (int64_t v = chunk * kChunk; v < least(p.v, (chunk + 1) * kChunk); v += kBlock) {
      const int64_t n = least(kBlock, p.v - v);
      if (p.entropy) add_block<true>(y + v, n, head, &total);
      else add_block<false>(y + v, n, head, &total);
    }
    if (items.chunks == 1) finish(row, total);
    else partials[row * items.chunks + chunk] = total;
  });
  if (items.chunks == 1) return;
  parallel_for(p.threads, items.rows, [&](int64_t row, int) {
    if (p.target[row] == p.ignore_index) return;
    Partial total = partials[row * items.chunks];
    for (int64_t chunk = 1; chunk < items.chunks; ++chunk) total.add(partials[row * items.chunks + chunk], head);
    finish(row, total);
  });
}

template <class S> void backward(const LogprobBackwardParams& p) {
  const Head head(p.temperature, p.softcap);
  const Items items(p.b * p.s, p.v);
  S* dlogits = (S*)p.dlogits;
  items.each(p.threads, [&](int64_t row, int64_t chunk) {
    const int64_t first = chunk * kChunk, n = least(kChunk, p.v - first), target = p.target[row];
    const S* y = (const S*)row_of(p, row, sizeof(S)) + first;
    S* dy = dlogits + row * p.v + first;
    if (target == p.ignore_index) {
      memset((void*)dy, 0, n * sizeof(S));
      return;
    }
    const RowGradient g(head, p.dlogprob[row], p.dentropy ? p.dentropy[row] : 0, p.lse[row], p.entropy[row]);
    const auto gradient = [&](vf x) {
      vf slope;
      if (head.softcap == 0) return g.of<kExact<S>>(x, head);
      const vf u = soft_capped<kExact<S>>(x, head, &slope);
      return g.of<kExact<S>>(u, head) * slope;
    };
    const int64_t whole = n / W * W;
#pragma GCC unroll 2
    for (int64_t j = 0; j < whole; j += W) store_flushed(dy + j, gradient(load(y + j)));
    if (whole < n) store_n(dy + whole, gradient(load_n(y + whole, (int)(n - whole))), (int)(n - whole));
    const int64_t at = target - first;
    if (at < 0 || at >= n) return;
    vf slope = splat(1.0f), x = splat(to_float(y[at]));  // the target's own, one more time with its 1
    const vf u = head.softcap > 0 ? soft_capped<kExact<S>>(x, head, &slope) : x;
    dy[at] = from_float<S>(((g.of<kExact<S>>(u, head) + g.g_logprob) * slope)[0]);
  });
}

}  // namespace

void logprob_forward(const LogprobForwardParams& p) {
  if (p.dtype == DType::float32) forward<float>(p);
  else if (p.dtype == DType::bfloat16) forward<bf16>(p);
  else forward<f16>(p);
}

void logprob_backward(const LogprobBackwardParams& p) {
  if (p.dtype == DType::float32) backward<float>(p);
  else if (p.dtype == DType::bfloat16) backward<bf16>(p);
  else backward<f16>(p);
}

}  // namespace tk::TK_ISA
