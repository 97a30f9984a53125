"""Backward of grouped-query attention: a row pass, then dK/dV and dQ in kernels of their own (no atomics).

Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim, M, N the rows and
keys of a tile. Packed sequences are one row of the batch here; S_all and T_all count all their rows.

    L = logaddexp(lse, σ) (lse without a sink),  P = exp(s − L),  Δ = Σ_d dO·O − exp(L − lse)·dlse
    dS = P∘(dO·Vᵀ − Δ)·(1 − (s/c)²),  dQ = scale·dS·K,  dK = scale·dSᵀ·Q,  dV = Pᵀ·dO,  dσ[h] = −Σ_i exp(σ − L)·Σ_d dO·O

dK and dV sum over the query heads of a group and, inside each, over query blocks in ascending order; dQ over the
canonical key blocks. The scores are computed three times in all instead of twice: the price of determinism without a
float32 dQ buffer per key block.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .attention_tiles import (
    LOG2E,
    blocks,
    capped,
    floor_divide,
    has_options,
    key_blocks,
    mask_arguments,
    packed_rows,
    packed_tile,
    power,
    tiles,
    visible,
)
from .primitives import dot, is_wide, launch, load_tile, store_tile

# float32's dP sums its Dv terms in chains of so many: where a row sees a dozen keys, half of dQ's and dK's error is what dP = dO·Vᵀ
# loses in one chain.
CHAIN = tl.constexpr(32)


@triton.jit(do_not_specialize=["S"])
def _rows_kernel(out_ptr, dout_ptr, lse_ptr, dlse_ptr, sinks_ptr, level_ptr, delta_ptr, dsink_ptr, S, H, stride_ob, stride_os, stride_oh,
                 stride_gb, stride_gs, stride_gh, stride_lb, stride_ls, stride_lh, stride_eb, stride_es, stride_eh,
                 DV: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr, SINKS: tl.constexpr, DLSE: tl.constexpr, WIDE: tl.constexpr):
    """M rows of one head -> level [B,H,S] = L, delta [B,H,S] = Δ, dsink [B,H,S] = this row's share of dσ.

    A row that saw nothing gets level +inf, hence P = 0.
    """
    row_blocks = tl.cdiv(S, M)
    pid = tl.program_id(0)
    m0 = (pid % row_blocks) * M
    h = (pid // row_blocks) % H
    b = (pid // (row_blocks * H)).to(tl.int64)
    row = m0 + tl.arange(0, M)
    inside = row < S
    head = h.to(tl.int64)
    out = load_tile(out_ptr + b * stride_ob + head * stride_oh + m0.to(tl.int64) * stride_os, stride_os, S - m0, M, 0, BLOCK_DV, DV, WIDE)
    dout = load_tile(dout_ptr + b * stride_gb + head * stride_gh + m0.to(tl.int64) * stride_gs, stride_gs, S - m0, M, 0, BLOCK_DV, DV, WIDE)
    product = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)  # [M]
    lse = tl.load(lse_ptr + b * stride_lb + row.to(tl.int64) * stride_ls + h * stride_lh, mask=inside, other=float("-inf"))
    empty = lse == float("-inf")
    level = lse
    at = (b * H + h) * S + row
    if SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32)
        top = tl.where(empty, sink, tl.maximum(lse, sink))
        level = top + tl.log(tl.exp(lse - top) + tl.exp(sink - top))
        tl.store(dsink_ptr + at, tl.where(empty, 0.0, -tl.exp(sink - level) * product), mask=inside)
    if DLSE:
        dlse = tl.load(dlse_ptr + b * stride_eb + row.to(tl.int64) * stride_es + h * stride_eh, mask=inside, other=0.0).to(tl.float32)
        product = tl.where(empty, 0.0, product - tl.exp(level - lse) * dlse)
    tl.store(level_ptr + at, tl.where(empty, float("inf"), level), mask=inside)
    tl.store(delta_ptr + at, product, mask=inside)


@triton.jit
def row_weights(s, level, scale, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """P = exp(s − L) from (capped) products and level = L; −inf gives 0. EXACT as in `power`."""
    factor = scale
    if SOFTCAP:
        factor = 1.0
    if not EXACT:
        factor = factor * LOG2E
        level = level * LOG2E
    return power(tl.fma(s, tl.full(s.shape, factor, tl.float32), tl.broadcast_to(-level, s.shape)), EXACT)


@triton.jit(do_not_specialize=["S_all", "T_all", "n_tiles", "n_sequences", "left", "right", "chunk"])
def _keys_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, level_ptr, delta_ptr, dk_ptr, dv_ptr, key_start_ptr, cu_q_ptr, cu_k_ptr,
                 S_all, T_all, HKV, G, n_tiles, n_sequences,
                 stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
                 stride_gb, stride_gs, stride_gh, stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
                 scale, softcap, left, right, chunk,
                 D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                 M: tl.constexpr, N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr,
                 SOFTCAP: tl.constexpr, KEY_START: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr):
    """One program: dK and dV of N keys of one key head, over all queries of the group that see them."""
    # Which tile. Early keys (seen by the most queries under a causal mask) come first.
    pid = tl.program_id(0)
    kv_head = pid % HKV
    b = (pid // (HKV * n_tiles)).to(tl.int64)
    tile = (pid // HKV) % n_tiles
    S = S_all
    T = T_all
    n0 = tile * N
    if PACKED:
        sequence, n0 = packed_tile(tile, cu_k_ptr, n_sequences, N)
        q_first, S = packed_rows(sequence, cu_q_ptr, S_all)
        k_first, T = packed_rows(sequence, cu_k_ptr, T_all)
        q_ptr += q_first.to(tl.int64) * stride_qs
        dout_ptr += q_first.to(tl.int64) * stride_gs
        level_ptr += q_first
        delta_ptr += q_first
        k_ptr += k_first.to(tl.int64) * stride_ks
        v_ptr += k_first.to(tl.int64) * stride_vs
        dk_ptr += k_first.to(tl.int64) * stride_dks
        dv_ptr += k_first.to(tl.int64) * stride_dvs
    key_start = 0
    anchor = 0  # query blocks count from the first query that can see a key, so that left padding moves nothing
    if KEY_START:
        key_start = tl.minimum(tl.maximum(tl.load(key_start_ptr + b), 0), T)
        if RIGHT:
            anchor = tl.maximum(key_start - right - (T - S), 0)
    n0 += key_start
    if n0 < T:
        j = n0 + tl.arange(0, N)
        head = kv_head.to(tl.int64)
        at = n0.to(tl.int64)
        k_base = k_ptr + b * stride_kb + head * stride_kh + at * stride_ks
        k = load_tile(k_base, stride_ks, T - n0, N, 0, BLOCK_D, D, WIDE)  # [N, D]
        k_rest = k
        dk = tl.zeros([N, BLOCK_D], tl.float32)
        dk_rest = dk
        if REST_D > 0:
            k_rest = load_tile(k_base, stride_ks, T - n0, N, BLOCK_D, REST_D, D, WIDE)
            dk_rest = tl.zeros([N, REST_D], tl.float32)
        v = load_tile(v_ptr + b * stride_vb + head * stride_vh + at * stride_vs, stride_vs, T - n0, N, 0, BLOCK_DV, DV, WIDE)  # [N, Dv]
        dv = tl.zeros([N, BLOCK_DV], tl.float32)

        # Query blocks [first, last) that see any of these keys, [whole_first, whole_last) that see all of them.
        n1 = tl.minimum(n0 + N, T) - 1
        low = anchor
        whole_low = anchor
        high = S
        whole_high = S
        if RIGHT:
            low = tl.maximum(low, n0 - right - (T - S))
            whole_low = tl.maximum(whole_low, n1 - right - (T - S))
        if LEFT:
            high = tl.minimum(high, n1 + left + 1 - (T - S))
            whole_high = tl.minimum(whole_high, n0 + left + 1 - (T - S))
        if CHUNK:
            high = tl.minimum(high, key_start + (floor_divide(n1 - key_start, chunk) + 1) * chunk - (T - S))
            whole_high = tl.minimum(whole_high, key_start + (floor_divide(n0 - key_start, chunk) + 1) * chunk - (T - S))
        first = (low - anchor) // M
        last = tl.maximum(tl.cdiv(tl.maximum(high - anchor, 0), M), first)
        whole_first = tl.minimum(tl.cdiv(whole_low - anchor, M), last)
        whole_last = tl.maximum(tl.minimum(tl.maximum(whole_high - anchor, 0) // M, last), whole_first)

        # Add query block after query block, head after head of the group, in one flat loop: nested or split into masked
        # and unmasked loops it spills registers.
        count = last - first
        level_base = level_ptr + (b * HKV + kv_head) * G * S_all
        delta_base = delta_ptr + (b * HKV + kv_head) * G * S_all
        q_base = q_ptr + b * stride_qb + head * G * stride_qh
        dout_base = dout_ptr + b * stride_gb + head * G * stride_gh
        for step in range(0, G * count):
            g = tl.cast(step // count, tl.int64)
            block = first + step % count
            m0 = anchor + block * M
            row = m0 + tl.arange(0, M)
            q_at = q_base + g * stride_qh + m0.to(tl.int64) * stride_qs
            q = load_tile(q_at, stride_qs, S - m0, M, 0, BLOCK_D, D, WIDE)  # [M, D]
            s = dot(k, tl.trans(q), tl.zeros([N, M], tl.float32))  # [N, M]
            if REST_D > 0:
                q_rest = load_tile(q_at, stride_qs, S - m0, M, BLOCK_D, REST_D, D, WIDE)
                s = dot(k_rest, tl.trans(q_rest), s)
            dout_at = dout_base + g * stride_gh + m0.to(tl.int64) * stride_gs
            dout = load_tile(dout_at, stride_gs, S - m0, M, 0, BLOCK_DV, DV, WIDE)  # [M, Dv]
            dp = dot(v, tl.trans(dout), tl.zeros([N, M], tl.float32), CHAIN)  # [N, M]
            level = tl.load(level_base + g * S_all + row, mask=row < S, other=float("inf"))
            delta = tl.load(delta_base + g * S_all + row, mask=row < S, other=0.0)
            s, slope = capped(s, scale, softcap, SOFTCAP)
            if (block < whole_first) | (block >= whole_last):
                seen = visible((row + T - S)[None, :], j[:, None], key_start, T, left, right, chunk, LEFT, RIGHT, CHUNK)
                s = tl.where(seen, s, float("-inf"))
            p = row_weights(s, level[None, :], scale, SOFTCAP, q.dtype == tl.float32)
            dv = dot(p.to(dout.dtype), dout, dv)
            ds = (p * (dp - delta[None, :]) * slope).to(q.dtype)
            dk = dot(ds, q, dk)
            if REST_D > 0:
                dk_rest = dot(ds, q_rest, dk_rest)

        dk_base = dk_ptr + b * stride_dkb + head * stride_dkh + at * stride_dks
        store_tile(dk_base, dk * scale, stride_dks, T - n0, N, 0, BLOCK_D, D, WIDE)
        if REST_D > 0:
            store_tile(dk_base, dk_rest * scale, stride_dks, T - n0, N, BLOCK_D, REST_D, D, WIDE)
        store_tile(dv_ptr + b * stride_dvb + head * stride_dvh + at * stride_dvs, dv, stride_dvs, T - n0, N, 0, BLOCK_DV, DV, WIDE)


@triton.jit(do_not_specialize=["S_all", "T_all", "n_tiles", "n_sequences", "left", "right", "chunk"])
def _queries_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, level_ptr, delta_ptr, dq_ptr, key_start_ptr, cu_q_ptr, cu_k_ptr,
                    S_all, T_all, H, G, n_tiles, n_sequences,
                    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
                    stride_gb, stride_gs, stride_gh, stride_dqb, stride_dqs, stride_dqh, scale, softcap, left, right, chunk,
                    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                    M: tl.constexpr, N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr,
                    SOFTCAP: tl.constexpr, KEY_START: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr):
    """One program: dQ of M queries of one head, over all the keys they see."""
    pid = tl.program_id(0)
    b = (pid // (H * n_tiles)).to(tl.int64)
    h = pid % H
    tile = n_tiles - 1 - (pid // H) % n_tiles
    S = S_all
    T = T_all
    m0 = tile * M
    if PACKED:
        sequence, m0 = packed_tile(tile, cu_q_ptr, n_sequences, M)
        q_first, S = packed_rows(sequence, cu_q_ptr, S_all)
        k_first, T = packed_rows(sequence, cu_k_ptr, T_all)
        T = tl.where(m0 < S, T, 0)  # an idle tile sees no key
        q_ptr += q_first.to(tl.int64) * stride_qs
        dout_ptr += q_first.to(tl.int64) * stride_gs
        dq_ptr += q_first.to(tl.int64) * stride_dqs
        level_ptr += q_first
        delta_ptr += q_first
        k_ptr += k_first.to(tl.int64) * stride_ks
        v_ptr += k_first.to(tl.int64) * stride_vs
    row = m0 + tl.arange(0, M)
    p = row + T - S
    head = h.to(tl.int64)
    at = m0.to(tl.int64)
    key_start = 0
    if KEY_START:
        key_start = tl.minimum(tl.maximum(tl.load(key_start_ptr + b), 0), T)
    q_base = q_ptr + b * stride_qb + head * stride_qh + at * stride_qs
    q = load_tile(q_base, stride_qs, S - m0, M, 0, BLOCK_D, D, WIDE)  # [M, D]
    q_rest = q
    dq = tl.zeros([M, BLOCK_D], tl.float32)
    dq_rest = dq
    if REST_D > 0:
        q_rest = load_tile(q_base, stride_qs, S - m0, M, BLOCK_D, REST_D, D, WIDE)
        dq_rest = tl.zeros([M, REST_D], tl.float32)
    dout = load_tile(dout_ptr + b * stride_gb + head * stride_gh + at * stride_gs, stride_gs, S - m0, M, 0, BLOCK_DV, DV, WIDE)  # [M, Dv]
    rows = (b * H + h) * S_all
    level = tl.load(level_ptr + rows + row, mask=row < S, other=float("inf"))
    delta = tl.load(delta_ptr + rows + row, mask=row < S, other=0.0)
    kv_head = (h // G).to(tl.int64)
    k_base = k_ptr + b * stride_kb + kv_head * stride_kh
    v_base = v_ptr + b * stride_vb + kv_head * stride_vh

    first, last, whole_first, whole_last = key_blocks(
        m0 + T - S, tl.minimum(m0 + M, S) - 1 + T - S, key_start, T, left, right, chunk, N, LEFT, RIGHT, CHUNK)
    for block in range(first, last):
        n0 = key_start + block * N
        at_n = n0.to(tl.int64)
        k = load_tile(k_base + at_n * stride_ks, stride_ks, T - n0, N, 0, BLOCK_D, D, WIDE)  # [N, D]
        s = dot(q, tl.trans(k), tl.zeros([M, N], tl.float32))  # [M, N]
        if REST_D > 0:
            k_rest = load_tile(k_base + at_n * stride_ks, stride_ks, T - n0, N, BLOCK_D, REST_D, D, WIDE)
            s = dot(q_rest, tl.trans(k_rest), s)
        v = load_tile(v_base + at_n * stride_vs, stride_vs, T - n0, N, 0, BLOCK_DV, DV, WIDE)  # [N, Dv]
        dp = dot(dout, tl.trans(v), tl.zeros([M, N], tl.float32), CHAIN)  # [M, N]
        s, slope = capped(s, scale, softcap, SOFTCAP)
        if (block < whole_first) | (block >= whole_last):
            j = n0 + tl.arange(0, N)
            s = tl.where(visible(p[:, None], j[None, :], key_start, T, left, right, chunk, LEFT, RIGHT, CHUNK), s, float("-inf"))
        ds = (row_weights(s, level[:, None], scale, SOFTCAP, q.dtype == tl.float32) * (dp - delta[:, None]) * slope).to(k.dtype)
        dq = dot(ds, k, dq)
        if REST_D > 0:
            dq_rest = dot(ds, k_rest, dq_rest)

    dq_base = dq_ptr + b * stride_dqb + head * stride_dqh + at * stride_dqs
    store_tile(dq_base, dq * scale, stride_dqs, S - m0, M, 0, BLOCK_D, D, WIDE)
    if REST_D > 0:
        store_tile(dq_base, dq_rest * scale, stride_dqs, S - m0, M, BLOCK_D, REST_D, D, WIDE)


def row_terms(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """out and dout [B,S,H,Dv], lse and dlse [B,S,H] -> L, Δ and, with sinks, each row's share of dσ, float32 [B,H,S]."""
    B, S, H, Dv = out.shape
    level, delta = torch.empty((2, B, H, S), dtype=torch.float32, device=out.device)
    dsink = torch.empty_like(level) if sinks is not None else None
    rows = 16
    launch(
        _rows_kernel, (B * H * triton.cdiv(S, rows),), out, dout, lse, dlse, sinks, level, delta, dsink, S, H,
        *out.stride()[:3], *dout.stride()[:3], *lse.stride(), *(dlse.stride() if dlse is not None else (0, 0, 0)),
        DV=Dv, BLOCK_DV=max(16, triton.next_power_of_2(Dv)), M=rows, SINKS=sinks is not None, DLSE=dlse is not None,
        WIDE=any(is_wide(x.stride(1), rows) for x in (out, dout)), warps=4, stages=1, device=out.device)
    return level, delta, dsink


def attention_backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, *,
                       causal: bool, scale: float | None = None, dlse: Tensor | None = None, key_start: Tensor | None = None,
                       window: tuple[int, int] | None = None, chunk: int | None = None, softcap: float | None = None,
                       sinks: Tensor | None = None, dsinks: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
                       cu_seqlens_k: Tensor | None = None) -> None:
    """Fills dq, dk, dv (shapes of q, k, v) and, with sinks, dsinks [H] float32, from dout [B,S,H,Dv] and dlse [B,S,H] float32.

    out and lse are attention_forward's, packed sequences too. Extra memory: two (with sinks three) float32 numbers a row [B, H, S].
    """
    n_sequences = 0
    if cu_seqlens_q is not None:
        q, k, v, out, lse, dout, dq, dk, dv = (x[None] for x in (q, k, v, out, lse, dout, dq, dk, dv))
        dlse = None if dlse is None else dlse[None]
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        n_sequences = len(cu_seqlens_q) - 1
    B, S, H, D = q.shape
    T, Hkv, Dv = v.shape[1:]
    if key_start is not None or B * S * H == 0:
        dk.zero_()
        dv.zero_()
    if dsinks is not None:
        dsinks.zero_()
    if B * S * H == 0:
        return
    scale = float(D**-0.5 if scale is None else scale)
    (block_d, rest_d), block_dv = blocks(D), max(16, triton.next_power_of_2(Dv))
    bounds, flags = mask_arguments(causal, window, chunk)
    options = has_options(key_start, window, chunk, softcap, sinks)
    level, delta, dsink = row_terms(out, dout, lse, dlse, sinks)
    wide = any(is_wide(x.stride(1), 128) for x in (q, k, v, out, dout, dq, dk, dv))
    shapes = dict(D=D, DV=Dv, BLOCK_D=block_d, REST_D=rest_d, BLOCK_DV=block_dv)
    shared = dict(**shapes, **flags, SOFTCAP=bool(softcap), KEY_START=key_start is not None, PACKED=cu_seqlens_q is not None, WIDE=wide,
                  device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    scalars = (scale, float(softcap or 0.0), *bounds)
    if T * Hkv > 0:
        tile = configs.tile("backward_kv", q.device, q.dtype, block_d + rest_d, block_dv, options, n_sequences > 0)
        n_tiles = tiles(T, tile.n, cu_seqlens_k)
        launch(
            _keys_kernel, (B * Hkv * n_tiles,), q, k, v, dout, level, delta, dk, dv, key_start, cu_seqlens_q, cu_seqlens_k,
            S, T, Hkv, H // Hkv, n_tiles, n_sequences, *strides,
            *dk.stride()[:3], *dv.stride()[:3], *scalars, M=tile.m, N=tile.n, warps=tile.warps, stages=tile.stages, **shared)
    tile = configs.tile("backward_q", q.device, q.dtype, block_d + rest_d, block_dv, options, n_sequences > 0)
    n_tiles = tiles(S, tile.m, cu_seqlens_q)
    launch(
        _queries_kernel, (B * H * n_tiles,), q, k, v, dout, level, delta, dq, key_start, cu_seqlens_q, cu_seqlens_k,
        S, T, H, H // Hkv, n_tiles, n_sequences, *strides,
        *dq.stride()[:3], *scalars, M=tile.m, N=tile.n, warps=tile.warps, stages=tile.stages, **shared)
    if dsink is not None and dsinks is not None:
        torch.sum(dsink, (0, 2), out=dsinks)
