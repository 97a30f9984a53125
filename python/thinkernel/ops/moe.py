"""Mixture-of-experts ops: routing, experts, balance. Formulas: reference/moe.py.

Shapes: N tokens, H hidden, I intermediate, E experts, K experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from thinkernel.ops import checks, moe_cpu, moe_cuda, moe_gpu
from thinkernel.ops.dispatch import requested
from thinkernel.ops.library import Op, gradients, plain
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


route_op = Op(
    "route",
    "(Tensor logits, Tensor? experts, Tensor? bias, int top_k, str score, int n_group, int topk_group, "
    "str group_score, bool renormalize, float scaling) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _route_fake,
)
route_backward = Op(
    "route_backward",
    "(Tensor dweights, Tensor logits, Tensor chosen, str score, bool renormalize, float scaling) -> Tensor",
    lambda dweights, logits, *rest: logits.new_empty(logits.shape),
)


@route_op.kernel("reference")
def _reference_route(*args: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return _route(*args)


@route_backward.kernel("reference")
def _reference_route_backward(
    dweights: Tensor, logits: Tensor, chosen: Tensor, score: str, renormalize: bool, scaling: float
) -> Tensor:
    def weights(z: Tensor) -> Tensor:
        return reference.route(z, chosen.shape[1], score=score, renormalize=renormalize, scaling=scaling, experts=chosen).weights

    return gradients(weights, [logits], [0], [dweights])[0]


route_op.kernel("cpu", moe_cpu.route_covers)(moe_cpu.route)
route_backward.kernel("cpu", lambda dweights, logits, *rest: moe_cpu.route_covers(logits, None, None))(moe_cpu.route_backward)
route_op.kernel("cuda", moe_cuda.route_covers)(moe_cuda.route)
route_backward.kernel("cuda", moe_cuda.route_backward_covers)(moe_cuda.route_backward)
route_op.kernel("triton", moe_gpu.route_covers)(moe_gpu.route)
route_backward.kernel("triton", lambda dweights, logits, *rest: moe_gpu.route_covers(logits, None, None))(moe_gpu.route_backward)


@route_op.check
def _check_route(logits: Tensor, experts: Tensor | None, *options: Any) -> None:
    checks.within("experts", experts, 0, logits.shape[1] - 1, "E of logits")


def _route_setup(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(args[0], outputs[1])
    ctx.options = args[4], args[8], args[9]


def _route_backward(ctx: Any, dweights: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    dlogits = None if dweights is None else route_backward(dweights, *ctx.saved_tensors, *ctx.options)
    return dlogits, *(None,) * 9


route_op.differentiate(_route_setup, _route_backward, reference=_route)
route_backward.refuse_gradient("double backward is not supported")

# ---- experts -----------------------------------------------------------------------------------------------------

_TENSORS = (
    "Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor experts, Tensor? b_gate_up, Tensor? b_down"
)
_OPTIONS = "str activation, str weight_on, str layout, float? limit"

# z [N·K, C]: the pre-activations, kept for the backward on request (the cpu kernels alone)
moe_forward = Op(
    "moe_forward",
    f"({_TENSORS}, Tensor? packed_1, Tensor? packed_2, {_OPTIONS}, bool keep) -> (Tensor, Tensor)",
    lambda x, w1, w2, weights, experts, b1, b2, packed_1, packed_2, activation, weight_on, layout, limit, keep: (
        x.new_empty(x.shape),
        x.new_empty((experts.shape[0] * experts.shape[1] if keep else 0, w1.shape[1 if layout == "out_in" else 2])),
    ),
)
moe_backward = Op(
    "moe_backward",
    f"(Tensor dy, Tensor z, {_TENSORS}, {_OPTIONS}, bool[] needs) -> Tensor[]",
    lambda dy, z, x, w1, w2, weights, experts, b1, b2, activation, weight_on, layout, limit, needs: [
        x.new_empty(0) if not need or t is None else t.new_empty(t.shape)
        for need, t in zip(needs, (x, w1, w2, weights, b1, b2), strict=True)
    ],
)
_DIFFERENTIABLE = (0, 1, 2, 3, 5, 6)  # of moe_forward's arguments


def _reference_moe(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None,
    packed_1: Tensor | None, packed_2: Tensor | None, activation: str, weight_on: str, layout: str, limit: float | None, keep: bool,
) -> tuple[Tensor, Tensor]:
    y = reference.moe(
        x, w_gate_up, w_down, weights, experts, activation=activation, b_gate_up=b_gate_up, b_down=b_down,
        weight_on=weight_on, layout=layout, limit=limit,
    )
    kept = experts.numel() if keep else 0
    return y, x.new_empty((kept, w_gate_up.shape[1 if layout == "out_in" else 2]))


@moe_forward.kernel("reference")
def _reference_forward(*args: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return _reference_moe(*args)


@moe_backward.kernel("reference")
def _reference_backward(dy: Tensor, z: Tensor, *args: Any) -> list[Tensor]:
    *rest, needs = args
    tensors, options = rest[:7], rest[7:]
    found = iter(gradients(lambda *a: _reference_moe(*a)[0], [*tensors, None, None, *options, False], _DIFFERENTIABLE, [dy]))
    every = [next(found) if tensors[i] is not None else dy.new_empty(0) for i in _DIFFERENTIABLE]
    return [g if need else g.new_empty(0) for need, g in zip(needs, every, strict=True)]


moe_forward.kernel("cpu", moe_cpu.covers)(moe_cpu.forward)
moe_backward.kernel("cpu", lambda dy, z, *tensors: moe_cpu.covers(*tensors[:7], None, None))(moe_cpu.backward)
moe_forward.kernel("triton", moe_gpu.covers)(moe_gpu.forward)
moe_backward.kernel("triton", lambda dy, z, *tensors: moe_gpu.covers(*tensors[:7], None, None))(moe_gpu.backward)


def _setup(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(outputs[1], *args[:7])
    ctx.options = args[9:13]


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 14
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    found = moe_backward(dy, *ctx.saved_tensors, *ctx.options, needs)
    grads: list[Any] = [None] * 14
    for i, need, g in zip(_DIFFERENTIABLE, needs, found, strict=True):
        grads[i] = g if need else None
    return tuple(grads)


moe_forward.differentiate(_setup, _backward, reference=_reference_moe)
moe_forward.autocast("x", "w_gate_up", "w_down", "b_gate_up", "b_down")
moe_backward.refuse_gradient("double backward is not supported")


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
    rows, top_k = math.prod(x.shape[:-1]), experts.shape[-1]  # not -1: a dimension may be 0
    tensors = (x, w_gate_up, w_down, weights, b_gate_up, b_down)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    packed = None
    if not keep and rows > moe_cpu.DECODE_ROWS and _may_keep_packed(x, w_gate_up, w_down):
        packed = moe_cpu.packed_weights(x, w_gate_up, w_down, activation, layout)
    y, _ = moe_forward(
        x.reshape(rows, hidden), w_gate_up, w_down, weights.reshape(rows, top_k), experts.reshape(rows, top_k), b_gate_up, b_down,
        *(packed or (None, None)), activation, weight_on, layout, None if limit is None else float(limit), keep,
    )
    return y.view(x.shape)


def _may_keep_packed(x: Tensor, *weights: Tensor) -> bool:
    """Plain tensors of an eager call, which the cpu kernels take."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and requested() in ("auto", "cpu")
        and not torch._C._is_any_autocast_enabled()
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in (x, *weights))
    )


def load_balancing_loss(probs: Tensor, counts: Tensor, *, normalize: str = "one", group: Any = None) -> Tensor:
    """E / (K·T²)·Σ_e count_e·Σ_t p_te -> scalar, 1 when balanced (Megatron, Switch Transformer arXiv 2101.03961).

    probs [T, E], counts [E]; normalize="top_k" leaves the 1/K out (transformers). Differentiable in probs, not in counts.
    group: a torch.distributed group over whose tokens T, count and Σ p are summed. Every rank gets the same loss, and as
    gradient the part of its own probs: added over the ranks they are the whole (averaged, as DDP does, 1/ranks of it).
    """
    checks.tensor("probs", probs, 2, "[T, E]")
    checks.tensor("counts", counts, 1, "[E]", (*checks.INTEGERS, *checks.FLOATS))
    checks.shape("counts", counts, probs.shape[1:], "[E]")
    checks.one_of("normalize", normalize, ("one", "top_k"))
    checks.process_group("group", group)
    plain("load_balancing_loss", probs)
    return reference.load_balancing_loss(probs, counts, normalize=normalize, group=group)


def router_z_loss(logits: Tensor, *, group: Any = None) -> Tensor:
    """mean_t (logsumexp_e z_te)² -> scalar (ST-MoE, arXiv 2202.08906). logits [T, E]; differentiable.

    group: the mean over all its ranks' tokens, gradients as in load_balancing_loss."""
    checks.tensor("logits", logits, 2, "[T, E]")
    checks.process_group("group", group)
    plain("router_z_loss", logits)
    return reference.router_z_loss(logits, group=group)


def sequence_balance_loss(scores: Tensor, experts: Tensor, cu_seqlens: Tensor, *, group: Any = None) -> Tensor:
    """DeepSeek-V3's balance loss within each sequence, averaged over sequences -> scalar (arXiv 2412.19437).

    scores [N, E], experts [N, K], cu_seqlens [B + 1] rising from 0 to N. Differentiable in scores; balanced = 1.
    group: the mean over all its ranks' sequences, gradients as in load_balancing_loss.
    """
    checks.tensor("scores", scores, 2, "[N, E]")
    checks.tensor("experts", experts, 2, "[N, K]", checks.INTEGERS)
    checks.size("experts", experts, 0, scores.shape[0], "N of scores")
    checks.tensor("cu_seqlens", cu_seqlens, 1, "[B + 1]", checks.INTEGERS)
    checks.cumulative("cu_seqlens", cu_seqlens, scores.shape[0])
    checks.within("experts", experts, 0, scores.shape[1] - 1, "E of scores")
    checks.process_group("group", group)
    plain("sequence_balance_loss", scores)
    return reference.sequence_balance_loss(scores, experts, cu_seqlens, group=group)


def update_expert_bias(bias: Tensor, counts: Tensor, *, rate: float = 1e-3, group: Any = None) -> None:
    """bias += rate·sign(mean(counts) − counts), in place: balance without an auxiliary loss (arXiv 2408.15664).

    bias [E], counts [E], summed over the process group `group` first. Nothing here is differentiable.
    """
    checks.tensor("bias", bias, 1, "[E]")
    checks.tensor("counts", counts, 1, "[E]", (*checks.INTEGERS, *checks.FLOATS))
    checks.shape("counts", counts, bias.shape, "[E]")
    checks.same_device("bias", bias, counts=counts)
    checks.process_group("group", group)
    plain("update_expert_bias", bias)
    reference.update_expert_bias(bias, counts, rate=rate, group=group)
