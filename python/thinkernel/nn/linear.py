"""A linear layer whose rows never see each other.

Shapes: x [..., I], weight [O, I], out [..., O]; per head: x [..., H, I], weight [H, O, I], out [..., H, O].

torch's matmul picks its blocking by the number of rows, so a token's bits change with its neighbours; tk.linear does
not. A model is batch-invariant only when its projections are, hence every projection here goes through it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thinkernel.ops import checks
from thinkernel.ops.linear import linear, linear_forward


class Linear(nn.Linear):
    """torch.nn.Linear over tk.linear: out = x·weightᵀ + bias."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear_per_head(x: Tensor, weight: Tensor) -> Tensor:
    """One projection per head: out[..., h, :] = x[..., h, :]·weight[h]ᵀ.

    A loop over heads instead of one batched matmul, because torch's is not batch-invariant. tk.linear's checks of a call
    take as long as a small product: here they are made once, for the first head."""
    heads = weight.shape[0]
    checks.size("x", x, -2, heads, "the weight's heads")
    first = linear(x[..., 0, :], weight[0])  # [..., O]
    rows = x.reshape(-1, heads, x.shape[-1]).unbind(1)  # H of [N, I]
    others = [linear_forward(rows[h], weight[h], None).view(first.shape) for h in range(1, heads)]
    return torch.stack([first, *others], dim=-2)  # [..., H, O]
