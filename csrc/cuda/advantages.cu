// Host side of group_advantages: checks and launches. The kernels are in advantages_kernel.cuh.
#include "advantages_kernel.cuh"
#include "cuda_kernels.h"
#include "launch.h"

namespace tk::cuda {

void group_advantages(const GroupAdvantagesCudaParams& params, std::uintptr_t stream_handle) {
  require(params.samples >= 0 && params.samples < kGridLimit, "group_advantages: samples must be in 0..2^31-1", params.samples);
  require(params.group_size > 0 || (params.order != nullptr && params.ends != nullptr),
          "group_advantages: group_size must be positive where order and ends are not given", params.group_size);
  if (params.samples == 0) return;
  require(params.scratch != nullptr, "group_advantages: scratch must hold 2 R doubles", 0);
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  TK_LAUNCH(advantage_groups, static_cast<unsigned>(params.samples), kGroupThreads, stream, params);
  TK_LAUNCH(advantage_batch, static_cast<unsigned>(ceil_div(params.samples, kBatchThreads)), kBatchThreads, stream, params);
  check_launch("group_advantages");
}

}  // namespace tk::cuda
