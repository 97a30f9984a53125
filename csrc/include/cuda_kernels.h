// The CUDA half as the rest of the core sees it: plain functions, no CUDA header needed to call them.
//
// Pointers in params are device pointers of the calling thread's current device; `stream` is the raw cudaStream_t.
// Calls only enqueue work. Bad sizes throw std::invalid_argument, a failed launch throws std::runtime_error.
#pragma once
#include <cstdint>

#include "grpo.h"
#include "policy_cuda.h"
#include "route_cuda.h"
#include "topk.h"

namespace tk::cuda {

// The scratch that topk wants for these sizes on the current device; only sizes, k, dtype and chunk are read.
int64_t topk_workspace_bytes(const TopkParams& params);
// The k largest scores of each row in ascending order of position: see csrc/cuda/topk_kernel.cuh.
void topk(const TopkParams& params, std::uintptr_t stream);

// Routing and its gradient: csrc/cuda/route_kernel.cuh. The workspace depends on sizes alone.
int64_t route_workspace_bytes(const RouteForwardCudaParams& params);
void route_forward(const RouteForwardCudaParams& params, std::uintptr_t stream);
void route_backward(const RouteBackwardParams& params, std::uintptr_t stream);

// Log-probability and entropy from given logits, and their gradient: csrc/cuda/logprob_kernel.cuh. A target
// outside 0..V-1 counts as ignored.
void logprob_forward(const LogprobForwardParams& params, std::uintptr_t stream);
void logprob_backward(const LogprobBackwardParams& params, std::uintptr_t stream);

// The policy losses with gradients and metrics: csrc/cuda/policy_loss_kernel.cuh. The workspace depends on sizes alone.
int64_t policy_loss_workspace_bytes(const PolicyLossCudaParams& params);
void policy_loss(const PolicyLossCudaParams& params, std::uintptr_t stream);

// Advantages within groups of samples: csrc/cuda/advantages_kernel.cuh.
void group_advantages(const GroupAdvantagesCudaParams& params, std::uintptr_t stream);

}  // namespace tk::cuda
