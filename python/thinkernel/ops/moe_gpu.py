"""How the mixture of experts' ops call the Triton kernels: what these cover, result buffers, launch.

Shapes: N tokens, H hidden, I intermediate, E experts, K experts a token, C columns of the first product (2I; I for relu2).
Arguments in the order of the ops in ops/moe.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkernel.ops.memory import empty, rows_contiguous

# ---- routing -----------------------------------------------------------------------------------------------------


def route_covers(logits: Tensor, experts: Tensor | None, bias: Tensor | None, *options: Any) -> str | None:
    from thinkernel.kernels import moe_route as kernels

    return kernels.covers(logits, bias)


def route(
    logits: Tensor, experts: Tensor | None, bias: Tensor | None, top_k: int, score: str, n_group: int, topk_group: int,
    group_score: str, renormalize: bool, scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from thinkernel.kernels import moe_route as kernels

    n, n_expert = logits.shape
    chosen = empty((n, top_k), logits, torch.int32)
    if experts is not None:
        chosen.copy_(here_or_none(experts, n_expert))
    weights = empty((n, top_k), logits, torch.float32)
    counts, order, offsets = (empty((size,), logits, torch.int32) for size in (n_expert, n * top_k, n_expert + 1))
    kernels.route_forward(
        rows_contiguous(logits), None if bias is None else bias.float().contiguous(), chosen, weights, counts, order, offsets,
        score=score, n_group=n_group, topk_group=topk_group, group_score=group_score, renormalize=renormalize, scaling=scaling,
        replay=experts is not None,
    )
    return weights, chosen, counts, order, offsets


def route_backward(dweights: Tensor, logits: Tensor, chosen: Tensor, score: str, renormalize: bool, scaling: float) -> Tensor:
    """dlogits [N, E]."""
    from thinkernel.kernels import moe_route as kernels

    dlogits = empty(tuple(logits.shape), logits)
    kernels.route_backward(
        rows_contiguous(logits), chosen.contiguous(), dweights.float().contiguous(), dlogits, score=score, renormalize=renormalize,
        scaling=scaling,
    )
    return dlogits


def here_or_none(experts: Tensor, n_expert: int) -> Tensor:
    """experts as int32, where a 64-bit number outside [0, E) stays outside."""
    return experts if experts.dtype == torch.int32 else experts.clamp(-1, n_expert).int()
