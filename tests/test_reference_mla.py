"""The MLA reference: absorbed decode equals expanded attention, the latent cache in bf16, float and FP8."""

from __future__ import annotations

import math

import pytest
import torch
from thinkernel.reference.attention import attention
from thinkernel.reference.mla import append_latent, dequantize_latent, gather_latent, mla_decode, quantize_latent
from torch import Tensor
from torch.testing import assert_close

LATENT, ROPE, NOPE, VALUE = 32, 8, 16, 12  # of the small model in these tests


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def paged(dense: Tensor, seqlens: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """dense [B, T, D] -> pages in shuffled order, NaN (0x7f bytes) in every slot no sequence owns, table -1 there."""
    B, T = dense.shape[:2]
    per_row = -(-T // page) + 1
    order = torch.randperm(B * per_row, generator=torch.Generator().manual_seed(1)).view(B, per_row)
    poison = 0x7F if dense.dtype == torch.uint8 else torch.nan
    pages = torch.full((B * per_row, page, dense.shape[2]), poison, dtype=dense.dtype)
    table = torch.full((B, per_row), -1, dtype=torch.int32)
    for b in range(B):
        for j in range(int(seqlens[b])):
            table[b, j // page] = order[b, j // page]
            pages[order[b, j // page], j % page] = dense[b, j]
    return pages, table


@pytest.mark.parametrize("H", [1, 5])
@pytest.mark.parametrize("Sq", [1, 3])
@pytest.mark.parametrize("page", [None, 4])
def test_absorbed_decode_equals_expanded_attention(H, Sq, page):
    B, T = 3, 11
    seqlens = torch.tensor([11, 3, 7], dtype=torch.int32)
    latent, rope = randn(B, T, LATENT), randn(B, T, ROPE, seed=1)
    q_nope, q_rope = randn(B, Sq, H, NOPE), randn(B, Sq, H, ROPE, seed=2)
    w_uk, w_uv = randn(H, NOPE, LATENT) / LATENT**0.5, randn(H, VALUE, LATENT, seed=3) / LATENT**0.5
    scale = (NOPE + ROPE) ** -0.5

    absorbed = torch.cat([torch.einsum("bshn,hnl->bshl", q_nope, w_uk), q_rope], dim=-1)
    cache, table = torch.cat([latent, rope], dim=-1), None
    if page is None:
        cache = cache.masked_fill((torch.arange(T) >= seqlens[:, None])[..., None], torch.nan)
    else:
        cache, table = paged(cache, seqlens, page)
    out, lse = mla_decode(absorbed, cache, seqlens=seqlens, block_table=table, value_dim=LATENT, scale=scale)
    out = torch.einsum("bshl,hvl->bshv", out, w_uv)

    k = torch.cat([torch.einsum("btl,hnl->bthn", latent, w_uk), rope[:, :, None].expand(-1, -1, H, -1)], dim=-1)
    v = torch.einsum("btl,hvl->bthv", latent, w_uv)
    q = torch.cat([q_nope, q_rope], dim=-1)
    for b, n in enumerate(seqlens.tolist()):
        alone = q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]
        expected_out, expected_lse = attention(*alone, causal=True, scale=scale)
        assert_close(out[b], expected_out[0])
        assert_close(lse[b], expected_lse[0])


def test_decode_gradients():
    q, cache = randn(2, 2, 2, 4, grad=True), randn(2, 3, 4, seed=1, grad=True)
    seqlens = torch.tensor([3, 2])

    def run(q, cache):
        return mla_decode(q, cache, seqlens=seqlens, value_dim=3, scale=0.5)

    assert torch.autograd.gradcheck(run, (q, cache))


@pytest.mark.parametrize("pages", [False, True])
def test_shared_prefix_is_part_of_every_row(pages):
    seqlens, length, D = torch.tensor([4, 2], dtype=torch.int32), 6, LATENT + ROPE
    q, cache, shared = randn(2, 2, 3, D), randn(2, 4, D, seed=1), randn(9, D, seed=2)
    if pages:
        shared_pages, table = paged(shared[None], torch.tensor([length]), 4)
        prefix = (shared_pages, length, table[0])
    else:
        prefix = (shared, length)
    out, lse = mla_decode(q, cache, seqlens=seqlens, value_dim=LATENT, scale=0.2, prefix=prefix)
    for b, n in enumerate(seqlens.tolist()):
        whole = torch.cat([shared[None, :length], cache[b : b + 1, :n]], dim=1)
        expected_out, expected_lse = mla_decode(
            q[b : b + 1], whole, seqlens=torch.tensor([length + n]), value_dim=LATENT, scale=0.2
        )
        assert_close(out[b], expected_out[0])
        assert_close(lse[b], expected_lse[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("page", [None, 2])
def test_append_then_gather(dtype, page):
    B, T, Sq = 3, 6, 2
    seqlens = torch.tensor([6, 3, 2], dtype=torch.int32)
    width = 656 if dtype == torch.uint8 else 576
    latent, rope = randn(B, T, 512, dtype=torch.float32), randn(B, T, 64, seed=1, dtype=torch.float32)
    cache = torch.full((B, T, width) if page is None else (B * T // page, page, width), 0x7F, dtype=dtype)
    order = torch.randperm(B * T // (page or T), generator=torch.Generator().manual_seed(2))
    table = None if page is None else order.view(B, -1).int()
    for end in range(1, T + 1):  # tokens arrive one at a time up to T - Sq, then Sq at once
        if end > T - Sq and end < T:
            continue
        step = Sq if end == T else 1
        start = seqlens - T + end - step  # rows shorter than T start late
        take = start.clamp_min(0)[:, None] + torch.arange(step)
        rows = torch.arange(B)[:, None]
        append_latent(cache, latent[rows, take], rope[rows, take], seqlens=seqlens - T + end, block_table=table)
    dense = gather_latent(cache, seqlens=seqlens, block_table=table)
    for b, n in enumerate(seqlens.tolist()):
        expected = torch.cat([latent[b, :n], rope[b, :n]], dim=-1)
        if dtype == torch.uint8:
            expected = dequantize_latent(quantize_latent(latent[b, :n], rope[b, :n]))
        assert torch.equal(dense[b, :n], expected.to(dense.dtype))
        assert (dense[b, n:] == 0).all()


def test_fp8_layout_byte_by_byte():
    latent, rope = randn(3, 512, dtype=torch.float32), randn(3, 64, seed=1, dtype=torch.float32)
    latent[1] *= 1000
    latent[2] = 0
    stored = quantize_latent(latent, rope)
    assert stored.shape == (3, 656) and stored.dtype == torch.uint8
    for token in range(3):
        for group in range(4):
            values = latent[token, 128 * group : 128 * (group + 1)]
            scale = 2.0 ** math.ceil(math.log2(max(values.abs().max().item() / 448, 1e-4)))
            assert stored[token, 512 + 4 * group : 516 + 4 * group].clone().view(torch.float32).item() == scale
            codes = stored[token, 128 * group : 128 * (group + 1)].clone().view(torch.float8_e4m3fn)
            assert torch.equal(codes.float(), (values / scale).to(torch.float8_e4m3fn).float())
        assert torch.equal(stored[token, 528:].clone().view(torch.bfloat16), rope[token].bfloat16())


@pytest.mark.parametrize("power", [-20, -3, 0, 5])
def test_fp8_scale_at_exact_powers_of_two(power):
    latent = torch.full((1, 512), 448.0 * 2.0**power)
    stored = quantize_latent(latent, torch.zeros(1, 64))
    scale = stored[0, 512:528].clone().view(torch.float32)
    assert torch.equal(scale, torch.full((4,), max(2.0**power, 2.0**-13)))  # 2^-13 is the least power of two above 1e-4
    assert torch.equal(dequantize_latent(stored)[0, :512].float(), latent[0])


def test_fp8_error_is_that_of_three_mantissa_bits():
    latent, rope = randn(64, 512, dtype=torch.float32), randn(64, 64, seed=1, dtype=torch.float32)
    back = dequantize_latent(quantize_latent(latent, rope)).float()
    amax = latent.unflatten(-1, (4, 128)).abs().amax(-1, keepdim=True)
    # half a unit in the last of 3 bits, or half the smallest subnormal step, 2^-10 of a scale of at most amax / 224
    bound = torch.maximum(latent.abs() / 16, (amax / 224 * 2**-10).expand(-1, -1, 128).flatten(1))
    assert ((back[:, :512] - latent).abs() <= bound).all()


def test_decode_from_fp8_equals_decode_from_its_values():
    seqlens = torch.tensor([5, 2], dtype=torch.int32)
    cache = quantize_latent(randn(2, 5, 512, dtype=torch.float32), randn(2, 5, 64, dtype=torch.float32))
    q = randn(2, 1, 3, 576, dtype=torch.float32)
    pages, table = paged(cache, seqlens, 2)
    got = mla_decode(q, pages, seqlens=seqlens, block_table=table, scale=192**-0.5)
    values = dequantize_latent(cache).float()
    expected = mla_decode(q, values, seqlens=seqlens, scale=192**-0.5)
    for a, b in zip(got, expected):
        assert_close(a, b)


def test_wrong_fp8_width_is_named():
    with pytest.raises(ValueError, match="kv_cache.*656.*got 600"):
        gather_latent(torch.zeros(1, 2, 600, dtype=torch.uint8), seqlens=torch.tensor([1]))
