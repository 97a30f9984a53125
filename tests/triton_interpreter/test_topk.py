"""Triton top-k under the interpreter: exactly the reference's choice, values bit for bit, however the rows are cut up.

Shapes: N rows, T scores a row, k kept. A block has 256 scores here; fewer than four rows of more than 512 are cut into parts.
"""
from __future__ import annotations

from unittest import mock

import pytest
import thinkernel as tk
import torch
from thinkernel.kernels import configs_sparse
from thinkernel.ops.memory import poisoned_results
from thinkernel.reference import sparse as reference
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(pattern: str, *shape: int, dtype: torch.dtype) -> Tensor:
    if pattern == "ties":
        return torch.randint(-2, 3, shape).to(dtype)
    if pattern == "constant":
        return torch.full(shape, 0.75, dtype=dtype)
    scores = torch.randn(shape).to(dtype)
    if pattern == "specials":
        for value in (0.0, -0.0, torch.inf, -torch.inf, torch.nan):
            scores[torch.rand(shape) < 0.15] = value
    if pattern == "low bits":  # all but the lowest bits agree: the last digit decides
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        scores = (torch.ones((), dtype=dtype).view(bits) + torch.randint(0, 7, shape).to(bits)).view(dtype)
    return scores


def same(scores: Tensor, k: int, lengths: Tensor | None = None, given: Tensor | None = None) -> None:
    with tk.use_backend("triton"), poisoned_results():
        values, indices = tk.topk(scores if given is None else given, k, lengths=lengths)
    want = reference.topk(scores, k, lengths=lengths)
    assert torch.equal(indices, want[1]), (indices != want[1]).nonzero()[:3]
    assert torch.equal(values.isnan(), want[0].isnan())
    bits = torch.int32 if values.dtype == torch.float32 else torch.int16
    assert torch.equal(*(v.masked_fill(v.isnan(), 9.0).view(bits) for v in (values, want[0])))


SIZES = [(1, 1, 1), (3, 61, 64), (1, 1101, 300), (4, 300, 256), (1, 600, 1), (4, 258, 257)]  # N, T, k


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("pattern", ["normal", "ties", "constant", "specials", "low bits"])
def test_equals_the_reference(pattern: str, dtype: torch.dtype) -> None:
    for rows, length, k in SIZES:
        same(draw(pattern, rows, length, dtype=dtype), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [1, 5])
def test_lengths(rows: int, dtype: torch.dtype) -> None:
    T, k = 700, 100
    scores = draw("specials", rows, T, dtype=dtype)
    for lengths in ([k + 1, 0, k, T, 1, k - 1], [600, 513, 7, 256, 512, 99]):
        counts = torch.tensor(lengths[:rows], dtype=torch.int32)
        unread = torch.arange(T) >= counts[:, None]
        same(scores, k, counts, given=scores.masked_fill(unread, torch.inf))


def test_any_cutting_gives_the_same_and_a_row_is_its_own() -> None:
    scores = draw("ties", 3, 1300, dtype=torch.float32)
    with tk.use_backend("triton"):
        want = tk.topk(scores, 200)
        for part in (256, 1024):
            plan = configs_sparse.Parts(256, 4, part, -(-1300 // part))
            with mock.patch.object(configs_sparse, "topk", lambda rows, length, plan=plan: plan):
                assert all(torch.equal(x, y) for x, y in zip(tk.topk(scores, 200), want, strict=True))
        with mock.patch.object(configs_sparse, "topk", lambda rows, length: configs_sparse.Parts(128, 4, length, 1)):
            assert all(torch.equal(x, y[1:2]) for x, y in zip(tk.topk(scores[1:2], 200), want, strict=True))


@pytest.mark.slow
def test_a_million_scores_and_thousands_kept() -> None:
    with mock.patch.object(configs_sparse, "topk", lambda rows, length: configs_sparse.Parts(16384, 8, 131072, 8)):
        same(draw("ties", 1, 1_000_003, dtype=torch.float32), 2048)
    same(draw("specials", 1, 20_000, dtype=torch.bfloat16), 9000)


def test_strides_and_empty_problems() -> None:
    whole = draw("ties", 2, 3, 401, dtype=torch.bfloat16)
    for start in (1, 6):
        same(whole[..., start : start + 301], 30)
    same(whole[..., :9].transpose(0, 2), 2)
    same(torch.empty(0, 5), 3)
    same(torch.empty(2, 0), 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_gradient_goes_where_the_values_came_from(dtype: torch.dtype) -> None:
    scores, lengths = draw("ties", 6, 133, dtype=dtype), torch.tensor([133, 0, 20, 60, 61, 1], dtype=torch.int32)
    dvalues, grads = torch.randn(6, 60).to(dtype), []
    for backend in ("triton", "reference"):
        leaf = scores.clone().requires_grad_()
        with tk.use_backend(backend), poisoned_results():
            grads.append(torch.autograd.grad(tk.topk(leaf, 60, lengths=lengths)[0], leaf, dvalues)[0])
    assert torch.equal(*grads)


def test_what_is_not_covered_is_named() -> None:
    with tk.use_backend("triton"), pytest.raises(NotImplementedError, match="scores: torch.float64"):
        tk.topk(torch.zeros(2, 8, dtype=torch.float64), 2)
