"""The Triton mla kernels on a real GPU, at real sizes: numerics against the float64 reference, and bits that must not move.

Shapes: q [B, Sq, H, 576], latents [B, T, 576] or pages [P, page, 576], FP8 [.., 656].
"""

from __future__ import annotations

import pytest
import torch
from thinkernel.kernels import mla
from thinkernel.reference import mla as reference
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAN, SCALE = float("nan"), 192**-0.5


def decode(q: Tensor, kv: Tensor, **options) -> tuple[Tensor, Tensor]:
    out = torch.full((*q.shape[:3], 512), NAN, dtype=q.dtype, device="cuda")
    lse = torch.full(q.shape[:3], NAN, device="cuda")
    mla.mla_decode(q, kv, out, lse, scale=SCALE, **options)
    return out, lse


def as_pages(cache: Tensor, page: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(cache.shape[0] * cache.shape[1] // page, device="cuda")
    pages = torch.empty_like(cache).view(-1, page, cache.shape[-1])
    pages[order] = cache.view(-1, page, cache.shape[-1])
    return pages, order.view(len(cache), -1).int()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H,Sq", [(1, 1), (16, 1), (16, 2), (37, 3), (128, 1), (128, 8)])
def test_decode(H: int, Sq: int, dtype: torch.dtype) -> None:
    """Dense, NaN past every end, by the rule; again, in pages, behind a shared prefix, alone: the same bits."""
    torch.manual_seed(H + Sq)
    lengths, T, shared = [3000, 1100, 1024, 2049], 3008, 1090
    q, kv = torch.randn(4, Sq, H, 576, device="cuda").to(dtype), torch.randn(4, T, 576, device="cuda").to(dtype)
    kv[:, :shared] = kv[:1, :shared].clone()
    seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    seqlens[2] = 1091
    past = torch.arange(T, device="cuda")[None, :, None] >= seqlens[:, None, None]
    cache = kv.masked_fill(past, NAN)
    got = decode(q, cache, seqlens=seqlens)
    want = reference.mla_decode(q.double(), kv.double(), seqlens=seqlens, scale=SCALE)
    base = reference.mla_decode(q, kv, seqlens=seqlens, scale=SCALE)
    pages, table = as_pages(cache, 64)
    own = cache[:, shared:]
    others = {
        "again": decode(q, cache, seqlens=seqlens),
        "pages": decode(q, pages, seqlens=seqlens, block_table=table),
        "prefix": decode(q, own, seqlens=seqlens - shared, prefix=(kv[0, :shared], shared, None)),
    }
    alone = decode(q[1:2], cache[1:2], seqlens=seqlens[1:2])
    for i, name in enumerate(("out", "lse")):
        check(got[i], want[i].double(), base[i], name=name)
        assert_bitwise(got[i][1:2], alone[i], f"{name}, alone")
        for other, found in others.items():
            assert_bitwise(found[i], got[i], f"{name}, {other}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8(dtype: torch.dtype) -> None:
    """Bytes of the reference's quantisation; decode by the rule against float64 on the dequantised cache; gather exact."""
    torch.manual_seed(1)
    latent = (torch.randn(3, 1984, 512, device="cuda") * 10.0 ** torch.randint(-3, 3, (3, 1984, 1), device="cuda")).to(dtype)
    rope, seqlens = torch.randn(3, 1984, 64, device="cuda").to(dtype), torch.tensor([1984, 700, 1], dtype=torch.int32, device="cuda")
    full = torch.full_like(seqlens, 1984)
    cache = torch.full((3, 1984, 656), 0x7F, dtype=torch.uint8, device="cuda")
    mla.append_latent(cache, latent, rope, seqlens=full)
    assert_bitwise(cache, reference.quantize_latent(latent.cpu(), rope.cpu()).cuda())
    values = reference.dequantize_latent(cache)
    out = torch.full_like(values, NAN)
    mla.gather_latent(cache, out, seqlens=seqlens)
    assert_bitwise(out, reference.gather_latent(cache, seqlens=seqlens))
    q = torch.randn(3, 2, 16, 576, device="cuda").to(dtype)
    small = reference.quantize_latent(torch.randn(3, 1984, 512), torch.randn(3, 1984, 64)).cuda()
    past = torch.arange(1984, device="cuda")[None, :, None] >= seqlens[:, None, None]
    got, dense = decode(q, small.masked_fill(past, 0x7F), seqlens=seqlens), reference.dequantize_latent(small)
    want = reference.mla_decode(q.double(), dense.double(), seqlens=seqlens, scale=SCALE)
    base = reference.mla_decode(q, dense.to(dtype), seqlens=seqlens, scale=SCALE)
    pages, table = as_pages(small, 64)
    paged = decode(q, pages, seqlens=seqlens, block_table=table)
    for i, name in enumerate(("out", "lse")):
        check(got[i], want[i].double(), base[i], name=name)
        assert_bitwise(paged[i], got[i], f"{name}, pages")
