// Params of policy_loss and group_advantages. Formulas: policy_math.h and csrc/cpu/policy_loss.cpp, csrc/cpu/advantages.cpp.
//
// B sequences of S tokens (packed: N tokens, sequence b at [cu_seqlens[b], cu_seqlens[b + 1])), R samples, n rewards each.
#pragma once
#include "policy_math.h"

namespace tk {

struct PolicyLossParams : policy::Options {
  int64_t sequences = 0;                 // B
  int64_t length = 0;                    // S; packed: not read
  const int64_t* cu_seqlens = nullptr;   // [B + 1], null: padded [B, S]
  // [B, S], rows `stride` elements apart and contiguous inside; packed: [N] contiguous, and the strides are not read
  const float* logprob = nullptr;
  const float* old_logprob = nullptr;    // null: logprob itself, held constant
  const float* ref_logprob = nullptr;    // read where kl is not none
  const float* rollout_logprob = nullptr;  // null: old_logprob; NaN: that token's old_logprob
  const float* entropy = nullptr;        // may be null
  const float* advantages = nullptr;     // [B] with stride advantages_stride, or per token like the others
  const void* mask = nullptr;            // elements of mask_bytes; a token is active where one is not zero
  int64_t logprob_stride = 0, old_logprob_stride = 0, ref_logprob_stride = 0, rollout_logprob_stride = 0, entropy_stride = 0;
  int64_t advantages_stride = 0, mask_stride = 0;
  int32_t advantage_per_token = 0;
  int32_t mask_bytes = 1;                // 1, 2, 4 or 8
  int32_t mask_is_float = 0;             // then the sign bit does not count: -0.0 is masked
  double total = 0;                      // divisor of Reduction::total (at least 1); 0: the active tokens
  double top_entropy = 0;                // keeps this fraction of the active tokens; 0: all
  double entropy_coef = 0;
  // results
  float* loss = nullptr;                 // one value
  float* metrics = nullptr;              // [kPolicyMetrics]
  float* dlogprob = nullptr;             // [B, S] or [N] contiguous; null: not wanted. d loss / d logprob, 0 where masked
  float* dref_logprob = nullptr;         // the same for ref_logprob
  float* dentropy = nullptr;             // and for entropy
  int32_t threads = 1;
};

// The order of PolicyLossParams::metrics; means are over the active tokens.
enum PolicyMetric {
  kPolicyLoss, kApproxKl, kRatioMean, kRatioMin, kRatioMax, kClipLow, kClipHigh, kClipFraction, kTokens, kKl,
  kRolloutRatio, kOffPolicyKept, kEntropy, kPolicyMetrics
};

struct GroupAdvantagesParams {
  int64_t samples = 0, rewards_each = 1;  // R, n
  const float* rewards = nullptr;        // [R, n] contiguous; NaN: unscorable
  int64_t group_size = 0;                // neighbours of this number form a group; 0: group_ids do
  const int64_t* group_ids = nullptr;    // [R] any numbers in any order
  const float* weights = nullptr;        // [n], null: ones
  const float* token_counts = nullptr;   // [R] tokens of each sample: statistics over the batch count it so often; null: once
  int32_t normalize = 0;                 // 0 group, 1 none, 2 batch, 3 rloo, 4 maxrl, 5 whiten
  int32_t normalize_then_sum = 0;        // GDPO
  double eps = 0;
  int32_t correction = 1;                // subtracted from the count under the variance
  float* advantages = nullptr;           // [R]
  uint8_t* zero_variance = nullptr;      // [R] 1: the sample's group teaches nothing
};

}  // namespace tk
