"""Attention over selected keys: each query names its keys by their positions (DeepSeek Sparse Attention, arXiv 2512.02556).

Shapes: B batch, S queries, T keys, R = B·S query rows (packed: all of them), H query heads, Hkv key heads, G = H / Hkv, K slots of a
query, D head dim, Dv value dim, P pages, M and N the heads and slots of a tile.

    s_j = scale·q·k_j for the j that indices[query, key head] names,  lse = log Σ_j exp(s_j),  o = Σ_j exp(s_j − lse)·v_j,
    with a sink σ: o ← o·sigmoid(lse − σ). −1 and whatever is not the sequence's names no key; no keys: o = 0, lse = −inf.

The rows of a tile are heads of one query that share their keys, so each key is gathered once for M heads. Latents have one key head,
and the first columns of a key are its value: one tile of [N, Dv] serves both products. Slots are walked as attention walks keys: in
blocks of N, and splits of KEY_SPLIT slots merged in order, so a row's bits do not depend on other rows nor on empty slots behind.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, configs_sparse, mla
from .attention_tiles import blocks, cache_rows, finish, load_fp8_rows, load_rows, merge, packed_rows, packed_tile, softmax_step
from .primitives import dot, is_wide, launch, load_tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256  # of keys beside values; mla's limits for latents
PART_BYTES = 256 << 20  # of splits before they are merged; more queries than these hold take turns


@triton.jit
def keys_of(n, S, T, cu_q_ptr, cu_k_ptr, seqlens_ptr, n_sequences, PACKED: tl.constexpr, SEQLENS: tl.constexpr):
    """Query row n -> its batch row, its place there, the first of its keys in that row and how many of them there are."""
    b = n // S
    first = 0
    if PACKED:
        sequence, _ = packed_tile(n, cu_q_ptr, n_sequences, 1)
        first, T = packed_rows(sequence, cu_k_ptr, T)
    if SEQLENS:
        T = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b), 0), T)
    return b.to(tl.int64), (n % S).to(tl.int64), first, T


@triton.jit
def used_slots(index_at, first, K, T, SLOTS: tl.constexpr):
    """1 + the last of the slots first … first + SLOTS − 1 that names one of T keys; 0 if none does."""
    slot = first + tl.arange(0, SLOTS)
    j = tl.load(index_at + slot, mask=slot < K, other=-1)
    return tl.max(tl.where((j >= 0) & (j < T), slot + 1, 0), 0)


@triton.jit(do_not_specialize=["first_row", "S", "T_all", "n_splits", "n_sequences", "n_pages"])
def _sparse_kernel(q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, lse_ptr, part_ptr, total_ptr, peak_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
                   seqlens_ptr, table_ptr, first_row, S, T_all, HKV, G, K, n_splits, n_sequences, n_pages,
                   stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_table, scale,
                   D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                   M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr, SINGLE: tl.constexpr,
                   PACKED: tl.constexpr, SEQLENS: tl.constexpr, SINKS: tl.constexpr, WIDE: tl.constexpr,
                   LATENT: tl.constexpr, FP8: tl.constexpr):
    """One program: M heads of one query and key head, one split of its slots. SINGLE (there is but one) writes out [R, H, Dv] and
    lse [R, H]; otherwise the unnormalised split goes to _merge_kernel, and of one without keys only that it has none."""
    # Which tile. Heads vary fastest (they read the same keys), then splits.
    row_blocks = tl.cdiv(G, M)
    pid = tl.program_id(0)
    g0 = (pid % row_blocks) * M
    split = (pid // row_blocks) % n_splits
    kv_head = (pid // (row_blocks * n_splits)) % HKV
    row = pid // (row_blocks * n_splits * HKV)  # among those of this launch
    b, s, k_first, T = keys_of(first_row + row, S, T_all, cu_q_ptr, cu_k_ptr, seqlens_ptr, n_sequences, PACKED, SEQLENS)

    # Load the queries.
    h0 = (kv_head * G + g0).to(tl.int64)
    q_at = q_ptr + b * stride_qb + s * stride_qs + h0 * stride_qh
    q = load_tile(q_at, stride_qh, G - g0, M, 0, BLOCK_D, D, WIDE)  # [M, D]
    q_rest = q
    if REST_D > 0:
        q_rest = load_tile(q_at, stride_qh, G - g0, M, BLOCK_D, REST_D, D, WIDE)

    # Where the keys are.
    head = kv_head.to(tl.int64)
    k_base = k_ptr + head * stride_kh
    v_base = v_ptr + head * stride_vh
    table = k_base  # stands in where there are no pages
    if PAGE > 0:
        table = table_ptr + b * stride_table
    else:
        k_base += b * stride_kb + k_first.to(tl.int64) * stride_ks
        v_base += b * stride_vb + k_first.to(tl.int64) * stride_vs
    cache = (k_base, v_base, stride_ks, stride_vs, table, stride_kb, stride_vb, n_pages)
    index_at = index_ptr + ((first_row + row).to(tl.int64) * HKV + kv_head) * K
    end = used_slots(index_at, split * SPLIT, K, T, SPLIT)

    # Attend to the split's blocks.
    EXACT: tl.constexpr = q.dtype == tl.float32
    factor = scale
    if not EXACT:
        factor = factor * 1.4426950408889634
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    total = tl.zeros([M], tl.float32)
    peak = tl.full([M], float("-inf"), tl.float32)
    for start in range(split * SPLIT, end, N):
        slot = start + tl.arange(0, N)
        j = tl.load(index_at + slot, mask=slot < K, other=-1)
        k_at, v_at, there = cache_rows(j, T, cache, PAGE)
        if FP8:
            k, k_rest = load_fp8_rows(k_at, there, q.dtype)
        else:
            k = load_rows(k_at, there, 0, BLOCK_D, D)
        scores = dot(q, tl.trans(k), tl.zeros([M, N], tl.float32))  # [M, N]
        if REST_D > 0:
            if not FP8:
                k_rest = load_rows(k_at, there, BLOCK_D, REST_D, D)
            scores = dot(q_rest, tl.trans(k_rest), scores)
        if not FP8:
            scores = tl.where(there[None, :], scores, float("-inf"))
        elif tl.min(there.to(tl.int32), 0) == 0:  # the branch parts the products from the dequantisation, which otherwise spills on Hopper
            scores = tl.where(there[None, :], scores, float("-inf"))
        weights, decay, total, peak = softmax_step(scores, total, peak, factor, EXACT)
        if LATENT:
            v = k
        else:
            v = load_rows(v_at, there, 0, BLOCK_DV, DV)
        acc = dot(weights.to(v.dtype), v, acc * decay[:, None])

    # Write the result, or the split.
    i = tl.arange(0, M)
    value = tl.arange(0, BLOCK_DV)
    live = g0 + i < G
    inside = live[:, None] & (value < DV)[None, :]
    if SINGLE:
        at = (first_row + row).to(tl.int64) * (HKV * G) + h0
        sink = tl.zeros([M], tl.float32)
        if SINKS:
            sink = tl.load(sinks_ptr + h0 + i, mask=live, other=0.0).to(tl.float32)
        out, lse = finish(acc, total, peak, sink, SINKS, EXACT)
        tl.store(out_ptr + at * DV + (i[:, None] * DV + value[None, :]), out.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(lse_ptr + at + i, lse, mask=live)
    else:
        at = (row.to(tl.int64) * (HKV * G) + h0) * n_splits + split
        if end > 0:
            tl.store(part_ptr + at * DV + ((i * n_splits)[:, None] * DV + value[None, :]), acc, mask=inside)
        tl.store(total_ptr + at + i * n_splits, total, mask=live)
        tl.store(peak_ptr + at + i * n_splits, peak, mask=live)


@triton.jit(do_not_specialize=["first_row", "n_splits"])
def _merge_kernel(part_ptr, total_ptr, peak_ptr, out_ptr, lse_ptr, sinks_ptr, first_row, H, n_splits,
                  DV: tl.constexpr, BLOCK_DV: tl.constexpr, SINKS: tl.constexpr):
    """One program: one row (query, head); its splits, in order -> out [Dv], lse."""
    row = tl.program_id(0).to(tl.int64)
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    value = tl.arange(0, BLOCK_DV)
    one = tl.arange(0, 1)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    total = tl.zeros([1], tl.float32)
    peak = tl.full([1], float("-inf"), tl.float32)
    for split in range(0, n_splits):
        at = row * n_splits + split
        top = tl.load(peak_ptr + at + one)
        part = tl.load(part_ptr + at * DV + value[None, :], mask=(value < DV)[None, :] & (top != float("-inf"))[:, None], other=0.0)
        acc, total, peak = merge(acc, total, peak, part, tl.load(total_ptr + at + one), top, EXACT)
    sink = tl.zeros([1], tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + row % H + one).to(tl.float32)
    out, lse = finish(acc, total, peak, sink, SINKS, EXACT)
    at = first_row.to(tl.int64) * H + row
    tl.store(out_ptr + at * DV + value[None, :], out.to(out_ptr.dtype.element_ty), mask=(value < DV)[None, :])
    tl.store(lse_ptr + at + one, lse)


def widths(D: int, Dv: int, latent: bool, fp8: bool = False) -> tuple[int, int, int]:
    """Padded columns of a key's two blocks and of a value; of latents the first block is the value."""
    return mla.widths(D, Dv, fp8) if latent else (*blocks(D), max(16, triton.next_power_of_2(Dv)))


def covers(q: Tensor, kv: Tensor, v: Tensor | None, value_dim: int, scale: float) -> str | None:
    """Why the kernels cannot take this call, naming the argument; None if they can. -1 slots, any K, H and page size are covered."""
    if q.dtype not in DTYPES:
        return f"q: {q.dtype} is not one of {DTYPES}"
    if not scale > 0:
        return f"scale: {scale} is not positive"
    if v is not None:
        width = max(q.shape[-1], value_dim)
        return f"kv: {width} columns of a key or a value are over {MAX_HEAD_DIM}" if width > MAX_HEAD_DIM else None
    if value_dim > mla.MAX_VALUE_DIM:
        return f"value_dim: {value_dim} is over {mla.MAX_VALUE_DIM}"
    block, rest, _ = mla.widths(q.shape[-1], value_dim, kv.dtype == torch.uint8)
    if rest > mla.MAX_REST:
        return f"kv: {q.shape[-1] - block} columns beside the value's {block} are over {mla.MAX_REST}"
    return mla.covers_cache(kv, "kv") if kv.dtype == torch.uint8 else None


class Keys(NamedTuple):
    """A call's queries, keys and slots as the kernels take them: batches of rows, packed sequences being one row."""

    q: Tensor  # [B, S, H, D]
    k: Tensor  # [B, T, Hkv, D], pages [P, page, Hkv, D], FP8 bytes [.., 656]
    v: Tensor  # [.., Dv], of latents k itself
    indices: Tensor  # [R, Hkv, K] int32
    latent: bool
    sequences: tuple[Tensor | None, Tensor | None, Tensor | None]  # cu_seqlens of queries and keys, seqlens
    page: int
    capacity: int

    @property
    def wide(self) -> bool:
        return any(is_wide(x.stride(-2), 128) for x in (self.q, self.k, self.v))


def prepare(q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
            seqlens: Tensor | None = None, block_table: Tensor | None = None) -> Keys:
    latent, k = v is None, kv
    if v is None:
        k = v = kv[..., None, :]
    if cu_seqlens_q is not None:
        q, k, v = q[None], k[None], v[None]
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    page = 0 if block_table is None else k.shape[1]
    capacity = k.shape[1] if block_table is None else block_table.shape[1] * page
    indices = indices.reshape(q.shape[0] * q.shape[1], k.shape[2], indices.shape[-1])
    return Keys(q, k, v, indices, latent, (cu_seqlens_q, cu_seqlens_k, seqlens), page, capacity)


def sparse_attention(q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor, out: Tensor, lse: Tensor, *, scale: float,
                     sinks: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
                     seqlens: Tensor | None = None, block_table: Tensor | None = None) -> None:
    """q [B,S,H,D] over latents kv [B,T,D] (v None; FP8: uint8 [..,656]) or keys and values [B,T,Hkv,·] -> out [B,S,H,Dv], lse [B,S,H].

    out and lse (float32) are given and contiguous, as is indices int32 [B,S,K] or [B,S,Hkv,K]. Packed: without B and S, [N,H,·] and
    [Nk,·], with cu_seqlens [sequences + 1] int32. Caches: seqlens [B] int32, pages [P,page,·] with block_table [B,max_pages] int32.
    """
    if out.numel() == 0:
        return
    x = prepare(q, kv, v, indices, cu_seqlens_q, cu_seqlens_k, seqlens, block_table)
    (S, H, D), (Hkv, K), Dv = x.q.shape[1:], x.indices.shape[1:], out.shape[-1]
    rows, fp8 = len(x.indices), kv.dtype == torch.uint8
    block_d, rest_d, block_dv = widths(D, Dv, x.latent, fp8)
    tile = configs_sparse.sparse_tile("forward", q.device, q.dtype, block_d + rest_d, block_dv, fp8)
    split = configs.key_split()
    n_splits = max(triton.cdiv(K, split), 1)
    at_once, part, total, peak = rows, None, None, None  # [at_once, H, n_splits, Dv], [at_once, H, n_splits] twice
    if n_splits > 1:
        at_once = min(max(PART_BYTES // (H * n_splits * Dv * 4), 1), rows)
        part = torch.empty(at_once * H * n_splits * Dv, dtype=torch.float32, device=q.device)
        total, peak = torch.empty((2, at_once * H * n_splits), dtype=torch.float32, device=q.device)
    for first in range(0, rows, at_once):
        here = min(at_once, rows - first)
        launch(
            _sparse_kernel, (here * Hkv * n_splits * triton.cdiv(H // Hkv, tile.m),), x.q, x.k, x.v, x.indices, out, lse, part, total, peak,
            sinks, *x.sequences, block_table, first, S, x.capacity, Hkv, H // Hkv, K, n_splits,
            0 if cu_seqlens_q is None else len(cu_seqlens_q) - 1, x.k.shape[0], *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3],
            0 if block_table is None else block_table.stride(0), float(scale),
            D=D, DV=Dv, BLOCK_D=block_d, REST_D=rest_d, BLOCK_DV=block_dv, M=tile.m, N=tile.n, SPLIT=split, PAGE=x.page,
            SINGLE=n_splits == 1, PACKED=cu_seqlens_q is not None, SEQLENS=seqlens is not None, SINKS=sinks is not None, WIDE=x.wide,
            LATENT=x.latent, FP8=fp8, warps=tile.warps, stages=tile.stages, device=q.device)
        if n_splits > 1:
            launch(
                _merge_kernel, (here * H,), part, total, peak, out, lse, sinks, first, H, n_splits,
                DV=Dv, BLOCK_DV=block_dv, SINKS=sinks is not None, warps=1, stages=1, device=q.device)
