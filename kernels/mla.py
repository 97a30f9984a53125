"""Multi-head latent attention: absorbed decode over a latent cache, and the cache's own kernels.

Shapes: B batch, Sq new queries, H heads, T cached tokens, P pages, L value dim (the latent, 512), R rope (64), D = L + R.

    s_j = scale·q·c_j,  o = Σ_j softmax(s)_j c_j[:L]    (DeepSeek-V2, arXiv 2405.04434, with W_UK and W_UV absorbed)

Decode is attention_decode.py's kernel with one key head that all H query heads share and whose value is the first columns of the
key: each block of latents is read once, a tile of [N, L] serving both products, and one of [N, R] beside it. So pages, splits, the
merge in order and the shared prefix are the same code, and a row's bits are those of no other than its own keys.
An FP8 cache has 656 bytes a token: 512 e4m3, 4 float32 scales (a power of two for 128 values each), 64 bfloat16.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .attention_decode import decode
from .attention_tiles import load_fp8_rows
from .primitives import convert, launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LATENT, ROPE, FP8_BYTES = 512, 64, 656  # of the FP8 layout
MAX_VALUE_DIM, MAX_REST = 512, 128

Prefix = tuple[Tensor, int, Tensor | None]


def widths(D: int, L: int, fp8: bool) -> tuple[int, int, int]:
    """Padded columns: of the tile that is key and value, of the rest of the key, of a value (those of the first)."""
    block = LATENT if fp8 else max(16, triton.next_power_of_2(L))
    rest = max(16, triton.next_power_of_2(D - block)) if D > block else 0
    return block, rest, block


def covers_cache(cache: Tensor, name: str = "kv_cache") -> str | None:
    """Why the kernels cannot address this cache, or None."""
    if cache.dtype not in (*DTYPES, torch.uint8):
        return f"{name}: {cache.dtype} is not one of {(*DTYPES, torch.uint8)}"
    if cache.numel() and cache.stride(-1) != 1:
        return f"{name}: the last dimension has stride {cache.stride(-1)}, not 1"
    if cache.dtype == torch.uint8 and (cache.data_ptr() % 4 or any(stride % 4 for stride in cache.stride()[:-1])):
        return f"{name}: FP8 tokens do not begin at multiples of 4 bytes"
    return None


def covers(q: Tensor, kv_cache: Tensor, prefix_kv: Tensor | None, value_dim: int, scale: float) -> str | None:
    """Why mla_decode cannot take this call, naming the argument; None if it can."""
    if q.dtype not in DTYPES:
        return f"q: {q.dtype} is not one of {DTYPES}"
    reason = covers_cache(kv_cache)
    if reason is None and prefix_kv is not None:
        reason = covers_cache(prefix_kv, "prefix kv")
        if prefix_kv.dtype != kv_cache.dtype:
            return f"prefix kv: {prefix_kv.dtype} differs from kv_cache's {kv_cache.dtype}"
    if reason is not None:
        return reason
    if value_dim > MAX_VALUE_DIM:
        return f"value_dim: {value_dim} is over {MAX_VALUE_DIM}"
    block, rest, _ = widths(q.shape[-1], value_dim, kv_cache.dtype == torch.uint8)
    if rest > MAX_REST:
        return f"q: {q.shape[-1] - block} columns beside the value's {block} are over {MAX_REST}"
    return None if scale > 0 else f"scale: {scale} is not positive"


def mla_decode(q: Tensor, kv_cache: Tensor, out: Tensor, lse: Tensor, *, seqlens: Tensor, block_table: Tensor | None = None,
               scale: float, prefix: Prefix | None = None) -> None:
    """q [B,Sq,H,D] over latents [B,T,D] or pages [P,page,D] (FP8: uint8 [..,656]) -> out [B,Sq,H,L], lse [B,Sq,H] float32, both given.

    seqlens [B] int32 counts the Sq new tokens; block_table [B, max_pages] int32. Nothing past a sequence's end is read.
    prefix: (latents [Tp,D], length, None), or pages and their table [max_pages]; seqlens does not count it.
    """
    if out.numel() == 0:
        return
    fp8 = kv_cache.dtype == torch.uint8
    padded = widths(q.shape[-1], out.shape[-1], fp8)
    heads = kv_cache[:, :, None]  # [B, T, 1, D]: one key head
    shared = None
    if prefix is not None:
        kv, length, table = prefix
        shared = (kv[..., None, :], kv[..., None, :], length, table)
    decode(q, heads, heads, out, lse, configs.mla_tile(q.device, q.dtype, padded[0], fp8, shared is not None), padded,
           seqlens=seqlens, block_table=block_table, scale=scale, prefix=shared, latent=True)


@triton.jit
def _float_to_e4m3(x):
    """float32 -> e4m3 bits, to nearest even; past 448, the largest, it stays there, and NaN is 0x7f (sm_80 has no such type)."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    finite = tl.minimum(size, 0x43E00000)  # 448
    normal = ((finite + 0x7FFFF + ((finite >> 20) & 1)) >> 20) - (120 << 3)  # 20 bits of mantissa go, the exponent's bias falls by 120
    # Below 2^-6 the step is 2^-9: adding 2^14, whose last bit is 2^-9, rounds to it.
    small = (finite.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size > 0x7F800000, 0x7F, tl.where(size < 0x3C800000, small, normal))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _slot(b, position, table_ptr, stride_table, stride_b, stride_s, n_pages, PAGE: tl.constexpr):
    """Where a token of sequence b lies in the cache -> offset, whether it exists."""
    if PAGE > 0:
        page = tl.load(table_ptr + b * stride_table + position // PAGE)
        there = (page >= 0) & (page < n_pages)
        at = page.to(tl.int64) * stride_b + (position % PAGE).to(tl.int64) * stride_s
    else:
        there = position >= 0
        at = b * stride_b + position.to(tl.int64) * stride_s
    return at, there


@triton.jit(do_not_specialize=["SQ", "capacity", "n_pages"])
def _append_kernel(cache_ptr, latent_ptr, rope_ptr, seqlens_ptr, table_ptr, SQ, capacity, n_pages,
                   stride_cb, stride_cs, stride_lb, stride_ls, stride_rb, stride_rs, stride_table,
                   L: tl.constexpr, R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr):
    """One program: one new token. FP8: value = e4m3·scale, scale = 2^⌈log2 max(amax/448, 1e-4)⌉ for each 128 values."""
    b = (tl.program_id(0) // SQ).to(tl.int64)
    s = tl.program_id(0) % SQ
    position = tl.load(seqlens_ptr + b).to(tl.int32) - SQ + s
    if (position >= 0) & (position < capacity):  # rows with fewer tokens than Sq take no part with the rest
        at, there = _slot(b, position, table_ptr, stride_table, stride_cb, stride_cs, n_pages, PAGE)
        column = tl.arange(0, BLOCK_L)
        latent = tl.load(latent_ptr + b * stride_lb + s.to(tl.int64) * stride_ls + column, mask=column < L, other=0.0)
        rope_column = tl.arange(0, BLOCK_R)
        rope = tl.load(rope_ptr + b * stride_rb + s.to(tl.int64) * stride_rs + rope_column, mask=rope_column < R, other=0.0)
        if FP8:
            groups = tl.reshape(latent.to(tl.float32), (4, 128))
            amax = tl.max(tl.abs(groups), 1)
            bound = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32)), 1e-4)
            bits = bound.to(tl.int32, bitcast=True)
            exponent = ((bits + 0x7FFFFF) >> 23) - 127  # up to the next power of two, which stays
            bad = (tl.abs(groups).to(tl.int32, bitcast=True) >= 0x7F800000).to(tl.int32)  # infinite or NaN: a scale of 1, as the reference
            exponent = tl.where(tl.max(bad, 1) > 0, 0, exponent)
            scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
            inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
            code = tl.reshape(_float_to_e4m3(groups * inverse[:, None]), (512,))
            tl.store(cache_ptr + at + column, code, mask=there & (column < 512))
            tl.store((cache_ptr + at + 512).to(tl.pointer_type(tl.float32)) + tl.arange(0, 4), scale, mask=there)
            tl.store((cache_ptr + at + 528).to(tl.pointer_type(tl.bfloat16)) + rope_column, convert(rope, tl.bfloat16),
                     mask=there & (rope_column < R))
        else:
            kind = cache_ptr.dtype.element_ty
            tl.store(cache_ptr + at + column, convert(latent, kind), mask=there & (column < L))
            tl.store(cache_ptr + at + L + rope_column, convert(rope, kind), mask=there & (rope_column < R))


@triton.jit(do_not_specialize=["capacity", "n_pages", "n_blocks"])
def _gather_kernel(cache_ptr, out_ptr, seqlens_ptr, table_ptr, capacity, n_pages, n_blocks,
                   stride_cb, stride_cs, stride_ob, stride_os, stride_table,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr):
    """One program: ROWS tokens of one sequence, zeros past its end."""
    b = (tl.program_id(0) // n_blocks).to(tl.int64)
    j = (tl.program_id(0) % n_blocks) * ROWS + tl.arange(0, ROWS)
    there = j < tl.load(seqlens_ptr + b)
    row = j.to(tl.int64)
    at = cache_ptr + b * stride_cb + row * stride_cs
    if PAGE > 0:
        page = tl.load(table_ptr + b * stride_table + j // PAGE, mask=there & (j < capacity), other=-1)
        there = (page >= 0) & (page < n_pages)
        at = cache_ptr + page.to(tl.int64) * stride_cb + (row % PAGE) * stride_cs
    there = there & (j < capacity)
    to = out_ptr + b * stride_ob + row * stride_os
    inside = (j < capacity)[:, None]
    if FP8:
        latent, rope = load_fp8_rows(at, there, tl.bfloat16)
        tl.store(to[:, None] + tl.arange(0, 512)[None, :], latent, mask=inside)
        tl.store(to[:, None] + 512 + tl.arange(0, 64)[None, :], rope, mask=inside)
    else:
        column = tl.arange(0, BLOCK_D)
        for first in range(0, D, BLOCK_D):
            kept = (first + column < D)[None, :]
            x = tl.load(at[:, None] + first + column[None, :], mask=there[:, None] & kept, other=0.0)
            tl.store(to[:, None] + first + column[None, :], x, mask=inside & kept)


def append_latent(kv_cache: Tensor, latent: Tensor, rope: Tensor, *, seqlens: Tensor, block_table: Tensor | None = None) -> None:
    """latent [B,Sq,L] and rope [B,Sq,R] to the last Sq places of each sequence of kv_cache [B,T,D], pages [P,page,D] or FP8, in place.

    seqlens [B] int32 counts them already. Places before a sequence's first, past the cache and in pages that do not exist are dropped.
    """
    B, Sq, L = latent.shape
    R = rope.shape[-1]
    if B * Sq * (L + R) == 0:
        return
    page = 0 if block_table is None else kv_cache.shape[1]
    capacity = kv_cache.shape[1] if block_table is None else block_table.shape[1] * page
    launch(
        _append_kernel, (B * Sq,), kv_cache, latent, rope, seqlens, block_table, Sq, capacity, kv_cache.shape[0], *kv_cache.stride()[:2],
        *latent.stride()[:2], *rope.stride()[:2], 0 if block_table is None else block_table.stride(0),
        L=L, R=R, BLOCK_L=triton.next_power_of_2(max(L, 1)), BLOCK_R=triton.next_power_of_2(max(R, 1)), PAGE=page,
        FP8=kv_cache.dtype == torch.uint8, warps=4, stages=1, device=kv_cache.device)


def gather_latent(kv_cache: Tensor, out: Tensor, *, seqlens: Tensor, block_table: Tensor | None = None) -> None:
    """The cached tokens -> out [B,T,D], given, zeros past each sequence's end (seqlens [B] int32); FP8 comes out as bfloat16."""
    B, T, D = out.shape
    if out.numel() == 0:
        return
    rows = 16 if not configs.INTERPRET else 64
    n_blocks = triton.cdiv(T, rows)
    launch(
        _gather_kernel, (B * n_blocks,), kv_cache, out, seqlens, block_table, T, kv_cache.shape[0], n_blocks,
        *kv_cache.stride()[:2], *out.stride()[:2], 0 if block_table is None else block_table.stride(0),
        D=D, BLOCK_D=min(128, triton.next_power_of_2(D)), ROWS=rows, PAGE=0 if block_table is None else kv_cache.shape[1],
        FP8=kv_cache.dtype == torch.uint8, warps=4, stages=1, device=kv_cache.device)
