// The function table that each ISA level fills in (csrc/cpu/kernels.cpp) and csrc/dispatch.cpp chooses from.
#pragma once

#include "attention.h"
#include "block_sparse.h"
#include "branch_gates.h"
#include "grpo.h"
#include "indexer.h"
#include "linear.h"
#include "mla.h"
#include "moe.h"
#include "policy_loss.h"
#include "sparse.h"
#include "topk.h"

namespace tk {

struct Kernels {
  const char* level = nullptr;  // "baseline", "avx2", "avx512", "avx512_bf16" or "amx"
  void (*attention_forward)(const AttentionForwardParams&) = nullptr;
  void (*attention_backward)(const AttentionBackwardParams&) = nullptr;
  void (*attention_decode)(const AttentionDecodeParams&) = nullptr;
  void (*mla_decode)(const MlaDecodeParams&) = nullptr;
  void (*append_latent)(const LatentAppendParams&) = nullptr;
  void (*gather_latent)(const LatentGatherParams&) = nullptr;
  void (*linear_forward)(const LinearForwardParams&) = nullptr;
  void (*linear_backward)(const LinearBackwardParams&) = nullptr;
  void (*linear_logprob_forward)(const LinearLogprobForwardParams&) = nullptr;
  void (*linear_logprob_backward)(const LinearLogprobBackwardParams&) = nullptr;
  void (*policy_loss)(const PolicyLossParams&) = nullptr;
  void (*group_advantages)(const GroupAdvantagesParams&) = nullptr;
  void (*logprob_forward)(const LogprobForwardParams&) = nullptr;
  void (*logprob_backward)(const LogprobBackwardParams&) = nullptr;
  void (*topk)(const TopkParams&) = nullptr;
  void (*indexer_topk)(const IndexerTopkParams&) = nullptr;
  void (*indexer_scores)(const IndexerScoresParams&) = nullptr;
  void (*indexer_scores_backward)(const IndexerScoresBackwardParams&) = nullptr;
  void (*indexer_loss)(const IndexerLossParams&) = nullptr;
  void (*indexer_loss_backward)(const IndexerLossBackwardParams&) = nullptr;
  void (*sparse_forward)(const SparseForwardParams&) = nullptr;
  void (*sparse_backward)(const SparseBackwardParams&) = nullptr;
  void (*block_select)(const BlockSelectParams&) = nullptr;
  void (*block_sparse_forward)(const BlockSparseForwardParams&) = nullptr;
  void (*block_sparse_backward)(const BlockSparseBackwardParams&) = nullptr;
  void (*branch_gates)(const BranchGatesParams&) = nullptr;
  void (*moe_pack)(const MoePackParams&) = nullptr;
  void (*moe_forward)(const MoeForwardParams&) = nullptr;
  void (*moe_backward)(const MoeBackwardParams&) = nullptr;
  void (*route_forward)(const RouteForwardParams&) = nullptr;
  void (*route_backward)(const RouteBackwardParams&) = nullptr;
};

// The table for this CPU: the highest level it runs, or the one named by THINKERNEL_ISA.
// Throws std::runtime_error when that names a level this CPU or build does not have.
const Kernels& kernels();
// Levels this CPU runs and this build has, lowest first; ends with nullptr.
const char* const* isa_levels();
// Chooses a level by name from here on; for tests.
void set_isa(const char* level);

}  // namespace tk
