// The linear kernels of one ISA level, for its function table.
#pragma once

#include "linear.h"

namespace tk::TK_ISA {

void linear_forward(const LinearForwardParams& p);
void linear_backward(const LinearBackwardParams& p);

}  // namespace tk::TK_ISA
