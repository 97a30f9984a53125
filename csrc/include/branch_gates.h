// Params of NSA's sum of branches, o = sum over c of gates[c] branches[c], and of its gradient.
//
// N rows (batch, position, head), Dv value dim, three branches. All contiguous.
#pragma once
#include <cstdint>

#include "types.h"

namespace tk {

struct BranchGatesParams {
  DType dtype = DType::float32;  // of branches and results
  int64_t rows = 0, value_dim = 0;
  const void *branch0 = nullptr, *branch1 = nullptr, *branch2 = nullptr;  // [N, Dv] each
  const float* gates = nullptr;    // [N, 3]; null, of the forward alone: 1
  void* out = nullptr;             // [N, Dv], of the forward
  const void* dout = nullptr;      // [N, Dv], of the backward, and so on
  void* dbranches = nullptr;       // [3, N, Dv]
  float* dgates = nullptr;         // [N, 3]
  int32_t threads = 1;
};

}  // namespace tk
