"""Attention of new queries over a cache: dense or paged, split over the keys, with or without a prefix that all rows share.

Shapes: B batch, Sq new queries a sequence, T keys, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim, P pages,
L keys of the prefix, W = ⌊L / KEY_SPLIT⌋, M and N the rows and keys of a tile.

Each split of KEY_SPLIT keys has a program; the splits are merged in order, with the operations of the forward kernel. A prefix
stands before every row's own keys, and the splits count from its first key as they would without sharing: its W whole splits
are read once for all B·Sq·G rows of a key head, its tail by each row, in the row's first own split. So sharing moves no bit.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .attention_tiles import attend, blocks, finish, has_options, key_blocks, mask_arguments, merge
from .primitives import again, is_wide, launch


@triton.jit
def _keys_of(seqlens_ptr, b, capacity, live):
    """Own keys of sequence b (a number, or one for each row of a tile), inside the cache whatever seqlens holds."""
    return tl.minimum(tl.maximum(tl.load(seqlens_ptr + b, mask=live, other=0), 0), capacity)


@triton.jit(do_not_specialize=["B", "SQ", "capacity", "n_pages", "n_prefix_pages", "prefix_length", "first_split", "n_here", "n_splits",
                               "left", "right", "chunk"])
def _decode_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_ptr, total_ptr, peak_ptr, seqlens_ptr, table_ptr, sinks_ptr,
                   prefix_k_ptr, prefix_v_ptr, prefix_table_ptr,
                   B, SQ, HKV, G, capacity, n_pages, n_prefix_pages, prefix_length, first_split, n_here, n_splits,
                   stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
                   stride_ob, stride_os, stride_oh, stride_lb, stride_ls, stride_lh, stride_table,
                   stride_pkb, stride_pks, stride_pkh, stride_pvb, stride_pvs, stride_pvh,
                   scale, softcap, left, right, chunk,
                   D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                   M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr, PREFIX_PAGE: tl.constexpr,
                   SHARED: tl.constexpr, TAIL: tl.constexpr, SINGLE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                   CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, WIDE: tl.constexpr,
                   LATENT: tl.constexpr, FP8: tl.constexpr):
    """One program: one of the splits [first_split, first_split + n_here) of one key head, M (query, head of the group) rows.

    SHARED: a split of the prefix, with the rows of the whole batch. Otherwise a split of one sequence's own keys, which with
    TAIL begin with the end of the prefix. SINGLE (there is but one split) writes out and lse, otherwise the unnormalised split
    goes to _merge_kernel.
    """
    # Which tile; row blocks vary fastest (they read the same keys), then splits.
    rows = SQ * G
    if SHARED:
        rows = B * SQ * G
    row_blocks = tl.cdiv(rows, M)
    pid = tl.program_id(0)
    r0 = (pid % row_blocks) * M
    split = first_split + (pid // row_blocks) % n_here
    kv_head = (pid // (row_blocks * n_here)) % HKV
    row = r0 + tl.arange(0, M)  # [M]
    live = row < rows
    s = (row // G) % SQ
    h = kv_head * G + row % G
    if SHARED:
        b = (row // (SQ * G)).to(tl.int64)  # [M]
        T = prefix_length + _keys_of(seqlens_ptr, b, capacity, live)
        end = prefix_length
    else:
        b = (pid // (row_blocks * n_here * HKV)).to(tl.int64)
        T = prefix_length + _keys_of(seqlens_ptr, b, capacity, True)
        end = T
    if split * SPLIT < tl.maximum(end, 1):
        # Load the queries.
        p = s + T - SQ
        q_at = q_ptr + b * stride_qb + s.to(tl.int64) * stride_qs + h.to(tl.int64) * stride_qh
        column = tl.arange(0, BLOCK_D)
        q = tl.load(q_at[:, None] + column[None, :], mask=live[:, None] & (column < D)[None, :], other=0.0)  # [M, D]
        q_rest = q
        if REST_D > 0:
            rest = BLOCK_D + tl.arange(0, REST_D)
            q_rest = tl.load(q_at[:, None] + rest[None, :], mask=live[:, None] & (rest < D)[None, :], other=0.0)

        # Where the keys are.
        head = kv_head.to(tl.int64)
        k_base = k_ptr + head * stride_kh
        v_base = v_ptr + head * stride_vh
        table = k_base  # stands in where there are no pages
        before = 0  # keys before the first of this cache
        if PAGE > 0:
            table = table_ptr
        if not SHARED:
            before = prefix_length
            if PAGE > 0:
                table += b * stride_table
            else:
                k_base += b * stride_kb
                v_base += b * stride_vb
        cache = (k_base, v_base, stride_ks, stride_vs, table, stride_kb, stride_vb, n_pages)
        prefix = cache  # stands in where no tail is read
        if TAIL:
            prefix_k = prefix_k_ptr + head * stride_pkh
            prefix_table = prefix_k
            if PREFIX_PAGE > 0:
                prefix_table = prefix_table_ptr
            prefix = (prefix_k, prefix_v_ptr + head * stride_pvh, stride_pks, stride_pvs, prefix_table, stride_pkb, stride_pvb,
                      n_prefix_pages)

        # Attend to the split's blocks.
        if SHARED:
            p_first = tl.min(tl.where(live, p, 2**31 - 1), 0)
            p_last = tl.max(tl.where(live, p, -(2**31)), 0)
        else:
            p_first = r0 // G + T - SQ
            p_last = (tl.minimum(r0 + M, rows) - 1) // G + T - SQ
        first, last, whole_first, whole_last = key_blocks(p_first, p_last, 0, end, left, right, chunk, N, LEFT, RIGHT, CHUNK)
        per_split: tl.constexpr = SPLIT // N
        acc = tl.zeros([M, BLOCK_DV], tl.float32)
        total = tl.zeros([M], tl.float32)
        peak = tl.full([M], float("-inf"), tl.float32)
        acc, total, peak = attend(
            acc, total, peak, q, q_rest, p, tl.maximum(first, split * per_split), tl.minimum(last, (split + 1) * per_split),
            whole_first, whole_last, 0, end, cache, prefix, before, scale, softcap, left, right, chunk,
            N, D, DV, BLOCK_D, REST_D, BLOCK_DV, 0, PAGE, TAIL, PREFIX_PAGE, LEFT, RIGHT, CHUNK, SOFTCAP, WIDE, False, LATENT, FP8)

        # Write the result, or the split.
        value = tl.arange(0, BLOCK_DV)
        if LATENT:
            # Rows of contiguous results. Beside an accumulator of [64, 512] Hopper has no register left for their places, so these are
            # worked out again; which of the two ways is shorter is what compiles without spills.
            size = rows
            start = again(r0)
            sequence = b
            if FP8 and (PAGE > 0 or not (TAIL or SHARED)):
                size = again(SQ) * G
                if SHARED:
                    size *= B
                place, blocks = again(pid), tl.cdiv(size, M)
                start = (place % blocks) * M
                split = first_split + (place // blocks) % n_here
                sequence = (place // (blocks * n_here)).to(tl.int64)
            at = start.to(tl.int64)
            if not SHARED:
                at += sequence * size
            i = tl.arange(0, M)
            inside = (start + i < size)[:, None] & (value < DV)[None, :]
            if SINGLE:
                out, lse = finish(acc, total, peak, tl.zeros([M], tl.float32), False, q.dtype == tl.float32)
                tl.store(out_ptr + at * DV + (i[:, None] * DV + value[None, :]), out.to(out_ptr.dtype.element_ty), mask=inside)
                tl.store(lse_ptr + at + i, lse, mask=start + i < size)
            else:
                at = at * n_splits + split
                tl.store(part_ptr + at * DV + ((i * n_splits)[:, None] * DV + value[None, :]), acc, mask=inside)
                tl.store(total_ptr + at + i * n_splits, total, mask=start + i < size)
                tl.store(peak_ptr + at + i * n_splits, peak, mask=start + i < size)
        else:
            inside = live[:, None] & (value < DV)[None, :]
            if SINGLE:
                sink = tl.zeros([M], tl.float32)
                if SINKS:
                    sink = tl.load(sinks_ptr + h, mask=live, other=0.0).to(tl.float32)
                out, lse = finish(acc, total, peak, sink, SINKS, q.dtype == tl.float32)
                o_at = out_ptr + b * stride_ob + s.to(tl.int64) * stride_os + h.to(tl.int64) * stride_oh
                tl.store(o_at[:, None] + value[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
                tl.store(lse_ptr + b * stride_lb + s.to(tl.int64) * stride_ls + h * stride_lh, lse, mask=live)
            else:
                slot = ((b * SQ + s) * (HKV * G) + h) * n_splits + split  # [M], rows in the order (b, s, h)
                tl.store(part_ptr + slot[:, None] * DV + value[None, :], acc, mask=inside)
                tl.store(total_ptr + slot, total, mask=live)
                tl.store(peak_ptr + slot, peak, mask=live)


@triton.jit(do_not_specialize=["SQ", "capacity", "prefix_length", "n_splits"])
def _merge_kernel(part_ptr, total_ptr, peak_ptr, out_ptr, lse_ptr, seqlens_ptr, sinks_ptr, SQ, H, capacity, prefix_length, n_splits,
                  stride_ob, stride_os, stride_oh, stride_lb, stride_ls, stride_lh,
                  DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLIT: tl.constexpr, SINKS: tl.constexpr):
    """One program: one row (b, s, h); its splits, in order -> out [Dv], lse."""
    slot = tl.program_id(0).to(tl.int64)
    h = slot % H
    s = (slot // H) % SQ
    b = slot // (H * SQ)
    T = prefix_length + _keys_of(seqlens_ptr, b, capacity, True)
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    value = tl.arange(0, BLOCK_DV)
    one = tl.arange(0, 1)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    total = tl.zeros([1], tl.float32)
    peak = tl.full([1], float("-inf"), tl.float32)
    for split in range(0, tl.cdiv(T, SPLIT)):
        at = slot * n_splits + split
        part = tl.load(part_ptr + at * DV + value, mask=value < DV, other=0.0)[None, :]
        acc, total, peak = merge(acc, total, peak, part, tl.load(total_ptr + at + one), tl.load(peak_ptr + at + one), EXACT)
    sink = tl.zeros([1], tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + h + one).to(tl.float32)
    out, lse = finish(acc, total, peak, sink, SINKS, EXACT)
    o_at = out_ptr + b * stride_ob + s * stride_os + h * stride_oh
    tl.store(o_at + value[None, :], out.to(out_ptr.dtype.element_ty), mask=(value < DV)[None, :])
    tl.store(lse_ptr + b * stride_lb + s * stride_ls + h * stride_lh + one, lse)


Prefix = tuple[Tensor, Tensor, int, Tensor | None]


def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor, *, seqlens: Tensor,
                     block_table: Tensor | None = None, causal: bool = True, scale: float | None = None,
                     window: tuple[int, int] | None = None, chunk: int | None = None, softcap: float | None = None,
                     sinks: Tensor | None = None, prefix: Prefix | None = None) -> None:
    """q [B,Sq,H,D] over a cache [B,T,Hkv,D] or pages [P,page,Hkv,D] -> out [B,Sq,H,Dv], lse [B,Sq,H] float32, both given.

    seqlens [B] int32 counts the Sq new keys; block_table [B, max_pages] int32. Nothing past a sequence's end is read,
    and nothing here waits for the GPU: the grid covers the cache's capacity and programs past a sequence's end leave.
    prefix: (k [L,Hkv,D], v [L,Hkv,Dv], length, None), or pages and their table [max_pages]; seqlens does not count it.
    """
    if out.numel() == 0:
        return
    (block_d, rest_d), block_dv = blocks(q.shape[-1]), max(16, triton.next_power_of_2(v_cache.shape[-1]))
    options = has_options(None, window, chunk, softcap, sinks)
    tile = configs.tile("decode", q.device, q.dtype, block_d + rest_d, block_dv, options)
    decode(q, k_cache, v_cache, out, lse, tile, (block_d, rest_d, block_dv), seqlens=seqlens, block_table=block_table, causal=causal,
           scale=q.shape[-1] ** -0.5 if scale is None else scale, window=window, chunk=chunk, softcap=softcap, sinks=sinks, prefix=prefix)


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor, tile: configs.Tile, widths: tuple[int, int, int], *,
           seqlens: Tensor, block_table: Tensor | None, scale: float, causal: bool = True, window: tuple[int, int] | None = None,
           chunk: int | None = None, softcap: float | None = None, sinks: Tensor | None = None, prefix: Prefix | None = None,
           latent: bool = False) -> None:
    """The launches of a decode, for this family and for mla: shared splits, own splits, merge.

    widths: padded columns of a key's two blocks and of a value. latent: the values are the first columns of the keys of one head,
    the caches may hold FP8 (uint8 [..., 656]), out and lse are contiguous.
    """
    B, Sq, H, D = q.shape
    page = 0 if block_table is None else k_cache.shape[1]
    capacity = k_cache.shape[1] if block_table is None else block_table.shape[1] * page
    Hkv, Dv = k_cache.shape[2], out.shape[-1]
    block_d, rest_d, block_dv = widths
    bounds, flags = mask_arguments(causal, window, chunk)
    split = configs.key_split()
    pk, pv, length, prefix_table = (k_cache, v_cache, 0, None) if prefix is None else prefix
    pk, pv = (x[None] if x.dim() == 3 else x for x in (pk, pv))
    prefix_page = 0 if prefix_table is None else pk.shape[1]
    shared = length // split  # the prefix's whole splits
    n_splits = max(triton.cdiv(length + capacity, split), shared, 1)
    single = n_splits == 1 and shared == 0
    part = total = peak = None  # [B, Sq, H, n_splits, Dv], [B, Sq, H, n_splits] twice
    if not single:
        part = torch.empty((B * Sq * H * n_splits, Dv), dtype=torch.float32, device=q.device)
        total, peak = torch.empty((2, B * Sq * H * n_splits), dtype=torch.float32, device=q.device)

    def attend_splits(rows: int, first: int, count: int, k: Tensor, v: Tensor, table: Tensor | None, page: int, **constants: bool) -> None:
        """`rows` query rows for each key head, cut into tiles, times splits first … first + count − 1 of k and v."""
        launch(
            _decode_kernel, (triton.cdiv(rows, tile.m) * count * Hkv * (1 if constants["SHARED"] else B),), q, k, v, out, lse,
            part, total, peak, seqlens, table, sinks, pk, pv, prefix_table,
            B, Sq, Hkv, H // Hkv, capacity, k.shape[0], pk.shape[0], length, first, count, n_splits,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride(), 0 if table is None else table.stride(0),
            *pk.stride()[:3], *pv.stride()[:3], float(scale), float(softcap or 0.0), *bounds,
            D=D, DV=Dv, BLOCK_D=block_d, REST_D=rest_d, BLOCK_DV=block_dv, M=tile.m, N=tile.n, SPLIT=split, PAGE=page,
            PREFIX_PAGE=prefix_page, SINGLE=single, **constants, **flags, SOFTCAP=bool(softcap), SINKS=sinks is not None,
            WIDE=any(is_wide(x.stride(1), tile.n) for x in (k, v)), LATENT=latent,
            FP8=k.dtype == torch.uint8, warps=tile.warps, stages=tile.stages, device=q.device)

    if shared > 0:
        attend_splits(B * Sq * (H // Hkv), 0, shared, pk, pv, prefix_table, prefix_page, SHARED=True, TAIL=False)
    if n_splits > shared:
        attend_splits(Sq * (H // Hkv), shared, n_splits - shared, k_cache, v_cache, block_table, page, SHARED=False,
                      TAIL=length % split > 0)
    if not single:
        launch(
            _merge_kernel, (B * Sq * H,), part, total, peak, out, lse, seqlens, sinks, Sq, H, capacity, length, n_splits,
            *out.stride()[:3], *lse.stride(), DV=Dv, BLOCK_DV=block_dv, SPLIT=split, SINKS=sinks is not None,
            warps=1, stages=1, device=q.device)
