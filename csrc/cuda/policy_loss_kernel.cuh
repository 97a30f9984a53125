// policy_loss on [B, S] tokens: loss, gradients and metrics. The loss of a token, its gradients and what they need of a sequence
// are include/policy_math.h, shared with the CPU kernel.
//
//   B sequences of S tokens (packed: N tokens in all), in blocks of kBlockTokens from each sequence's first token
//
// A slot is the place of one block's partial sums. Steps, one kernel each: sums per sequence; token losses and gradients, partial
// sums per slot; where the ratio is the sequence's, its gradient back to the tokens; the partial sums in order -> loss and metrics.
// No atomics: every sum has one order, which starts at the sequence's first token, in double beyond a thread.
#pragma once
#include "policy_cuda.h"
#include "simt.cuh"

// Threads and tokens of a block; tests on the host build with fewer.
#ifndef TK_POLICY_THREADS
#define TK_POLICY_THREADS 256
#endif
#ifndef TK_POLICY_TOKENS
#define TK_POLICY_TOKENS 1024
#endif

namespace tk::cuda {

constexpr int kPolicyThreads = TK_POLICY_THREADS;
constexpr int64_t kBlockTokens = TK_POLICY_TOKENS;

using Scalar = policy::ScalarOps;

struct PolicyArgs {
  PolicyLossCudaParams p;
  struct SequenceSums* sequences;  // [B]; null: not wanted
  struct SlotSums* slots;          // [slots]
  int64_t slot_count;
  int64_t blocks;                  // slots of one sequence, where not packed
  float rollout_log_low, rollout_log_high;
};

struct SequenceSums {
  double log_ratio, drift, rollout, log_weight;
  int64_t tokens, bonus;  // active, and of these the ones the entropy bonus counts
};

struct SlotSums {
  double loss, slope;  // with the reduction's weight in them
  double approx_kl, ratio, kl, rollout_ratio, kept, entropy, bonus_entropy;
  int64_t tokens, bonus, clip_low, clip_high;
  float ratio_min, ratio_max;
};

__device__ __forceinline__ SequenceSums add(const SequenceSums& a, const SequenceSums& b) {
  return {a.log_ratio + b.log_ratio, a.drift + b.drift, a.rollout + b.rollout, a.log_weight + b.log_weight,
          a.tokens + b.tokens, a.bonus + b.bonus};
}

__device__ __forceinline__ SlotSums add(const SlotSums& a, const SlotSums& b) {
  return {a.loss + b.loss, a.slope + b.slope, a.approx_kl + b.approx_kl, a.ratio + b.ratio, a.kl + b.kl,
          a.rollout_ratio + b.rollout_ratio, a.kept + b.kept, a.entropy + b.entropy, a.bonus_entropy + b.bonus_entropy,
          a.tokens + b.tokens, a.bonus + b.bonus, a.clip_low + b.clip_low, a.clip_high + b.clip_high,
          b.ratio_min < a.ratio_min ? b.ratio_min : a.ratio_min, b.ratio_max > a.ratio_max ? b.ratio_max : a.ratio_max};
}

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(const T& a, const T& b) const {
    return add(a, b);
  }
};

// ---- where things are

// Packed, sequence b has as many slots as fit between the offsets, and one for its last, short block.
__device__ __forceinline__ int64_t first_slot(const PolicyArgs& args, int64_t b) {
  return args.p.cu_seqlens == nullptr ? b * args.blocks : args.p.cu_seqlens[b] / kBlockTokens + b;
}

__device__ __forceinline__ int64_t sequence_of(const PolicyArgs& args, int64_t slot) {
  if (args.p.cu_seqlens == nullptr) return slot / args.blocks;
  int64_t low = 0, high = args.p.sequences;  // the last sequence whose first slot is not after this one
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_slot(args, middle) <= slot) low = middle;
    else high = middle;
  }
  return low;
}

struct Place {
  int64_t sequence, start, length;  // start: in contiguous tensors
};

__device__ __forceinline__ Place place_of(const PolicyArgs& args, int64_t b) {
  const int64_t* cu = args.p.cu_seqlens;
  if (cu == nullptr) return {b, b * args.p.length, args.p.length};
  return {b, cu[b], cu[b + 1] - cu[b]};
}

template <class T>
__device__ __forceinline__ T load(const PolicyArgs& args, const T* x, int64_t stride, const Place& at, int64_t token) {
  return x[(args.p.cu_seqlens == nullptr ? at.sequence * stride : at.start) + token];
}

__device__ __forceinline__ bool active(const PolicyArgs& args, const Place& at, int64_t token) {
  return token < at.length && load(args, static_cast<const uint8_t*>(args.p.mask), args.p.mask_stride, at, token) != 0;
}

__device__ __forceinline__ policy::Token<Scalar> token_at(const PolicyArgs& args, const Place& at, int64_t token) {
  const PolicyLossCudaParams& p = args.p;
  policy::Token<Scalar> t{};
  t.logprob = load(args, p.logprob, p.logprob_stride, at, token);
  t.old = p.old_logprob == nullptr ? t.logprob : load(args, p.old_logprob, p.old_logprob_stride, at, token);
  t.rollout = p.rollout_logprob == nullptr ? t.old : load(args, p.rollout_logprob, p.rollout_logprob_stride, at, token);
  if (t.rollout != t.rollout) t.rollout = t.old;
  t.ref = p.ref_logprob == nullptr ? 0.0f : load(args, p.ref_logprob, p.ref_logprob_stride, at, token);
  t.advantage = p.advantage_per_token ? load(args, p.advantages, p.advantages_stride, at, token)
                                      : p.advantages[at.sequence * p.advantages_stride];
  t.top = p.top == nullptr || p.top[at.start + token] != 0 ? 1.0f : 0.0f;
  return t;
}

// ---- the steps

__global__ void __launch_bounds__(kPolicyThreads) policy_sequences(const PolicyArgs args) {
  struct Shared {
    SequenceSums slots[kPolicyThreads / 32];
  };
  TK_SHARED(Shared, shared);
  const Place at = place_of(args, blockIdx.x);
  const bool ratios = policy::needs_sequence_sums(args.p);
  SequenceSums sums{};
  for (int64_t token = threadIdx.x; token < at.length; token += kPolicyThreads) {
    if (!active(args, at, token)) continue;
    ++sums.tokens;
    sums.bonus += args.p.top == nullptr || args.p.top[at.start + token] != 0;
    if (!ratios) continue;
    const policy::SequenceTerms<Scalar> terms =
        policy::sequence_terms(token_at(args, at, token), args.p, args.rollout_log_low, args.rollout_log_high);
    sums.log_ratio += terms.log_ratio;
    sums.drift += terms.drift;
    sums.rollout += terms.rollout;
    sums.log_weight += terms.log_weight;
  }
  sums = simt::block_merge<kPolicyThreads>(shared.slots, sums, Sum{});
  if (threadIdx.x == 0) args.sequences[blockIdx.x] = sums;
}

__device__ __forceinline__ policy::SequenceFactors factors_of(const PolicyArgs& args, const SequenceSums& sums) {
  return policy::finish_sequence(args.p, sums.log_ratio, sums.drift, sums.rollout, sums.log_weight, sums.tokens);
}

__global__ void __launch_bounds__(kPolicyThreads) policy_tokens(const PolicyArgs args) {
  struct Shared {
    SequenceSums sequences[kPolicyThreads / 32];
    SlotSums slots[kPolicyThreads / 32];
  };
  TK_SHARED(Shared, shared);
  const PolicyLossCudaParams& p = args.p;
  const int64_t b = sequence_of(args, blockIdx.x);
  const Place at = place_of(args, b);
  const int64_t first = (blockIdx.x - first_slot(args, b)) * kBlockTokens;

  // ---- what the batch and the sequence give
  SequenceSums batch{}, mine{};
  if (args.sequences != nullptr) {
    for (int64_t i = threadIdx.x; i < p.sequences; i += kPolicyThreads) {
      batch.tokens += args.sequences[i].tokens;  // integers: in any order
      batch.bonus += args.sequences[i].bonus;
    }
    batch = simt::block_merge<kPolicyThreads>(shared.sequences, batch, Sum{});
    mine = args.sequences[b];
  }
  double total = p.divisor != nullptr ? *p.divisor : static_cast<double>(batch.tokens);
  total = total < 1 ? 1 : total;
  const double weight = policy::sequence_weight(p, mine.tokens, p.sequences, total);
  const policy::SequenceFactors factors = factors_of(args, mine);
  const float bonus = static_cast<float>(-p.entropy_coef / static_cast<double>(batch.bonus < 1 ? 1 : batch.bonus));

  // ---- tokens
  const policy::ClipBounds clip = policy::clip_bounds(p);
  SlotSums sums{};
  sums.ratio_min = INFINITY;
  sums.ratio_max = -INFINITY;
  const int64_t end = first + kBlockTokens < at.length ? first + kBlockTokens : at.length;
  for (int64_t token = first + threadIdx.x; token < end; token += kPolicyThreads) {
    float dlogprob = 0, dref = 0, dentropy = 0;
    if (active(args, at, token)) {
      const policy::Token<Scalar> t = token_at(args, at, token);
      const policy::TokenLoss<Scalar> x = policy::token_loss(t, factors, p);
      const float direct = p.level == policy::Level::token ? policy::token_gradient(x) : x.direct;
      const bool top = t.top != 0;
      dlogprob = static_cast<float>(weight * direct);
      dref = static_cast<float>(weight * x.dref);
      dentropy = top ? bonus : 0.0f;
      sums.loss += weight * x.loss;
      sums.slope += weight * x.slope;
      sums.approx_kl += x.approx_kl;
      sums.ratio += x.ratio;
      sums.kl += x.kl;
      sums.rollout_ratio += x.rollout_ratio;
      sums.kept += x.kept;
      sums.tokens += 1;
      sums.bonus += top;
      sums.clip_low += x.ratio < clip.low && t.advantage < 0;
      sums.clip_high += x.ratio > clip.high && t.advantage > 0;
      sums.ratio_min = x.ratio < sums.ratio_min ? x.ratio : sums.ratio_min;
      sums.ratio_max = x.ratio > sums.ratio_max ? x.ratio : sums.ratio_max;
      if (p.entropy != nullptr) {
        const float entropy = load(args, p.entropy, p.entropy_stride, at, token);
        sums.entropy += entropy;
        if (top) sums.bonus_entropy += entropy;
      }
    }
    if (p.dlogprob != nullptr) p.dlogprob[at.start + token] = dlogprob;
    if (p.dref_logprob != nullptr) p.dref_logprob[at.start + token] = dref;
    if (p.dentropy != nullptr) p.dentropy[at.start + token] = dentropy;
  }
  sums = simt::block_merge<kPolicyThreads>(shared.slots, sums, Sum{});
  if (threadIdx.x == 0) args.slots[blockIdx.x] = sums;
}

__global__ void __launch_bounds__(kPolicyThreads) policy_sequence_ratio(const PolicyArgs args) {
  const PolicyLossCudaParams& p = args.p;
  const int64_t b = sequence_of(args, blockIdx.x);
  const Place at = place_of(args, b);
  const int64_t slot = first_slot(args, b), first = (blockIdx.x - slot) * kBlockTokens;
  double slope = 0;
  for (int64_t i = 0; i * kBlockTokens < at.length; ++i) slope += args.slots[slot + i].slope;
  const float g = static_cast<float>(slope * factors_of(args, args.sequences[b]).slope);
  const int64_t end = first + kBlockTokens < at.length ? first + kBlockTokens : at.length;
  for (int64_t token = first + threadIdx.x; token < end; token += kPolicyThreads) {
    if (!active(args, at, token)) continue;
    const policy::Token<Scalar> t = token_at(args, at, token);
    p.dlogprob[at.start + token] += policy::sequence_gradient<Scalar>(t.logprob, t.old, g, p);
  }
}

__global__ void __launch_bounds__(kPolicyThreads) policy_metrics(const PolicyArgs args) {
  struct Shared {
    SlotSums slots[kPolicyThreads / 32];
  };
  TK_SHARED(Shared, shared);
  SlotSums sums{};
  sums.ratio_min = INFINITY;
  sums.ratio_max = -INFINITY;
  for (int64_t slot = threadIdx.x; slot < args.slot_count; slot += kPolicyThreads) sums = add(sums, args.slots[slot]);
  sums = simt::block_merge<kPolicyThreads>(shared.slots, sums, Sum{});
  if (threadIdx.x != 0) return;
  const double count = static_cast<double>(sums.tokens < 1 ? 1 : sums.tokens);
  const double bonus = args.p.entropy_coef * sums.bonus_entropy / static_cast<double>(sums.bonus < 1 ? 1 : sums.bonus);
  float* m = args.p.metrics;
  *args.p.loss = static_cast<float>(args.p.entropy_coef != 0 ? sums.loss - bonus : sums.loss);
  m[kPolicyLoss] = static_cast<float>(sums.loss);
  m[kApproxKl] = static_cast<float>(sums.approx_kl / count);
  m[kRatioMean] = static_cast<float>(sums.ratio / count);
  const bool nan = sums.ratio != sums.ratio;  // a comparison passes NaN over, the sum does not
  m[kRatioMin] = nan ? NAN : sums.ratio_min;
  m[kRatioMax] = nan ? NAN : sums.ratio_max;
  m[kClipLow] = static_cast<float>(static_cast<double>(sums.clip_low) / count);
  m[kClipHigh] = static_cast<float>(static_cast<double>(sums.clip_high) / count);
  m[kClipFraction] = static_cast<float>(static_cast<double>(sums.clip_low + sums.clip_high) / count);
  m[kTokens] = static_cast<float>(sums.tokens);
  m[kKl] = static_cast<float>(sums.kl / count);
  m[kRolloutRatio] = static_cast<float>(sums.rollout_ratio / count);
  m[kOffPolicyKept] = static_cast<float>(sums.kept / count);
  m[kEntropy] = static_cast<float>(sums.entropy / count);
}

}  // namespace tk::cuda
