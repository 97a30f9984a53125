"""The Triton sparse_attention kernels on a real GPU, at real sizes: by the rule against float64, and bits that must not move.

Shapes: q [B, S, H, 576], latents [B, T, 576], pages [P, page, 576], FP8 [.., 656], indices [B, S, K]; GQA heads [B, T, Hkv, D].
"""

from __future__ import annotations

import pytest
import thinkernel as tk
import torch
from thinkernel.reference import mla as reference_mla
from thinkernel.reference import sparse as reference
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALE = 192**-0.5


def run(function, q: Tensor, kv: tuple[Tensor, ...], indices: Tensor, douts: tuple[Tensor, Tensor], sinks: Tensor,
        **options) -> list[Tensor]:
    """out, lse, and the gradients of q, kv's tensors and sinks."""
    leaves = [x.detach().requires_grad_() for x in (q, *kv, sinks)]
    given = tuple(leaves[1:-1]) if len(kv) == 2 else leaves[1]
    out, lse = function(leaves[0], given, indices, sinks=leaves[-1], scale=SCALE, **options)
    total = (out * douts[0].to(out.dtype)).sum() + (lse.masked_fill(lse.isneginf(), 0) * douts[1].to(lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


def ours(*args, **options) -> list[Tensor]:
    with tk.use_backend("triton"):
        return run(lambda *a, **b: tk.sparse_attention(*a, **b, return_lse=True), *args, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H,Hkv,K", [(1, 0, 300), (16, 0, 2048), (128, 0, 2048), (37, 0, 1100), (8, 2, 300), (32, 2, 1500)])
def test_forward_and_backward(H: int, Hkv: int, K: int, dtype: torch.dtype) -> None:
    """By the rule; again, one sequence alone, and its pairs in other chunks: the same bits."""
    B, S, T = 2, 12, 2500
    D, Dv = (128, 128) if Hkv else (576, 512)
    draw = Draw(H + K, dtype, "cuda")
    shape = (B, T, Hkv) if Hkv else (B, T)
    q, sinks = draw.normal(B, S, H, D), draw.normal(H)
    kv = (draw.normal(*shape, D), draw.normal(*shape, Dv)) if Hkv else (draw.normal(*shape, D),)
    lists = [draw.selected(B, S, T, K) for _ in range(max(Hkv, 1))]
    for slots in lists:
        slots[0, 1], slots[0, 2, ::3] = -1, -1
    indices = torch.stack(lists, 2) if Hkv else lists[0]
    douts = draw.normal(B, S, H, Dv), draw.normal(B, S, H, dtype=torch.float32)
    options = {} if Hkv else dict(value_dim=Dv)
    got = ours(q, kv, indices, douts, sinks, **options)
    want = run(reference.sparse_attention, q.double(), tuple(x.double() for x in kv), indices, douts, sinks.double(), **options)
    base = run(reference.sparse_attention, q, kv, indices, douts, sinks, **options)
    names = ["out", "lse", "dq", *("dk", "dv")[: len(kv)], "dsinks"]
    for name, x, exact, near in zip(names, got, want, base, strict=True):
        check(x, exact.double(), near, name=name)
    for name, x, again in zip(names, got, ours(q, kv, indices, douts, sinks, **options), strict=True):
        assert_bitwise(again, x, f"{name}, again")
    alone = ours(q[1:], tuple(x[1:] for x in kv), indices[1:], tuple(x[1:] for x in douts), sinks, **options)
    for name, x, single in zip(names[:-1], got, alone, strict=False):
        assert_bitwise(single, x[1:], f"{name}, alone")


def test_more_queries_than_a_chunk_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinkernel.kernels import sparse_attention_backward as kernels

    draw = Draw(1, torch.bfloat16, "cuda")
    q, kv, indices = draw.normal(1, 300, 16, 576), (draw.normal(1, 1000, 576),), draw.selected(1, 300, 1000, 256)
    douts, sinks = (draw.normal(1, 300, 16, 512), draw.normal(1, 300, 16, dtype=torch.float32)), draw.normal(16)
    want = ours(q, kv, indices, douts, sinks, value_dim=512)
    whole = kernels.sparse_attention_backward
    monkeypatch.setattr(kernels, "sparse_attention_backward", lambda *a, **b: whole(*a, **b, pair_bytes=20 << 20))
    for x, y in zip(ours(q, kv, indices, douts, sinks, value_dim=512), want, strict=True):
        assert_bitwise(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fp8", [False, True], ids=["latents", "FP8"])
def test_caches(fp8: bool, dtype: torch.dtype) -> None:
    """A cache poisoned past every end, by the rule; in pages: the same bits. Slots past the end are empty."""
    B, T, K, page = 3, 2048, 1200, 64
    draw = Draw(5, dtype, "cuda")
    q, kv = draw.normal(B, 2, 37, 576), draw.normal(B, T, 576)
    indices = draw.selected(B, 2, T, K)
    seqlens = torch.tensor([2048, 700, 1], dtype=torch.int32, device="cuda")
    cache = reference_mla.quantize_latent(kv[..., :512], kv[..., 512:]) if fp8 else kv
    values = reference_mla.dequantize_latent(cache).to(dtype) if fp8 else kv
    past = torch.arange(T, device="cuda")[None, :, None] >= seqlens[:, None, None]
    cache = cache.masked_fill(past, 0x7F if fp8 else float("nan"))
    order = torch.randperm(B * T // page, device="cuda")
    pages = torch.empty_like(cache).view(-1, page, cache.shape[-1])
    pages[order] = cache.view(-1, page, cache.shape[-1])
    table = order.view(B, -1).int()
    options = dict(value_dim=512, scale=SCALE, seqlens=seqlens)
    with tk.use_backend("triton"):
        got = tk.sparse_attention(q, cache, indices, **options, return_lse=True)
        paged = tk.sparse_attention(q, pages, indices, **options, block_table=table, return_lse=True)
    want = reference.sparse_attention(q.double(), values.double(), indices, **options)
    base = reference.sparse_attention(q, values, indices, **options)
    for i, name in enumerate(("out", "lse")):
        check(got[i], want[i].double(), base[i], name=name)
        assert_bitwise(paged[i], got[i], f"{name}, pages")
