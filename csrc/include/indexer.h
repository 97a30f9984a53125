// Params of the lightning indexer's scoring fused with its selection.
//
// B batch, S queries of a sequence, T keys of a sequence, Hi index heads, Di index dim, N queries in all, P pages. Strides count elements.
#pragma once
#include <cstdint>

#include "types.h"

namespace tk {

struct IndexerTopkParams {
  DType dtype = DType::float32;  // of q and, unless they are quantised, of the keys
  int32_t quantised = 0;         // keys of e4m3
  int32_t causal = 0;
  int64_t batch = 0, q_len = 0, k_len = 0, heads = 0, head_dim = 0, top_k = 0;
  int32_t threads = 1;                    // torch.get_num_threads()
  const void* q = nullptr;                // [B, S, Hi, Di] contiguous; packed [N, Hi, Di]
  const void* k = nullptr;                // [B, T, Di], packed [Nk, Di], or pages [P, page_size, Di]
  const float* w = nullptr;               // [B, S, Hi] contiguous
  const float* k_scale = nullptr;         // k's shape without Di; null: ones
  int64_t k_stride[2] = {0, 0};           // {sequence or page, position}
  int64_t k_scale_stride[2] = {0, 0};
  const int32_t* cu_seqlens_q = nullptr;  // [B + 1] packed, else null
  const int32_t* cu_seqlens_k = nullptr;  // [B + 1]
  const int32_t* seqlens = nullptr;       // [B] keys of a cache that count, else null: T
  const int32_t* block_table = nullptr;   // [B, max_pages], else null
  int64_t page_size = 0, max_pages = 0;
  int32_t* indices = nullptr;             // [B, S, top_k] contiguous: ascending, -1 in unused slots (at the end)
};

}  // namespace tk
