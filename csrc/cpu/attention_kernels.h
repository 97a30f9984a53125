// The attention kernels of one ISA level, for its function table.
#pragma once

#include "attention.h"

namespace tk::TK_ISA {

void attention_forward(const AttentionForwardParams& p);
void attention_backward(const AttentionBackwardParams& p);
void attention_decode(const AttentionDecodeParams& p);

}  // namespace tk::TK_ISA
