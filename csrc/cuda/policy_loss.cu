// Host side of policy_loss: checks, workspace, launches. The kernels are in policy_loss_kernel.cuh.
#include "cuda_kernels.h"
#include "launch.h"
#include "policy_loss_kernel.cuh"

namespace tk::cuda {
namespace {

int64_t count_slots(const PolicyLossCudaParams& p) {
  require(p.sequences >= 0 && p.sequences < kGridLimit, "policy_loss: sequences must be in 0..2^31-1", p.sequences);
  require(p.length >= 0 && p.tokens >= 0, "policy_loss: lengths must not be negative", p.length < 0 ? p.length : p.tokens);
  require(p.mask_bytes == 1 && !p.mask_is_float, "policy_loss: the mask must be bytes", p.mask_bytes);
  const int64_t slots = p.cu_seqlens != nullptr ? (p.sequences == 0 ? 0 : p.tokens / kBlockTokens + p.sequences)
                                                : p.sequences * ceil_div(p.length, kBlockTokens);
  require(slots < kGridLimit, "policy_loss: blocks of 1024 tokens must stay below 2^31", slots);
  return slots;
}

// Whether anything counted or summed per sequence is wanted before the tokens.
bool wants_sequences(const PolicyLossCudaParams& p) {
  if (policy::needs_sequence_sums(p) || p.reduction == policy::Reduction::sequence_mean || p.dentropy != nullptr) return true;
  return p.reduction == policy::Reduction::total && p.divisor == nullptr;
}

int64_t workspace_bytes(const PolicyLossCudaParams& p, int64_t slots) {
  return p.sequences * static_cast<int64_t>(sizeof(SequenceSums)) + slots * static_cast<int64_t>(sizeof(SlotSums));
}

float log_of(float x) { return x <= 0 ? -INFINITY : ::logf(x); }

}  // namespace

int64_t policy_loss_workspace_bytes(const PolicyLossCudaParams& params) { return workspace_bytes(params, count_slots(params)); }

void policy_loss(const PolicyLossCudaParams& params, std::uintptr_t stream_handle) {
  const int64_t slots = count_slots(params);
  const int64_t wanted = workspace_bytes(params, slots);
  require(wanted == 0 || (params.workspace != nullptr && params.workspace_bytes >= wanted),
          "policy_loss: the workspace is smaller than policy_loss_workspace_bytes says", params.workspace_bytes);
  PolicyArgs args{};
  args.p = params;
  if (params.rollout == policy::Rollout::none && !params.off_policy) args.p.rollout_logprob = nullptr;
  args.slots = static_cast<SlotSums*>(params.workspace);
  SequenceSums* sequences = reinterpret_cast<SequenceSums*>(args.slots + slots);
  args.sequences = wants_sequences(params) ? sequences : nullptr;
  args.slot_count = slots;
  args.blocks = ceil_div(params.length, kBlockTokens);
  args.rollout_log_low = log_of(params.rollout_low);
  args.rollout_log_high = log_of(params.rollout_high);
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const unsigned grid = static_cast<unsigned>(slots);
  if (slots > 0) {
    if (args.sequences != nullptr) {
      TK_LAUNCH(policy_sequences, static_cast<unsigned>(params.sequences), kPolicyThreads, stream, args);
    }
    TK_LAUNCH(policy_tokens, grid, kPolicyThreads, stream, args);
    if (params.level != policy::Level::token && params.dlogprob != nullptr) {
      TK_LAUNCH(policy_sequence_ratio, grid, kPolicyThreads, stream, args);
    }
  }
  TK_LAUNCH(policy_metrics, 1, kPolicyThreads, stream, args);
  check_launch("policy_loss");
}

}  // namespace tk::cuda
