"""Rotary position embeddings, with YaRN.

Shapes: B batch, S tokens, H heads, R rotary dims. positions [B, S], cos and sin [B, S, R/2], x [B, S, H, R].

Pair i of a vector is turned by the angle `position · inv_freq[i]`, `inv_freq[i] = theta^(-2i/R)`. Where the pair lies
is a convention: half-split (Qwen, Llama, the DeepSeek-V3.2 indexer) pairs i with i + R/2, interleaved (DeepSeek's MLA)
pairs 2i with 2i + 1. YaRN (Peng et al., arXiv:2309.00071) slows the low frequencies down by `factor`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


@dataclass(frozen=True)
class Yarn:
    """The YaRN parameters, named as in a Hugging Face `rope_parameters` dictionary."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor)

    @property
    def softmax_factor(self) -> float:
        """What MLA's softmax scale is multiplied by: mscale², and 1 where mscale_all_dim is absent or 0."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def inverse_frequencies(dim: int, theta: float, yarn: Yarn | None = None) -> Tensor:
    """Angles per position, [dim/2] float32."""
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: got {dim}, takes an even number >= 2")
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    frequencies = theta**exponents  # [dim/2]
    if yarn is None:
        return 1.0 / frequencies

    def turning_dim(rotations: float) -> float:
        """The dimension that makes this many full turns over the original context."""
        turns = yarn.original_max_positions / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = turning_dim(yarn.beta_fast), turning_dim(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    slowed = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)  # [dim/2]
    return slowed / (yarn.factor * frequencies) + (1 - slowed) / frequencies


class RotaryEmbedding(nn.Module):
    """cos and sin of every position, float32. Holds no parameters and no buffers: a model cast to bfloat16 must not
    round its frequencies."""

    def __init__(self, dim: int, theta: float = 10000.0, yarn: Yarn | None = None) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(dim, theta, yarn)  # [R/2]; an attribute, not a buffer
        self.factor = yarn.cos_sin_factor if yarn else 1.0

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None].float() * self.inv_freq  # [B, S, R/2]
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.factor == 1.0 else (cos * self.factor, sin * self.factor)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], *, interleaved: bool) -> Tensor:
    """Turn every pair of x [B, S, H, R] by its angle; the layout of the result is that of x."""
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in rope)  # [B, S, 1, R/2]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]  # [B, S, H, R/2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
