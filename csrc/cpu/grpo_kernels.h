// The GRPO kernels of one ISA level, for its function table.
#pragma once

#include "grpo.h"

namespace tk::TK_ISA {

void linear_logprob_forward(const LinearLogprobForwardParams& p);
void linear_logprob_backward(const LinearLogprobBackwardParams& p);

}  // namespace tk::TK_ISA
