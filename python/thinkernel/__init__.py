"""thinkernel: kernels for reasoning language models, forward and backward, on CPU and GPU.

Functions are listed in `__all__`; modules are in `thinkernel.nn`, the reference model in `thinkernel.models`, training
with verifiable rewards in `thinkernel.rl`. `thinkernel doctor` on the command line says what works on this machine.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "thinkernel needs PyTorch 2.11 or newer, which it does not install itself because only you know which build "
        "fits this machine: `pip install torch` (CUDA), or a CPU build (pytorch.org/get-started)."
    ) from error

from thinkernel import nn
from thinkernel.integrations.transformers import patch, unpatch
from thinkernel.ops.attention import append_kv, attention, attention_decode, merge_attention
from thinkernel.ops.dispatch import backends, explain, use_backend
from thinkernel.ops.grpo import (
    dpo_loss,
    group_advantages,
    grpo_loss,
    linear_logprob,
    policy_loss,
    ppo_value_loss,
)
from thinkernel.ops.linear import linear
from thinkernel.ops.logprob import logprob
from thinkernel.ops.mla import append_latent, gather_latent, mla_decode
from thinkernel.ops.moe import (
    load_balancing_loss,
    moe,
    route,
    router_z_loss,
    sequence_balance_loss,
    update_expert_bias,
)
from thinkernel.ops.native_sparse import block_attention, native_sparse_attention
from thinkernel.ops.sparse import (
    indexer_loss,
    indexer_scores,
    indexer_topk,
    sparse_attention,
    topk,
)
from thinkernel.reference.moe import Routing

__version__ = "0.1.0"

__all__ = [
    "Routing", "append_kv", "append_latent", "attention", "attention_decode", "backends", "block_attention", "dpo_loss",
    "explain", "gather_latent", "group_advantages", "grpo_loss", "indexer_loss", "indexer_scores", "indexer_topk",
    "linear", "linear_logprob", "load_balancing_loss", "logprob", "merge_attention", "mla_decode", "moe",
    "native_sparse_attention", "nn", "patch", "policy_loss", "ppo_value_loss", "route", "router_z_loss",
    "sequence_balance_loss", "sparse_attention", "topk", "unpatch", "update_expert_bias", "use_backend",
]
