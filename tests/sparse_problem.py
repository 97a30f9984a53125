"""Inputs of sparse_attention's tests, with every kind of slot list, and the op on them; for the C++ and the Triton kernels."""
from __future__ import annotations

import dataclasses
from typing import Any

import thinkernel as tk
import torch
from thinkernel.reference import sparse as reference
from thinkernel.testing.attention import torch_sparse_attention
from thinkernel.testing.compare import check
from thinkernel.testing.inputs import Draw
from torch import Tensor


@dataclasses.dataclass
class Sizes:
    B: int = 2
    S: int = 5
    T: int = 40
    H: int = 3
    D: int = 48
    Dv: int = 32
    K: int = 12
    Hkv: int = 0  # 0: latents
    sinks: bool = False
    scale: float | None = None


class Problem:
    """Inputs, weights for their gradients, and the op in any dtype on any implementation. `ours` runs on `backend`."""

    backend = "auto"

    def __init__(self, sizes: Sizes, dtype: torch.dtype, seed: int = 1):
        x, draw = sizes, Draw(seed, dtype)
        self.sizes, self.dtype = x, dtype
        shape = (x.B, x.T, x.Hkv) if x.Hkv else (x.B, x.T)
        self.inputs = dict(q=draw.normal(x.B, x.S, x.H, x.D), k=draw.normal(*shape, x.D))
        if x.Hkv:
            self.inputs["v"] = draw.normal(*shape, x.Dv)
        if x.sinks:
            self.inputs["sinks"] = draw.normal(x.H)
        lists = [self.slots(draw) for _ in range(max(x.Hkv, 1))]
        self.indices = torch.stack(lists, 2) if x.Hkv else lists[0]
        self.dout, self.dlse = draw.normal(x.B, x.S, x.H, x.Dv), draw.normal(x.B, x.S, x.H, dtype=torch.float32)

    def slots(self, draw: Draw) -> Tensor:
        """Causal, ascending; and one row backwards, one empty, holes in one, one out of order and partly no keys of the sequence."""
        x = self.sizes
        slots = draw.selected(x.B, x.S, x.T, min(x.K, x.T))
        slots = torch.nn.functional.pad(slots, (0, x.K - slots.shape[-1]), value=-1)
        slots[0, 0] = slots[0, 0].flip(0)
        if x.S > 1:
            slots[0, 1] = -1
        if x.S > 2:
            slots[0, 2, ::3] = -1
        if x.S > 3:
            slots[-1, 3] = slots[-1, 3][draw.permutation(x.K)]
        return slots

    def run(self, function: Any, dtype: torch.dtype | None = None, grads: bool = True, **more: Any) -> dict[str, Tensor]:
        dtype = dtype or self.dtype
        inputs = {n: x.detach().to(dtype, copy=True).requires_grad_(grads) for n, x in self.inputs.items()}
        kv = (inputs["k"], inputs["v"]) if self.sizes.Hkv else inputs["k"]
        value_dim = None if self.sizes.Hkv else self.sizes.Dv
        out, lse = function(inputs["q"], kv, self.indices, value_dim=value_dim, scale=self.sizes.scale, sinks=inputs.get("sinks"), **more)
        found = dict(out=out, lse=lse)
        if grads:
            empty = lse.isneginf()
            total = (out * self.dout.to(dtype)).sum() + (lse.masked_fill(empty, 0) * self.dlse.to(lse.dtype)).sum()
            found |= {f"d{n}": g for n, g in zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True)}
        return {n: x.detach() for n, x in found.items()}

    def ours(self, **options: Any) -> dict[str, Tensor]:
        with tk.use_backend(self.backend):
            return self.run(lambda *a, **b: tk.sparse_attention(*a, **b, return_lse=True), **options)

    def check(self) -> dict[str, Tensor]:
        found = self.ours()
        ref64, base = self.run(reference.sparse_attention, torch.float64), self.run(torch_sparse_attention)
        for name, x in found.items():
            check(x, ref64[name], base[name], name=name)
        return found
