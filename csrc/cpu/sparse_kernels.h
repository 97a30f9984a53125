// The sparse attention kernels of one ISA level, for its function table.
#pragma once

#include "block_sparse.h"
#include "indexer.h"
#include "sparse.h"
#include "topk.h"

namespace tk::TK_ISA {

void topk(const TopkParams& p);
void indexer_topk(const IndexerTopkParams& p);
void indexer_scores(const IndexerScoresParams& p);
void indexer_scores_backward(const IndexerScoresBackwardParams& p);
void indexer_loss(const IndexerLossParams& p);
void indexer_loss_backward(const IndexerLossBackwardParams& p);
void sparse_forward(const SparseForwardParams& p);
void sparse_backward(const SparseBackwardParams& p);
void block_select(const BlockSelectParams& p);
void block_sparse_forward(const BlockSparseForwardParams& p);
void block_sparse_backward(const BlockSparseBackwardParams& p);

}  // namespace tk::TK_ISA
