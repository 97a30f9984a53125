// Params of top-k selection over rows of scores.
//
// N rows · L scores a row · k kept a row · C pieces a long row is cut into
#pragma once
#include <cstdint>

#include "types.h"

namespace tk {

struct TopkParams {
  const void* scores;      // [N, L] of dtype, rows row_stride elements apart, contiguous inside a row
  const int32_t* lengths;  // [N] scores that count in each row, clamped to 0..L; null: all L
  void* values;            // [N, k] of dtype, contiguous: the kept scores, −inf in unused slots; null: not wanted
  int32_t* indices;        // [N, k] contiguous: positions in the row, ascending; −1 in unused slots (at the end)
  void* workspace;         // [workspace_bytes] scratch, 4-byte aligned; null where topk_workspace_bytes says 0
  int64_t workspace_bytes;
  DType dtype;             // of scores and values
  int64_t rows;            // N
  int64_t length;          // L < 2^31
  int64_t row_stride;      // in elements
  int64_t k;               // < 2^31
  int64_t chunk;           // on the GPU: scores a piece; 0: chosen by shape. It never shows in the result.
  int threads;             // on the CPU
};

}  // namespace tk
