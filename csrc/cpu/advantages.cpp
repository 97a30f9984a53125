// group_advantages (include/policy_loss.h). Formulas and names: python/thinkernel/reference/advantages.py. R samples with n
// rewards each, in groups. All sums are in double and in one order; R is thousands, so one thread does it.
//
// A group's samples are listed in the order of their positions, so the result does not depend on how ids are numbered. Zero variance is
// max == min over the scorable values, never a small standard deviation, and gives exactly 0.
#include <math.h>
#include <stdlib.h>

#include "grpo_kernels.h"
#include "parallel.h"
#include "simd/gemm.h"

namespace tk::TK_ISA {

namespace {

enum Normalize { kGroup, kNone, kBatch, kRloo, kMaxRl, kWhiten };

// Statistics of the values that are not NaN.
struct Moments {
  double mean = NAN, std = 0, count = 0;
  bool constant = true;
};

// value(i), i < n, counting weight(i) times each (the variance's divisor is the summed weight less `correction`, at least 1).
template <class Value, class Weight> Moments moments(int64_t n, int correction, const Value& value, const Weight& weight) {
  Moments m;
  double sum = 0, low = INFINITY, high = -INFINITY;
  int64_t seen = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = value(i);
    if (isnan(x)) continue;
    ++seen;
    m.count += weight(i);
    sum += weight(i) * x;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  m.constant = seen <= 1 || low == high;
  if (m.count > 0) m.mean = sum / m.count;
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = value(i) - m.mean;
    if (!isnan(d)) squares += weight(i) * d * d;
  }
  const double divisor = m.count - correction;
  m.std = sqrt(squares / (divisor < 1 ? 1 : divisor));
  return m;
}
double once(int64_t) { return 1; }

// The samples, group after group: order[start[g]] … order[start[g + 1] - 1] are the positions of group g's.
struct Groups {
  int64_t count = 0;
  Scratch<int64_t> order, start;
  Groups(const GroupAdvantagesParams& p) : order(p.samples), start(p.samples + 1) {
    const int64_t R = p.samples;
    for (int64_t i = 0; i < R; ++i) order[i] = i;
    start[0] = 0;
    if (p.group_size > 0) {
      count = R / p.group_size;
      for (int64_t g = 0; g < count; ++g) start[g + 1] = (g + 1) * p.group_size;
      return;
    }
    const int64_t* ids = p.group_ids;
    radix_sort(ids, R);
    for (int64_t i = 0; i < R; ++i)
      if (i + 1 == R || ids[order[i]] != ids[order[i + 1]]) start[++count] = i + 1;
  }

 private:
  // Stable: positions of one id stay in order. By bytes from the lowest, those in which all ids agree left out.
  void radix_sort(const int64_t* ids, int64_t R) {
    Scratch<int64_t> other(R);
    int64_t *from = order, *to = other;
    uint64_t differ = 0;
    for (int64_t i = 1; i < R; ++i) differ |= (uint64_t)(ids[i] ^ ids[0]);
    for (int shift = 0; shift < 64; shift += 8) {
      if ((differ >> shift & 255) == 0) continue;
      const int sign = shift == 56 ? 128 : 0;  // negative ids come first
      const auto byte = [&](int64_t i) { return (int)((uint64_t)ids[i] >> shift & 255) ^ sign; };
      int64_t place[257] = {};
      for (int64_t i = 0; i < R; ++i) ++place[byte(i) + 1];
      for (int i = 0; i < 256; ++i) place[i + 1] += place[i];
      for (int64_t i = 0; i < R; ++i) to[place[byte(from[i])]++] = from[i];
      int64_t* const swap = from;
      from = to;
      to = swap;
    }
    if (from != order.get()) memcpy(order.get(), from, R * sizeof(int64_t));
  }
};

}  // namespace

void group_advantages(const GroupAdvantagesParams& p) {
  const int64_t R = p.samples, n = p.rewards_each;
  const Groups groups(p);
  Scratch<double> total(R), result(R);  // the reward that is normalised (NaN: unscorable); the advantage before the last step
  const auto weight = [&](int64_t j) { return p.weights ? (double)p.weights[j] : 1.0; };
  const auto often = [&](int64_t i) { return p.token_counts ? (double)p.token_counts[i] : 1.0; };
  const auto unscorable = [&](int64_t i) {
    for (int64_t j = 0; j < n; ++j)
      if (!isnan(p.rewards[i * n + j])) return false;
    return true;
  };
  for (int64_t i = 0; i < R; ++i) p.zero_variance[i] = 1;

  if (p.normalize_then_sum) {
    for (int64_t i = 0; i < R; ++i) result[i] = unscorable(i) ? NAN : 0.0;
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t* const of = groups.order + groups.start[g];
      const int64_t size = groups.start[g + 1] - groups.start[g];
      for (int64_t j = 0; j < n; ++j) {
        const auto value = [&](int64_t i) { return (double)p.rewards[of[i] * n + j]; };
        const Moments m = moments(size, p.correction, value, once);
        if (m.constant) continue;
        for (int64_t i = 0; i < size; ++i) {
          p.zero_variance[of[i]] = 0;
          if (!isnan(value(i))) result[of[i]] += weight(j) * ((value(i) - m.mean) / (m.std + p.eps));
        }
      }
    }
  } else {
    for (int64_t i = 0; i < R; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double x = p.rewards[i * n + j];
        if (!isnan(x)) sum += weight(j) * x;
      }
      total[i] = unscorable(i) ? NAN : (double)(float)sum;  // in float: sums equal but for their order of adding are equal
    }
    const auto all = [&](int64_t i) { return total[i]; };
    const Moments batch = p.normalize == kBatch ? moments(R, p.correction, all, once) : Moments{};
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t* const of = groups.order + groups.start[g];
      const int64_t size = groups.start[g + 1] - groups.start[g];
      const Moments m = moments(size, p.correction, [&](int64_t i) { return total[of[i]]; }, once);
      for (int64_t i = 0; i < size; ++i) {
        double d = total[of[i]] - m.mean;
        if (p.normalize == kGroup) d /= m.std + p.eps;
        if (p.normalize == kBatch) d /= batch.std + p.eps;
        if (p.normalize == kRloo) d *= m.count / (m.count > 1 ? m.count - 1 : 1);
        if (p.normalize == kMaxRl) d = m.mean == 0 ? 0 : d / m.mean;
        result[of[i]] = m.constant && !isnan(d) ? 0 : d;
        p.zero_variance[of[i]] = m.constant;
      }
    }
  }

  if (p.normalize_then_sum || p.normalize == kWhiten) {
    const Moments m = moments(R, p.correction, [&](int64_t i) { return result[i]; }, often);
    for (int64_t i = 0; i < R; ++i) result[i] = m.constant ? 0 : (result[i] - m.mean) / (m.std + p.eps);
  }
  for (int64_t i = 0; i < R; ++i) p.advantages[i] = p.zero_variance[i] || unscorable(i) ? 0.0f : (float)result[i];
}

}  // namespace tk::TK_ISA
