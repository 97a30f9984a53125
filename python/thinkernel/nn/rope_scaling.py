"""RoPE beyond the trained context: what a model's `rope_type` makes of the rotary frequencies.

Shapes: R rotary dims. frequencies [R/2] float32 are theta^(2i/R), the inverse of the angle per position.

The formulas are those of transformers' modeling_rope_utils.py, in float32 and in its order, since a frequency's last bit
is multiplied by the position. `linear` divides every angle (Chen et al., arXiv:2306.15595), `llama3` only the slow ones
(Llama 3.1), `yarn` ramps between the two and sharpens the softmax (Peng et al., arXiv:2309.00071). `dynamic` and
`longrope` are not here: their angles follow the longest row of a batch, so a row's result would depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """What all of them have: the name in a Hugging Face `rope_parameters` dictionary and two things to compute."""

    rope_type: ClassVar[str]

    @property
    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    def inverse(self, frequencies: Tensor, theta: float) -> Tensor:
        """Angles per position [R/2] from the frequencies [R/2]."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"rope_type": self.rope_type, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class LinearRope(RopeScaling):
    """Every position divided by `factor`."""

    rope_type: ClassVar[str] = "linear"
    factor: float

    def inverse(self, frequencies: Tensor, theta: float) -> Tensor:
        return 1.0 / frequencies / self.factor


@dataclass(frozen=True)
class Llama3Rope(RopeScaling):
    """Llama 3.1: a wave of length w = 2π/angle turns `original_max_positions / w` times over the trained context.
    Above high_freq_factor turns it stays, below low_freq_factor it is slowed by `factor`, linear in the turns between."""

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def inverse(self, frequencies: Tensor, theta: float) -> Tensor:
        plain = 1.0 / frequencies  # [R/2]
        wavelength = 2 * math.pi / plain
        slow = wavelength > self.original_max_positions / self.low_freq_factor
        fast = wavelength < self.original_max_positions / self.high_freq_factor
        kept = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - kept) * plain / self.factor + kept * plain
        return torch.where(slow, plain / self.factor, torch.where(fast, plain, between))


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


@dataclass(frozen=True)
class Yarn(RopeScaling):
    """Waves that turn more than beta_fast times over the trained context stay, those below beta_slow are slowed by
    `factor`, linear in the dimension between; cos and sin grow by 0.1·ln(factor) + 1 where nothing else is said."""

    rope_type: ClassVar[str] = "yarn"
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
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor)

    @property
    def softmax_factor(self) -> float:
        """What MLA's softmax scale is multiplied by: mscale², and 1 where mscale_all_dim is absent or 0."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def inverse(self, frequencies: Tensor, theta: float) -> Tensor:
        dim = 2 * len(frequencies)

        def turning_dim(rotations: float) -> float:
            """The dimension that makes this many full turns over the original context."""
            turns = self.original_max_positions / (rotations * 2 * math.pi)
            return dim * math.log(turns) / (2 * math.log(theta))

        low, high = turning_dim(self.beta_fast), turning_dim(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = (high - low) or 0.001
        slowed = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)  # [R/2]
        return slowed / (self.factor * frequencies) + (1 - slowed) / frequencies


KINDS: dict[str, type[RopeScaling]] = {kind.rope_type: kind for kind in (LinearRope, Llama3Rope, Yarn)}


def scaling_from_dict(values: Mapping[str, Any]) -> RopeScaling:
    """What `to_dict` wrote."""
    values = dict(values)
    return KINDS[values.pop("rope_type")](**values)


def scaling_from_hf(parameters: Mapping[str, Any], max_positions: int | None = None) -> RopeScaling | None:
    """A Hugging Face `rope_parameters` dictionary (or an older file's `rope_scaling`) as one of ours; None for the
    default. max_positions is the configuration's max_position_embeddings, which stands in for missing values."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    if kind not in KINDS:
        raise ValueError(f"rope_type: got {kind!r}, takes one of 'default', {', '.join(map(repr, KINDS))}")

    def value(name: str, fallback: float | None = None) -> Any:
        found = parameters.get(name)
        found = fallback if found is None else found
        if found is None:
            raise ValueError(f"rope_parameters: got no {name}, which rope_type {kind!r} takes")
        return found

    if kind == "linear":
        return LinearRope(value("factor"))
    original = value("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        return Llama3Rope(value("factor"), value("low_freq_factor"), value("high_freq_factor"), original)
    return Yarn(
        factor=value("factor", None if max_positions is None else max_positions / original),
        original_max_positions=original,
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        mscale=parameters.get("mscale"),
        mscale_all_dim=parameters.get("mscale_all_dim"),
        attention_factor=parameters.get("attention_factor"),
        truncate=parameters.get("truncate", True),
    )
