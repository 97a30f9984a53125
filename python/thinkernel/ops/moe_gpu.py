"""How the mixture of experts' ops call the Triton kernels: what these cover, result buffers, launch.

Shapes: N tokens, H hidden, I intermediate, E experts, K experts a token, C columns of the first product (2I; I for relu2).
Arguments in the order of the ops in ops/moe.py.
"""

from __future__ import annotations

from collections.abc import Sequence
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


# ---- experts -----------------------------------------------------------------------------------------------------


def covers(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None,
    packed_1: Tensor | None, packed_2: Tensor | None, *options: Any,
) -> str | None:
    from thinkernel.kernels import moe as kernels

    return kernels.covers(x, w_gate_up, w_down, weights)


def _inputs(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None
) -> tuple[Any, ...]:
    """The same, laid out as the kernels want them."""
    b1, b2 = (None if b is None else b.float().contiguous() for b in (b_gate_up, b_down))
    return (
        rows_contiguous(x), rows_contiguous(w_gate_up), rows_contiguous(w_down), weights.float().contiguous(),
        here_or_none(experts, len(w_gate_up)).contiguous(), b1, b2,
    )  # fmt: skip


def _options(activation: str, weight_on: str, layout: str, limit: float | None) -> dict[str, Any]:
    if limit is None:
        limit = 7.0 if activation == "gpt_oss" else float("inf")
    return dict(activation=activation, weight_on=weight_on, layout=layout, limit=limit)


def forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None,
    packed_1: Tensor | None, packed_2: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:
    """y [N, H] and, to keep for the backward, the pre-activations z [N·K, C] by expert, of which the first M rows are written."""
    from thinkernel.kernels import moe as kernels

    *shape, keep = options
    columns = w_gate_up.shape[1 if shape[2] == "out_in" else 2]
    y, z = empty(tuple(x.shape), x), empty((experts.numel() if keep else 0, columns), x)
    given: list[Any] = [*_inputs(x, w_gate_up, w_down, weights, experts, b_gate_up, b_down), y, z if keep else None]
    kernels.moe_forward(*given, **_options(*shape))
    return y, z


def backward(
    dy: Tensor, z: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, b_gate_up: Tensor | None,
    b_down: Tensor | None, activation: str, weight_on: str, layout: str, limit: float | None, needs: Sequence[bool],
) -> list[Tensor]:
    """[dx, dw_gate_up, dw_down, dweights, db_gate_up, db_down], empty where not needed."""
    from thinkernel.kernels import moe_backward as kernels

    inputs = (x, w_gate_up, w_down, weights, b_gate_up, b_down)
    found = []
    for i, (need, like) in enumerate(zip(needs, inputs, strict=True)):
        float_sums = i >= 3  # of weights and biases
        found.append(None if not need or like is None else empty(tuple(like.shape), like, torch.float32 if float_sums else None))
    kernels.moe_backward(
        dy.to(x.dtype).contiguous(), z if z.shape[0] == experts.numel() else None,
        *_inputs(x, w_gate_up, w_down, weights, experts, b_gate_up, b_down), *found, **_options(activation, weight_on, layout, limit),
    )
    return [x.new_empty(0) if g is None else g if like is None else g.to(like.dtype) for g, like in zip(found, inputs, strict=True)]
