"""Random combinations of attention's features in the Triton kernels under the interpreter, forward, backward and decode.

Shapes: q [B, S, H, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv]; packed [N, H, D]; caches [B, T, Hkv, D] or pages. Every case is judged by
the rule, gradients (through out and lse) included; its number is its seed.
"""
from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest
import thinkernel as tk
import torch
from rule import assert_within
from test_attention import paged
from test_packed import offsets, packed_eager
from test_rule import DTYPES, eager
from thinkernel.kernels import attention as kernels
from thinkernel.reference import attention as reference
from thinkernel.testing.cases import Case, Inputs
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

NAN = float("nan")
HEAD_DIMS = [(32, 32), (64, 64), (128, 128), (256, 256), (192, 128), (33, 33), (77, 41), (96, 160), (250, 17)]
GROUPS = [(1, 1), (2, 2), (4, 2), (3, 1), (5, 1)]  # H, Hkv


def heads_first(x: Tensor) -> Tensor:
    """The same values as a transposed [B, H, S, D] tensor."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def part_of_more(x: Tensor) -> Tensor:
    """The same values as a slice of a tensor with twice the columns."""
    return torch.cat([x, x.detach()], -1)[..., : x.shape[-1]]


def as_it_is(x: Tensor) -> Tensor:
    return x


LAYOUTS = [as_it_is, heads_first, part_of_more]


def random_options(choose: random.Random, D: int) -> dict[str, Any]:
    """Mask and scores; a query sees several keys where it sees any (with one key, an eager gradient is exactly 0, no fused one)."""
    options: dict[str, Any] = {"causal": choose.random() < 0.6}
    if choose.random() < 0.4:
        options["window"] = choose.choice([(9, -1), (25, 0), (-1, 6), (12, 7), (60, 60)])
    if choose.random() < 0.25:
        options["chunk"] = choose.choice([37, 64])
    if choose.random() < 0.3:
        options["softcap"] = choose.choice([2.0, 15.0])
    if choose.random() < 0.3:
        options["scale"] = choose.choice([0.4, 1.3]) * D**-0.5
    return options


def random_case(seed: int, head_dims: tuple[int, int] | None = None) -> Case:
    choose = random.Random(seed)
    (D, Dv), (H, Hkv) = head_dims or choose.choice(HEAD_DIMS), choose.choice(GROUPS)
    options, sinks, layout = random_options(choose, D), choose.random() < 0.5, choose.choice(LAYOUTS)
    form = ("plain", "packed", "padded")[seed // 2 % 3]  # each meets both dtypes
    S = choose.choice([9, 24, 40, 66])
    T = S + choose.choice([8, 20, 33])
    cu = {"cu_seqlens_q": offsets([S, 0, 3]), "cu_seqlens_k": offsets([T, 4, 20])}
    padding = {"key_start": torch.tensor([0, choose.randrange(T - S)], dtype=torch.int32)}

    def inputs(draw: Draw) -> Inputs:
        more: Inputs = {"packed": cu, "padded": padding, "plain": {}}[form]
        q_rows, k_rows = ((S + 3,), (T + 24,)) if form == "packed" else ((len(padding["key_start"]), S), (len(padding["key_start"]), T))
        x: Inputs = dict(q=draw.normal(*q_rows, H, D), k=draw.normal(*k_rows, Hkv, D), v=draw.normal(*k_rows, Hkv, Dv), **more)
        return x | ({"sinks": draw.normal(H)} if sinks else {})

    def run(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        return tk.attention(layout(q), layout(k), layout(v), **more, **options, return_lse=True)

    def baseline(**x: Any) -> Any:
        return (packed_eager if form == "packed" else eager)(**x, **options)

    name = f"{seed}: {form}, {layout.__name__}, S {S} T {T} H {H}/{Hkv} D {D}/{Dv} sinks {sinks} {options}"
    return Case("attention", name, inputs, run, ("q", "k", "v", "sinks") if sinks else ("q", "k", "v"), baseline)


@pytest.mark.parametrize("seed", range(8))
def test_random_calls(seed: int) -> None:
    assert_within(random_case(seed), DTYPES[seed % 2], 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("seed", range(100, 112))
def test_random_calls_at_every_head_dim(seed: int, head_dims: tuple[int, int], dtype: torch.dtype) -> None:
    assert_within(random_case(seed, head_dims), dtype, 3)


def random_decode(seed: int, dtype: torch.dtype) -> None:
    """Dense against the rule, then pages of an odd size, and a part of the keys as a shared prefix: the same bits."""
    choose = random.Random(seed)
    (D, Dv), (H, Hkv) = choose.choice(HEAD_DIMS), choose.choice(GROUPS)
    Sq, page, B = choose.randint(1, 16), choose.choice([1, 3, 5, 16, 33]), 2
    T = Sq + choose.choice([8, 50, 140])
    options = random_options(choose, D)
    options |= {"sinks": torch.randn(H)} if choose.random() < 0.4 else {}
    lengths = [T, choose.randint(Sq, T)]
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    q, k, v = torch.randn(B, Sq, H, D).to(dtype), torch.randn(B, T, Hkv, D).to(dtype), torch.randn(B, T, Hkv, Dv).to(dtype)
    shared = choose.randrange(lengths[1] + 1)
    k[:, :shared], v[:, :shared] = k[:1, :shared].clone(), v[:1, :shared].clone()
    past = torch.arange(T)[None, :, None, None] >= seqlens[:, None, None, None]
    dense = [x.masked_fill(past, NAN) for x in (k, v)]
    (k_pages, table), (v_pages, _) = (paged(x, page, seqlens, seed) for x in (k, v))
    calls: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
        "dense": (*dense, dict(seqlens=seqlens)),
        "strided": (*(part_of_more(heads_first(x)) for x in dense), dict(seqlens=seqlens)),
        "paged": (k_pages, v_pages, dict(seqlens=seqlens, block_table=table)),
        "prefix": (*(x[:, shared:] for x in dense), dict(seqlens=seqlens - shared, prefix=(k[0, :shared], v[0, :shared], shared, None))),
    }
    results = {}
    for name, (k_cache, v_cache, more) in calls.items():
        out, lse = torch.full((B, Sq, H, Dv), NAN, dtype=dtype), torch.full((B, Sq, H), NAN)
        kernels.attention_decode(q, k_cache, v_cache, out, lse, **more, **options)
        results[name] = (out, lse)
    truth = reference.attention_decode(q.double(), k.double(), v.double(), seqlens=seqlens, **options)
    rows = [eager(q[[b]], k[[b], :n], v[[b], :n], **options) for b, n in enumerate(lengths)]
    about = f"H {H}/{Hkv} D {D}/{Dv} Sq {Sq} T {lengths} page {page} prefix {shared} {options}"
    for i, name in enumerate(("out", "lse")):
        check(results["dense"][i], truth[i].double(), torch.cat([row[i] for row in rows]), name=f"{name}, {about}")
        for other in ("strided", "paged", "prefix"):
            assert_bitwise(results[other][i], results["dense"][i], f"{name}, {other}, {about}")


@pytest.mark.parametrize("seed", range(6))
def test_random_decodes(seed: int) -> None:
    random_decode(seed, DTYPES[seed % 2])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("seed", range(100, 180))
def test_random_decodes_at_length(seed: int, dtype: torch.dtype) -> None:
    random_decode(seed, dtype)


def test_a_transposed_view_is_not_copied() -> None:
    q, k, v = (heads_first(torch.randn(1, n, h, 16)) for n, h in ((4, 2), (6, 1), (6, 1)))
    with mock.patch.object(kernels, "attention_forward", wraps=kernels.attention_forward) as launched, tk.use_backend("triton"):
        tk.attention(q, k, v, causal=True)
    for given, taken in zip((q, k, v), launched.call_args.args, strict=False):
        assert taken.data_ptr() == given.data_ptr() and taken.stride() == given.stride()
