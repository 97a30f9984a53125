// The CUDA half as the rest of the core sees it: plain functions, no CUDA header needed to call them.
//
// Pointers in params are device pointers of the calling thread's current device; `stream` is the raw cudaStream_t.
// Calls only enqueue work. Bad sizes throw std::invalid_argument, a failed launch throws std::runtime_error.
#pragma once
#include <cstdint>

#include "topk.h"

namespace tk::cuda {

// The scratch that topk wants for these sizes on the current device; only sizes, k, dtype and chunk are read.
int64_t topk_workspace_bytes(const TopkParams& params);
// The k largest scores of each row in ascending order of position: see csrc/cuda/topk_kernel.cuh.
void topk(const TopkParams& params, std::uintptr_t stream);

}  // namespace tk::cuda
