// Params of attention over chosen blocks of keys (NSA's middle branch, MoBA) and of the choice itself.
//
// B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, U choosing heads (Hkv or H), D head dim, Dv value dim,
// n blocks of a choosing head. Query i sits at p = i + T - S and sees key j when j <= p and block j / block is named.
// Strides count elements: {batch, position, head}. Packed with cu_seqlens [B + 1] (then S = T, batch strides are 0).
#pragma once
#include <cstdint>

#include "attention.h"

namespace tk {

struct BlockSparseShape : AttentionShape {  // q_len, k_len: S and T, or the totals of packed sequences
  int64_t choosing = 0, slots = 0, block = 0;  // U, n, keys of a block
  const void* q = nullptr;                     // [B, S, H, D]
  const void* k = nullptr;                     // [B, T, Hkv, D]
  const void* v = nullptr;                     // [B, T, Hkv, Dv]
  int64_t q_stride[3] = {0, 0, 0}, k_stride[3] = {0, 0, 0}, v_stride[3] = {0, 0, 0};
  const int32_t* indices = nullptr;     // [B, S, U, n] contiguous, distinct; outside of 0 ... p / block: an empty slot
  const int32_t* cu_seqlens = nullptr;  // [B + 1] or null
};

struct BlockSparseForwardParams : BlockSparseShape {
  void* out = nullptr;   // [B, S, H, Dv] contiguous
  float* lse = nullptr;  // [B, S, H] contiguous
};

struct BlockSparseBackwardParams : BlockSparseShape {
  const void* out = nullptr;   // [B, S, H, Dv] contiguous, and so are all below
  const float* lse = nullptr;  // [B, S, H]
  const void* dout = nullptr;  // [B, S, H, Dv]
  void* dq = nullptr;          // [B, S, H, D]
  void* dk = nullptr;          // [B, T, Hkv, D]
  void* dv = nullptr;          // [B, T, Hkv, Dv]
};

// NSA: k are the compressed keys, lse those of attention over them; probabilities of each group of heads -> blocks [B, S, Hkv, n].
// MoBA (compress_block = 0): k are the keys, blocks [B, S, H, n] by q . mean of a block.
struct BlockSelectParams : AttentionShape {  // k_len: T, of the keys that are chosen from
  int64_t slots = 0, block = 0, compress_block = 0, stride = 0;
  const void* q = nullptr;                         // [B, S, H, D]
  const void* k = nullptr;                         // [B, Tc, Hkv, D] or [B, T, Hkv, D]
  const float* lse = nullptr;                      // [B, S, H] contiguous
  int64_t q_stride[3] = {0, 0, 0}, k_stride[3] = {0, 0, 0};
  const int32_t* cu_seqlens = nullptr;             // [B + 1] or null
  const int32_t* cu_compressed = nullptr;          // [B + 1] with cu_seqlens, of the compressed keys
  const int32_t* seqlens = nullptr;                // [B] keys of a cache that count, else null: T
  int32_t* indices = nullptr;                      // [B, S, Hkv or H, n], ascending, -1 at the end
};

}  // namespace tk
