"""Triton mla under the interpreter: decode by the rule, the bits that must not move, FP8 and the cache's kernels bit for bit.

Shapes: q [B, Sq, H, D], latents [B, T, D] or pages [P, page, D], L the value's columns. A tile has 64 (query, head) rows and 32 keys
here, a split 64 keys.
"""
from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import thinkernel as tk
import torch
from rule import assert_within
from test_attention import paged
from test_rule import DTYPES, eager
from thinkernel.kernels import mla as kernels
from thinkernel.reference import mla as reference
from thinkernel.testing.cases import CASES, Case
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

NAN = float("nan")


def decode(q: Tensor, kv: Tensor, L: int, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = torch.full((*q.shape[:3], L), NAN, dtype=q.dtype), torch.full(q.shape[:3], NAN)
    kernels.mla_decode(q, kv, out, lse, scale=0.15, **options)
    return out, lse


def baseline(q: Tensor, rows: list[Tensor], L: int) -> list[Tensor]:
    """torch's attention of each sequence over its latents [n, D], all heads on one key head."""
    found = [eager(q[[b]], kv[None, :, None], kv[None, :, None, :L], scale=0.15) for b, kv in enumerate(rows)]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


DECODE = {  # B, Sq, T, H, D, L, seqlens
    "one split, one head": (3, 8, 60, 1, 40, 32, [60, 8, 0]),
    "several splits": (2, 1, 150, 16, 40, 32, [150, 65]),
    "speculative, odd sizes": (2, 5, 130, 7, 29, 20, [130, 6]),
    "more rows than a tile": (1, 2, 70, 33, 24, 16, [70]),
    "all of it value": (2, 1, 70, 12, 32, 32, [64, 70]),
    "512 + 64": (2, 4, 70, 16, 576, 512, [70, 33]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", DECODE.values(), ids=DECODE.keys())
def test_decode(case: tuple, dtype: torch.dtype) -> None:
    """A dense cache against float64; then pages of 7, and a part of the latents as a shared prefix, dense and paged: the same bits."""
    B, Sq, T, H, D, L, lengths = case
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    q, kv = torch.randn(B, Sq, H, D).to(dtype), torch.randn(B, T, D).to(dtype)
    shared = min(lengths) if B == 1 else min(max(min(lengths) - 1, 0), 67)
    kv[:, :shared] = kv[:1, :shared].clone()
    past = torch.arange(T)[None, :, None] >= seqlens[:, None, None]
    got = decode(q, kv.masked_fill(past, NAN), L, seqlens=seqlens)
    want = reference.mla_decode(q.double(), kv.double(), seqlens=seqlens, value_dim=L, scale=0.15)
    base = baseline(q, [kv[b, :n] for b, n in enumerate(lengths)], L)
    for i, name in enumerate(("out", "lse")):
        check(got[i], want[i].double(), base[i], name=name)
    pages, table = paged(kv, 7, seqlens, 1)
    others = {"paged": decode(q, pages, L, seqlens=seqlens, block_table=table)}
    if shared:
        own = kv.masked_fill(past, NAN)[:, shared:]
        prefix_pages, prefix_table = paged(kv[:1, :shared], 5, torch.tensor([shared]), 2)
        own_pages, own_table = paged(kv[:, shared:], 7, seqlens - shared, 3)
        others["prefix"] = decode(q, own, L, seqlens=seqlens - shared, prefix=(kv[0, :shared], shared, None))
        others["paged prefix"] = decode(
            q, own_pages, L, seqlens=seqlens - shared, block_table=own_table, prefix=(prefix_pages, shared, prefix_table[0]))
    for name, other in others.items():
        assert_bitwise(other[0], got[0], f"out, {name}")
        assert_bitwise(other[1], got[1], f"lse, {name}")


def test_prefix_of_whole_splits_is_read_once_for_the_batch() -> None:
    B, H, L = 5, 13, 16  # 65 rows: two tiles of the shared splits
    q, kv, shared = torch.randn(B, 1, H, 24), torch.randn(B, 20, 24), torch.randn(150, 24)
    seqlens = torch.randint(1, 21, (B,), dtype=torch.int32)
    want = decode(q, torch.cat([shared.expand(B, -1, -1), kv], 1), L, seqlens=seqlens + 150)
    got = decode(q, kv, L, seqlens=seqlens, prefix=(shared, 150, None))
    assert_bitwise(got[0], want[0], "out")
    assert_bitwise(got[1], want[1], "lse")


def test_a_row_alone_in_a_batch_and_among_fewer_heads() -> None:
    q, kv = torch.randn(3, 2, 5, 40).half(), torch.randn(3, 130, 40).half()
    seqlens = torch.tensor([130, 70, 20], dtype=torch.int32)
    out, lse = decode(q, kv, 32, seqlens=seqlens)
    alone = decode(q[1:2, :, 2:3], kv[1:2, :90], 32, seqlens=seqlens[1:2])
    assert_bitwise(alone[0], out[1:2, :, 2:3])
    assert_bitwise(alone[1], lse[1:2, :, 2:3])
    last = decode(q[:, 1:], kv, 32, seqlens=seqlens)  # one query token of the two
    assert_bitwise(last[0], out[:, 1:])


def test_each_latent_is_loaded_once() -> None:
    """No tile is loaded as a value: the kernel is told that the key's first columns are."""
    q, kv = torch.randn(1, 1, 2, 40), torch.randn(1, 10, 40)
    with mock.patch("thinkernel.kernels.attention_decode.launch") as launched:
        decode(q, kv, 32, seqlens=torch.tensor([10], dtype=torch.int32))
    assert launched.call_args.kwargs["LATENT"] and launched.call_args.kwargs["BLOCK_D"] == launched.call_args.kwargs["BLOCK_DV"]


def test_a_page_number_outside_the_cache_counts_as_empty() -> None:
    q, pages = torch.randn(1, 1, 4, 24), torch.randn(3, 16, 24)
    seqlens = torch.tensor([40], dtype=torch.int32)
    want = decode(q, torch.cat([pages[2], pages[0, :8]])[None], 16, seqlens=torch.tensor([24], dtype=torch.int32))
    for missing in (3, -1, 2**31 - 1):
        table = torch.tensor([[2, missing, 0]], dtype=torch.int32)
        got = decode(q, pages, 16, seqlens=seqlens, block_table=table)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_row_and_empty_calls_pass() -> None:
    q, kv = torch.randn(2, 1, 3, 24), torch.randn(2, 20, 24)
    seqlens = torch.tensor([20, 20], dtype=torch.int32)
    clean, _ = decode(q, kv, 16, seqlens=seqlens)
    q[1, 0, 2, 5] = NAN
    out, lse = decode(q, kv, 16, seqlens=seqlens)
    assert out[1, 0, 2].isnan().all() and lse[1, 0, 2].isnan()
    clean[1, 0, 2] = NAN
    assert_bitwise(out, clean)
    for B, Sq, H in ((0, 1, 2), (2, 0, 2), (2, 1, 0)):
        assert decode(torch.randn(B, Sq, H, 24), kv[:B], 16, seqlens=seqlens[:B])[0].numel() == 0
    out, lse = decode(torch.randn(1, 1, 2, 24), torch.randn(1, 0, 24), 16, seqlens=torch.zeros(1, dtype=torch.int32))
    assert (out == 0).all() and lse.isneginf().all()


# ---- the FP8 cache


def latents(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latents of all magnitudes that the layout has to hold, and rotary keys."""
    latent = torch.randn(*shape, 512) * 10.0 ** torch.randint(-9, 4, (*shape, 1))
    return latent.to(dtype), torch.randn(*shape, 64).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("page", [0, 3])
def test_append_writes_the_references_bytes(page: int, dtype: torch.dtype) -> None:
    latent, rope = latents(3, 4, dtype=dtype)
    latent[0, 0] = 0
    latent[0, 1, :9] = torch.tensor([0.0, -0.0, NAN, -NAN, 1e-9, -1e-9, 3.0, float("inf"), 448.0]).to(dtype)
    latent[0, 2] = torch.linspace(-(2.0**-4), 2.0**-4, 512)  # every subnormal code of a scale of 1, rounded from between
    latent[0, 2, ::128] = 448.0
    latent[0, 3] = 448.0 * 2.0 ** torch.arange(-3, 1).repeat_interleave(128)  # scales that are powers of two exactly
    seqlens = torch.tensor([9, 2, 0], dtype=torch.int32)  # the second and third rows drop what lies before their first place
    table = torch.tensor([[4, 0, 2], [5, -1, 9], [-1, -1, -1]], dtype=torch.int32) if page else None
    for kind in (torch.uint8, torch.float32, torch.bfloat16, torch.float16):
        width = 656 if kind == torch.uint8 else 576
        shape = (7, page, width) if page else (3, 10, width)
        mine, theirs = (torch.full(shape, 0x55, dtype=kind) for _ in range(2))
        reference.append_latent(theirs, latent, rope, seqlens=seqlens, block_table=table)
        kernels.append_latent(mine, latent, rope, seqlens=seqlens, block_table=table)
        if kind != torch.uint8:  # what a NaN's bits are is no promise
            assert_bitwise(mine.isnan(), theirs.isnan())
            mine, theirs = mine.nan_to_num(7.0), theirs.nan_to_num(7.0)
        assert_bitwise(mine, theirs, str(kind))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_gather_is_the_references(kind: torch.dtype) -> None:
    B, T, seqlens = 3, 70, torch.tensor([70, 0, 33], dtype=torch.int32)
    cache = reference.quantize_latent(*latents(B, T, dtype=torch.float32)) if kind == torch.uint8 else torch.randn(B, T, 37).to(kind)
    for page in (0, 9):
        table = None
        if page:
            order = torch.randperm(24)
            pages = torch.full((26, page, cache.shape[-1]), 0x7F).to(kind)
            rows = torch.cat([cache, cache[:, :2]], 1).unflatten(1, (8, page)).flatten(0, 1)
            pages[order] = rows
            table = order.view(3, 8).int()
            table[1] = -4
        given = pages if page else cache
        want = reference.gather_latent(given, seqlens=seqlens, block_table=table)
        out = torch.full_like(want, NAN)
        kernels.gather_latent(given, out, seqlens=seqlens, block_table=table)
        assert_bitwise(out, want, f"page {page}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_decode_from_fp8(dtype: torch.dtype) -> None:
    """The rule against float64 on the dequantised cache; pages, poisoned past the end, and a shared prefix move no bit."""
    B, T, lengths = 2, 70, [70, 40]
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    cache = reference.quantize_latent(torch.randn(B, T, 512), torch.randn(B, T, 64))
    cache[:, :10] = cache[:1, :10].clone()
    q, values = torch.randn(B, 2, 16, 576).to(dtype), reference.dequantize_latent(cache)
    past = torch.arange(T)[None, :, None] >= seqlens[:, None, None]
    poisoned = cache.masked_fill(past, 0x7F)
    got = decode(q, poisoned, 512, seqlens=seqlens)
    want = reference.mla_decode(q.double(), values.double(), seqlens=seqlens, scale=0.15)
    base = baseline(q, [values[b, :n].to(dtype) for b, n in enumerate(lengths)], 512)
    for i, name in enumerate(("out", "lse")):
        check(got[i], want[i].double(), base[i], name=name)
    order = torch.randperm(10)
    pages = poisoned.reshape(10, 14, 656)[order.argsort()]
    table = order.view(2, 5).int()
    table[1, 3:] = 99
    others = [decode(q, pages, 512, seqlens=seqlens, block_table=table)]
    others.append(decode(q, poisoned[:, 10:], 512, seqlens=seqlens - 10, prefix=(cache[0, :10], 10, None)))
    for other in others:
        assert_bitwise(other[0], got[0])
        assert_bitwise(other[1], got[1])
    some = decode(q, poisoned, 300, seqlens=seqlens)  # fewer columns of value than the layout's latents
    assert_bitwise(some[0], got[0][..., :300])


# ---- through the ops


def mla_cases() -> list[Any]:
    """The modules' cases have products and backward besides, others many rows: up to a minute each."""
    heavy = ("module", "one-token", "pages-of-64", "128-heads", "40-values", "fp8-paged", "prefix")
    marked = [(c, [pytest.mark.slow] if any(x in c.name for x in heavy) else []) for c in CASES if c.family == "mla" and c.small]
    return [pytest.param(c, dtype, id=f"{c}-{str(dtype)[6:]}", marks=marks) for c, marks in marked for dtype in DTYPES]


@pytest.mark.parametrize(("case", "dtype"), mla_cases())
def test_within_the_rule(case: Case, dtype: torch.dtype) -> None:
    assert_within(case, dtype)


def test_the_ops_take_any_strides_and_name_what_they_do_not_cover() -> None:
    q, kv = torch.randn(2, 1, 3, 40), torch.randn(2, 12, 40)
    seqlens = torch.tensor([12, 5])
    with tk.use_backend("triton"):
        want = tk.mla_decode(q, kv, seqlens=seqlens, value_dim=32, scale=0.2)
        got = tk.mla_decode(q.mT.contiguous().mT, torch.cat([kv, kv], -1)[..., :40], seqlens=seqlens, value_dim=32, scale=0.2)
        assert_bitwise(got, want)
        for arguments, name in (
            (dict(value_dim=32, scale=-1.0), "scale"),
            (dict(kv_cache=kv.mT.contiguous().mT, value_dim=32), "kv_cache"),
            (dict(q=torch.randn(2, 1, 3, 600), kv_cache=torch.randn(2, 12, 600), value_dim=550), "value_dim"),
            (dict(q=torch.randn(2, 1, 3, 600), kv_cache=torch.randn(2, 12, 600), value_dim=32), "q"),
        ):
            with pytest.raises(NotImplementedError, match=f": {name}: "):
                tk.mla_decode(**{"q": q, "kv_cache": kv, "seqlens": seqlens, "scale": 0.2, **arguments})
