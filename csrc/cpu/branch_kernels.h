// The kernels of one ISA level that join NSA's branches, for its function table.
#pragma once

#include "branch_gates.h"

namespace tk::TK_ISA {

void branch_gates(const BranchGatesParams& p);

}  // namespace tk::TK_ISA
