"""Input generators shared by tests, `thinkernel validate` and the benches: fresh random numbers at realistic scales.

Unit-normal activations, weights of standard deviation fan_in^-0.5: scores, logits and outputs are then of order 1, and a
kernel that drops a term shows. (Inputs of 0.02·randn with loose tolerances have hidden wrong kernels elsewhere.)
"""

from __future__ import annotations

import torch
from torch import Tensor


class Draw:
    """Random tensors from one seed, drawn in float32 and rounded to `dtype`, so that every dtype gets the same numbers."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, torch.device(device)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * scale
        return x.to(self.dtype if dtype is None else dtype).to(self.device)

    def weight(self, *shape: int) -> Tensor:
        """A weight whose last dimension is the fan-in."""
        return self.normal(*shape, scale=shape[-1] ** -0.5)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Uniform in low..high − 1."""
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(self.device)

    def pages(self, batch: int, max_pages: int, spare: int = 3) -> Tensor:
        """A block table [B, max_pages] int32 over batch·max_pages + spare pages, shuffled."""
        return self.permutation(batch * max_pages + spare)[: batch * max_pages].view(batch, max_pages).int()

    def selected(self, batch: int, queries: int, keys: int, k: int) -> Tensor:
        """Causal indices [B, S, K] int32: ascending, −1 padded, as top-k returns them."""
        scores = torch.rand(batch, queries, keys, generator=self.generator)
        visible = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]  # [S, T]
        scores = scores.masked_fill(~visible, -1.0)
        order = scores.argsort(-1, descending=True)[..., :k]  # [B, S, K]
        order = order.masked_fill(scores.gather(-1, order) < 0, keys).sort(-1).values
        return order.masked_fill(order == keys, -1).int().to(self.device)
