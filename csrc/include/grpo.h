// Log-probability of a target token and entropy: linear_logprob from hidden states and the head's weight, without a [N, V]
// buffer, logprob from given logits. N rows (tokens), D hidden, V vocabulary. Formulas: csrc/cpu/grpo.cpp, softmax_rows.h.
// logits, hidden, weight, bias and their gradients have `dtype`; everything per row is float. Strides count elements.
#pragma once
#include "types.h"

namespace tk {

struct LinearLogprobForwardParams {
  DType dtype;
  int64_t n, d, v;          // N, D, V
  const void* hidden;       // [N, D]
  int64_t hidden_stride;    // elements from one row to the next
  const void* weight;       // [V, D]
  int64_t weight_stride;
  const void* bias;         // [V] or null
  const int64_t* target;    // [N], or ignore_index; a target outside 0..V-1 counts but is none of these words
  int64_t ignore_index;
  float temperature;        // > 0
  float softcap;            // > 0, or 0 for none
  float* logprob;           // [N]; 0 where ignored, -inf where the target is none of these words
  float* entropy;           // [N] or null (then its work is saved); 0 where ignored
  double* lse;              // [N]: log-sum-exp of z, for the backward (rounded to float it would tilt every p of its row
                            // by up to 5e-7 at lse = 10); 0 where ignored
  void* kept;               // [kept_blocks, N, 384] of dtype: the products h·w of the first kept_blocks blocks of 384 words,
  int64_t kept_blocks;      // rows in the order of the active ones
  int32_t threads;
};

struct LinearLogprobBackwardParams {
  DType dtype;
  int64_t n, d, v;
  const void* hidden;       // [N, D]
  int64_t hidden_stride;
  const void* weight;       // [V, D]
  int64_t weight_stride;
  const void* bias;         // [V] or null
  const int64_t* target;    // [N]
  int64_t ignore_index;
  float temperature;
  float softcap;
  const float* dlogprob;    // [N] gradient of logprob
  const float* dentropy;    // [N] gradient of entropy, or null
  const double* lse;        // [N] from the forward
  const float* entropy;     // [N] from the forward; read only with dentropy
  const void* kept;         // the forward's, or null
  int64_t kept_blocks;
  void* dhidden;            // [N, D] contiguous, or null
  bool dhidden_float;       // dhidden is float, whatever dtype
  void* dweight;            // [V, D] contiguous, or null
  bool dweight_add;         // dweight is float, and the gradient is added to it
  void* dbias;              // [V] or null
  int32_t threads;
};

struct LogprobForwardParams {
  DType dtype;
  int64_t b, s, v;          // B, S, V; rows are B x S
  const void* logits;       // [B, S, V], contiguous in V
  int64_t stride[2];        // elements from one batch, one row to the next
  const int64_t* target;    // [B, S], each in 0..V-1 or ignore_index
  int64_t ignore_index;
  float temperature;        // > 0
  float softcap;            // > 0, or 0 for none
  float* logprob;           // [B, S]; 0 where ignored
  float* entropy;           // [B, S] or null; 0 where ignored
  double* lse;              // [B, S], as above
  int32_t threads;
};

struct LogprobBackwardParams {
  DType dtype;
  int64_t b, s, v;
  const void* logits;       // [B, S, V]
  int64_t stride[2];
  const int64_t* target;    // [B, S]
  int64_t ignore_index;
  float temperature;
  float softcap;
  const float* dlogprob;    // [B, S]
  const float* dentropy;    // [B, S] or null
  const double* lse;        // [B, S] from the forward
  const float* entropy;     // [B, S] from the forward
  void* dlogits;            // [B, S, V] contiguous; 0 where ignored
  int32_t threads;
};

}  // namespace tk
