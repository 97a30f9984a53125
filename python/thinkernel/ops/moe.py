"""Mixture-of-experts ops: routing, experts, balance. Formulas: reference/moe.py.

Shapes: N tokens, H hidden, I intermediate, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkernel.ops import checks
from thinkernel.ops.library import plain, reference_op
from thinkernel.reference import moe as reference
from thinkernel.reference.moe import ACTIVATIONS, SCORES, Routing


def _route_fake(logits: Tensor, experts: Tensor | None, bias: Tensor | None, top_k: int, *options: Any) -> tuple[Tensor, ...]:
    n, e = logits.shape
    k = top_k if experts is None else experts.shape[1]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    sizes = (((n, k), wide), ((n, k), torch.int32), ((e,), torch.int32), ((n * k,), torch.int32), ((e + 1,), torch.int32))
    return tuple(logits.new_empty(size, dtype=dtype) for size, dtype in sizes)


def _route(
    logits: Tensor, experts: Tensor | None, bias: Tensor | None, top_k: int, score: str, n_group: int, topk_group: int,
    group_score: str, renormalize: bool, scaling: float,
) -> tuple[Tensor, ...]:
    return tuple(reference.route(
        logits, top_k, score=score, bias=bias, n_group=n_group, topk_group=topk_group, group_score=group_score,
        renormalize=renormalize, scaling=scaling, experts=experts,
    ))


route_op = reference_op(
    "route",
    "(Tensor logits, Tensor? experts, Tensor? bias, int top_k, str score, int n_group, int topk_group, "
    "str group_score, bool renormalize, float scaling) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _route_fake,
    _route,
    differentiable=("logits",),
)


@route_op.check
def _check_route(logits: Tensor, experts: Tensor | None, *options: Any) -> None:
    checks.within("experts", experts, 0, logits.shape[1] - 1, "E of logits")


def _moe(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, b_gate_up: Tensor | None,
    b_down: Tensor | None, activation: str, weight_on: str, layout: str, limit: float | None,
) -> Tensor:
    return reference.moe(
        x, w_gate_up, w_down, weights, experts, activation=activation, b_gate_up=b_gate_up, b_down=b_down,
        weight_on=weight_on, layout=layout, limit=limit,
    )


moe_op = reference_op(
    "moe",
    "(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor experts, Tensor? b_gate_up, Tensor? b_down, "
    "str activation, str weight_on, str layout, float? limit) -> Tensor",
    lambda x, *rest: x.new_empty(x.shape),
    _moe,
    differentiable=("x", "w_gate_up", "w_down", "weights", "b_gate_up", "b_down"),
)
moe_op.autocast("x", "w_gate_up", "w_down", "b_gate_up", "b_down")


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2",
    renormalize: bool = True,
    scaling: float = 1.0,
    experts: Tensor | None = None,
) -> Routing:
    """Choose top_k experts for each token and weigh them: logits [N, E] -> Routing.

    score: "softmax" (Mixtral, Qwen3, DeepSeek-V2, ERNIE), "softmax_topk" (gpt-oss), "sigmoid" (DeepSeek-V3, Kimi K2,
    GLM), "sigmoid_topk" (Llama 4), "sqrtsoftplus" (DeepSeek-V4); the table of rules is in reference/moe.py.
    bias: [E] added to what selects, never to what weighs; no gradient. n_group, topk_group: only the topk_group best
    groups of E / n_group experts compete, by their "max" or the sum of their "top2". renormalize: divide by the selected
    sum. scaling multiplies last. experts: [N, K] replays a given choice with the live weights (then top_k must be K).

    Returns Routing(weights float32 [N, K] (differentiable), experts int32 [N, K] best first, counts int32 [E],
    order int32 [N·K], offsets int32 [E + 1]). Ties go to the lower index. Raises ValueError naming the argument.
    """
    checks.tensor("logits", logits, 2, "[N, E]")
    n, n_expert = logits.shape
    checks.integer("top_k", top_k, 1)
    if top_k > n_expert:
        raise ValueError(f"top_k: got {top_k}, takes at most E = {n_expert}")
    checks.one_of("score", score, SCORES)
    checks.one_of("group_score", group_score, ("top2", "max"))
    checks.integer("n_group", n_group, 1)
    checks.integer("topk_group", topk_group, 1)
    if n_expert % n_group:
        raise ValueError(f"n_group: got {n_group}, takes a divisor of E = {n_expert}")
    if topk_group > n_group:
        raise ValueError(f"topk_group: got {topk_group}, takes at most n_group = {n_group}")
    if n_group > 1 and top_k > topk_group * (n_expert // n_group):
        raise ValueError(f"top_k: got {top_k}, takes at most topk_group · E / n_group = {topk_group * (n_expert // n_group)}")
    if bias is not None:
        checks.tensor("bias", bias, 1, "[E]")
        checks.shape("bias", bias, (n_expert,), "[E]")
    if experts is not None:
        checks.tensor("experts", experts, 2, "[N, K]", checks.INTEGERS)
        checks.shape("experts", experts, (n, top_k), "[N, top_k]")
    checks.same_device("logits", logits, bias=bias, experts=experts)
    bias = None if bias is None else bias.detach()
    return Routing(
        *route_op(
            logits, experts, bias, top_k, score, n_group, topk_group, group_score, bool(renormalize), float(scaling)
        )
    )


def moe(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    experts: Tensor,
    *,
    activation: str = "swiglu",
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    weight_on: str = "output",
    layout: str = "out_in",
    limit: float | None = None,
) -> Tensor:
    """Each token through its experts, weighted and summed in k order: x [N, H] (or [B, S, H]) -> the same shape.

    weights (float32), experts (int): [N, K] (or [B, S, K]) from route. layout "out_in": w_gate_up [E, 2I, H],
    w_down [E, H, I] (Hugging Face); "in_out": [E, H, 2I], [E, I, H] (gpt-oss, Llama 4). Biases [E, 2I] and [E, H].
    activation: swiglu, gpt_oss, geglu, geglu_tanh or relu2 (I columns for 2I); limit clamps (reference/moe.py).
    weight_on: "output", or "input" (Llama 4). An expert number outside [0, E) belongs to another rank and adds 0.
    Differentiable in x, the weights and the biases. Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("x", x, (2, 3), "[N, H] or [B, S, H]")
    checks.tensor("w_gate_up", w_gate_up, 3, "[E, 2I, H] or [E, H, 2I]")
    checks.tensor("w_down", w_down, 3, "[E, H, I] or [E, I, H]")
    checks.one_of("activation", activation, ACTIVATIONS)
    checks.one_of("weight_on", weight_on, ("output", "input"))
    checks.one_of("layout", layout, ("out_in", "in_out"))
    n_expert, hidden = w_gate_up.shape[0], x.shape[-1]
    columns = w_gate_up.shape[1 if layout == "out_in" else 2]
    if activation != "relu2" and columns % 2:
        raise ValueError(f"w_gate_up: got {columns} columns, takes an even number (gate and up)")
    inner = columns if activation == "relu2" else columns // 2
    out_in = layout == "out_in"
    checks.shape("w_gate_up", w_gate_up, (n_expert, columns, hidden) if out_in else (n_expert, hidden, columns), "E, 2I, H in the layout")
    checks.shape("w_down", w_down, (n_expert, hidden, inner) if out_in else (n_expert, inner, hidden), "E, H, I in the layout")
    checks.tensor("weights", weights, x.dim(), "[N, K] or [B, S, K]")
    checks.tensor("experts", experts, x.dim(), "[N, K] or [B, S, K]", checks.INTEGERS)
    checks.shape("experts", experts, weights.shape, "weights' shape")
    checks.shape("weights", weights, (*x.shape[:-1], weights.shape[-1]), "x's rows and K")
    for name, b, width in (("b_gate_up", b_gate_up, columns), ("b_down", b_down, hidden)):
        if b is not None:
            checks.tensor(name, b, 2, "[E, columns]")
            checks.shape(name, b, (n_expert, width), "[E, columns]")
    checks.positive("limit", limit)
    checks.same_device(
        "x", x, w_gate_up=w_gate_up, w_down=w_down, weights=weights, experts=experts, b_gate_up=b_gate_up, b_down=b_down
    )
    return moe_op(
        x, w_gate_up, w_down, weights, experts, b_gate_up, b_down, activation, weight_on, layout,
        None if limit is None else float(limit),
    )


def load_balancing_loss(probs: Tensor, counts: Tensor, *, normalize: str = "one", group: object | None = None) -> Tensor:
    """E / (K·T²)·Σ_e count_e·Σ_t p_te -> scalar, 1 when balanced (Megatron, Switch Transformer arXiv 2101.03961).

    probs [T, E], counts [E]; normalize="top_k" leaves the 1/K out (transformers). Differentiable in probs.
    """
    checks.tensor("probs", probs, 2, "[T, E]")
    checks.tensor("counts", counts, 1, "[E]", (*checks.INTEGERS, *checks.FLOATS))
    checks.shape("counts", counts, probs.shape[1:], "[E]")
    checks.one_of("normalize", normalize, ("one", "top_k"))
    checks.not_yet("load_balancing_loss", group=group)
    plain("load_balancing_loss", probs)
    return reference.load_balancing_loss(probs, counts, normalize=normalize)


def router_z_loss(logits: Tensor) -> Tensor:
    """mean_t (logsumexp_e z_te)² -> scalar (ST-MoE, arXiv 2202.08906). logits [T, E]; differentiable."""
    checks.tensor("logits", logits, 2, "[T, E]")
    plain("router_z_loss", logits)
    return reference.router_z_loss(logits)


def sequence_balance_loss(scores: Tensor, experts: Tensor, cu_seqlens: Tensor) -> Tensor:
    """DeepSeek-V3's balance loss within each sequence, averaged over sequences -> scalar (arXiv 2412.19437).

    scores [N, E], experts [N, K], cu_seqlens [B + 1] rising from 0 to N. Differentiable in scores; balanced = 1.
    """
    checks.tensor("scores", scores, 2, "[N, E]")
    checks.tensor("experts", experts, 2, "[N, K]", checks.INTEGERS)
    checks.size("experts", experts, 0, scores.shape[0], "N of scores")
    checks.tensor("cu_seqlens", cu_seqlens, 1, "[B + 1]", checks.INTEGERS)
    checks.cumulative("cu_seqlens", cu_seqlens, scores.shape[0])
    checks.within("experts", experts, 0, scores.shape[1] - 1, "E of scores")
    plain("sequence_balance_loss", scores)
    return reference.sequence_balance_loss(scores, experts, cu_seqlens)


def update_expert_bias(bias: Tensor, counts: Tensor, *, rate: float = 1e-3, group: object | None = None) -> None:
    """bias += rate·sign(mean(counts) − counts), in place: balance without an auxiliary loss (arXiv 2408.15664).

    bias [E], counts [E], summed over the process group `group` first.
    """
    checks.tensor("bias", bias, 1, "[E]")
    checks.tensor("counts", counts, 1, "[E]", (*checks.INTEGERS, *checks.FLOATS))
    checks.shape("counts", counts, bias.shape, "[E]")
    checks.same_device("bias", bias, counts=counts)
    plain("update_expert_bias", bias)
    reference.update_expert_bias(bias, counts, rate=rate, group=group)
