"""Rotary embeddings and their scalings against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thinkernel import nn
from thinkernel.nn.rope import inverse_frequencies, rotate, rotate_front
from thinkernel.testing.compare import assert_bitwise

transformers = pytest.importorskip("transformers")

LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN = dict(rope_type="yarn", rope_theta=150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=64)


def frequencies_of_transformers(parameters: dict, head_dim: int) -> tuple[torch.Tensor, float, Any]:
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=8192, rope_parameters=dict(parameters)
    )
    kind = parameters["rope_type"]
    if kind == "default":
        from transformers.models.glm4.modeling_glm4 import Glm4RotaryEmbedding  # knows partial_rotary_factor

        return *Glm4RotaryEmbedding.compute_default_rope_parameters(config), config
    return *transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config), config


SCALINGS = [
    dict(rope_type="default", rope_theta=10000.0),
    dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.5),
    dict(rope_type="linear", rope_theta=10000.0, factor=8.0),
    dict(rope_type="linear", rope_theta=1e6, factor=2.5, partial_rotary_factor=0.25),
    dict(LLAMA3, original_max_position_embeddings=8192),
    dict(LLAMA3, factor=32.0, original_max_position_embeddings=8192),
    dict(LLAMA3, rope_theta=10000.0, low_freq_factor=1.5, high_freq_factor=9.0, partial_rotary_factor=0.5),
    {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
    dict(YARN, original_max_position_embeddings=4096),
    dict(YARN, original_max_position_embeddings=4096, truncate=False),
    dict(YARN, original_max_position_embeddings=4096, factor=40.0, mscale=0.7, mscale_all_dim=1.0),
    dict(YARN, original_max_position_embeddings=4096, factor=40.0, mscale=1.0, mscale_all_dim=1.0, rope_theta=10000.0),
    dict(YARN, original_max_position_embeddings=4096, mscale=0.7, mscale_all_dim=0.0),
    dict(YARN, original_max_position_embeddings=4096, attention_factor=0.8),
    dict(YARN, original_max_position_embeddings=4096, beta_fast=2, beta_slow=1.9, partial_rotary_factor=0.75),
    dict(YARN, factor=None, original_max_position_embeddings=2048),
    dict(YARN, factor=0.5, original_max_position_embeddings=4096),
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("parameters", SCALINGS, ids=lambda p: f"{p['rope_type']}-{SCALINGS.index(p)}")
def test_frequencies_are_those_of_transformers(parameters: dict, head_dim: int) -> None:
    expected, factor, config = frequencies_of_transformers(parameters, head_dim)
    rope = nn.RotaryEmbedding.from_hf(parameters, head_dim, max_positions=8192)
    assert rope.factor == pytest.approx(factor, rel=1e-15)
    assert_bitwise(rope.inv_freq, expected)
    positions = torch.cat((torch.arange(50), torch.tensor([1000, 8191])))[None]
    angles = positions[..., None].float() * expected
    cos, sin = rope(positions)
    torch.testing.assert_close(cos, angles.cos() * factor, rtol=0, atol=1e-7 * factor)
    torch.testing.assert_close(sin, angles.sin() * factor, rtol=0, atol=1e-7 * factor)


def test_rotation_of_the_leading_dims() -> None:
    x = torch.randn(2, 7, 3, 20)
    rope = nn.RotaryEmbedding(8)(torch.arange(7).expand(2, 7))
    for interleaved in (False, True):
        out = rotate_front(x, rope, interleaved=interleaved)
        assert_bitwise(out[..., :8], rotate(x[..., :8], rope, interleaved=interleaved))
        assert_bitwise(out[..., 8:], x[..., 8:])
        assert_bitwise(rotate_front(x[..., :8], rope, interleaved=interleaved), out[..., :8])


def test_a_scaling_is_named_by_its_numbers() -> None:
    assert torch.equal(inverse_frequencies(32, 500.0, nn.LinearRope(4.0)), inverse_frequencies(32, 500.0) / 4.0)
    for parameters, match in (
        (dict(rope_type="dynamic", factor=2.0), "rope_type: got 'dynamic'.*linear"),
        (dict(rope_type="linear"), "rope_parameters: got no factor"),
        (dict(rope_type="yarn", factor=2.0), "rope_parameters: got no original_max_position_embeddings"),
        (dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0), "rope_parameters: got no"),
    ):
        with pytest.raises(ValueError, match=match):
            nn.RotaryEmbedding.from_hf(parameters, 64)
