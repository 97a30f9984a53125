"""Rotary position embeddings (Su et al., arXiv:2104.09864).

Shapes: B batch, S tokens, N packed tokens, H heads, D head dim, R rotary dims, R ≤ D. positions [B, S] or [N], any
integer; cos and sin [..., R/2]; x [..., H, D].

Pair i of a vector is turned by the angle `position · inv_freq[i]`, `inv_freq[i] = theta^(-2i/R)`. Where the pair lies
is a convention: half-split (Qwen, Llama, the DeepSeek-V3.2 indexer) pairs i with i + R/2, interleaved (DeepSeek's MLA,
GLM-4) pairs 2i with 2i + 1. Where R < D the first R dims are turned and the rest passes (GLM-4, Phi, StableLM).
Longer contexts than the trained one: rope_scaling.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from thinkernel.nn.rope_scaling import LinearRope, Llama3Rope, RopeScaling, Yarn, scaling_from_hf

__all__ = [
    "LinearRope",
    "Llama3Rope",
    "RotaryEmbedding",
    "Yarn",
    "inverse_frequencies",
    "packed_positions",
    "rotate",
    "rotate_front",
]


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angles per position, [dim/2] float32."""
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: got {dim}, takes an even number >= 2")
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    frequencies = theta**exponents  # [dim/2]
    return 1.0 / frequencies if scaling is None else scaling.inverse(frequencies, theta)


class RotaryEmbedding(nn.Module):
    """cos and sin of every position, float32. Holds no parameters and no buffers: a model cast to bfloat16 must not
    round its frequencies. dim is R, the number of rotary dims."""

    def __init__(self, dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(dim, theta, scaling)  # [R/2]; an attribute, not a buffer
        self.factor = scaling.cos_sin_factor if scaling else 1.0

    @classmethod
    def from_hf(
        cls, parameters: Mapping[str, Any], head_dim: int, *, max_positions: int | None = None
    ) -> RotaryEmbedding:
        """From a Hugging Face configuration's `rope_parameters`: rope_type default, linear, llama3 or yarn with its
        numbers, rope_theta, partial_rotary_factor. max_positions: the configuration's max_position_embeddings."""
        dim = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
        theta = parameters.get("rope_theta") or 10000.0
        return cls(dim, theta, scaling_from_hf(parameters, max_positions))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [..., S] -> cos and sin, each [..., S, R/2]."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None].float() * self.inv_freq  # [B, S, R/2]
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.factor == 1.0 else (cos * self.factor, sin * self.factor)


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Positions [N] int64 that begin at 0 in every sequence, from its offsets [B + 1]; total is N, cu_seqlens' last."""
    slots = torch.arange(total, device=cu_seqlens.device)  # [N]
    offsets = cu_seqlens.long()
    return slots - offsets[torch.searchsorted(offsets, slots, right=True) - 1]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], *, interleaved: bool) -> Tensor:
    """Turn every pair of x [..., H, R] by its angle; the layout of the result is that of x."""
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in rope)  # [..., 1, R/2]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]  # [..., H, R/2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotate_front(x: Tensor, rope: tuple[Tensor, Tensor], *, interleaved: bool) -> Tensor:
    """Turn the first R dims of x [..., H, D] and let the others pass; R is what cos and sin [..., R/2] have."""
    rotary = 2 * rope[0].shape[-1]
    if rotary == x.shape[-1]:
        return rotate(x, rope, interleaved=interleaved)
    front, rest = x.split((rotary, x.shape[-1] - rotary), dim=-1)
    return torch.cat((rotate(front, rope, interleaved=interleaved), rest), dim=-1)
