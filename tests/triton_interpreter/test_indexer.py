"""The Triton indexer under the interpreter: scores, selection and loss by the rule, and the bits that must not move.

Shapes: B batch, S queries, T keys, Hi index heads, Di index dim, H heads of the attention, Hkv key heads (0: latents), D head dim, K slots.
A tile has 16 (query, head) pairs and 32 keys here, and the functions hold 32 KiB of scores at a time.
"""
from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import indexer_problem
import pytest
import thinkernel as tk
import torch
from indexer_problem import LEARNT, Sizes
from rule import assert_within
from test_attention import paged
from thinkernel.kernels import configs_sparse
from thinkernel.ops.memory import poisoned_results
from thinkernel.reference import sparse as reference
from thinkernel.testing.cases import CASES, Case
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

DTYPES = [torch.float32, torch.float16]


def indexer_cases() -> list[Any]:
    cases = [c for c in CASES if c.name.startswith(("sparse/topk", "sparse/indexer"))]
    marked = [(c, [pytest.mark.slow] if "00-keys" in c.name else []) for c in cases]
    return [pytest.param(c, dtype, id=f"{c}-{str(dtype)[6:]}", marks=marks) for c, marks in marked for dtype in DTYPES]


@pytest.mark.parametrize(("case", "dtype"), indexer_cases())
def test_within_the_rule(case: Case, dtype: torch.dtype) -> None:
    assert_within(case, dtype, 1 if case.selection or dtype == torch.float16 else 3)


# ---- scores


def scores(q: Tensor, k: Tensor, w: Tensor, backend: str, causal: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    learnt = [x.to(dtype or x.dtype).detach().clone().requires_grad_() for x in (q, k, w)]
    with tk.use_backend(backend), poisoned_results():
        out = tk.indexer_scores(*learnt, causal=causal)
        grads = torch.autograd.grad(out, learnt, Draw(9).normal(*out.shape).to(out.dtype))
    return {"scores": out.detach()} | {f"d{n}": g for n, g in zip(LEARNT, grads, strict=True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("sizes", [(2, 5, 37, 20, 19, True), (1, 19, 40, 3, 24, False), (2, 7, 3, 1, 8, True)], ids=str)
def test_scores(sizes: tuple, dtype: torch.dtype) -> None:
    """More heads than a tile has columns, several queries a tile, odd sizes, more queries than keys; then a sequence alone."""
    B, S, T, Hi, Di, causal = sizes
    draw = Draw(4, dtype)
    inputs = draw.normal(B, S, Hi, Di), draw.normal(B, T, Di), draw.normal(B, S, Hi)
    found = scores(*inputs, "triton", causal)
    ref64, base = scores(*inputs, "reference", causal, torch.float64), scores(*inputs, "reference", causal)
    for name, x in found.items():
        check(x, ref64[name], base[name], name=name)
    with tk.use_backend("triton"):
        assert_bitwise(tk.indexer_scores(*(x[-1:] for x in inputs), causal=causal), found["scores"][-1:])
        one = tk.indexer_scores(inputs[0][-1:, -1:], inputs[1][-1:], inputs[2][-1:, -1:], causal=causal)
    assert_bitwise(one, found["scores"][-1:, -1:], "a query alone")


def test_float16_gradients_of_any_size_are_kept() -> None:
    """Gradients far below float16's smallest number, with weights that make up for it."""
    draw = Draw(5, torch.float16)
    q, k, w = draw.normal(1, 4, 2, 16), draw.normal(1, 40, 16), draw.normal(1, 4, 2, dtype=torch.float32)
    grads = []
    for size in (1.0, 2.0**-30):
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_(), (w / size).requires_grad_()]
        with tk.use_backend("triton"):
            out = tk.indexer_scores(*leaves)
            grads.append(torch.autograd.grad(out, leaves, Draw(6).normal(*out.shape) * size))
    assert_bitwise(grads[1][0], grads[0][0], "dq")
    assert_bitwise(grads[1][1], grads[0][1], "dk")


# ---- selection


def exact(dtype: torch.dtype, B: int, S: int, T: int, Hi: int, Di: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers: every product and sum of them is exact in any order, and there are many ties."""
    draw = Draw(seed, dtype)
    return (draw.integers(-3, 4, B, S, Hi, Di).to(dtype), draw.integers(-3, 4, B, T, Di).to(dtype),
            draw.integers(-1, 2, B, S, Hi).float())


def same(q: Tensor, k: Tensor, w: Tensor, want: Tensor | None = None, **options: Any) -> Tensor:
    want = reference.indexer_topk(q, k, w, **options) if want is None else want
    with tk.use_backend("triton"):
        found = tk.indexer_topk(q, k, w, **options)
    assert torch.equal(found, want), (found != want).nonzero()[:3]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("sizes", [(2, 3, 40, 4, 16, 7), (1, 18, 70, 1, 8, 20), (2, 6, 3, 1, 1, 2), (1, 2, 90, 33, 40, 90)])
def test_selection_of_exact_scores(sizes: tuple, dtype: torch.dtype) -> None:
    *shape, top_k = sizes
    inputs = exact(dtype, *shape)
    for causal in (True, False):
        same(*inputs, top_k=top_k, causal=causal)


@pytest.mark.parametrize("S", [4, pytest.param(70, marks=pytest.mark.slow)])
def test_selection_chunk_by_chunk_and_alone(S: int) -> None:
    """Chunks within a sequence, of several sequences, or everything at once; a batch's row alone; with gradients asked for."""
    draw = Draw(8, torch.float32)
    q, k, w = draw.normal(2, S, 2, 8), draw.normal(2, S + 10, 8), draw.normal(2, S, 2)
    with tk.use_backend("triton"):
        found = tk.indexer_topk(q, k, w, top_k=9)
        for size in (1, 4 * (S + 10) * S, 1 << 24):
            with mock.patch.object(configs_sparse, "workspace", lambda size=size: size):
                assert torch.equal(tk.indexer_topk(q, k, w, top_k=9), found)
        assert torch.equal(tk.indexer_topk(q[1:, -1:], k[1:], w[1:, -1:], top_k=9), found[1:, -1:])
        leaves = [x.clone().requires_grad_() for x in (q, k, w)]
        assert torch.equal(tk.indexer_topk(*leaves, top_k=9), found)


def test_nan_and_infinite_scores() -> None:
    q, k, w = exact(torch.float32, 1, 4, 90, 2, 8)
    w = w.abs() + 1
    k[0, 30:40], k[0, 50, 0] = torch.nan, torch.inf
    q[0, 2, 1, 3] = torch.nan
    for top_k in (5, 85):
        same(q, k, w, top_k=top_k, causal=False)
    w[0, 1] = -torch.inf
    same(q, k, w, top_k=50)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_selection_of_packed_sequences(dtype: torch.dtype) -> None:
    lengths, keys = [4, 0, 9, 1], [50, 5, 40, 1]
    (q, _, w), (_, k, _) = exact(dtype, 1, sum(lengths), 1, 5, 16), exact(dtype, 1, 1, sum(keys), 5, 16)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, keys))
    for causal in (True, False):
        same(q[0], k[0], w[0], top_k=20, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=causal)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("page", [0, 1, 16])
@pytest.mark.parametrize("S", [1, 3])
def test_selection_from_caches(S: int, page: int, fp8: bool) -> None:
    """Pages in any order; what lies past a sequence's end, and in pages that do not exist, is never read."""
    counts = torch.tensor([70, 2, 0], dtype=torch.int32)
    q, k, w = exact(torch.float16, 3, S, 75, 16, 32)
    scale = torch.randint(1, 4, (3, 75)).float() if fp8 else None
    past = torch.arange(75) >= counts[:, None]
    want = reference.indexer_topk(q, k, w, top_k=40, seqlens=counts, k_scale=scale)
    k = k.masked_fill(past[..., None], torch.nan)
    k = k.to(torch.float8_e4m3fn) if fp8 else k
    table = None
    if page:
        pages, table = paged(k.float(), page, counts, 1)
        k = pages.to(k.dtype)
        if scale is not None:
            scale = paged(scale[..., None], page, counts, 1)[0][..., 0]
    same(q, k, w, want, top_k=40, seqlens=counts, block_table=table, k_scale=scale)


# ---- the loss


class Problem(indexer_problem.Problem):
    backend = "triton"


SHAPES = {
    "warm-up": Sizes(),
    "warm-up, gqa, more heads than a tile": Sizes(B=1, Hkv=2, H=36, S=5, T=70, Hi=20),
    "warm-up, more queries than keys": Sizes(S=25, T=17),
    "warm-up, one head, chunks": Sizes(B=1, S=66, T=70, Hi=1, H=1, D=16),
    "sparse": Sizes(K=9),
    "sparse, gqa, more heads than a tile": Sizes(B=1, Hkv=2, H=36, S=5, T=70, Hi=20, K=40),
    "sparse, more slots than keys": Sizes(B=1, S=6, T=25, K=40),
    "sparse, odd": Sizes(B=1, S=7, T=33, Hi=3, Di=19, H=5, D=21, K=13, scale=-0.3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if "," in n else []) for n in SHAPES])
def test_loss(name: str, dtype: torch.dtype) -> None:
    found = Problem(SHAPES[name], dtype).check()
    if SHAPES[name].K:  # no slot named a key
        assert found["loss"][0, 1] == 0 and (found["dq"][0, 1] == 0).all() and (found["dw"][0, 1] == 0).all()
    if SHAPES[name].S > SHAPES[name].T:  # queries that see nothing
        assert (found["loss"][:, : SHAPES[name].S - SHAPES[name].T] == 0).all()


@pytest.mark.parametrize("name", ["warm-up", "sparse"])
def test_loss_with_the_attention_s_lse(name: str) -> None:
    """Of other keys and with sinks it would still do: p is normalised."""
    problem = Problem(SHAPES[name], torch.float32)
    lse = Draw(5).normal(2, 12, 3)
    lse[0, 0] = -torch.inf
    problem.check(target_lse=lse)


@pytest.mark.parametrize("K", [0, 9])
def test_loss_s_bits_by_batch_and_chunk(K: int) -> None:
    problem = Problem(Sizes(B=3, S=7, K=K, H=2, Hi=2), torch.float32)
    found = problem.run()
    with mock.patch.object(configs_sparse, "workspace", lambda: 1):
        for n, x in problem.run().items():
            assert_bitwise(x, found[n], n)
    alone = Problem(dataclasses.replace(problem.sizes, B=1), torch.float32)
    alone.inputs, alone.dloss = {n: x[2:] for n, x in problem.inputs.items()}, problem.dloss[2:]
    for n, x in alone.run().items():
        assert_bitwise(x, found[n][2:], n)
    # the last queries alone: a row's loss, dq and dw are its own
    alone.inputs = {n: x if n in ("k", "target_kv") else x[:, -1:] for n, x in alone.inputs.items()}
    alone.dloss = alone.dloss[:, -1:]
    few = alone.run()
    for n in ("loss", "dq", "dw"):
        assert_bitwise(few[n], found[n][2:, -1:], n)


@pytest.mark.parametrize("name", ["warm-up", "sparse"])
def test_nan_stays_with_its_query(name: str) -> None:
    problem = Problem(dataclasses.replace(SHAPES[name], S=6, H=2, Hi=2), torch.float32)
    clean = problem.run()
    problem.inputs["q"][1, 5, 1] = torch.nan
    dirty = problem.run()
    assert dirty["loss"][1, 5].isnan() and dirty["dq"][1, 5].isnan().all()
    for n in ("loss", "dq", "dw"):
        dirty[n][1, 5] = clean[n][1, 5]
        assert_bitwise(dirty[n], clean[n], n)
    assert_bitwise(dirty["dk"][0], clean["dk"][0])


def test_nothing_there_and_what_is_not_covered() -> None:
    with tk.use_backend("triton"):
        for indices in (None, torch.empty(2, 3, 0, dtype=torch.int32)):
            q, k, w = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 2, 8), (2, 5, 8), (2, 3, 2)))
            keys = k if indices is not None else k[:, :0]
            loss = tk.indexer_loss(q, keys, w, torch.ones(2, 3, 2, 4), keys[..., :4], indices=indices, scale=1.0)
            assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (q, k, w)))
        assert tk.indexer_topk(torch.empty(0, 3, 2, 8), torch.empty(0, 5, 8), torch.empty(0, 3, 2), top_k=4).shape == (0, 3, 4)
        assert (tk.indexer_topk(torch.ones(1, 3, 2, 8), torch.empty(1, 0, 8), torch.ones(1, 3, 2), top_k=4) == -1).all()
        with pytest.raises(NotImplementedError, match="q: an index dim of 300"):
            tk.indexer_scores(torch.ones(1, 1, 1, 300), torch.ones(1, 2, 300), torch.ones(1, 1, 1))
        with pytest.raises(NotImplementedError, match="k: torch.float16 is not q's"):
            tk.indexer_scores(torch.ones(1, 1, 1, 8), torch.ones(1, 2, 8).half(), torch.ones(1, 1, 1))
