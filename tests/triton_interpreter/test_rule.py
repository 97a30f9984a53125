"""The numerics rule for the Triton kernels under the interpreter: the cases that `thinkernel validate` runs, and larger ones.

Shapes: q [B, S, H, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv]. Under the interpreter a tile has 64 query rows and 32 keys and a
split holds 64 keys, so the cases added here are those with S > 64 or T > 64 and with what masks do at such borders.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import thinkernel as tk
import torch
import torch.nn.functional as F
from rule import assert_within
from thinkernel.reference import attention as reference
from thinkernel.testing.cases import CASES, Case, Inputs, attention_case, head_case, linear_case, qkv
from thinkernel.testing.inputs import Draw
from torch import Tensor

DTYPES = [torch.float32, torch.float16]
SMALL = [c for c in CASES if c.small and c.family in ("attention", "linear", "grpo")]


def eager(q: Tensor, k: Tensor, v: Tensor, *, key_start: Tensor | None = None, sinks: Tensor | None = None, causal: bool = True,
          window: tuple[int, int] | None = None, chunk: int | None = None, softcap: float = 0.0,
          scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The baseline: torch's attention under a mask; for softcap and sinks, which it lacks, attention as an eager model has it."""
    S, T, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(G, 2).transpose(1, 2) for x in (k, v))  # [B, H, T, .]
    visible = reference.visible_keys(torch.arange(T - S, T)[None], torch.arange(T), key_start, None, causal, window, chunk)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = ((q.transpose(1, 2) @ k.mT) * scale).float()  # [B, H, S, T]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    probs, lse = reference.masked_softmax(scores, None if visible is None else visible[:, None])
    if not softcap and sinks is None:
        mask = None if visible is None else visible[:, None]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=scale)
        return out.transpose(1, 2), lse.transpose(1, 2)
    if sinks is not None:
        probs = probs * reference.sink_gate(lse, sinks.float()[:, None])[..., None]
    return (probs.to(v.dtype) @ v).transpose(1, 2), lse.transpose(1, 2)


def masked_case(name: str, *sizes: int, key_start: list[int] | None = None, sinks: bool = False, **options: Any) -> Case:
    def inputs(draw: Draw) -> Inputs:
        more: Inputs = {} if key_start is None else {"key_start": torch.tensor(key_start, dtype=torch.int32)}
        return qkv(draw, *sizes, **more, **({"sinks": draw.normal(sizes[3])} if sinks else {}))

    gradients = ("q", "k", "v", "sinks") if sinks else ("q", "k", "v")
    def run(**x: Any) -> Any:
        return tk.attention(**x, **options, return_lse=True)

    return Case("attention", name, inputs, run, gradients, lambda **x: eager(**x, **options))


LARGER = [
    attention_case("three splits, D and Dv odd", 1, 33, 150, 3, 1, 17, 9),
    attention_case("two row blocks, full, S > T", 1, 70, 33, 2, 1, 16, causal=False),
    attention_case("head dim in two blocks", 1, 40, 70, 2, 1, 96, 64),
    masked_case("rows that see nothing", 2, 75, 20, 2, 2, 32, causal=True),
    masked_case("left padding, one row all padding", 3, 40, 100, 2, 1, 24, 40, key_start=[0, 41, 100], causal=True),
    masked_case("left padding, full", 2, 20, 50, 2, 1, 16, key_start=[3, 33], causal=False),
    masked_case("window across splits, softcap", 1, 100, 100, 2, 1, 16, causal=True, window=(20, -1), softcap=3.0),
    masked_case("two-sided window", 2, 50, 90, 2, 1, 32, 16, causal=False, window=(9, 30)),
    masked_case("chunk, sinks, left padding", 2, 60, 90, 2, 1, 32, 16, causal=True, chunk=25, key_start=[0, 40], sinks=True),
    head_case("three row blocks, softcap", 70, 20, 201, bias=True, softcap=5.0, temperature=0.7),
    head_case("one split", 5, 33, 64, temperature=2.0),
    linear_case("three row blocks", 70, 33, 20),
]


def runs() -> Iterator[Any]:
    """Each case in each dtype; losses and advantages are float32 whatever the inputs, and all their options take a minute."""
    for case in [*SMALL, *LARGER]:
        loss = case.name.startswith(("grpo/policy-loss", "grpo/advantages"))
        for dtype in DTYPES[:1] if loss else DTYPES:
            marks = [pytest.mark.slow] if loss and case.name.count("-") > 2 else []
            yield pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}", marks=marks)


@pytest.mark.parametrize(("case", "dtype"), runs())
def test_within_the_rule(case: Case, dtype: torch.dtype) -> None:
    assert_within(case, dtype)
