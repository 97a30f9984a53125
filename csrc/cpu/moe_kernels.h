// The mixture-of-experts kernels of one ISA level, for its function table.
#pragma once

#include "moe.h"

namespace tk::TK_ISA {

void moe_pack(const MoePackParams& p);
void moe_forward(const MoeForwardParams& p);
// moe_forward of few tokens; the same bits.
bool moe_decode_covers(const MoeForwardParams& p);
void moe_decode(const MoeForwardParams& p);
void moe_backward(const MoeBackwardParams& p);
void route_forward(const RouteForwardParams& p);
void route_backward(const RouteBackwardParams& p);

}  // namespace tk::TK_ISA
