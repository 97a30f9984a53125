// What the CUDA kernels of route take beside the CPU's params (moe.h).
#pragma once
#include "moe.h"

namespace tk {

// threads is not read. Where experts are replayed, those outside 0..E-1 are another rank's: weight 0, not counted, last in order.
struct RouteForwardCudaParams : RouteForwardParams {
  void* workspace = nullptr;        // [route_workspace_bytes], 4-byte aligned
  int64_t workspace_bytes = 0;
};

}  // namespace tk
