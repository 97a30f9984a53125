"""Experts as torch itself computes them in the inputs' dtype: the baseline that the numerics rule measures against.

Shapes: N tokens, H hidden, I intermediate, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thinkernel.reference.moe import activate
from thinkernel.testing.inputs import Draw

EXPERT_GRADIENTS = ("x", "w_gate_up", "w_down", "weights")


def torch_moe(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, *, activation: str = "swiglu",
    b_gate_up: Tensor | None = None, b_down: Tensor | None = None, weight_on: str = "output", layout: str = "out_in",
    limit: float | None = None,
) -> Tensor:
    """tk.moe expert by expert as transformers' experts run: F.linear in the dtype, results weighed in float32 and summed in k order."""
    tokens, (n, k) = x.flatten(0, -2), experts.flatten(0, -2).shape
    chosen, weigh = experts.reshape(-1), weights.reshape(-1, 1)
    biases = [(None,) * len(w_gate_up) if b is None else b.to(x.dtype).unbind(0) for b in (b_gate_up, b_down)]
    slots, places = [], []
    for e, (up, down, b1, b2) in enumerate(zip(w_gate_up.unbind(0), w_down.unbind(0), *biases)):
        place = (chosen == e).nonzero().squeeze(1)
        rows = tokens[place // k]
        if weight_on == "input":
            rows = (rows * weigh[place]).to(x.dtype)
        up, down = (up, down) if layout == "out_in" else (up.T, down.T)
        slots.append(F.linear(activate(F.linear(rows, up, b1), activation, limit), down, b2))
        places.append(place)
    at = torch.cat(places)
    found = torch.cat(slots).float() if x.dtype != torch.float64 else torch.cat(slots)
    if weight_on == "output":
        found = found * weigh[at]
    every = found.new_zeros(n * k, x.shape[-1]).index_copy(0, at, found)
    return every.view(n, k, x.shape[-1]).sum(1).to(x.dtype).view(x.shape)


def expert_inputs(
    draw: Draw, *, N: int = 29, H: int = 20, inner: int = 24, E: int = 8, K: int = 3, in_out: bool = False, biases: bool = False,
    columns: int | None = None, spread: float = 1.0,
) -> dict[str, Any]:
    """Inputs of tk.moe: each token has K experts of its own, all different."""
    columns = 2 * inner if columns is None else columns
    experts = torch.stack([draw.permutation(E)[:K] for _ in range(N)]).int() if N else torch.empty(0, K, dtype=torch.int32)
    up, down = draw.weight(E, columns, H) * spread, draw.weight(E, H, inner)
    if in_out:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    inputs = dict(
        x=draw.normal(N, H), w_gate_up=up, w_down=down, weights=draw.normal(N, K, dtype=torch.float32).softmax(-1),
        experts=experts,
    )
    return inputs | (dict(b_gate_up=draw.normal(E, columns), b_down=draw.normal(E, H)) if biases else {})
