// The grpo kernels on the host shim with a C interface, so that tests can hold them, and the ops' host code, against the reference.
// Params come as the bytes of the structs in csrc/include; tk_params_size lets the caller check its idea of their layout.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda_kernels.h"

namespace {

template <class P>
P read(const void* bytes) {
  P params;
  std::memcpy(&params, bytes, sizeof(P));
  return params;
}

}  // namespace

extern "C" int64_t tk_params_size(int32_t which) {
  const std::size_t sizes[] = {sizeof(tk::LogprobForwardParams), sizeof(tk::LogprobBackwardParams),
                               sizeof(tk::PolicyLossCudaParams), sizeof(tk::GroupAdvantagesCudaParams)};
  return static_cast<int64_t>(sizes[which]);
}

extern "C" void tk_logprob_forward(const void* params) { tk::cuda::logprob_forward(read<tk::LogprobForwardParams>(params), 0); }

extern "C" void tk_logprob_backward(const void* params) { tk::cuda::logprob_backward(read<tk::LogprobBackwardParams>(params), 0); }

extern "C" int64_t tk_policy_loss_workspace_bytes(const void* params) {
  return tk::cuda::policy_loss_workspace_bytes(read<tk::PolicyLossCudaParams>(params));
}

extern "C" void tk_policy_loss(const void* params) { tk::cuda::policy_loss(read<tk::PolicyLossCudaParams>(params), 0); }

extern "C" void tk_group_advantages(const void* params) {
  tk::cuda::group_advantages(read<tk::GroupAdvantagesCudaParams>(params), 0);
}
