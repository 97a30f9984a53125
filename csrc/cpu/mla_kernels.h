// The MLA kernels of one ISA level, for its function table.
#pragma once

#include "mla.h"

namespace tk::TK_ISA {

void mla_decode(const MlaDecodeParams& p);
void append_latent(const LatentAppendParams& p);
void gather_latent(const LatentGatherParams& p);

}  // namespace tk::TK_ISA
