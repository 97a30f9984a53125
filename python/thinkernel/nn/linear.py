"""A linear layer whose rows never see each other.

Shapes: x [..., I], weight [O, I], out [..., O]; per head: x [..., H, I], weight [H, O, I], out [..., H, O].

torch's matmul picks its blocking by the number of rows, so a token's bits change with its neighbours; tk.linear does
not. A model is batch-invariant only when its projections are, hence every projection here goes through it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thinkernel.ops.linear import linear


class Linear(nn.Linear):
    """torch.nn.Linear over tk.linear: out = x·weightᵀ + bias."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear_per_head(x: Tensor, weight: Tensor) -> Tensor:
    """One projection per head: out[..., h, :] = x[..., h, :]·weight[h]ᵀ.

    A loop over heads instead of one batched matmul, because torch's is not batch-invariant."""
    heads = [linear(x[..., h, :], weight[h]) for h in range(weight.shape[0])]  # each [..., O]
    return torch.stack(heads, dim=-2)  # [..., H, O]
