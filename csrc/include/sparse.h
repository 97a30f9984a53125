// Params of sparse attention: every query attends to the keys that its indices name.
//
// B batch, S queries of a sequence, T keys of a sequence, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim,
// K slots of a query, N queries in all, P pages.
// Latents: one key head, and the value is the first Dv of a key (v is null). Strides count elements (bytes where quantised).
#pragma once
#include <cstdint>

#include "types.h"

namespace tk {

struct SparseShape {
  DType dtype = DType::float32;  // of queries, results and, unless quantised, keys and values
  int32_t quantised = 0;         // keys of 656 bytes (mla.h)
  int64_t batch = 0, q_len = 0, k_len = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0, slots = 0;
  float scale = 1.0f;
  int32_t threads = 1;                    // torch.get_num_threads()
  const void* q = nullptr;                // [B, S, H, D] contiguous; packed [N, H, D]
  const void* k = nullptr;                // [B, T, Hkv, D], packed [Nk, Hkv, D], or pages [P, page_size, Hkv, D]
  const void* v = nullptr;                // [B, T, Hkv, Dv] and so on; null: the first Dv of k
  int64_t k_stride[3] = {0, 0, 0};        // {sequence or page, position, head}
  int64_t v_stride[3] = {0, 0, 0};
  const int32_t* indices = nullptr;       // [B, S, Hkv, K] contiguous: positions in the sequence; outside of it: an empty slot
  const float* sinks = nullptr;           // [H] or null
  const int32_t* cu_seqlens_q = nullptr;  // [B + 1] packed, else null
  const int32_t* cu_seqlens_k = nullptr;  // [B + 1]
  const int32_t* seqlens = nullptr;       // [B] keys of a cache that count, else null: T
  const int32_t* block_table = nullptr;   // [B, max_pages], else null
  int64_t page_size = 0, max_pages = 0;
};

struct SparseForwardParams : SparseShape {
  void* out = nullptr;   // [B, S, H, Dv] contiguous
  float* lse = nullptr;  // [B, S, H], without the sinks
};

// Of keys that lie in no pages and are not quantised. All contiguous.
struct SparseBackwardParams : SparseShape {
  const void* out = nullptr;
  const float* lse = nullptr;
  const void* dout = nullptr;   // [B, S, H, Dv]
  const float* dlse = nullptr;  // [B, S, H] or null
  void* dq = nullptr;           // [B, S, H, D]
  void* dk = nullptr;           // like k, contiguous
  void* dv = nullptr;           // like v, contiguous; null where v is
  float* dsinks = nullptr;      // [H] or null
};

}  // namespace tk
