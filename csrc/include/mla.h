// Params of the MLA kernels: absorbed decode over a latent cache, append to it, gather from it.
//
// B batch, Sq new queries, H heads, T cached tokens, P pages, D values of a cached token, Dv of them its value, R rope.
// A cached token is one row of D values, [latent | rotated key], shared by all heads: key, and with its first Dv values value.
// Quantised caches hold 656 bytes a token: 512 float8 e4m3, 4 float32 scales (one per 128 values), 64 bfloat16; D is 576.
// Strides of caches count elements (bytes where quantised): {cache row or page, position or slot}; rows are contiguous.
#pragma once
#include <cstdint>

#include "types.h"

namespace tk {

// The cached tokens of each sequence; slots and pages past a sequence's end are never read.
struct LatentCacheParams {
  DType dtype = DType::float32;  // of queries, results and, unless quantised, the cache
  int32_t quantised = 0;
  int64_t batch = 0;
  const int32_t* seqlens = nullptr;      // [B] tokens, the new ones included; checked by the caller
  const int32_t* block_table = nullptr;  // [B, max_pages]; null: one cache row per sequence
  int64_t page_size = 0, max_pages = 0;  // with block_table
  int64_t kv_stride[2] = {0, 0};
  int32_t threads = 1;  // torch.get_num_threads()
};

struct MlaDecodeParams : LatentCacheParams {
  const void* q = nullptr;   // [B, Sq, H, D] contiguous
  const void* kv = nullptr;  // [B, T, D] or pages [P, page_size, D]
  void* out = nullptr;       // [B, Sq, H, Dv] contiguous
  float* lse = nullptr;      // [B, Sq, H]
  int64_t q_len = 0, heads = 0, head_dim = 0, value_dim = 0;
  float scale = 1.0f;
  // Tokens that stand before every sequence's own; seqlens does not count them, positions go on from them.
  const void* prefix = nullptr;           // [Tp, D], or pages [P, prefix_page_size, D]; null: none
  const int32_t* prefix_table = nullptr;  // page numbers; null: one run of tokens
  int64_t prefix_length = 0, prefix_page_size = 0;
  int64_t prefix_stride[2] = {0, 0};
};

// Token i of the new ones goes to position seqlens - Sq + i of its sequence, nowhere where that is negative.
struct LatentAppendParams : LatentCacheParams {
  void* kv = nullptr;
  const void* latent = nullptr;  // [B, Sq, Dv]
  const void* rope = nullptr;    // [B, Sq, R]
  DType source = DType::float32; // of latent and rope
  int64_t q_len = 0, latent_dim = 0, rope_dim = 0;
  int64_t latent_stride[2] = {0, 0}, rope_stride[2] = {0, 0};  // {sequence, token}
};

// The cache as one dense tensor, zeros past each sequence's end; quantised tokens become bfloat16.
struct LatentGatherParams : LatentCacheParams {
  const void* kv = nullptr;
  void* out = nullptr;  // [B, length, D] contiguous
  int64_t length = 0, head_dim = 0;
};

}  // namespace tk
