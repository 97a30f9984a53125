"""How the mixture of experts' ops call the C++ kernels: what these cover, result buffers, packed weights, launch.

Shapes: N tokens, H hidden, I intermediate, E experts, K experts a token, C columns of the first product (2I; I for relu2),
M slots whose expert lives here, at most N·K. Arguments in the order of the ops in ops/moe.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import DTYPE_CODES, empty, pointer, rows_contiguous
from thinkernel.reference.moe import ACTIVATIONS, SCORES

DECODE_ROWS = 16  # up to which the chosen experts' weights are read where they lie


# ---- routing -----------------------------------------------------------------------------------------------------


def route_covers(logits: Tensor, experts: Tensor | None, bias: Tensor | None, *options: Any) -> str | None:
    if logits.dtype not in DTYPE_CODES:
        return f"logits: the C++ kernels take float32, bfloat16 and float16, not {logits.dtype}"
    if bias is not None and bias.dtype == torch.float64:
        return "bias: the C++ kernels add it in float32, not float64"
    return None


def route(
    logits: Tensor, experts: Tensor | None, bias: Tensor | None, top_k: int, score: str, n_group: int, topk_group: int,
    group_score: str, renormalize: bool, scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Routing: csrc/cpu/moe_route.cpp."""
    assert C is not None
    logits, bias = rows_contiguous(logits), None if bias is None else bias.float().contiguous()
    n, n_expert = logits.shape
    chosen = empty((n, top_k), logits, torch.int32)
    if experts is not None:
        chosen.copy_(experts)
    weights = empty((n, top_k), logits, torch.float32)
    counts, order, offsets = (empty((size,), logits, torch.int32) for size in (n_expert, n * top_k, n_expert + 1))
    C.route_forward(C.RouteForwardParams(
        dtype=DTYPE_CODES[logits.dtype], score=SCORES.index(score), renormalize=int(renormalize), tokens=n, experts=n_expert,
        top_k=top_k, scaling=scaling, threads=torch.get_num_threads(), logits=pointer(logits), stride=logits.stride(0), groups=n_group,
        top_groups=topk_group, group_max=int(group_score == "max"), bias=pointer(bias), replay=int(experts is not None),
        chosen=pointer(chosen), weights=pointer(weights), counts=pointer(counts), order=pointer(order), offsets=pointer(offsets),
    ))
    return weights, chosen, counts, order, offsets


def route_backward(dweights: Tensor, logits: Tensor, chosen: Tensor, score: str, renormalize: bool, scaling: float) -> Tensor:
    """dlogits [N, E]."""
    assert C is not None
    logits, dweights, chosen = rows_contiguous(logits), dweights.float().contiguous(), chosen.contiguous()
    dlogits = empty(tuple(logits.shape), logits)
    C.route_backward(C.RouteBackwardParams(
        dtype=DTYPE_CODES[logits.dtype], score=SCORES.index(score), renormalize=int(renormalize), tokens=logits.shape[0],
        experts=logits.shape[1], top_k=chosen.shape[1], scaling=scaling, threads=torch.get_num_threads(), logits=pointer(logits),
        stride=logits.stride(0), chosen=pointer(chosen), dweights=pointer(dweights), dlogits=pointer(dlogits),
    ))
    return dlogits


# ---- experts -----------------------------------------------------------------------------------------------------


def covers(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None,
    packed_1: Tensor | None, packed_2: Tensor | None, *options: Any,
) -> str | None:
    if x.dtype not in DTYPE_CODES:
        return f"x: the C++ kernels take float32, bfloat16 and float16, not {x.dtype}"
    if w_gate_up.dtype != x.dtype or w_down.dtype != x.dtype:
        return f"w_gate_up and w_down: the C++ kernels take x's {x.dtype}, not {w_gate_up.dtype} and {w_down.dtype}"
    if 0 in w_gate_up.shape or 0 in w_down.shape:
        return "w_gate_up: the C++ kernels take an expert, a hidden and an inner dimension or more"
    return "weights: the C++ kernels take no float64" if weights.dtype == torch.float64 else None


def _fields(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor | None, experts: Tensor | None, b_gate_up: Tensor | None,
    b_down: Tensor | None, activation: str, weight_on: str, layout: str, limit: float | None,
) -> tuple[dict[str, Any], list[Tensor | None]]:
    """Fields of MoeShape, and the tensors they point to."""
    x, w1, w2 = rows_contiguous(x), rows_contiguous(w_gate_up), rows_contiguous(w_down)
    b1, b2 = (None if b is None else b.float().contiguous() for b in (b_gate_up, b_down))
    weights = None if weights is None else weights.float().contiguous()
    chosen = experts
    if chosen is not None:
        chosen = (chosen if chosen.dtype == torch.int32 else chosen.long().clamp(-1, w1.shape[0]).int()).contiguous()
    if limit is None:
        limit = 7.0 if activation == "gpt_oss" else float("inf")
    fields = dict(
        dtype=DTYPE_CODES[x.dtype], activation=ACTIVATIONS.index(activation), weight_on_input=int(weight_on == "input"),
        in_out=int(layout == "in_out"), limit=limit, tokens=x.shape[0], hidden=x.shape[1],
        inner=w2.shape[2 if layout == "out_in" else 1], experts=w1.shape[0], top_k=0 if chosen is None else chosen.shape[1],
        threads=torch.get_num_threads(), x=pointer(x), x_stride=x.stride(0), w1=pointer(w1), w2=pointer(w2),
        w1_stride=w1.stride()[:2], w2_stride=w2.stride()[:2], b1=pointer(b1), b2=pointer(b2), weights=pointer(weights),
        chosen=pointer(chosen),
    )  # fmt: skip
    return fields, [x, w1, w2, b1, b2, weights, chosen]


def forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None,
    packed_1: Tensor | None, packed_2: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:
    """y [N, H] and, to keep for the backward, the pre-activations z [N·K, C] by expert, of which the first M rows are written."""
    assert C is not None
    *shape, keep = options
    fields, held = _fields(x, w_gate_up, w_down, weights, experts, b_gate_up, b_down, *shape)
    columns = w_gate_up.shape[1 if shape[2] == "out_in" else 2]
    y, z = empty(tuple(x.shape), x), empty((experts.numel() if keep else 0, columns), x)
    C.moe_forward(C.MoeForwardParams(
        **fields, packed1=pointer(packed_1), packed2=pointer(packed_2), y=pointer(y), z=pointer(z) if keep else 0,
    ))
    return y, z


def backward(
    dy: Tensor, z: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, b_gate_up: Tensor | None,
    b_down: Tensor | None, activation: str, weight_on: str, layout: str, limit: float | None, needs: Sequence[bool],
) -> list[Tensor]:
    """[dx, dw_gate_up, dw_down, dweights, db_gate_up, db_down], empty where not needed."""
    assert C is not None
    shape = (activation, weight_on, layout, limit)
    if z.shape[0] != experts.numel():  # the forward did not keep it
        _, z = forward(x, w_gate_up, w_down, weights, experts, b_gate_up, b_down, None, None, *shape, True)
    fields, held = _fields(x, w_gate_up, w_down, weights, experts, b_gate_up, b_down, *shape)
    dy = dy.to(x.dtype).contiguous()
    inputs = (x, w_gate_up, w_down, weights, b_gate_up, b_down)
    found = []
    for i, (need, like) in enumerate(zip(needs, inputs, strict=True)):
        float_sums = i >= 3  # of weights and biases
        found.append(None if not need or like is None else empty(tuple(like.shape), like, torch.float32 if float_sums else None))
    dx, dw1, dw2, dweights, db1, db2 = found
    C.moe_backward(C.MoeBackwardParams(
        **fields, dy=pointer(dy), z=pointer(z), dx=pointer(dx), dw1=pointer(dw1), dw2=pointer(dw2), db1=pointer(db1), db2=pointer(db2),
        dweights=pointer(dweights),
    ))
    return [x.new_empty(0) if g is None else g if like is None else g.to(like.dtype) for g, like in zip(found, inputs, strict=True)]


# ---- packed weights ----------------------------------------------------------------------------------------------

PACKED_BYTES = 2 << 30  # what all packed copies together may take
_packed: dict[int, tuple[Any, tuple[Any, ...], Tensor, tuple[Tensor, Tensor]]] = {}  # by id of w_gate_up


def packed_weights(x: Tensor, w_gate_up: Tensor, w_down: Tensor, activation: str, layout: str) -> tuple[Tensor, Tensor] | None:
    """Both weights as the products want them, made once and kept until the weights change: by an optimiser or load_state_dict (the
    version), a move (the address), or behind autograd's back through `.data` (a sample of every expert's values: an update of few of
    them may go unnoticed). None where it would not fit, and for weights made in inference mode, which count no versions."""
    if C is None or covers(x, w_gate_up, w_down, x, x, None, None, None, None) is not None:
        return None
    both = (w_gate_up, w_down)
    if any(w.stride(-1) != 1 or w.is_inference() for w in both):
        return None
    states = [(w.data_ptr(), w._version, w.dtype, w.shape, w.stride()) for w in both]
    key = C.isa(), activation, layout, *states
    sample = torch.cat([w.detach()[:, :: w.shape[1] // 8 | 1, :: w.shape[2] // 64 | 1].reshape(-1) for w in both])
    former = _packed.get(id(w_gate_up))
    if former is not None and former[0]() is w_gate_up and former[1] == key and torch.equal(former[2], sample):
        return former[3]
    _packed.pop(id(w_gate_up), None)
    fields, held = _fields(x[:0], w_gate_up, w_down, None, None, None, None, activation, "output", layout, None)
    sizes = torch.zeros(2, dtype=torch.int64)
    C.moe_pack(C.MoePackParams(**fields, bytes=pointer(sizes)))
    taken = sum(t.nbytes for entry in _packed.values() for t in entry[3])
    if taken + int(sizes.sum()) > PACKED_BYTES:
        return None
    made = (empty((int(sizes[0]),), x, torch.uint8), empty((int(sizes[1]),), x, torch.uint8))
    C.moe_pack(C.MoePackParams(**fields, packed1=pointer(made[0]), packed2=pointer(made[1])))
    name = id(w_gate_up)
    _packed[name] = weakref.ref(w_gate_up, lambda _: _packed.pop(name, None)), key, sample, made
    return made
