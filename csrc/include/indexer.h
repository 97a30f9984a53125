// Params of the lightning indexer: scoring fused with selection, dense scores, and the loss that trains it.
//
// B batch, S queries of a sequence, T keys of a sequence, Hi index heads, Di index dim, N queries in all, P pages; of the attention that
// the loss follows: H heads, Hkv key heads, D head dim, K slots of a query. Strides count elements.
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

struct IndexerShape {
  DType dtype = DType::float32;  // of q, k, target_q and target_k
  int32_t causal = 0;
  int64_t batch = 0, q_len = 0, k_len = 0, heads = 0, head_dim = 0;
  int32_t threads = 1;           // torch.get_num_threads()
  const void* q = nullptr;       // [B, S, Hi, Di] contiguous
  const void* k = nullptr;       // [B, T, Di]
  const float* w = nullptr;      // [B, S, Hi] contiguous
  int64_t k_stride[2] = {0, 0};  // {sequence, position}
};

struct IndexerGradients {
  void* dq = nullptr;   // [B, S, Hi, Di]
  void* dk = nullptr;   // [B, T, Di] contiguous
  float* dw = nullptr;  // [B, S, Hi]
};

struct IndexerScoresParams : IndexerShape {
  float* scores = nullptr;  // [B, S, T]: -inf where a key is not visible
};
struct IndexerScoresBackwardParams : IndexerShape, IndexerGradients {
  const float* dscores = nullptr;  // [B, S, T] contiguous
};

struct IndexerTarget {
  int64_t target_heads = 0, target_kv_heads = 0, target_dim = 0, slots = 0;
  float scale = 1.0f;
  const void* target_q = nullptr;           // [B, S, H, D] contiguous
  const void* target_k = nullptr;           // [B, T, Hkv, D]
  int64_t target_stride[3] = {0, 0, 0};     // {sequence, position, head}
  const int32_t* indices = nullptr;         // [B, S, K] contiguous; null: all visible keys
};
struct IndexerLossParams : IndexerShape, IndexerTarget {
  const float* target_lse = nullptr;  // [B, S, H] or null
  float* loss = nullptr;              // [B, S]
  double* total = nullptr;            // [1] their sum, or null
  // What backward needs. With indices [B, S, K]: softmax(I) - p. Without [B, S, 3 + 2H]: x, a with softmax(I) = a e^(I - x); the sum over
  // heads and keys of the target's probabilities; and such x, a for each head's.
  float* kept = nullptr;
};
struct IndexerLossBackwardParams : IndexerShape, IndexerTarget, IndexerGradients {
  const float* kept = nullptr;
  const float* dloss = nullptr;  // [B, S] contiguous
};

}  // namespace tk
