"""indexer_topk in C++: exactly the reference's choice where scores are exact, and its choice up to rounding where they are not.

Shapes: B batch, S queries, T keys, Hi index heads, Di index dim.
"""

from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from cache_pages import paged
from cpu_levels import level as level  # every test runs on every ISA level
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkernel.ops.dispatch import C
from thinkernel.reference import sparse as reference
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "indexer_topk"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULPS = 16  # of the largest term of a score, in float32: how far apart two candidates that swap may lie


def whole(draw: Draw, *shape: int, top: int = 3) -> Tensor:
    """Small integers: every product and sum of them is exact in any order, and there are many ties."""
    return draw.integers(-top, top + 1, *shape).to(draw.dtype)


def exact(dtype: torch.dtype, B: int, S: int, T: int, Hi: int, Di: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    draw = Draw(seed, dtype)
    return whole(draw, B, S, Hi, Di), whole(draw, B, T, Di), whole(draw, B, S, Hi, top=1).float()


def same(q: Tensor, k: Tensor, w: Tensor, **options: Any) -> Tensor:
    found = tk.indexer_topk(q, k, w, **options)
    want = reference.indexer_topk(q, k, w, **options)
    assert torch.equal(found, want), (found != want).nonzero()[:3]
    return found


SIZES = [  # B, S, T, Hi, Di, top_k
    (2, 5, 40, 4, 16, 7), (1, 3, 3000, 16, 128, 200), (1, 70, 300, 2, 64, 20), (1, 2, 600, 64, 128, 50), (3, 1, 1, 1, 8, 5),
    (1, 9, 257, 3, 40, 256), (2, 33, 33, 5, 33, 40), (1, 2, 700, 40, 32, 1), (2, 6, 3, 1, 1, 2), (1, 130, 2600, 1, 32, 900),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_exact_scores(sizes, dtype):
    *shape, top_k = sizes
    inputs = exact(dtype, *shape)
    for causal in (True, False):
        same(*inputs, top_k=top_k, causal=causal)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dtype = data.draw(st.sampled_from(DTYPES))
    inputs = exact(dtype, draw(1, 3), draw(1, 12), draw(1, 900), draw(1, 20), draw(1, 70), seed=draw(0, 2**32))
    same(*inputs, top_k=draw(1, 300), causal=data.draw(st.booleans()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 6, 5000, 16, 128, 512), (2, 40, 700, 64, 128, 64), (1, 1, 9000, 32, 64, 2048)], ids=str)
def test_random_scores(sizes, dtype):
    """What was left out scores no more than what was taken, in float64, by more than a few ulps of the largest term."""
    B, S, T, Hi, Di, top_k = sizes
    draw = Draw(4, dtype)
    q, k, w = draw.normal(B, S, Hi, Di), draw.normal(B, T, Di), draw.normal(B, S, Hi, dtype=torch.float32)
    found = tk.indexer_topk(q, k, w, top_k=top_k).long()
    assert (found.diff(dim=-1)[found[..., 1:] >= 0] > 0).all()
    scores = reference.indexer_scores(q.double(), k.double(), w.double())  # [B, S, T]
    terms = (q.double().flatten(1, 2) @ k.double().mT).abs().unflatten(1, (S, Hi)) * w.double().abs()[..., None]
    largest = terms.amax((2, 3))  # [B, S]
    taken = torch.zeros(B, S, T + 1, dtype=torch.bool).scatter_(-1, found.masked_fill(found < 0, T), True)[..., :T]
    visible = scores > -torch.inf
    assert torch.equal(taken.sum(-1), visible.sum(-1).clamp_max(top_k))
    least_taken = scores.masked_fill(~taken, torch.inf).amin(-1)
    most_left = scores.masked_fill(taken, -torch.inf).amax(-1)
    assert (most_left - least_taken <= ULPS * 2.0**-23 * largest).all()


def test_rising_and_falling_scores():
    """Every key beats all before it, or none does: the buffer of candidates fills up again and again, or once."""
    T = 20_000
    q, w = torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1)
    for k in (torch.arange(T), torch.arange(T).flip(0), torch.zeros(T), torch.arange(T) // 100):
        same(q, k.float().view(1, T, 1), w, top_k=300)


def test_nan_and_infinite_scores():
    q, k, w = exact(torch.float32, 1, 4, 400, 2, 8)
    w = w.abs() + 1
    k[0, 30:60], k[0, 70, 0] = torch.nan, torch.inf
    q[0, 2, 1, 3] = torch.nan
    for top_k in (5, 380, 395):
        same(q, k, w, top_k=top_k, causal=False)
    w[0, 1] = -torch.inf
    same(q, k, w, top_k=50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed(dtype):
    lengths, keys = [4, 0, 70, 1], [300, 5, 80, 1]
    draw = Draw(3, dtype)
    q, k, w = whole(draw, sum(lengths), 5, 32), whole(draw, sum(keys), 32), whole(draw, sum(lengths), 5).float()
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, keys))
    same(q, k, w, top_k=20, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("page", [None, 1, 64])
@pytest.mark.parametrize("S", [1, 3])
def test_caches(S, page, fp8):
    """Pages in any order; what lies past a sequence's end is never read."""
    counts = [3000, 2, 190]
    q, k, w = exact(torch.bfloat16, 3, S, 3010, 16, 128)
    scale = torch.randint(1, 4, (3, 3010)).float() if fp8 else None
    whole_k = k
    if fp8:
        k = k.to(torch.float8_e4m3fn)
    want = reference.indexer_topk(q, whole_k, w, top_k=40, seqlens=torch.tensor(counts), k_scale=scale)
    table = None
    if page is not None:
        k, table = paged(k.view(torch.uint8) if fp8 else k, counts, page, Draw(6))
        k = k.view(torch.float8_e4m3fn) if fp8 else k
        if scale is not None:
            scale, _ = paged(scale, counts, page, Draw(6))
    found = tk.indexer_topk(q, k, w, top_k=40, seqlens=torch.tensor(counts, dtype=torch.int32), block_table=table, k_scale=scale)
    assert torch.equal(found, want)


def test_choice_by_threads_and_batch():
    draw = Draw(8, torch.bfloat16)
    q, k, w = draw.normal(2, 70, 16, 64), draw.normal(2, 9000, 64), draw.normal(2, 70, 16, dtype=torch.float32)
    found = tk.indexer_topk(q, k, w, top_k=700)
    for threads in (1, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(tk.indexer_topk(q, k, w, top_k=700), found)
        assert torch.equal(tk.indexer_topk(q[1:], k[1:], w[1:], top_k=700), found[1:])
        assert torch.equal(tk.indexer_topk(q[1:, -1:], k[1:], w[1:, -1:], top_k=700), found[1:, -1:])  # ranges of keys


def test_nothing_there():
    assert tk.indexer_topk(torch.empty(0, 3, 2, 8), torch.empty(0, 5, 8), torch.empty(0, 3, 2), top_k=4).shape == (0, 3, 4)
    assert (tk.indexer_topk(torch.ones(1, 3, 2, 8), torch.empty(1, 0, 8), torch.ones(1, 3, 2), top_k=4) == -1).all()
