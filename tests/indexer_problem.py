"""Inputs of indexer_loss's tests, with every kind of slot list, and the op on them; for the C++ and the Triton kernels."""
from __future__ import annotations

import dataclasses
from typing import Any

import thinkernel as tk
import torch
from thinkernel.ops.memory import poisoned_results
from thinkernel.testing.compare import check
from thinkernel.testing.inputs import Draw
from torch import Tensor

LEARNT = ("q", "k", "w")


@dataclasses.dataclass
class Sizes:
    B: int = 2
    S: int = 12
    T: int = 30
    Hi: int = 4
    Di: int = 24
    H: int = 3
    D: int = 40
    Hkv: int = 0
    K: int = 0  # 0: the dense stage
    scale: float = 0.2


class Problem:
    """Inputs, and the loss of each query with its gradients in any dtype on any backend; by itself on `backend`."""

    backend = "auto"

    def __init__(self, sizes: Sizes, dtype: torch.dtype, seed: int = 1):
        x, draw = sizes, Draw(seed, dtype)
        self.sizes, self.dtype = x, dtype
        kv = (x.B, x.T, x.Hkv, x.D) if x.Hkv else (x.B, x.T, x.D)
        self.inputs: dict[str, Tensor] = dict(
            q=draw.normal(x.B, x.S, x.Hi, x.Di), k=draw.normal(x.B, x.T, x.Di),
            w=draw.normal(x.B, x.S, x.Hi, scale=(x.Hi * x.Di) ** -0.5, dtype=torch.float32),
            target_q=draw.normal(x.B, x.S, x.H, x.D), target_kv=draw.normal(*kv),
        )  # fmt: skip
        if x.K:
            self.inputs["indices"] = self.slots(draw)
        self.dloss = draw.normal(x.B, x.S, dtype=torch.float32)

    def slots(self, draw: Draw) -> Tensor:
        """Causal, ascending, and then: one row reversed, one empty, holes in the middle of one, one out of order with holes."""
        x = self.sizes
        slots = draw.selected(x.B, x.S, x.T, min(x.K, x.T))
        slots = torch.nn.functional.pad(slots, (0, x.K - slots.shape[-1]), value=-1)
        slots[0, -1] = slots[0, -1].flip(0)
        if x.S > 3:
            slots[0, 1] = -1
            slots[0, 2, ::3] = -1
            slots[-1, -2] = slots[-1, -2][draw.permutation(x.K)]
        return slots

    def run(self, backend: str | None = None, dtype: torch.dtype | None = None, **more: Any) -> dict[str, Tensor]:
        inputs = {n: x.to(dtype) if dtype and x.is_floating_point() else x.clone() for n, x in self.inputs.items()}
        learnt = [inputs[n].requires_grad_() for n in LEARNT]
        with tk.use_backend(backend or self.backend), poisoned_results():
            loss = tk.indexer_loss(**inputs, **{"scale": self.sizes.scale, "reduction": "none"} | more)
            grads = torch.autograd.grad(loss, learnt, self.dloss.to(loss.dtype) if loss.dim() else None)
        return {"loss": loss.detach()} | {f"d{n}": g for n, g in zip(LEARNT, grads, strict=True)}

    def check(self, **more: Any) -> dict[str, Tensor]:
        found, wide = self.run(**more), {n: x.double() if isinstance(x, Tensor) else x for n, x in more.items()}
        ref64, base = self.run("reference", torch.float64, **wide), self.run("reference", **more)
        for name, x in found.items():
            check(x, ref64[name], base[name], name=name)
        return found
