"""Backward of attention over chosen blocks of keys: dQ by tiles of queries, dK and dV by blocks of keys (no atomics).

Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, U choosing heads, R = H / U heads that share a choice, D head dim,
Dv value dim, n blocks of a choice, M and N the rows and keys of a tile. Query i sits at p = i + T − S.

    P = exp(s − lse),  Δ = Σ_d dO·O,  dS = P∘(dO·Vᵀ − Δ),  dQ = scale·dS·K,  dK = scale·dSᵀ·Q,  dV = Pᵀ·dO

dQ walks the blocks as the forward does. For dK and dV the pairs (query, choosing head) are sorted by the block that they name, stably, so
that each block has a list of them in ascending order. Every query names block 0, so a list is cut into segments of
configs_sparse.SEGMENT rows, a program each; a block of more than one has its segments' float32 sums added in order afterwards. Where a
list is cut depends on nothing but the list, so the order of all sums is that of the sequence alone.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, configs_sparse
from .attention_backward import CHAIN, _rows_kernel, row_weights
from .attention_tiles import blocks, load_rows, tiles
from .native_sparse_choose import locate
from .native_sparse_walk import keys_of_tile, step_keys, steps_of, walk
from .primitives import dot, is_wide, launch, load_tile


@triton.jit(do_not_specialize=["S", "T", "n_tiles", "n_sequences", "capacity"])
def _block_queries_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, level_ptr, delta_ptr, dq_ptr, list_ptr, named_ptr, count_ptr, cu_ptr,
                          S, T, H, G, U, R, n_tiles, n_sequences, capacity,
                          stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, scale,
                          D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                          M: tl.constexpr, N: tl.constexpr, QUERIES: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
                          PIECES: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr):
    """One program: dQ of one tile of the forward."""
    S_all = S
    pid = tl.program_id(0)
    part = pid % PARTS
    pid = pid // PARTS
    u = pid % U
    b, _, first, q0, S, T = locate(pid // U, n_tiles, cu_ptr, cu_ptr, S, T, n_sequences, QUERIES, PACKED, False)
    if q0 < S:
        row = part * M + tl.arange(0, M)
        i = row // R
        t = q0 + i
        h = u * R + row % R
        live = (i < QUERIES) & (t < S)
        p = tl.where(live, t + T - S, -1)
        kv_head = ((u * R) // G).to(tl.int64)

        q_at = q_ptr + b * stride_qb + (first + t) * stride_qs + h.to(tl.int64) * stride_qh
        q = load_rows(q_at, live, 0, BLOCK_D, D)  # [M, D]
        q_rest = q
        dq = tl.zeros([M, BLOCK_D], tl.float32)
        dq_rest = dq
        if REST_D > 0:
            q_rest = load_rows(q_at, live, BLOCK_D, REST_D, D)
            dq_rest = tl.zeros([M, REST_D], tl.float32)
        to = (b * S_all + first + t) * H + h  # rows of contiguous [B, S, H, ·]
        dout = load_rows(dout_ptr + to * DV, live, 0, BLOCK_DV, DV)  # [M, Dv]
        at = (b * H + h) * S_all + first + t
        level = tl.load(level_ptr + at, mask=live, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=live, other=0.0)
        k_base = k_ptr + b * stride_kb + first * stride_ks + kv_head * stride_kh
        v_base = v_ptr + b * stride_vb + first * stride_vs + kv_head * stride_vh

        list_ptr += pid.to(tl.int64) * capacity
        named_ptr += pid.to(tl.int64) * capacity
        steps = steps_of(list_ptr, tl.load(count_ptr + pid), tl.minimum(q0 + QUERIES, S) - 1 + T - S, N, BLOCK, PIECES)
        for step in range(0, steps):
            n0, size, seen = step_keys(list_ptr, named_ptr, step, i, p, N, BLOCK, PIECES)
            left = tl.minimum(T - n0, size)
            k_at = k_base + n0.to(tl.int64) * stride_ks
            k = load_tile(k_at, stride_ks, left, N, 0, BLOCK_D, D, WIDE)  # [N, D]
            s = dot(q, tl.trans(k), tl.zeros([M, N], tl.float32))  # [M, N]
            if REST_D > 0:
                k_rest = load_tile(k_at, stride_ks, left, N, BLOCK_D, REST_D, D, WIDE)
                s = dot(q_rest, tl.trans(k_rest), s)
            v = load_tile(v_base + n0.to(tl.int64) * stride_vs, stride_vs, left, N, 0, BLOCK_DV, DV, WIDE)  # [N, Dv]
            dp = dot(dout, tl.trans(v), tl.zeros([M, N], tl.float32), CHAIN)  # [M, N]
            weights = row_weights(tl.where(seen, s, float("-inf")), level[:, None], scale, False, q.dtype == tl.float32)
            ds = (weights * (dp - delta[:, None])).to(k.dtype)
            dq = dot(ds, k, dq)
            if REST_D > 0:
                dq_rest = dot(ds, k_rest, dq_rest)

        d = tl.arange(0, BLOCK_D)
        kind = dq_ptr.dtype.element_ty
        tl.store(dq_ptr + to[:, None] * D + d[None, :], (dq * scale).to(kind), mask=live[:, None] & (d < D)[None, :])
        if REST_D > 0:
            d_rest = BLOCK_D + tl.arange(0, REST_D)
            tl.store(dq_ptr + to[:, None] * D + d_rest[None, :], (dq_rest * scale).to(kind), mask=live[:, None] & (d_rest < D)[None, :])


@triton.jit
def _store_keys(result_ptr, part_ptr, tile, at, part_at, size, alone, scale, N: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
                WIDTH: tl.constexpr, STRIDE_ROWS):
    """`size` rows of a tile [N, COLUMNS]: to the result where the segment is alone, else to its float32 sums."""
    lane = tl.arange(0, N)
    d = FIRST + tl.arange(0, COLUMNS)
    inside = (lane < size)[:, None] & (d < WIDTH)[None, :]
    to = (at + lane.to(tl.int64) * STRIDE_ROWS) * WIDTH
    tl.store(result_ptr + to[:, None] + d[None, :], (tile * scale).to(result_ptr.dtype.element_ty), mask=inside & alone)
    tl.store(part_ptr + (part_at + lane)[:, None] * WIDTH + d[None, :], tile, mask=inside & ~alone)


@triton.jit(do_not_specialize=["S_all", "T_all", "n_blocks", "n_sequences", "n_lists"])
def _block_keys_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, level_ptr, delta_ptr, dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr,
                       pair_ptr, start_ptr, owner_ptr, first_ptr, place_ptr, cu_ptr, S_all, T_all, H, HKV, n_blocks, n_sequences, n_lists,
                       stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, scale,
                       U: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr,
                       D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                       M: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr, SEGMENT: tl.constexpr,
                       BLOCK: tl.constexpr, PIECES: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr):
    """One program: N keys of one block and key head over one segment of the list of pairs that named the block."""
    # Which segment of which list.
    pid = tl.program_id(0)
    piece = (pid % PIECES) * N
    segment = pid // PIECES
    owner = tl.load(owner_ptr + segment)
    if owner < n_lists:
        g = (owner // n_blocks) % HKV
        tile = owner // (n_blocks * HKV) * n_blocks + owner % n_blocks
        b, _, first, n0, _, T = locate(tile, n_blocks, cu_ptr, cu_ptr, T_all, T_all, n_sequences, BLOCK, PACKED, False)
        n0 += piece
        size = tl.minimum(T - n0, BLOCK - piece)
        if size > 0:
            number = segment - tl.load(first_ptr + owner)
            place = tl.load(place_ptr + owner)
            begin = tl.load(start_ptr + owner) + number.to(tl.int64) * SEGMENT
            end = tl.minimum(begin + SEGMENT, tl.load(start_ptr + owner + 1))
            behind = T - S_all
            if PACKED:
                behind = tl.cast(-first, tl.int32)  # of a query's number to its position

            # Load the keys.
            k_base = k_ptr + b * stride_kb + g.to(tl.int64) * stride_kh + (first + n0) * stride_ks
            v_base = v_ptr + b * stride_vb + g.to(tl.int64) * stride_vh + (first + n0) * stride_vs
            k = load_tile(k_base, stride_ks, size, N, 0, BLOCK_D, D, WIDE)  # [N, D]
            v = load_tile(v_base, stride_vs, size, N, 0, BLOCK_DV, DV, WIDE)  # [N, Dv]
            dk = tl.zeros([N, BLOCK_D], tl.float32)
            dv = tl.zeros([N, BLOCK_DV], tl.float32)
            k_rest = k
            dk_rest = dk
            if REST_D > 0:
                k_rest = load_tile(k_base, stride_ks, size, N, BLOCK_D, REST_D, D, WIDE)
                dk_rest = tl.zeros([N, REST_D], tl.float32)
            key = n0 + tl.arange(0, N)

            # Add tile after tile of rows: PAIRS pairs with their R heads.
            count = (end - begin).to(tl.int32)
            for step in range(0, tl.cdiv(count, PAIRS) * PARTS):
                row = (step % PARTS) * M + tl.arange(0, M)
                i = (step // PARTS) * PAIRS + row // R
                live = (row < PAIRS * R) & (i < count)
                pair = tl.load(pair_ptr + begin + i, mask=live, other=0)
                s_row = (pair // (U * SLOTS)).to(tl.int64) - b * S_all
                h = (pair // SLOTS) % U * R + row % R
                q_at = q_ptr + b * stride_qb + s_row * stride_qs + h.to(tl.int64) * stride_qh
                q = load_rows(q_at, live, 0, BLOCK_D, D)  # [M, D]
                s = dot(k, tl.trans(q), tl.zeros([N, M], tl.float32))  # [N, M]
                if REST_D > 0:
                    q_rest = load_rows(q_at, live, BLOCK_D, REST_D, D)
                    s = dot(k_rest, tl.trans(q_rest), s)
                dout = load_rows(dout_ptr + ((b * S_all + s_row) * H + h) * DV, live, 0, BLOCK_DV, DV)  # [M, Dv]
                dp = dot(v, tl.trans(dout), tl.zeros([N, M], tl.float32), CHAIN)  # [N, M]
                at = (b * H + h) * S_all + s_row
                level = tl.load(level_ptr + at, mask=live, other=float("inf"))
                delta = tl.load(delta_ptr + at, mask=live, other=0.0)
                seen = key[:, None] <= (s_row.to(tl.int32) + behind)[None, :]
                p = row_weights(tl.where(seen, s, float("-inf")), level[None, :], scale, False, q.dtype == tl.float32)
                dv = dot(p.to(dout.dtype), dout, dv)
                ds = (p * (dp - delta[None, :])).to(q.dtype)
                dk = dot(ds, q, dk)
                if REST_D > 0:
                    dk_rest = dot(ds, q_rest, dk_rest)

            at = (b * T_all + first + n0) * HKV + g
            part_at = (place + number).to(tl.int64) * BLOCK + piece
            _store_keys(dk_ptr, dk_part_ptr, dk, at, part_at, size, place < 0, scale, N, 0, BLOCK_D, D, HKV)
            if REST_D > 0:
                _store_keys(dk_ptr, dk_part_ptr, dk_rest, at, part_at, size, place < 0, scale, N, BLOCK_D, REST_D, D, HKV)
            _store_keys(dv_ptr, dv_part_ptr, dv, at, part_at, size, place < 0, 1.0, N, 0, BLOCK_DV, DV, HKV)


@triton.jit(do_not_specialize=["T_all", "n_blocks", "n_sequences"])
def _block_sums_kernel(part_ptr, result_ptr, first_ptr, end_ptr, place_ptr, cu_ptr, T_all, HKV, n_blocks, n_sequences, scale,
                       WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """One program: ROWS keys of a block that has several segments; their sums in order."""
    pieces = tl.cdiv(BLOCK, ROWS)
    piece = (tl.program_id(0) % pieces) * ROWS
    owner = tl.program_id(0) // pieces
    place = tl.load(place_ptr + owner)
    if place >= 0:
        g = (owner // n_blocks) % HKV
        tile = owner // (n_blocks * HKV) * n_blocks + owner % n_blocks
        b, _, first, n0, _, T = locate(tile, n_blocks, cu_ptr, cu_ptr, T_all, T_all, n_sequences, BLOCK, PACKED, False)
        lane = piece + tl.arange(0, ROWS)
        there = (lane < BLOCK) & (n0 + lane < T)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for number in range(0, tl.load(end_ptr + owner) - tl.load(first_ptr + owner)):
            total += load_rows(part_ptr + ((place + number).to(tl.int64) * BLOCK + lane) * WIDTH, there, 0, COLUMNS, WIDTH)
        to = result_ptr + ((b * T_all + first + n0 + lane) * HKV + g) * WIDTH
        d = tl.arange(0, COLUMNS)
        tl.store(to[:, None] + d[None, :], (total * scale).to(result_ptr.dtype.element_ty), mask=there[:, None] & (d < WIDTH)[None, :])


class Lists(NamedTuple):
    """The pairs that named each block of each key head, and the segments that the lists are cut into. Lists: (b·Hkv + g)·blocks + block."""

    pairs: Tensor  # [B S U n] of (row · U + u) · n + slot, sorted by the block named, stably
    starts: Tensor  # [lists + 1] int64
    owners: Tensor  # [segments] int32, the list that a segment is of; past the last: the number of lists
    first: Tensor  # [lists] int32, its first segment, and the one behind its last
    end: Tensor
    places: Tensor  # [lists] int32, where its sums begin, −1: of one segment
    n_segments: int  # at most
    n_blocks: int  # of a row of the batch
    n_places: int


def lists_of(indices: Tensor, T: int, Hkv: int, block: int, segment: int, cu_seqlens: Tensor | None) -> Lists:
    """indices [B, S, U, n] int32; segments of so many pairs. Integer work of fixed sizes: nothing waits for the GPU."""
    B, S, U, slots = indices.shape
    device = indices.device
    n_blocks = tiles(T, block, cu_seqlens)
    n_lists, n_pairs = B * Hkv * n_blocks, indices.numel()
    row = torch.arange(S, device=device)
    if cu_seqlens is None:
        own, first_block = (row + T - S).div(block, rounding_mode="floor"), torch.zeros_like(row)
    else:
        cu = cu_seqlens.long()
        sequence = torch.searchsorted(cu[1:], row, right=True).clamp_max(len(cu) - 2)
        own = (row - cu[sequence]).div(block, rounding_mode="floor")
        first_block = (cu[sequence] + sequence * (block - 1)).div(block, rounding_mode="floor")  # as packed_tile counts
    small = torch.int32 if max(n_lists, n_pairs) < 2**31 else torch.int64
    head = torch.arange(U, device=device) // (U // Hkv)
    base = (torch.arange(B, device=device)[:, None, None] * Hkv + head) * n_blocks + first_block[:, None]  # [B, S, U]
    named = (indices >= 0) & (indices <= own[:, None, None])
    owner = torch.where(named, indices + base[..., None], n_lists).to(small)
    owner, pairs = owner.flatten().sort(stable=True)
    starts = torch.searchsorted(owner, torch.arange(n_lists + 1, device=device, dtype=small))
    segments = starts.diff().add(segment - 1).div(segment, rounding_mode="floor").clamp_min(1)
    end = segments.cumsum(0)
    several = torch.where(segments > 1, segments, 0)
    places = torch.where(segments > 1, several.cumsum(0) - several, -1)
    n_segments = n_lists + n_pairs // segment
    owners = torch.searchsorted(end, torch.arange(n_segments, device=device), right=True)
    first, end, places, owners = (x.int() for x in (end - segments, end, places, owners))
    return Lists(pairs.to(small), starts, owners, first, end, places, n_segments, n_blocks, 2 * n_pairs // segment)


def block_backward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dq: Tensor, dk: Tensor,
                   dv: Tensor, *, block: int, scale: float, cu_seqlens: Tensor | None = None) -> None:
    """Fills dq, dk, dv (shapes of q, k, v) from dout [B,S,H,Dv]; out and lse are block_attention's. All but q, k, v contiguous.

    Extra memory: float32 level and delta [B,H,S]; the lists, 20 bytes a pair while they are sorted; the segments' sums.
    """
    n_sequences = 0
    if cu_seqlens is not None:
        q, k, v, indices, out, lse, dout, dq, dk, dv = (x[None] for x in (q, k, v, indices, out, lse, dout, dq, dk, dv))
        n_sequences = len(cu_seqlens) - 1
    B, S, H, D = q.shape
    T, Hkv, Dv = v.shape[1:]
    if B * S * H * T == 0:
        for x in (dq, dk, dv):
            x.zero_()
        return
    U, slots = indices.shape[2:]
    shared = H // U
    (block_d, rest_d), block_dv = blocks(D), max(16, triton.next_power_of_2(Dv))
    width = max(block_d + rest_d, block_dv)
    level, delta = torch.empty((2, B, H, S), dtype=torch.float32, device=q.device)
    wide = any(is_wide(x.stride(1), 128) for x in (q, k, v, out))
    rows = 64 if configs.INTERPRET else 16
    launch(
        _rows_kernel, (B * H * triton.cdiv(S, rows),), out, dout, lse, None, None, level, delta, None, S, H, *out.stride()[:3],
        *dout.stride()[:3], *lse.stride(), 0, 0, 0, DV=Dv, BLOCK_DV=block_dv, M=rows, SINKS=False, DLSE=False, WIDE=wide,
        warps=4, stages=1, device=q.device)
    shapes: dict[str, Any] = dict(
        D=D, DV=Dv, BLOCK_D=block_d, REST_D=rest_d, BLOCK_DV=block_dv, PACKED=cu_seqlens is not None, WIDE=wide, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])

    tile = configs_sparse.block_sparse_tile("blocks_q", q.device, q.dtype, width)
    way = walk(indices, T, H, tile.m, block, cu_seqlens, None)
    launch(
        _block_queries_kernel, (way.programs,), q, k, v, dout, level, delta, dq, way.blocks, way.named, way.counts, cu_seqlens,
        S, T, H, H // Hkv, U, shared, way.n_tiles, n_sequences, way.capacity, *strides, float(scale), M=tile.m,
        **way.constants(tile.n, block), **shapes, warps=tile.warps, stages=tile.stages)

    tile = configs_sparse.block_sparse_tile("blocks_kv", q.device, q.dtype, width, whole=64 % shared == 0)
    keys = keys_of_tile(tile.n, block)
    pieces, pairs = triton.cdiv(block, keys), max(1, tile.m // shared)
    segment = max(1, configs_sparse.segment() * pieces // shared)
    lists = lists_of(indices, T, Hkv, block, segment, cu_seqlens)
    dk_part, dv_part = (torch.empty((max(lists.n_places, 1), block, n), dtype=torch.float32, device=q.device) for n in (D, Dv))
    n_lists = len(lists.first)
    launch(
        _block_keys_kernel, (lists.n_segments * pieces,), q, k, v, dout, level, delta, dk, dv, dk_part, dv_part, lists.pairs, lists.starts,
        lists.owners, lists.first, lists.places, cu_seqlens, S, T, H, Hkv, lists.n_blocks, n_sequences, n_lists, *strides, float(scale),
        U=U, R=shared, SLOTS=slots, M=tile.m, N=keys, PAIRS=pairs, PARTS=triton.cdiv(shared, tile.m) if shared > tile.m else 1,
        SEGMENT=segment, BLOCK=block, PIECES=pieces, **shapes, warps=tile.warps, stages=tile.stages)
    if lists.n_places > 0:
        for part, result, factor in ((dk_part, dk, float(scale)), (dv_part, dv, 1.0)):
            columns = max(16, triton.next_power_of_2(result.shape[-1]))
            rows = max(1, 4096 // columns)
            launch(
                _block_sums_kernel, (n_lists * triton.cdiv(block, rows),), part, result, lists.first, lists.end, lists.places, cu_seqlens,
                T, Hkv, lists.n_blocks, n_sequences, factor, WIDTH=result.shape[-1], COLUMNS=columns, ROWS=rows, BLOCK=block,
                PACKED=cu_seqlens is not None, warps=4, stages=2, device=q.device)
