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

// Of n keys, n >= 1; scores and mass are readable to whole vectors.
inline RowLoss row_loss(const float* scores, const float* mass, int64_t n) {
  vf top = splat(-INFINITY), total[2] = {};
  for (int64_t c = 0; c < n; c += W) {
    const vi in = lane_index() + (int32_t)c < splat((int32_t)n);
    top = max(select(in, load(scores + c), top), top);
    total[c / W % 2] += select(in, load(mass + c), zero());
  }
  const float most = reduce_max(top), sum = reduce_add(total[0] + total[1]);
  vf exps[2] = {};
  for (int64_t c = 0; c < n; c += W)
    exps[c / W % 2] += select(lane_index() + (int32_t)c < splat((int32_t)n), exp(load(scores + c) - most), zero());
  const float exp_sum = reduce_add(exps[0] + exps[1]), lse = most + ::logf(exp_sum), inverse = 1.0f / (sum < 1.17549435e-38f ? 1.17549435e-38f : sum);
  vf loss[2] = {};
  for (int64_t c = 0; c < n; c += W) {
    const vf p = load(mass + c) * inverse, x = p * (log(p) - (load(scores + c) - lse));
    const vi in = (lane_index() + (int32_t)c < splat((int32_t)n)) & (vi)!(p < 1.17549435e-38f);  // 0 log 0 = 0; a NaN counts
    loss[c / W % 2] += select(in, x, zero());
  }
  return {reduce_add(loss[0] + loss[1]), most, 1.0f / exp_sum, sum};
}

}  // namespace tk::TK_ISA
