// A block of scratch memory cut into arrays.
#pragma once

#include "simd/gemm.h"

namespace tk::TK_ISA {

// Pieces of a block of scratch one after the other; starting at 0 it measures.
struct Pieces {
  uintptr_t at;
  template <class X> X* take(int64_t count) {
    X* piece = (X*)at;
    at += round_up(count * (int64_t)sizeof(X), 64);
    return piece;
  }
};

}  // namespace tk::TK_ISA
