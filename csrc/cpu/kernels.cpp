// The function table of one ISA level. Compiled once per level, TK_ISA names the namespace.
#include "kernels.h"

#include "attention_kernels.h"
#include "branch_kernels.h"
#include "grpo_kernels.h"
#include "linear_kernels.h"
#include "mla_kernels.h"
#include "moe_kernels.h"
#include "sparse_kernels.h"

namespace tk {
namespace TK_ISA {

#define TK_STRING_(x) #x
#define TK_STRING(x) TK_STRING_(x)

const Kernels& table() {
  static const Kernels kernels{
      .level = TK_STRING(TK_ISA),
      .attention_forward = attention_forward,
      .attention_backward = attention_backward,
      .attention_decode = attention_decode,
      .mla_decode = mla_decode,
      .append_latent = append_latent,
      .gather_latent = gather_latent,
      .linear_forward = linear_forward,
      .linear_backward = linear_backward,
      .linear_logprob_forward = linear_logprob_forward,
      .linear_logprob_backward = linear_logprob_backward,
      .policy_loss = policy_loss,
      .group_advantages = group_advantages,
      .logprob_forward = logprob_forward,
      .logprob_backward = logprob_backward,
      .topk = topk,
      .indexer_topk = indexer_topk,
      .indexer_scores = indexer_scores,
      .indexer_scores_backward = indexer_scores_backward,
      .indexer_loss = indexer_loss,
      .indexer_loss_backward = indexer_loss_backward,
      .sparse_forward = sparse_forward,
      .sparse_backward = sparse_backward,
      .block_select = block_select,
      .block_sparse_forward = block_sparse_forward,
      .block_sparse_backward = block_sparse_backward,
      .branch_gates = branch_gates,
      .moe_pack = moe_pack,
      .moe_forward = moe_forward,
      .moe_backward = moe_backward,
      .route_forward = route_forward,
      .route_backward = route_backward,
  };
  return kernels;
}

}  // namespace TK_ISA
}  // namespace tk
