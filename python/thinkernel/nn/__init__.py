"""Modules over the public functions; each can be used alone in somebody else's model."""

from thinkernel.nn.attention import GroupedQueryAttention
from thinkernel.nn.cache import CacheStep
from thinkernel.nn.grpo import GRPOLoss, LinearLogProb
from thinkernel.nn.linear import Linear
from thinkernel.nn.mla import MultiHeadLatentAttention
from thinkernel.nn.moe import FeedForward, MixtureOfExperts, MoELosses, expert_dtype
from thinkernel.nn.native_sparse import BlockCompression, NativeSparseAttention
from thinkernel.nn.norm import ZeroCentredRMSNorm
from thinkernel.nn.rope import LinearRope, Llama3Rope, RotaryEmbedding, Yarn, packed_positions
from thinkernel.nn.sparse import Indexer, SparseLatentAttention

__all__ = [
    "BlockCompression",
    "CacheStep",
    "FeedForward",
    "GRPOLoss",
    "GroupedQueryAttention",
    "Indexer",
    "Linear",
    "LinearLogProb",
    "LinearRope",
    "Llama3Rope",
    "MixtureOfExperts",
    "MoELosses",
    "MultiHeadLatentAttention",
    "NativeSparseAttention",
    "RotaryEmbedding",
    "SparseLatentAttention",
    "Yarn",
    "ZeroCentredRMSNorm",
    "expert_dtype",
    "packed_positions",
]
