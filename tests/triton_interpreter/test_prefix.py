"""A shared prefix in Triton decode under the interpreter: the bits of the same call without sharing, and the rule.

Shapes: q [B, Sq, H, D], caches [B, T, Hkv, D], prefix [L, Hkv, D], any of them in pages. A tile has 64 rows and 32 keys here, a split
64 keys, so a prefix of 150 keys has two whole splits, read once, and a tail of 22 keys, which each row reads.
"""
from __future__ import annotations

import pytest
import thinkernel as tk
import torch
from test_attention import paged
from test_rule import eager
from thinkernel.kernels import attention as kernels
from thinkernel.reference import attention as reference
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

NAN = float("nan")


def decode(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    out, lse = torch.full((*q.shape[:3], v.shape[-1]), NAN, dtype=q.dtype), torch.full(q.shape[:3], NAN)
    kernels.attention_decode(q, k, v, out, lse, **options)
    return out, lse


OPTIONS = {
    "causal": {},
    "window, sinks": dict(window=(100, -1), sinks=True),
    "window shorter than the rows' own keys": dict(window=(5, 0)),
    "chunk, softcap, not causal": dict(chunk=70, softcap=3.0, causal=False),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("length,dtype", [(0, torch.float32), (10, torch.float16), (128, torch.float32), (150, torch.float16)], ids=str)
def test_prefix(length: int, dtype: torch.dtype, options: dict) -> None:
    """Dense and paged prefixes before dense and paged caches: bitwise the plain call over the joined keys; that one by the rule."""
    B, Sq, T, H, Hkv, D, Dv, lengths = 3, 2, 50, 2, 1, 24, 16, [50, 0, 33]
    options = options | ({"sinks": torch.randn(H)} if "sinks" in options else {})
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    q, k, v = torch.randn(B, Sq, H, D).to(dtype), torch.randn(B, T, Hkv, D).to(dtype), torch.randn(B, T, Hkv, Dv).to(dtype)
    shared_k, shared_v = torch.randn(length, Hkv, D).to(dtype), torch.randn(length, Hkv, Dv).to(dtype)
    joined = [torch.cat([shared.expand(B, *shared.shape), x], 1) for shared, x in ((shared_k, k), (shared_v, v))]
    want = decode(q, *joined, seqlens=seqlens + length, **options)

    past = torch.arange(T)[None, :, None, None] >= seqlens[:, None, None, None]
    (k_pages, table), (v_pages, _) = (paged(x, 5, seqlens, 1) for x in (k, v))
    caches = {"dense": (k.masked_fill(past, NAN), v.masked_fill(past, NAN), None), "paged": (k_pages, v_pages, table)}
    room = [torch.cat([x, torch.full((9, *x.shape[1:]), NAN, dtype=dtype)]) for x in (shared_k, shared_v)]
    prefixes = {"dense": (*room, length, None)}
    if length:
        count = torch.tensor([length])
        (pages_k, pages_table), (pages_v, _) = (paged(x[None], 7, count, 2) for x in (shared_k, shared_v))
        prefixes["paged"] = (pages_k, pages_v, length, pages_table[0])
    for cache_name, (k_cache, v_cache, block_table) in caches.items():
        for prefix_name, prefix in prefixes.items():
            got = decode(q, k_cache, v_cache, seqlens=seqlens, block_table=block_table, prefix=prefix, **options)
            for i, name in enumerate(("out", "lse")):
                assert_bitwise(got[i], want[i], f"{name}, {prefix_name} prefix, {cache_name} cache")

    truth = reference.attention_decode(
        q.double(), k.double(), v.double(), seqlens=seqlens, prefix=(shared_k.double(), shared_v.double(), length), **options)
    rows = [eager(q[[b]], joined[0][[b], : n + length], joined[1][[b], : n + length], **options) for b, n in enumerate(lengths)]
    for i, name in enumerate(("out", "lse")):
        check(want[i], truth[i].double(), torch.cat([row[i] for row in rows]), name=name)


def test_prefix_rows_fill_tiles_across_the_batch() -> None:
    """B·Sq·G = 90 rows of a key head against one split of the prefix: two tiles, each with rows of several sequences."""
    B, Sq, H = 15, 3, 4
    q, k, v = torch.randn(B, Sq, H, 16), torch.randn(B, 40, 2, 16), torch.randn(B, 40, 2, 16)
    shared_k, shared_v = torch.randn(64, 2, 16), torch.randn(64, 2, 16)
    seqlens = torch.randint(Sq, 41, (B,), dtype=torch.int32)
    joined = [torch.cat([shared.expand(B, *shared.shape), x], 1) for shared, x in ((shared_k, k), (shared_v, v))]
    options = dict(window=(50, -1))
    want = decode(q, *joined, seqlens=seqlens + 64, **options)
    got = decode(q, k, v, seqlens=seqlens, prefix=(shared_k, shared_v, 64, None), **options)
    assert_bitwise(got[0], want[0], "out")
    assert_bitwise(got[1], want[1], "lse")


def test_prefix_through_the_op_with_any_strides() -> None:
    q, k, v = torch.randn(2, 1, 4, 32).half(), torch.randn(2, 9, 2, 32).half(), torch.randn(2, 9, 2, 32).half()
    seqlens = torch.tensor([9, 4], dtype=torch.int32)
    shared = torch.randn(2, 70, 2, 32).half()
    views = {"heads first": shared.transpose(1, 2).contiguous().transpose(1, 2), "last dimension strided": shared.mT.contiguous().mT}
    with tk.use_backend("triton"):
        want = tk.attention_decode(q, k, v, seqlens=seqlens, prefix=(*shared, 70), return_lse=True)
        for name, view in views.items():
            assert not view.is_contiguous()
            got = tk.attention_decode(q, k, v, seqlens=seqlens, prefix=(*view, 70), return_lse=True)
            assert_bitwise(got[0], want[0], f"out, {name}")
            assert_bitwise(got[1], want[1], f"lse, {name}")
