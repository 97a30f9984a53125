"""sparse_attention in C++: forward and backward against float64, and bit for bit against itself in other batches and threads.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, D head dim, Dv value dim, K slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import thinkernel as tk
import torch
from cache_pages import paged
from cpu_levels import level as level  # every test runs on every ISA level
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_problem import Problem, Sizes
from thinkernel.ops.dispatch import C
from thinkernel.reference import sparse as reference
from thinkernel.reference.mla import dequantize_latent, quantize_latent
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "sparse_forward"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


SHAPES = {
    "few": Sizes(),
    "sinks": Sizes(sinks=True, H=5),
    "latents": Sizes(B=1, S=3, T=700, H=16, D=576, Dv=512, K=600, scale=0.07),
    "32 heads": Sizes(B=1, S=2, T=300, H=32, D=96, Dv=64, K=290, sinks=True),
    "47 heads": Sizes(B=1, S=2, T=90, H=47, D=64, Dv=64, K=70),
    "300 heads": Sizes(B=1, S=1, T=40, H=300, D=32, Dv=32, K=33, sinks=True),
    "one head, odd dims": Sizes(H=1, D=37, Dv=19, K=33, T=50),
    "gqa": Sizes(H=8, Hkv=2, D=64, Dv=64, K=40, T=60),
    "gqa, other value dim": Sizes(H=6, Hkv=3, D=40, Dv=72, K=10, sinks=True),
    "mha": Sizes(H=4, Hkv=4, D=16, Dv=16),
    "one slot": Sizes(K=1),
    "one key": Sizes(S=1, T=1, K=3),
    "more slots than keys": Sizes(T=20, K=64),
    "negative scale": Sizes(scale=-0.2, sinks=True),
    "keys of several blocks": Sizes(B=1, S=4, T=2500, H=4, D=32, Dv=32, K=1100),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtype):
    found = Problem(SHAPES[name], dtype).check()
    if SHAPES[name].S > 1:
        assert (found["out"][0, 1] == 0).all() and found["lse"][0, 1].isneginf().all() and (found["dq"][0, 1] == 0).all()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    Hkv = data.draw(st.sampled_from([0, 1, 2]))
    D = draw(9, 70)
    sizes = Sizes(  # of fewer numbers the largest error is a matter of luck, in float32 of these too
        B=draw(2, 3), S=draw(6, 9), T=draw(1, 80), H=draw(3, 20) * max(Hkv, 1), D=D, Dv=draw(9, 70) if Hkv else draw(9, D), K=draw(1, 90),
        Hkv=Hkv, sinks=data.draw(st.booleans()),
    )  # fmt: skip
    Problem(sizes, data.draw(st.sampled_from(DTYPES[1:])), seed=draw(0, 2**32)).check()


def test_many_queries():
    """More of them than one chunk of the backward holds."""
    Problem(Sizes(B=1, S=300, T=400, H=2, D=32, Dv=32, K=24), torch.float32).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Hkv", [0, 2])
def test_packed_is_each_sequence_alone(Hkv, dtype):
    lengths, keys = [4, 0, 7, 1], [30, 5, 50, 1]
    draw = Draw(3, dtype)
    q = draw.normal(sum(lengths), 6, 48)
    parts = [draw.normal(sum(keys), Hkv, 48), draw.normal(sum(keys), Hkv, 32)] if Hkv else [draw.normal(sum(keys), 48)]
    slots = [draw.selected(1, max(n, 1), max(t, n), 9)[0] for n, t in zip(lengths, keys)]
    slots = [torch.nn.functional.pad(x, (0, 9 - x.shape[-1]), value=-1)[:n] for x, n in zip(slots, lengths)]
    slots = [x[:, None].expand(-1, Hkv, -1) for x in slots] if Hkv else slots
    dout = draw.normal(sum(lengths), 6, 32)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, keys))

    def run(q: Tensor, parts: list[Tensor], indices: Tensor, dout: Tensor, **options: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, *parts)]
        kv = tuple(leaves[1:]) if Hkv else leaves[1]
        out, lse = tk.sparse_attention(leaves[0], kv, indices, value_dim=None if Hkv else 32, return_lse=True, **options)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]

    found = run(q, parts, torch.cat(slots), dout, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    at = key = 0
    for n, t, indices in zip(lengths, keys, slots):
        rows, own = slice(at, at + n), slice(key, key + t)
        alone = run(q[None, rows], [x[None, own] for x in parts], indices[None], dout[None, rows])
        for i, (x, want) in enumerate(zip(found, alone)):
            assert_bitwise(x[rows if i < 3 else own], want[0])
        at, key = at + n, key + t


@pytest.mark.parametrize("page", [None, 1, 16])
@pytest.mark.parametrize("kind", ["latents", "gqa", "fp8"])
def test_caches(kind, page):
    """Slots past a sequence's end are empty and what lies there is never read."""
    dtype, counts = torch.bfloat16, [70, 3, 33]
    draw = Draw(5, dtype)
    D, Dv, T, K = (576, 512, 80, 40) if kind == "fp8" else (64, 48, 80, 40)
    q = draw.normal(3, 2, 4, D)
    indices = torch.stack([draw.permutation(T)[:K].sort().values for _ in range(6)]).view(3, 2, K).int()
    indices[0, 1, 5:] = -1
    parts = [draw.normal(3, T, 2, D), draw.normal(3, T, 2, Dv)] if kind == "gqa" else [draw.normal(3, T, D)]
    if kind == "gqa":
        indices = indices[:, :, None].expand(-1, -1, 2, -1)
    if kind == "fp8":
        parts = [quantize_latent(parts[0][..., :Dv], parts[0][..., Dv:])]
    for x in parts:
        for b, n in enumerate(counts):
            x[b, n:] = 0x7F if kind == "fp8" else float("nan")
    table, given = None, parts
    if page is not None:
        made = [paged(x, counts, page, Draw(6)) for x in parts]
        given, table = [x for x, _ in made], made[0][1]
    seqlens = torch.tensor(counts, dtype=torch.int32)

    def run(function: Any, q: Tensor, kv: Any, **more: Any) -> tuple[Tensor, Tensor]:
        kv = tuple(kv) if kind == "gqa" else kv[0]
        return function(q, kv, indices, value_dim=None if kind == "gqa" else Dv, seqlens=seqlens, block_table=table, **more)

    found = run(tk.sparse_attention, q, given, return_lse=True)
    wide = [dequantize_latent(x) if kind == "fp8" else x for x in given]
    ref64 = run(reference.sparse_attention, q.double(), [x.double() for x in wide])
    base = run(reference.sparse_attention, q, wide)
    for name, x, want, near in zip(("out", "lse"), found, ref64, base):
        check(x, want, near, name=name)


def test_gradient_of_a_cache():
    """A cache that is no pages has a gradient, zero past a sequence's end."""
    draw = Draw(2)
    q, kv, indices = draw.normal(2, 3, 2, 16), draw.normal(2, 30, 16), draw.selected(2, 3, 30, 12)
    seqlens = torch.tensor([18, 30], dtype=torch.int32)

    def run(function: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        a, b = q.to(dtype).requires_grad_(), kv.to(dtype).requires_grad_()
        out = function(a, b, indices, seqlens=seqlens)
        return torch.autograd.grad((out if isinstance(out, Tensor) else out[0]).square().sum(), (a, b))

    found = run(tk.sparse_attention, torch.float32)
    for x, want, base in zip(found, run(reference.sparse_attention, torch.float64), run(reference.sparse_attention, torch.float32)):
        check(x, want, base)
    assert (found[1][0, 18:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [SHAPES["keys of several blocks"], Sizes(B=3, S=150, H=6, Hkv=2, K=30), Sizes(B=1, S=2, T=2000, K=1800)])
def test_bits_by_threads_and_batch(sizes, dtype):
    problem = Problem(sizes, dtype)
    found = problem.ours()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for name, x in problem.ours().items():
            assert_bitwise(x, found[name], name)
    b = sizes.B - 1
    alone = Problem(dataclasses.replace(sizes, B=1), dtype)
    alone.inputs = {n: x if n == "sinks" else x[b:] for n, x in problem.inputs.items()}
    alone.indices, alone.dout, alone.dlse = problem.indices[b:], problem.dout[b:], problem.dlse[b:]
    for name, x in alone.ours().items():
        assert_bitwise(x, found[name][b:], name)
    # queries alone, keys from their own splits
    q, kv = problem.inputs["q"][b:, :1], problem.inputs["k"][b:]
    kv = (kv, problem.inputs["v"][b:]) if sizes.Hkv else kv
    one = tk.sparse_attention(q, kv, problem.indices[b:, :1], value_dim=None if sizes.Hkv else sizes.Dv)
    assert_bitwise(one, found["out"][b:, :1])


def test_nan_stays_with_its_query_and_its_key():
    problem = Problem(Sizes(B=1, S=6), torch.float32)
    clean = problem.ours()
    problem.inputs["q"][0, 5, 1] = torch.nan
    dirty = problem.ours()
    assert dirty["out"][0, 5, 1].isnan().all()
    assert_bitwise(dirty["out"][0, :5], clean["out"][0, :5])
    assert_bitwise(dirty["out"][0, 5, 0], clean["out"][0, 5, 0])
    named = set(problem.indices[0, 5].tolist())
    others = [j for j in range(problem.sizes.T) if j not in named]
    assert_bitwise(dirty["dk"][0, others], clean["dk"][0, others])
    unread = [j for j in range(problem.sizes.T) if not (problem.indices == j).any()]
    problem.inputs["k"][0, unread] = torch.nan
    again = problem.ours()
    assert_bitwise(again["out"], dirty["out"])
    assert (again["dk"][0, unread] == 0).all()


def test_strided_inputs():
    problem = Problem(SHAPES["gqa"], torch.bfloat16)
    want = problem.ours(grads=False)
    problem.inputs = {n: torch.stack((x, x), -2).flatten(-3, -2)[..., ::2, :] for n, x in problem.inputs.items()}
    assert not problem.inputs["k"].is_contiguous()
    assert_bitwise(problem.ours(grads=False)["out"], want["out"])


def test_nothing_there():
    empty = torch.empty(0, 3, 2, 16, requires_grad=True)
    out = tk.sparse_attention(empty, torch.empty(0, 5, 16), torch.empty(0, 3, 4, dtype=torch.int32))
    assert out.shape == (0, 3, 2, 16)
    q, kv = torch.randn(2, 3, 2, 16, requires_grad=True), torch.randn(2, 5, 16, requires_grad=True)
    out, lse = tk.sparse_attention(q, kv, torch.empty(2, 3, 0, dtype=torch.int32), return_lse=True)
    assert (out == 0).all() and lse.isneginf().all()
    dq, dkv = torch.autograd.grad(out.sum(), (q, kv))
    assert (dq == 0).all() and (dkv == 0).all()
