// The GRPO kernels of one ISA level, for its function table.
#pragma once

#include "grpo.h"
#include "policy_loss.h"

namespace tk::TK_ISA {

void linear_logprob_forward(const LinearLogprobForwardParams& p);
void linear_logprob_backward(const LinearLogprobBackwardParams& p);
void policy_loss(const PolicyLossParams& p);
void group_advantages(const GroupAdvantagesParams& p);
void logprob_forward(const LogprobForwardParams& p);
void logprob_backward(const LogprobBackwardParams& p);

}  // namespace tk::TK_ISA
