// group_advantages: rewards of sampled completions -> advantages within their groups. Rules: csrc/cpu/advantages.cpp.
//
//   R samples with n rewards each, in groups
//
// First launch: one warp a place of `order`, and the first place of each group works for its group. Second launch: what "batch",
// "whiten" and GDPO's last step take over all samples; every block reduces them all again (R is thousands), then finishes its own.
// Sums are in double and in one order. NaN: unscorable. Zero variance is max == min and gives exactly 0.
#pragma once
#include "policy_cuda.h"
#include "simt.cuh"

// Threads of a block over all samples; tests on the host build with fewer.
#ifndef TK_ADVANTAGES_THREADS
#define TK_ADVANTAGES_THREADS 256
#endif

namespace tk::cuda {

constexpr int kGroupThreads = 32, kBatchThreads = TK_ADVANTAGES_THREADS;
enum Normalize { kGroup, kNone, kBatch, kRloo, kMaxRl, kWhiten };

// Of the values that are not NaN; count weighs, seen does not.
struct Moments {
  double sum, count, low, high;
  int64_t seen;
};

__device__ __forceinline__ Moments join(const Moments& a, const Moments& b) {
  return {a.sum + b.sum, a.count + b.count, b.low < a.low ? b.low : a.low, b.high > a.high ? b.high : a.high, a.seen + b.seen};
}

struct Statistics {
  double mean, std, count;
  bool constant;
};

// value(i) counting weight(i) times, i in first … end - 1; the same for every thread of the block. slots and sums are used in turn, so
// that it may be called again at once.
template <int THREADS, class Value, class Weight>
__device__ __forceinline__ Statistics statistics(Moments (&slots)[THREADS / 32], double (&sums)[THREADS / 32], int64_t first, int64_t end,
                                                 int correction, const Value& value, const Weight& weight) {
  Moments m{0, 0, INFINITY, -INFINITY, 0};
  for (int64_t i = first + threadIdx.x; i < end; i += THREADS) {
    const double x = value(i), w = weight(i);
    if (x != x) continue;
    m = join(m, Moments{w * x, w, x, x, 1});
  }
  m = simt::block_merge<THREADS>(slots, m, [](const Moments& a, const Moments& b) { return join(a, b); });
  const double mean = m.count > 0 ? m.sum / m.count : NAN;
  double squares = 0;
  for (int64_t i = first + threadIdx.x; i < end; i += THREADS) {
    const double d = value(i) - mean;
    if (d == d) squares += weight(i) * d * d;
  }
  squares = simt::block_merge<THREADS>(sums, squares, [](double a, double b) { return a + b; });
  const double divisor = m.count - correction;
  return {mean, sqrt(squares / (divisor < 1 ? 1 : divisor)), m.count, m.seen <= 1 || m.low == m.high};
}

__device__ __forceinline__ bool unscorable(const GroupAdvantagesCudaParams& p, int64_t sample) {
  for (int64_t j = 0; j < p.rewards_each; ++j) {
    const float x = p.rewards[sample * p.rewards_each + j];
    if (x == x) return false;
  }
  return true;
}

// The weighted sum of a sample's rewards, in float: sums equal but for their order of adding are equal. NaN: unscorable.
__device__ __forceinline__ double total_reward(const GroupAdvantagesCudaParams& p, int64_t sample) {
  double sum = 0;
  bool any = false;
  for (int64_t j = 0; j < p.rewards_each; ++j) {
    const double x = p.rewards[sample * p.rewards_each + j];
    if (x != x) continue;
    any = true;
    sum += (p.weights == nullptr ? 1.0 : static_cast<double>(p.weights[j])) * x;
  }
  return any ? static_cast<double>(static_cast<float>(sum)) : NAN;
}

__global__ void __launch_bounds__(kGroupThreads) advantage_groups(const GroupAdvantagesCudaParams p) {
  struct Shared {
    Moments slots[1];
    double sums[1];
  };
  TK_SHARED(Shared, shared);
  const int64_t first = blockIdx.x;
  const bool leads = p.ends == nullptr ? first % p.group_size == 0 : first == 0 || p.ends[first - 1] == first;
  if (!leads) return;
  const int64_t end = p.ends == nullptr ? first + p.group_size : p.ends[first];
  double* const total = p.scratch;              // [R]
  double* const result = p.scratch + p.samples;  // [R]; NaN: unscorable
  const auto sample = [&](int64_t i) { return p.order == nullptr ? i : p.order[i]; };
  const auto once = [](int64_t) { return 1.0; };

  if (p.normalize_then_sum) {
    for (int64_t i = first + threadIdx.x; i < end; i += kGroupThreads) {
      result[sample(i)] = unscorable(p, sample(i)) ? NAN : 0.0;
      p.zero_variance[sample(i)] = 1;
    }
    for (int64_t j = 0; j < p.rewards_each; ++j) {  // a sample stays with its thread
      const auto value = [&](int64_t i) { return static_cast<double>(p.rewards[sample(i) * p.rewards_each + j]); };
      const Statistics s = statistics<kGroupThreads>(shared.slots, shared.sums, first, end, p.correction, value, once);
      if (s.constant) continue;
      const double weight = p.weights == nullptr ? 1.0 : static_cast<double>(p.weights[j]);
      for (int64_t i = first + threadIdx.x; i < end; i += kGroupThreads) {
        p.zero_variance[sample(i)] = 0;
        const double d = value(i) - s.mean;
        if (d == d) result[sample(i)] += weight * (d / (s.std + p.eps));
      }
    }
    return;
  }
  const auto value = [&](int64_t i) { return total_reward(p, sample(i)); };
  const Statistics s = statistics<kGroupThreads>(shared.slots, shared.sums, first, end, p.correction, value, once);
  for (int64_t i = first + threadIdx.x; i < end; i += kGroupThreads) {
    const double x = value(i);
    double d = x - s.mean;
    if (p.normalize == kGroup) d /= s.std + p.eps;
    if (p.normalize == kRloo) d *= s.count / (s.count > 1 ? s.count - 1 : 1);
    if (p.normalize == kMaxRl) d = s.mean == 0 ? 0 : d / s.mean;
    total[sample(i)] = x;
    result[sample(i)] = x != x ? NAN : s.constant ? 0 : d;
    p.zero_variance[sample(i)] = s.constant;
  }
}

__global__ void __launch_bounds__(kBatchThreads, 1) advantage_batch(const GroupAdvantagesCudaParams p) {
  struct Shared {
    Moments slots[kBatchThreads / 32];
    double sums[kBatchThreads / 32];
  };
  TK_SHARED(Shared, shared);
  const double* const total = p.scratch;
  const double* const result = p.scratch + p.samples;
  const bool center = p.normalize_then_sum || p.normalize == kWhiten;
  Statistics s{0, 1, 0, false};
  if (center || p.normalize == kBatch) {
    const double* const over = center ? result : total;
    const auto weight = [&](int64_t i) { return center && p.token_counts != nullptr ? static_cast<double>(p.token_counts[i]) : 1.0; };
    s = statistics<kBatchThreads>(shared.slots, shared.sums, 0, p.samples, p.correction, [&](int64_t i) { return over[i]; }, weight);
  }
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBatchThreads + threadIdx.x;
  if (i >= p.samples) return;
  double x = result[i];
  const double scale = center && s.constant ? 0 : 1 / (s.std + p.eps);
  if (center) x = x != x ? NAN : (x - s.mean) * scale;
  else if (p.normalize == kBatch) x *= scale;
  p.advantages[i] = p.zero_variance[i] || x != x ? 0.0f : static_cast<float>(x);
}

}  // namespace tk::cuda
