// The sparse attention kernels of one ISA level, for its function table.
#pragma once

#include "topk.h"

namespace tk::TK_ISA {

void topk(const TopkParams& p);

}  // namespace tk::TK_ISA
