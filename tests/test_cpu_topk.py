"""topk in C++: the reference's positions exactly, on every ISA level, over rows that mislead a sample and rows full of ties.

Shapes: N rows, T scores a row, k kept.
"""

from __future__ import annotations

import pytest
import thinkernel as tk
import torch
from cpu_levels import level as level  # every test runs on every ISA level
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkernel.reference.sparse import topk as reference
from thinkernel.testing.compare import assert_bitwise
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(scores: Tensor, k: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    values, indices = tk.topk(scores, k, lengths=lengths)
    want = reference(scores, k, lengths=lengths)
    assert torch.equal(indices, want[1])
    assert_bitwise(values, want[0], "values")
    return values, indices


def rows(T: int, dtype: torch.dtype) -> Tensor:
    """Rows of every kind: random, sorted both ways, few values, one value, −inf, NaN, ±0, large ones side by side."""
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(12, T, generator=generator)
    x[1] = x[1].sort().values
    x[2] = x[2].sort(descending=True).values
    x[3] = torch.randint(-2, 3, (T,), generator=generator).float()
    x[4] = 0.25
    x[5, torch.rand(T, generator=generator) < 0.7] = -torch.inf
    x[6, torch.rand(T, generator=generator) < 0.3] = torch.nan
    x[7] = torch.where(torch.rand(T, generator=generator) < 0.5, -0.0, 0.0)
    x[8, : T // 3] += 100.0  # what a sample of evenly spread places sees is not what it would have drawn
    x[9] = torch.nan
    x[10] = -torch.inf
    x[11] *= 1e-42  # subnormal
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 100, 1000, 4096, 5000])
def test_positions_are_the_references(T, dtype):
    x = rows(T, dtype)
    for k in sorted({1, 2, T // 8 + 1, T // 2 + 1, T - 1, T, T + 5} - {0}):
        same(x, k)


@pytest.mark.parametrize("T, k", [(16384, 2048), (70001, 64), (1 << 20, 2048)])
def test_long_rows(T, k):
    x = rows(T, torch.float32)[[0, 3, 6, 8]] if T > 1 << 17 else rows(T, torch.float32)
    same(x, k)


def test_a_sample_that_misleads():
    """Every place the sample reads holds a small score: the bracket misses, and the row is read whole."""
    x = torch.randn(2, 8192)
    at = (torch.arange(32) * (8192 // 32))[:, None] + torch.arange(16)
    x[0, at.flatten()] = -50.0
    x[1, at.flatten()] = 50.0
    same(x, 1000)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_rows(data):
    T, k = data.draw(st.integers(1, 6000)), data.draw(st.integers(1, 700))
    lead = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    x = torch.randn(*lead, T, generator=generator).to(data.draw(st.sampled_from(DTYPES)))
    if data.draw(st.booleans()):  # ties
        x = (x * data.draw(st.sampled_from([1, 3, 50]))).round()
    if data.draw(st.booleans()):  # rows apart, places apart
        x = torch.stack((x, x), -1)[..., 0]
    lengths = torch.randint(0, T + 1, lead, generator=generator, dtype=torch.int32) if lead and data.draw(st.booleans()) else None
    same(x, k, lengths)


def test_bits_by_threads_and_batch():
    x = torch.randn(37, 9000)
    values, indices = tk.topk(x, 500)
    for threads in (1, 3, 4):
        torch.set_num_threads(threads)
        again = tk.topk(x, 500)
        assert torch.equal(again[1], indices) and torch.equal(again[0], values)
    alone = tk.topk(x[5], 500)
    assert torch.equal(alone[1], indices[5]) and torch.equal(alone[0], values[5])


def test_gradient():
    x = torch.randn(3, 500, requires_grad=True)
    weight = torch.randn(3, 40)
    (ours,) = torch.autograd.grad((tk.topk(x, 40)[0] * weight).sum(), x)
    values, indices = reference(x, 40)
    (want,) = torch.autograd.grad((values * weight).sum(), x)
    assert torch.equal(ours, want)


def test_nothing_to_choose_from():
    assert tk.topk(torch.empty(0, 5), 3)[1].shape == (0, 3)
    values, indices = tk.topk(torch.empty(2, 0), 3)
    assert (indices == -1).all() and (values == -torch.inf).all()
