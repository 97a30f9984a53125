"""The building block ``linear`` in plain torch.

Shapes: N rows (any leading dimensions), I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x·Wᵀ + b``, accumulated in float32 (float64 for float64) and rounded once to x's dtype.

    x [..., I], weight [O, I], bias [O] -> [..., O]. The values are torch.nn.functional.linear's; what the kernels
    add, that a row's bits never depend on the other rows, is a property of theirs and not of this function.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute) @ weight.to(compute).T  # [..., O]
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype)
