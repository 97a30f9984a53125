"""Triton attention under the interpreter: decode from dense and paged caches, the bits that must not move, and bad cache contents.

Shapes: q [B, Sq, H, D], caches [B, T, Hkv, D] or pages [P, page, Hkv, D]. A tile has 64 rows and 32 keys here, a split 64 keys.
The numerics of forward and backward are in test_rule.py.
"""
from __future__ import annotations

import pytest
import torch
from test_rule import DTYPES, eager
from thinkernel.kernels import attention as kernels
from thinkernel.reference import attention as reference
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

NAN = float("nan")


def forward(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    out = torch.full((*q.shape[:3], v.shape[-1]), NAN, dtype=q.dtype)
    lse = torch.full(q.shape[:3], NAN)
    kernels.attention_forward(q, k, v, out, lse, causal=True, **options)
    return out, lse


def backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, **options) -> list[Tensor]:
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    kernels.attention_backward(q, k, v, out, lse, dout, *grads, causal=True, **options)
    return grads


def paged(cache: Tensor, page: int, seqlens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A dense cache [B, T, ...] as shuffled pages and their table; everything past a sequence's end is NaN, table entries −1."""
    B, T = cache.shape[:2]
    count, spare = -(-T // page), 2
    pages = torch.full((B * count + spare, page, *cache.shape[2:]), NAN, dtype=cache.dtype)
    table = torch.full((B, count), -1, dtype=torch.int32)
    numbers = iter(torch.randperm(B * count + spare, generator=torch.Generator().manual_seed(seed)).tolist())
    for b in range(B):
        for i in range(-(-int(seqlens[b]) // page)):
            table[b, i] = next(numbers)
            rows = cache[b, i * page : min((i + 1) * page, int(seqlens[b]))]
            pages[table[b, i], : len(rows)] = rows
    return pages, table


DECODE = {  # B, Sq, T, H, Hkv, D, Dv, seqlens, options
    "one split": (3, 1, 60, 4, 2, 32, 32, [60, 1, 0], {}),
    "several splits": (3, 1, 200, 4, 1, 24, 40, [200, 65, 64], {}),
    "speculative": (2, 5, 150, 6, 2, 16, 16, [150, 3], {}),
    "more rows than a tile": (1, 9, 100, 8, 1, 16, 16, [97], {}),
    "not causal": (2, 3, 90, 2, 1, 16, 16, [90, 40], dict(causal=False)),
    "window, sinks, softcap": (2, 2, 180, 4, 2, 16, 16, [180, 70], dict(window=(30, -1), sinks=True, softcap=4.0)),
    "chunk": (2, 1, 180, 2, 2, 16, 16, [180, 131], dict(chunk=50)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", DECODE.values(), ids=DECODE.keys())
def test_decode(case: tuple, dtype: torch.dtype) -> None:
    """A dense cache against float64, then the same one in pages of 7: the same bits."""
    B, Sq, T, H, Hkv, D, Dv, lengths, options = case
    options = options | ({"sinks": torch.randn(H)} if "sinks" in options else {})
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    q, k, v = torch.randn(B, Sq, H, D).to(dtype), torch.randn(B, T, Hkv, D).to(dtype), torch.randn(B, T, Hkv, Dv).to(dtype)
    past = torch.arange(T)[None, :, None, None] >= seqlens[:, None, None, None]
    (k_pages, table), (v_pages, _) = paged(k, 7, seqlens, 1), paged(v, 7, seqlens, 1)
    results = []
    for k_cache, v_cache, block_table in ((k.masked_fill(past, NAN), v.masked_fill(past, NAN), None), (k_pages, v_pages, table)):
        out, lse = torch.full((B, Sq, H, Dv), NAN, dtype=dtype), torch.full((B, Sq, H), NAN)
        kernels.attention_decode(q, k_cache, v_cache, out, lse, seqlens=seqlens, block_table=block_table, **options)
        results.append((out, lse))

    want = reference.attention_decode(q.double(), k.double(), v.double(), seqlens=seqlens, **options)
    rows = [eager(q[[b]], k[[b], :n], v[[b], :n], **options) for b, n in enumerate(lengths)]
    for i, name in enumerate(("out", "lse")):
        check(results[0][i], want[i].double(), torch.cat([row[i] for row in rows]), name=name)
        assert_bitwise(results[0][i], results[1][i], f"{name}, dense and paged")


def test_a_page_number_outside_the_cache_counts_as_empty() -> None:
    q, k, v = torch.randn(1, 5, 8, 16), torch.randn(3, 16, 1, 16), torch.randn(3, 16, 1, 16)
    keys, values = torch.cat([k[2], k[0]])[None], torch.cat([v[2], v[0]])[None]
    want = reference.attention(q.double(), keys.double(), values.double())
    base = eager(q, keys, values, causal=False)
    seqlens = torch.tensor([48], dtype=torch.int32)
    for table in ([2, 3, 0], [2, -1, 0]):  # page 3 does not exist
        out, lse = torch.full((1, 5, 8, 16), NAN), torch.full((1, 5, 8), NAN)
        table = torch.tensor([table], dtype=torch.int32)
        kernels.attention_decode(q, k, v, out, lse, seqlens=seqlens, block_table=table, causal=False)
        check(out, want[0], base[0])
        check(lse, want[1], base[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_row_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 50, 4, 32).to(dtype), torch.randn(3, 130, 2, 32).to(dtype), torch.randn(3, 130, 2, 32).to(dtype)
    out, lse = forward(q, k, v)
    alone = forward(q[1:2], k[1:2], v[1:2])
    assert_bitwise(out[1:2], alone[0])
    assert_bitwise(lse[1:2], alone[1])
    few = forward(q[:, 43:], k, v)  # the last 7 queries without the ones before them
    assert_bitwise(out[:, 43:], few[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_left_padding_moves_nothing(dtype: torch.dtype) -> None:
    q, k, v, dout = (torch.randn(1, n, h, 32).to(dtype) for n, h in ((60, 2), (90, 1), (90, 1), (60, 2)))
    pad = 13
    padded = [torch.cat([torch.full((1, pad, *x.shape[2:]), NAN, dtype=dtype), x], 1) for x in (k, v)]
    start = torch.tensor([pad], dtype=torch.int32)
    plain, moved = forward(q, k, v), forward(q, *padded, key_start=start)
    assert_bitwise(plain[0], moved[0])
    assert_bitwise(plain[1], moved[1])
    a, b = backward(q, k, v, *plain, dout), backward(q, *padded, *moved, dout, key_start=start)
    assert_bitwise(a[0], b[0], "dq")
    for i, name in ((1, "dk"), (2, "dv")):
        assert_bitwise(a[i], b[i][:, pad:], name)
        assert (b[i][:, :pad] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_decode_equals_prefill(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 3, 4, 32).to(dtype), torch.randn(2, 200, 2, 32).to(dtype), torch.randn(2, 200, 2, 32).to(dtype)
    out, lse = forward(q, k, v)
    got, got_lse = torch.full_like(out, NAN), torch.full_like(lse, NAN)
    kernels.attention_decode(q, k, v, got, got_lse, seqlens=torch.tensor([200, 200], dtype=torch.int32))
    assert_bitwise(got, out)
    assert_bitwise(got_lse, lse)


def test_nan_stays_in_its_row() -> None:
    q, k, v = torch.randn(2, 20, 2, 16), torch.randn(2, 20, 1, 16), torch.randn(2, 20, 1, 16)
    clean, _ = forward(q, k, v)
    q[1, 7, 0, 3] = NAN
    out, lse = forward(q, k, v)
    assert out[1, 7, 0].isnan().all() and lse[1, 7, 0].isnan()
    clean[1, 7, 0] = NAN
    assert_bitwise(out, clean)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["no batch", "no queries", "no keys"])
def test_empty(shape: tuple[int, int, int]) -> None:
    B, S, T = shape
    q, k, v = torch.randn(B, S, 2, 16), torch.randn(B, T, 1, 16), torch.randn(B, T, 1, 16)
    out, lse = forward(q, k, v)
    grads = backward(q, k, v, out, lse, torch.randn_like(out))
    assert (out == 0).all() and torch.isneginf(lse).all() and all((g == 0).all() for g in grads)


def test_covers_names_the_argument() -> None:
    q, k = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 1, 16)
    assert kernels.covers(q, k, k) is None
    assert kernels.covers(q.double(), k, k).startswith("q:")
    assert kernels.covers(q, k.half(), k).startswith("k:")
    assert kernels.covers(q, k, k, scale=-1.0).startswith("scale:")
    assert kernels.covers(q, k, k, prefix=(k.half(), k)).startswith("prefix:")
    wide = torch.randn(1, 2, 1, 320)
    assert kernels.covers(torch.randn(1, 2, 2, 320), wide, k).startswith("q:")
