// Batch-invariant linear: y = x·Wᵀ + b. N rows, I in, O out.
// All tensors but the sizes share `dtype`; rows are contiguous, row strides count elements.
#pragma once
#include "types.h"

namespace tk {

struct LinearForwardParams {
  DType dtype;
  int64_t n, in, out;      // N, I, O
  const void* x;           // [N, I]
  int64_t x_stride;        // elements from one row of x to the next
  const void* weight;      // [O, I]
  int64_t weight_stride;
  const void* bias;        // [O] or null
  void* y;                 // [N, O]
  int64_t y_stride;
  int32_t threads;
};

struct LinearBackwardParams {
  DType dtype;
  int64_t n, in, out;
  const void* dy;          // [N, O]
  int64_t dy_stride;
  const void* x;           // [N, I], read for dweight alone
  int64_t x_stride;
  const void* weight;      // [O, I], read for dx alone
  int64_t weight_stride;
  void* dx;                // [N, I] contiguous, or null: dx = dy·W
  void* dweight;           // [O, I] contiguous, or null: dW = dyᵀ·x, summed over rows in order
  void* dbias;             // [O] or null: the sum of dy over rows
  int32_t threads;
};

}  // namespace tk
