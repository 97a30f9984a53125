// Params of the mixture of experts: routing, and the experts' feed-forward forward and backward.
//
// N tokens, H hidden, I intermediate, E experts, K experts a token, C columns of the first product (2I; I for relu2).
// A slot is a (token, k) pair, number token * K + k. Weights are read where they lie, in either layout; packed copies of them
// (moe_pack) spare a forward the packing.
#pragma once
#include <cstdint>

#include "types.h"

namespace tk {

enum class MoeActivation : int32_t { swiglu = 0, gpt_oss = 1, geglu = 2, geglu_tanh = 3, relu2 = 4 };

struct MoeShape {
  DType dtype = DType::float32;             // of x, the weights, y and z
  MoeActivation activation = MoeActivation::swiglu;
  int32_t weight_on_input = 0;
  int32_t in_out = 0;                       // w1 [E, H, C], w2 [E, I, H]; else w1 [E, C, H], w2 [E, H, I]
  float limit = 0;                          // of gate and up; infinity: none
  int64_t tokens = 0, hidden = 0, inner = 0, experts = 0, top_k = 0;  // N, H, I, E, K
  int32_t threads = 1;
  const void* x = nullptr;                  // [N, H]
  int64_t x_stride = 0;                     // elements from row to row
  const void* w1 = nullptr;
  const void* w2 = nullptr;
  int64_t w1_stride[2] = {0, 0};            // {expert, row}, in elements
  int64_t w2_stride[2] = {0, 0};
  const float* b1 = nullptr;                // [E, C] or null
  const float* b2 = nullptr;                // [E, H] or null
  const float* weights = nullptr;           // [N, K]
  const int32_t* chosen = nullptr;          // [N, K]; outside [0, E): another rank's, adds nothing
};

struct MoePackParams : MoeShape {
  void* packed1 = nullptr;                  // null: only `bytes` is written
  void* packed2 = nullptr;
  int64_t* bytes = nullptr;                 // [2]: what the copies take, or null
};

struct MoeForwardParams : MoeShape {
  const void* packed1 = nullptr;            // moe_pack's, or null: packed along the way
  const void* packed2 = nullptr;
  void* y = nullptr;                        // [N, H] contiguous
  void* z = nullptr;                        // [M, C] pre-activations of the M slots that live here, by expert, or null
};

struct MoeBackwardParams : MoeShape {
  const void* dy = nullptr;                 // [N, H] contiguous
  const void* z = nullptr;                  // as the forward left it
  void* dx = nullptr;                       // [N, H], or null; all results contiguous
  void* dw1 = nullptr;                      // like w1, or null
  void* dw2 = nullptr;
  float* db1 = nullptr;                     // [E, C], or null
  float* db2 = nullptr;                     // [E, H], or null
  float* dweights = nullptr;                // [N, K], or null
};

enum class MoeScore : int32_t { softmax = 0, softmax_topk = 1, sigmoid = 2, sigmoid_topk = 3, sqrtsoftplus = 4 };

struct RouteShape {
  DType dtype = DType::float32;             // of the logits
  MoeScore score = MoeScore::softmax;
  int32_t renormalize = 1;
  int64_t tokens = 0, experts = 0, top_k = 0;
  float scaling = 1;
  int32_t threads = 1;
  const void* logits = nullptr;             // [N, E]
  int64_t stride = 0;                       // elements from row to row
};

struct RouteForwardParams : RouteShape {
  int64_t groups = 1, top_groups = 1;
  int32_t group_max = 0;                    // a group's score: its best expert; else the sum of its two best
  const float* bias = nullptr;              // [E] or null
  int32_t replay = 0;                       // chosen is given
  int32_t* chosen = nullptr;                // [N, K]
  float* weights = nullptr;                 // [N, K]
  int32_t* counts = nullptr;                // [E]
  int32_t* order = nullptr;                 // [N * K]
  int32_t* offsets = nullptr;               // [E + 1]
};

struct RouteBackwardParams : RouteShape {
  const int32_t* chosen = nullptr;          // [N, K]
  const float* dweights = nullptr;          // [N, K]
  void* dlogits = nullptr;                  // [N, E] contiguous
};

}  // namespace tk
