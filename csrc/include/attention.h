// Params of the attention kernels (forward, backward, decode). Formulas: docs in csrc/cpu/attention_*.cpp.
//
// B batch, S queries, T keys, H query heads, Hkv key heads (H divisible by Hkv), D head dim, Dv value dim, P pages.
// D and Dv lie in 1..256. Every tensor's last dimension is contiguous; strides count elements, in the order of the
// dimensions before the last one: {batch, position, head}. Sizes may be 0. Query head h reads key head h / (H / Hkv).
// Query i sits at p = i + T - S. It sees key j when key_start <= j < T, and (causal) j <= p, and (window)
// p - window_left <= j <= p + window_right, and (chunk) j - key_start >= chunk * floor((p - key_start) / chunk).
#pragma once
#include <cstdint>

#include "types.h"

namespace tk {

// What is computed, common to all three kernels.
struct AttentionShape {
  DType dtype = DType::float32;  // of q, k, v, out, and of their gradients
  int64_t batch = 0, q_len = 0, k_len = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  float scale = 1.0f;
  int32_t causal = 0;
  int64_t window_left = -1, window_right = -1;  // -1: unlimited
  int64_t chunk = 0;                            // 0: none
  float softcap = 0.0f;                         // 0: none
  int32_t threads = 1;                          // torch.get_num_threads()
};

// Packed sequences: with cu_seqlens, sequence b has queries [cu_seqlens_q[b], cu_seqlens_q[b + 1]) and keys
// [cu_seqlens_k[b], cu_seqlens_k[b + 1]) of tensors whose batch dimension is 1 (batch strides 0): q [N, H, D], lse [N, H].
// batch counts sequences, q_len and k_len are the totals N and Nk; S and T of the formulas are each sequence's own.
struct AttentionForwardParams : AttentionShape {
  const void* q = nullptr;             // [B, S, H, D]
  const void* k = nullptr;             // [B, T, Hkv, D]
  const void* v = nullptr;             // [B, T, Hkv, Dv]
  const float* sinks = nullptr;        // [H], may be null
  const int32_t* key_start = nullptr;  // [B] first valid key of each row, 0 <= key_start <= T; may be null (0)
  const int32_t* cu_seqlens_q = nullptr;  // [B + 1] packed sequences, see above; null: all of length S
  const int32_t* cu_seqlens_k = nullptr;  // [B + 1], given exactly with cu_seqlens_q, and then key_start is null
  void* out = nullptr;                 // [B, S, H, Dv]
  float* lse = nullptr;                // [B, S, H] contiguous float32, never counts the sink; -inf where no key is seen
  int64_t q_stride[3] = {0, 0, 0}, k_stride[3] = {0, 0, 0}, v_stride[3] = {0, 0, 0}, out_stride[3] = {0, 0, 0};
};

struct AttentionBackwardParams : AttentionShape {
  const void* q = nullptr;             // [B, S, H, D]
  const void* k = nullptr;             // [B, T, Hkv, D]
  const void* v = nullptr;             // [B, T, Hkv, Dv]
  const void* out = nullptr;           // [B, S, H, Dv] the forward's
  const float* lse = nullptr;          // [B, S, H] contiguous, the forward's
  const void* dout = nullptr;          // [B, S, H, Dv]
  const float* dlse = nullptr;         // [B, S, H] contiguous, gradient of lse; may be null (0)
  const float* sinks = nullptr;        // [H], may be null
  const int32_t* key_start = nullptr;  // [B], may be null
  const int32_t* cu_seqlens_q = nullptr;  // [B + 1], as in the forward
  const int32_t* cu_seqlens_k = nullptr;  // [B + 1]
  void* dq = nullptr;                  // [B, S, H, D]   every element is written, zeros too
  void* dk = nullptr;                  // [B, T, Hkv, D]
  void* dv = nullptr;                  // [B, T, Hkv, Dv]
  float* dsinks = nullptr;             // [H], needed where sinks is given
  int64_t q_stride[3] = {0, 0, 0}, k_stride[3] = {0, 0, 0}, v_stride[3] = {0, 0, 0}, out_stride[3] = {0, 0, 0};
  int64_t dout_stride[3] = {0, 0, 0}, dq_stride[3] = {0, 0, 0}, dk_stride[3] = {0, 0, 0}, dv_stride[3] = {0, 0, 0};
};

// q_len new queries per sequence against a cache whose sequence b holds seqlens[b] keys, the new ones included:
// here T is seqlens[b], sequence by sequence; k_len is ignored. Slots and pages past the end are never read.
struct AttentionDecodeParams : AttentionShape {
  const void* q = nullptr;               // [B, Sq, H, D]
  const void* k = nullptr;               // [B, Tmax, Hkv, D], or pages [P, page_size, Hkv, D]
  const void* v = nullptr;               // [B, Tmax, Hkv, Dv], or pages [P, page_size, Hkv, Dv]
  const int32_t* seqlens = nullptr;      // [B], checked by the caller against Tmax or max_pages * page_size
  const int32_t* block_table = nullptr;  // [B, max_pages] contiguous rows; null: one cache row per sequence
  const float* sinks = nullptr;          // [H], may be null
  void* out = nullptr;                   // [B, Sq, H, Dv]
  float* lse = nullptr;                  // [B, Sq, H] contiguous
  int64_t page_size = 0, max_pages = 0;  // with block_table
  // A shared prefix: keys that stand before every sequence's own; seqlens does not count them, positions go on from them.
  const void* prefix_k = nullptr;         // [Tp, Hkv, D], or pages [P, prefix_page_size, Hkv, D]; null: no prefix
  const void* prefix_v = nullptr;         // [Tp, Hkv, Dv], or pages
  const int32_t* prefix_table = nullptr;  // page numbers of the prefix; null: one run of keys
  int64_t prefix_length = 0, prefix_page_size = 0;
  int64_t prefix_k_stride[3] = {0, 0, 0}, prefix_v_stride[3] = {0, 0, 0};  // {page or 0, position or slot, head}
  int64_t q_stride[3] = {0, 0, 0}, out_stride[3] = {0, 0, 0};
  int64_t k_stride[3] = {0, 0, 0}, v_stride[3] = {0, 0, 0};  // {cache row or page, position or slot, head}
};

}  // namespace tk
