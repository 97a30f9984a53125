// What the CUDA kernels of policy_loss and group_advantages take beside the CPU's params (policy_loss.h).
//
// B sequences of S tokens (packed: N tokens), R samples.
#pragma once
#include "policy_loss.h"

namespace tk {

// mask_bytes is 1; top_entropy is not read (top is); total is not read (divisor is).
struct PolicyLossCudaParams : PolicyLossParams {
  int64_t tokens = 0;               // N where packed
  const uint8_t* top = nullptr;     // [B, S] or [N] contiguous: 1 for the tokens that the top-entropy mask keeps; null: all
  const double* divisor = nullptr;  // one value, at least 1 counts: what Reduction::total divides by; null: the active tokens
  void* workspace = nullptr;        // [policy_loss_workspace_bytes], 8-byte aligned
  int64_t workspace_bytes = 0;
};

struct GroupAdvantagesCudaParams : GroupAdvantagesParams {
  const int64_t* order = nullptr;   // [R] the samples, group after group; null where group_size says it
  const int64_t* ends = nullptr;    // [R] for each place in order: where its group ends
  double* scratch = nullptr;        // [2, R]
};

}  // namespace tk
