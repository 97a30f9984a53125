"""Triton sparse_attention under the interpreter: forward, backward and caches by the rule, and the bits that must not move.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, D head dim, Dv value dim, K slots. A tile has 16 heads of one query and 32
slots here, a split 64 slots.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import sparse_problem
import thinkernel as tk
import torch
from rule import assert_within
from test_attention import paged
from test_rule import DTYPES
from thinkernel.kernels import sparse_attention_backward as backward_kernels
from thinkernel.reference import sparse as reference
from thinkernel.reference.mla import dequantize_latent, quantize_latent
from thinkernel.testing.cases import CASES, Case
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

NAN = float("nan")


@dataclasses.dataclass
class Sizes(sparse_problem.Sizes):
    B: int = 1
    S: int = 4
    D: int = 24
    Dv: int = 16


class Problem(sparse_problem.Problem):
    backend = "triton"


SHAPES = {
    "few heads, sinks": Sizes(B=2, sinks=True),
    "two blocks of heads, several splits": Sizes(S=3, T=150, H=17, D=40, Dv=32, K=140, sinks=True),
    "all of it value, odd": Sizes(H=5, D=19, Dv=19, K=33),
    "gqa, sinks": Sizes(B=2, S=3, H=6, Hkv=2, D=16, Dv=24, K=9, sinks=True),
    "mha, odd dims, one slot": Sizes(H=2, Hkv=2, D=37, Dv=9, K=1, S=9),
    "more slots than keys": Sizes(T=6, K=20),
}
SLOW = {
    "latents": Sizes(S=2, T=90, H=16, D=576, Dv=512, K=70, scale=0.07),
    "gqa of many heads, splits": Sizes(S=2, T=90, H=40, Hkv=2, D=96, Dv=64, K=80),
    "one key": Sizes(B=12, S=1, T=1, K=3),  # rows enough that torch's largest error is not luck
    "many queries": Sizes(S=60, T=60, H=2, K=24),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", [*SHAPES, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    sizes = (SHAPES | SLOW)[name]
    found = Problem(sizes, dtype).check()
    if sizes.S > 1:
        assert (found["out"][0, 1] == 0).all() and found["lse"][0, 1].isneginf().all() and (found["dq"][0, 1] == 0).all()


@pytest.mark.parametrize("Hkv", [0, 2])
def test_bits_by_run_batch_and_chunk(Hkv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again; with the backward's pairs one query at a time; the second row of the batch alone; and slots that are empty behind it."""
    sizes = Sizes(B=2, S=3, T=30, H=4, Hkv=Hkv, D=16, Dv=16, K=9, sinks=True)
    problem = Problem(sizes, torch.float16)
    found = problem.ours()
    run = backward_kernels.sparse_attention_backward
    monkeypatch.setattr(backward_kernels, "sparse_attention_backward", lambda *a, **b: run(*a, **b, pair_bytes=1))
    for name, x in problem.ours().items():
        assert_bitwise(x, found[name], f"{name}, in chunks")
    alone = Problem(dataclasses.replace(sizes, B=1), torch.float16)
    alone.inputs = {n: x if n == "sinks" else x[1:] for n, x in problem.inputs.items()}
    alone.indices, alone.dout, alone.dlse = problem.indices[1:], problem.dout[1:], problem.dlse[1:]
    for name, x in alone.ours().items():
        if name != "dsinks":
            assert_bitwise(x, found[name][1:], f"{name}, alone")
    alone.indices = torch.nn.functional.pad(alone.indices, (0, 70), value=-1)  # more splits, nothing in them
    padded = alone.ours(grads=False)
    for name in ("out", "lse"):
        assert_bitwise(padded[name], found[name][1:], f"{name}, padded")


def test_a_query_alone_and_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several splits, their buffer big enough for one query at a time."""
    problem = Problem(Sizes(S=3, T=150, K=130), torch.float32)
    found = problem.ours(grads=False)
    monkeypatch.setattr("thinkernel.kernels.sparse_attention.PART_BYTES", 1)
    for name, x in problem.ours(grads=False).items():
        assert_bitwise(x, found[name], name)
    problem.inputs["q"], problem.indices = problem.inputs["q"][:, 2:], problem.indices[:, 2:]
    for name, x in problem.ours(grads=False).items():
        assert_bitwise(x, found[name][:, 2:], name)


@pytest.mark.parametrize("Hkv", [0, 2])
def test_packed_is_each_sequence_alone(Hkv: int) -> None:
    lengths, keys, draw = [2, 0, 3], [9, 5, 12], Draw(3, torch.float16)
    q = draw.normal(sum(lengths), 4, 24)
    parts = [draw.normal(sum(keys), Hkv, 24), draw.normal(sum(keys), Hkv, 16)] if Hkv else [draw.normal(sum(keys), 24)]
    slots = [draw.selected(1, max(n, 1), t, 5)[0][:n] for n, t in zip(lengths, keys, strict=True)]
    slots = [x[:, None].expand(-1, Hkv, -1) for x in slots] if Hkv else slots
    dout = draw.normal(sum(lengths), 4, 16)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, keys))

    def run(q: Tensor, parts: list[Tensor], indices: Tensor, dout: Tensor, **options: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, *parts)]
        kv = tuple(leaves[1:]) if Hkv else leaves[1]
        with tk.use_backend("triton"):
            out, lse = tk.sparse_attention(leaves[0], kv, indices, value_dim=None if Hkv else 16, return_lse=True, **options)
            return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]

    found = run(q, parts, torch.cat(slots), dout, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    at = key = 0
    for n, t, indices in zip(lengths, keys, slots, strict=True):
        rows, own = slice(at, at + n), slice(key, key + t)
        if n:
            alone = run(q[None, rows], [x[None, own] for x in parts], indices[None], dout[None, rows])
            for i, (x, want) in enumerate(zip(found, alone, strict=True)):
                assert_bitwise(x[rows if i < 3 else own], want[0])
        else:
            assert all((x[own] == 0).all() for x in found[3:])
        at, key = at + n, key + t


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ["latents", "gqa", "fp8"])
def test_caches(kind: str, dtype: torch.dtype) -> None:
    """A cache, poisoned past every end, by the rule; in pages: the same bits. What lies past the end is no key."""
    counts, T, draw = [25, 3], 28, Draw(5, dtype)
    D, Dv = (576, 512) if kind == "fp8" else (24, 16)
    q = draw.normal(2, 1, 4, D)
    indices = torch.stack([draw.permutation(T)[:20] for _ in range(2)]).view(2, 1, 20).int()
    indices[0, 0, 15:] = -1
    parts = [draw.normal(2, T, 2, D), draw.normal(2, T, 2, Dv)] if kind == "gqa" else [draw.normal(2, T, D)]
    if kind == "gqa":
        indices = indices[:, :, None].expand(-1, -1, 2, -1)
    if kind == "fp8":
        parts = [quantize_latent(parts[0][..., :Dv], parts[0][..., Dv:])]
    seqlens = torch.tensor(counts, dtype=torch.int32)
    for x in parts:
        for b, n in enumerate(counts):
            x[b, n:] = 0x7F if kind == "fp8" else NAN

    def run(function: Any, q: Tensor, parts: list[Tensor], **more: Any) -> tuple[Tensor, Tensor]:
        kv = tuple(parts) if kind == "gqa" else parts[0]
        return function(q, kv, indices, value_dim=None if kind == "gqa" else Dv, seqlens=seqlens, **more)

    wide = [dequantize_latent(x) if kind == "fp8" else x for x in parts]
    ref64 = run(reference.sparse_attention, q.double(), [x.double() for x in wide])
    base = run(reference.sparse_attention, q, [x.to(dtype) for x in wide])
    made = [paged(x, 8, seqlens, 3) for x in parts] if kind != "fp8" else [fp8_pages(parts[0], 7)]
    with tk.use_backend("triton"):
        found = run(tk.sparse_attention, q, parts, return_lse=True)
        again = run(tk.sparse_attention, q, [x for x, _ in made], block_table=made[0][1], return_lse=True)
    for i, name in enumerate(("out", "lse")):
        check(found[i], ref64[i], base[i], name=name)
        assert_bitwise(again[i], found[i], f"{name}, pages")


def fp8_pages(cache: Tensor, page: int) -> tuple[Tensor, Tensor]:
    B, T, width = cache.shape
    order = torch.randperm(B * T // page)
    pages = torch.full((len(order) + 1, page, width), 0x7F, dtype=torch.uint8)
    pages[order] = cache.view(-1, page, width)
    return pages, order.view(B, -1).int()


def test_gradient_of_a_cache_and_of_a_part_of_the_results() -> None:
    draw = Draw(2)
    q, kv, indices = draw.normal(2, 2, 2, 16), draw.normal(2, 12, 16), draw.selected(2, 2, 12, 8)
    seqlens = torch.tensor([7, 12], dtype=torch.int32)

    def run(function: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        a, b = q.to(dtype).requires_grad_(), kv.to(dtype).requires_grad_()
        lse = function(a, b, indices, seqlens=seqlens)[1]
        return torch.autograd.grad(lse.square().sum(), (a, b))

    with tk.use_backend("triton"):
        found = run(lambda *a, **b: tk.sparse_attention(*a, **b, return_lse=True), torch.float32)
    for x, want, base in zip(found, run(reference.sparse_attention, torch.float64), run(reference.sparse_attention, torch.float32),
                             strict=True):
        check(x, want, base)
    assert (found[1][0, 7:] == 0).all()


def test_nan_stays_with_its_query_and_its_key() -> None:
    problem = Problem(Sizes(S=4, T=12, K=4), torch.float32)
    clean = problem.ours()
    problem.inputs["q"][0, 3, 1] = NAN
    unread = [j for j in range(12) if not (problem.indices == j).any()]
    problem.inputs["k"][0, unread] = NAN
    dirty = problem.ours()
    assert unread and dirty["out"][0, 3, 1].isnan().all()
    assert_bitwise(dirty["out"][0, :3], clean["out"][0, :3])
    assert_bitwise(dirty["out"][0, 3, 0], clean["out"][0, 3, 0])
    named = set(problem.indices[0, 3].tolist())
    others = [j for j in range(12) if j not in named]
    assert_bitwise(dirty["dk"][0, others], clean["dk"][0, others])
    assert (dirty["dk"][0, unread] == 0).all()


def test_slots_that_name_no_key_and_strides() -> None:
    """Positions out of range count as empty where nothing checks them (on a GPU); 64-bit ones do not wrap to a key."""
    from thinkernel.ops import sparse_attention_gpu as launchers

    draw = Draw(1)
    q, kv = draw.normal(1, 2, 3, 24), draw.normal(1, 10, 24)
    good = torch.tensor([[[3, 7, -1, -1], [0, -1, 9, -1]]])
    bad = torch.tensor([[[3, 7, 10, 2**31 - 1], [0, -(2**40), 9, 2**32 + 5]]])
    rest = (None, None, None, None, None, 16, 0.2)
    want = launchers.attention(q, kv, None, good, *rest)
    moved = q.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([kv, kv], -1)[..., :24]
    for got in (launchers.attention(q, kv, None, bad, *rest), launchers.attention(*moved, None, good, *rest)):
        for x, y in zip(got, want, strict=True):
            assert_bitwise(x, y)
    grads = [torch.ones_like(want[0]), None]
    gradients = [launchers.backward(grads, *want, *given, *rest) for given in (
        (q, kv, None, good), (q, kv, None, bad), (*moved, None, good))]
    for i in range(2):
        assert_bitwise(gradients[1][i], gradients[0][i])
        assert_bitwise(gradients[2][i], gradients[0][i])


def test_nothing_there() -> None:
    with tk.use_backend("triton"):
        empty = torch.empty(0, 3, 2, 16, requires_grad=True)
        out = tk.sparse_attention(empty, torch.empty(0, 5, 16), torch.empty(0, 3, 4, dtype=torch.int32))
        assert out.shape == (0, 3, 2, 16)
        for T, K in ((5, 0), (0, 3)):
            q, kv = torch.randn(2, 3, 2, 16, requires_grad=True), torch.randn(2, T, 16, requires_grad=True)
            out, lse = tk.sparse_attention(q, kv, torch.full((2, 3, K), -1, dtype=torch.int32), return_lse=True)
            assert (out == 0).all() and lse.isneginf().all()
            dq, dkv = torch.autograd.grad(out.sum(), (q, kv))
            assert (dq == 0).all() and (dkv == 0).all()


def test_what_is_not_covered_is_named() -> None:
    def call(name: str, q: Tensor, kv: Any, **options: Any) -> None:
        indices = torch.zeros(*q.shape[:2], *((1,) if isinstance(kv, tuple) else ()), 2, dtype=torch.int32)
        with tk.use_backend("triton"), pytest.raises(NotImplementedError, match=f": {name}: "):
            out = tk.sparse_attention(q, kv, indices, **options)
            out.sum().backward()

    q, kv = torch.randn(1, 1, 2, 600), torch.randn(1, 4, 600)
    call("value_dim", q, kv)
    call("kv", q, kv, value_dim=32)
    call("scale", q, kv, value_dim=512, scale=-1.0)
    call("kv", q, (kv[:, :, None], kv[:, :, None]))
    call("q", q.double(), kv.double(), value_dim=512)
    pages = dict(seqlens=torch.tensor([4]), block_table=torch.zeros(1, 1, dtype=torch.int32))
    call("block_table", q[..., :64].detach().requires_grad_(), kv[..., :64], **pages)
    assert "triton" in explained(q[..., :64], kv[..., :64])


def explained(q: Tensor, kv: Tensor) -> str:
    with tk.use_backend("triton"):
        return tk.explain(tk.sparse_attention, q, kv, torch.zeros(*q.shape[:2], 2, dtype=torch.int32))


def validated() -> list[Any]:
    """The op's cases; by default one, the shapes above being much the same."""
    cases = [(c, dtype) for c in CASES if c.name.startswith("sparse/attention") for dtype in DTYPES]
    quick = [pytest.mark.slow], []
    return [pytest.param(c, d, id=f"{c}-{str(d)[6:]}", marks=quick["gqa" in c.name and d == torch.float16]) for c, d in cases]


@pytest.mark.parametrize(("case", "dtype"), validated())
def test_within_the_rule(case: Case, dtype: torch.dtype) -> None:
    assert_within(case, dtype, 1)
