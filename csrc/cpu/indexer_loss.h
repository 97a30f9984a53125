// One query's divergence from its target, and the stage of the loss that runs over named keys.
//
//   p = m / sum m,  L = sum_s p (log p - I + log sum e^I),  dL/dI = e^I / sum e^I - p
#pragma once

#include "indexer.h"
#include "simd/vec.h"

namespace tk::TK_ISA {

void sparse_indexer_loss(const IndexerLossParams& p);
void sparse_indexer_loss_backward(const IndexerLossBackwardParams& p);

struct RowLoss {
  float loss, shift, factor, mass;  // L; softmax(I) = factor e^(I - shift), since e^(I - lse) tilts a row by lse's rounding; sum m
};

// Sums over a row in double, added up vector by vector: what its length or its lse rounds off would tilt all of the row.
struct RowSum {
  typedef double vd __attribute__((vector_size(W * 8)));
  vd sum = {};
  void add(vf x) { sum += __builtin_convertvector(x, vd); }
  double total() const {
    double x = 0.0;
    for (int i = 0; i < W; ++i) x += sum[i];
    return x;
  }
};

// Of n keys, n >= 1; scores and mass are readable to whole vectors.
inline RowLoss row_loss(const float* scores, const float* mass, int64_t n) {
  const auto in = [&](int64_t c) { return lane_index() + (int32_t)c < splat((int32_t)n); };
  vf top = splat(-INFINITY);
  RowSum masses, exps, loss;
  for (int64_t c = 0; c < n; c += W) {
    top = max(select(in(c), load(scores + c), top), top);
    masses.add(select(in(c), load(mass + c), zero()));
  }
  const float most = reduce_max(top), sum = (float)masses.total(), divisor = sum < 1.17549435e-38f ? 1.17549435e-38f : sum;
  for (int64_t c = 0; c < n; c += W) exps.add(select(in(c), exp(load(scores + c) - most), zero()));
  const double exact_lse = most + ::log(exps.total());
  const float lse = (float)exact_lse;
  for (int64_t c = 0; c < n; c += W) {
    const vf p = load(mass + c) / divisor, x = p * (log(p) - (load(scores + c) - lse));
    loss.add(select(in(c) & (vi)!(p < 1.17549435e-38f), x, zero()));  // 0 log 0 = 0; a NaN counts
  }
  const double rest = sum < 1.17549435e-38f ? 0.0 : exact_lse - lse;
  return {(float)(loss.total() + rest), most, (float)(1.0 / exps.total()), sum};
}

}  // namespace tk::TK_ISA
