"""Attention over chosen blocks of keys (NSA's middle branch, MoBA), and NSA's sum of branches.

Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, U choosing heads (NSA Hkv, MoBA H), R = H / U heads that share a choice,
D head dim, Dv value dim, n blocks of a choice, M and N the rows and keys of a tile. Query i sits at p = i + T − S.

    o = softmax(scale·q·k) v over the keys j ≤ p of the n blocks that the query named          (arXiv 2502.11089, 2502.13189)
    NSA: o = Σ_c g_c·o_c;  do_c = g_c·do,  dg_c = do·o_c

A tile is M rows (query, head that shares its choice): four queries of sixteen heads fill Hopper's 64. It walks the union of its queries'
blocks, ascending (native_sparse_walk.py), so a block that neighbours share is fetched once. A block that a row did not name changes nothing
in it (its weights are exactly 0, the rescaling factor exactly 1), so neither the tile nor the neighbours show in its bits.
"""
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import configs_sparse
from .attention import covers as attention_covers
from .attention_tiles import LOG2E, blocks, finish, load_rows, power
from .native_sparse_backward import block_backward
from .native_sparse_choose import MAX_SPAN, choose, locate
from .native_sparse_walk import step_keys, steps_of, walk
from .primitives import dot, is_wide, launch, load_tile

__all__ = ["block_attention", "block_backward", "branch_gates", "branch_gates_backward", "choose", "covers"]


@triton.jit(do_not_specialize=["S", "T", "n_tiles", "n_sequences", "capacity"])
def _blocks_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, list_ptr, named_ptr, count_ptr, cu_ptr, seqlens_ptr,
                   S, T, H, G, U, R, n_tiles, n_sequences, capacity,
                   stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, scale,
                   D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                   M: tl.constexpr, N: tl.constexpr, QUERIES: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
                   PACKED: tl.constexpr, CACHE: tl.constexpr, WIDE: tl.constexpr):
    """One program: QUERIES queries with the heads of one choosing head (or, of more heads than M, a part of them)."""
    # Which tile.
    S_all = S
    pid = tl.program_id(0)
    part = pid % PARTS
    pid = pid // PARTS
    u = pid % U
    b, _, first, q0, S, T = locate(pid // U, n_tiles, cu_ptr, seqlens_ptr, S, T, n_sequences, QUERIES, PACKED, CACHE)
    if q0 < S:
        row = part * M + tl.arange(0, M)
        i = row // R
        t = q0 + i
        h = u * R + row % R
        live = (i < QUERIES) & (t < S)
        p = tl.where(live, t + T - S, -1)
        kv_head = ((u * R) // G).to(tl.int64)

        # Load the queries.
        q_at = q_ptr + b * stride_qb + (first + t) * stride_qs + h.to(tl.int64) * stride_qh
        q = load_rows(q_at, live, 0, BLOCK_D, D)  # [M, D]
        q_rest = q
        if REST_D > 0:
            q_rest = load_rows(q_at, live, BLOCK_D, REST_D, D)
        k_base = k_ptr + b * stride_kb + first * stride_ks + kv_head * stride_kh
        v_base = v_ptr + b * stride_vb + first * stride_vs + kv_head * stride_vh

        # Walk the blocks.
        list_ptr += pid.to(tl.int64) * capacity
        named_ptr += pid.to(tl.int64) * capacity
        EXACT: tl.constexpr = q.dtype == tl.float32
        factor = scale
        if not EXACT:
            factor = factor * LOG2E
        acc = tl.zeros([M, BLOCK_DV], tl.float32)
        total = tl.zeros([M], tl.float32)
        peak = tl.full([M], float("-inf"), tl.float32)
        steps = steps_of(list_ptr, tl.load(count_ptr + pid), tl.minimum(q0 + QUERIES, S) - 1 + T - S, N, BLOCK, PIECES)
        for step in range(0, steps):
            n0, size, seen = step_keys(list_ptr, named_ptr, step, i, p, N, BLOCK, PIECES)
            left = tl.minimum(T - n0, size)
            at = n0.to(tl.int64)
            k = load_tile(k_base + at * stride_ks, stride_ks, left, N, 0, BLOCK_D, D, WIDE)  # [N, D]
            s = dot(q, tl.trans(k), tl.zeros([M, N], tl.float32))  # [M, N]
            if REST_D > 0:
                s = dot(q_rest, tl.trans(load_tile(k_base + at * stride_ks, stride_ks, left, N, BLOCK_D, REST_D, D, WIDE)), s)
            s = tl.where(seen, s, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(s, 1) * factor)
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen nothing: −inf − −inf
            weights = power(tl.fma(s, tl.full(s.shape, factor, tl.float32), tl.broadcast_to(-base[:, None], s.shape)), EXACT)
            decay = power(peak - base, EXACT)
            total = total * decay + tl.sum(weights, 1)
            v = load_tile(v_base + at * stride_vs, stride_vs, left, N, 0, BLOCK_DV, DV, WIDE)  # [N, Dv]
            acc = dot(weights.to(v.dtype), v, acc * decay[:, None])
            peak = new_peak

        # Normalise and write.
        out, lse = finish(acc, total, peak, 0.0, False, EXACT)
        to = (b * S_all + first + t) * H + h
        d = tl.arange(0, BLOCK_DV)
        tl.store(out_ptr + to[:, None] * DV + d[None, :], out.to(out_ptr.dtype.element_ty), mask=live[:, None] & (d < DV)[None, :])
        tl.store(lse_ptr + to, lse, mask=live)


def block_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, out: Tensor, lse: Tensor, *, block: int, scale: float,
                    cu_seqlens: Tensor | None = None, seqlens: Tensor | None = None) -> None:
    """q [B,S,H,D], k [B,T,Hkv,D], v [B,T,Hkv,Dv], indices [B,S,U,n] int32 -> out [B,S,H,Dv] and lse [B,S,H] float32, both contiguous.

    An index outside 0 … p / block is an empty slot. Packed: [N,·,·] with cu_seqlens [sequences + 1] int32. seqlens [B] int32: k, v are
    caches of which so many keys count, the S new ones included.
    """
    if cu_seqlens is not None:
        q, k, v, indices = q[None], k[None], v[None], indices[None]
    B, S, H, D = q.shape
    T, Hkv, Dv = v.shape[1:]
    if B * S * H == 0:
        return
    U = indices.shape[2]
    (block_d, rest_d), block_dv = blocks(D), max(16, triton.next_power_of_2(Dv))
    tile = configs_sparse.block_sparse_tile("blocks", q.device, q.dtype, max(block_d + rest_d, block_dv))
    way = walk(indices, T, H, tile.m, block, cu_seqlens, seqlens)
    launch(
        _blocks_kernel, (way.programs,), q, k, v, out, lse, way.blocks, way.named, way.counts, cu_seqlens, seqlens,
        S, T, H, H // Hkv, U, H // U, way.n_tiles, 0 if cu_seqlens is None else len(cu_seqlens) - 1, way.capacity,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        float(scale), D=D, DV=Dv, BLOCK_D=block_d, REST_D=rest_d, BLOCK_DV=block_dv, M=tile.m, **way.constants(tile.n, block),
        PACKED=cu_seqlens is not None, CACHE=seqlens is not None, WIDE=any(is_wide(x.stride(1), tile.n) for x in (k, v)),
        warps=tile.warps, stages=tile.stages, device=q.device)


def covers(q: Tensor, k: Tensor, v: Tensor, scale: float, block: int, compress_block: int = 0, stride: int = 1) -> str | None:
    """Why the kernels cannot take this call, naming the argument; None if they can."""
    reason = attention_covers(q, k, v, scale=scale)
    span = block // stride + compress_block // stride - 1
    if reason is None and compress_block and span > MAX_SPAN:
        return f"block: the score of {block} keys sums {span} compressed keys, over {MAX_SPAN}"
    return reason


# ---- the sum of branches ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _gates_kernel(a_ptr, b_ptr, c_ptr, gates_ptr, out_ptr, rows, DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
                  GATES: tl.constexpr):
    """ROWS rows of Σ_c g_c·o_c; without GATES the plain sum."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    first = 1.0
    second = tl.full([ROWS, 1], 1.0, tl.float32)
    third = second
    if GATES:
        first = tl.load(gates_ptr + row * 3, mask=there, other=0.0).to(tl.float32)[:, None]
        second = tl.load(gates_ptr + row * 3 + 1, mask=there, other=0.0).to(tl.float32)[:, None]
        third = tl.load(gates_ptr + row * 3 + 2, mask=there, other=0.0).to(tl.float32)[:, None]
    total = load_rows(a_ptr + row * DV, there, 0, BLOCK_DV, DV).to(tl.float32) * first
    second = tl.broadcast_to(second, total.shape)
    third = tl.broadcast_to(third, total.shape)
    total = tl.fma(load_rows(b_ptr + row * DV, there, 0, BLOCK_DV, DV).to(tl.float32), second, total)
    total = tl.fma(load_rows(c_ptr + row * DV, there, 0, BLOCK_DV, DV).to(tl.float32), third, total)
    d = tl.arange(0, BLOCK_DV)
    tl.store(out_ptr + row[:, None] * DV + d[None, :], total.to(out_ptr.dtype.element_ty), mask=there[:, None] & (d < DV)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _gates_backward_kernel(branches_ptr, gates_ptr, dout_ptr, dbranches_ptr, dgates_ptr, rows, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
                           ROWS: tl.constexpr):
    """ROWS rows of do_c = g_c·do and dg_c = do·o_c."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    d = tl.arange(0, BLOCK_DV)
    inside = there[:, None] & (d < DV)[None, :]
    dout = load_rows(dout_ptr + row * DV, there, 0, BLOCK_DV, DV).to(tl.float32)
    for c in tl.static_range(3):
        at = (rows.to(tl.int64) * c + row) * DV
        branch = load_rows(branches_ptr + at, there, 0, BLOCK_DV, DV).to(tl.float32)
        gate = tl.load(gates_ptr + row * 3 + c, mask=there, other=0.0).to(tl.float32)
        tl.store(dbranches_ptr + at[:, None] + d[None, :], (dout * gate[:, None]).to(dbranches_ptr.dtype.element_ty), mask=inside)
        tl.store(dgates_ptr + row * 3 + c, tl.sum(dout * branch, 1).to(dgates_ptr.dtype.element_ty), mask=there)


def _row_shape(Dv: int) -> tuple[int, int]:
    """Padded columns and rows of a tile of 4096 values."""
    padded = max(16, triton.next_power_of_2(Dv))
    return padded, max(1, 4096 // padded)


def branch_gates(branches: Sequence[Tensor], gates: Tensor | None, out: Tensor) -> None:
    """Three branches [..., Dv] and gates [..., 3] (None: all 1) -> out [..., Dv]; everything contiguous."""
    a, b, c = branches
    rows = out.numel() // max(out.shape[-1], 1)
    if rows == 0:
        return
    padded, some = _row_shape(out.shape[-1])
    launch(
        _gates_kernel, (triton.cdiv(rows, some),), a, b, c, gates, out, rows, DV=out.shape[-1], BLOCK_DV=padded, ROWS=some,
        GATES=gates is not None, warps=4, stages=1, device=out.device)


def branch_gates_backward(branches: Tensor, gates: Tensor, dout: Tensor, dbranches: Tensor, dgates: Tensor) -> None:
    """branches [3, ..., Dv], gates [..., 3], dout [..., Dv] -> dbranches [3, ..., Dv], dgates [..., 3]; everything contiguous."""
    rows = dout.numel() // max(dout.shape[-1], 1)
    if rows == 0:
        return
    padded, some = _row_shape(dout.shape[-1])
    launch(
        _gates_backward_kernel, (triton.cdiv(rows, some),), branches, gates, dout, dbranches, dgates, rows, DV=dout.shape[-1],
        BLOCK_DV=padded, ROWS=some, warps=4, stages=1, device=dout.device)
