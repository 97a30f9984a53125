"""Backward of attention over selected keys: the pairs of a query and a slot, their sums by key, dQ. No atomics.

Shapes: B batch, S queries, R = B·S query rows (packed: all of them), H query heads, Hkv key heads, G = H / Hkv, K slots of a query,
D head dim, Dv value dim, W = D (latents) or D + Dv, C query rows of a chunk, M and N the heads and slots of a tile.

    L = logaddexp(lse, σ) (lse without a sink),  P = exp(s − L),  Δ = Σ_d dO·O − exp(L − lse)·dlse,  dS = P∘(dO·Vᵀ − Δ)
    dQ = scale·dS·K,  dK[j] = scale·Σ dSᵀ·Q,  dV[j] = Σ Pᵀ·dO over the pairs that name j (latents: dK + [dV | 0]),
    dσ[h] = −Σ_i exp(σ − L)·Σ_d dO·O

A key's gradient sums over queries anywhere, so chunk after chunk of C query rows each pair's share, summed over the heads of its group
by tensor cores, is written to a buffer [C·Hkv·K, W] of PAIR_BYTES at most; a stable sort of the pairs by key, and each key's shares are
added in the order of the queries, onto what the chunks before gave: one chain of additions, whatever the chunk. dS is kept for the
chunk too, so scores are computed twice in all and dQ is one product.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, configs_sparse
from .attention_backward import CHAIN, row_terms, row_weights
from .attention_tiles import cache_rows, load_rows
from .primitives import again, dot, launch, load_tile
from .sparse_attention import keys_of, prepare, used_slots, widths

PAIR_BYTES = 512 << 20
NO_KEY = 2**31 - 1
_NO_KEY = tl.constexpr(NO_KEY)
WINDOW = 8  # places of the sorted list that a program of _sum_kernel looks at


@triton.jit
def _sums(N: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        return tl.zeros([COLUMNS, N], tl.float32)
    else:
        return tl.zeros([N, COLUMNS], tl.float32)


@triton.jit
def _add(sums, weights, rows, TRANSPOSED: tl.constexpr):
    """sums + weights [N, M] · rows [M, COLUMNS]. TRANSPOSED: the sums are [COLUMNS, N]; Hopper's warps then share the columns, where of
    chained products [N, COLUMNS] each warpgroup would hold the whole."""
    if TRANSPOSED:
        sums = dot(tl.trans(rows), tl.trans(weights), sums)
    else:
        sums = dot(weights, rows, sums)
    return sums


@triton.jit
def _upright(sums, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        sums = tl.trans(sums)
    return sums


@triton.jit(do_not_specialize=["first_row", "R", "S", "T_all", "n_sequences"])
def _pairs_kernel(q_ptr, k_ptr, v_ptr, index_ptr, dout_ptr, level_ptr, delta_ptr, share_ptr, key_ptr, ds_ptr, cu_q_ptr, cu_k_ptr,
                  seqlens_ptr, first_row, R, S, T_all, HKV, G, K, n_sequences,
                  stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, scale, inverse,
                  D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                  M: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr, SEQLENS: tl.constexpr,
                  LATENT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """One program: N slots of one query and key head -> each pair's key (its row among all keys and heads), its share of dK and dV,
    and dS [row, Hkv, K, G]. inverse = 1 / scale."""
    slot_blocks = tl.cdiv(K, N)
    pid = tl.program_id(0)
    s0 = (pid % slot_blocks) * N
    kv_head = (pid // slot_blocks) % HKV
    row = pid // (slot_blocks * HKV)  # among those of the chunk
    n = first_row + row
    b, s, k_first, T = keys_of(n, S, T_all, cu_q_ptr, cu_k_ptr, seqlens_ptr, n_sequences, PACKED, SEQLENS)
    head = kv_head.to(tl.int64)
    k_base = k_ptr + b * stride_kb + k_first.to(tl.int64) * stride_ks + head * stride_kh
    v_base = v_ptr + b * stride_vb + k_first.to(tl.int64) * stride_vs + head * stride_vh

    # Which keys.
    slot = s0 + tl.arange(0, N)
    j = tl.load(index_ptr + (n.to(tl.int64) * HKV + kv_head) * K + slot, mask=slot < K, other=-1)
    k_at, v_at, there = cache_rows(j, T, (k_base, v_base, stride_ks, stride_vs, k_base, 0, 0, 0), 0)
    pair = (row.to(tl.int64) * HKV + kv_head) * K + slot  # [N]
    key = (b.to(tl.int32) * T_all + k_first + j) * HKV + kv_head
    tl.store(key_ptr + pair, tl.where(there, key, _NO_KEY), mask=slot < K)

    if tl.max(there.to(tl.int32), 0) > 0:
        k = load_rows(k_at, there, 0, BLOCK_D, D)  # [N, D]
        k_rest = k
        dk = _sums(N, BLOCK_D, TRANSPOSED)
        dk_rest = dk
        if REST_D > 0:
            k_rest = load_rows(k_at, there, BLOCK_D, REST_D, D)
            dk_rest = _sums(N, REST_D, TRANSPOSED)
        v = k
        dv = dk
        if not LATENT:
            v = load_rows(v_at, there, 0, BLOCK_DV, DV)  # [N, Dv]
            dv = _sums(N, BLOCK_DV, TRANSPOSED)
        h0 = (n.to(tl.int64) * HKV + kv_head) * G  # among the rows of all heads
        level_base = level_ptr + head * G * R + n
        delta_base = delta_ptr + head * G * R + n
        ds_base = ds_ptr + ((row.to(tl.int64) * HKV + kv_head) * K + s0) * G
        for g0 in range(0, G, M):
            g = g0 + tl.arange(0, M)
            q = load_tile(q_ptr + (h0 + g0) * D, D, G - g0, M, 0, BLOCK_D, D, False)  # [M, D]
            scores = dot(k, tl.trans(q), tl.zeros([N, M], tl.float32))  # [N, M]
            if REST_D > 0:
                q_rest = load_tile(q_ptr + (h0 + g0) * D, D, G - g0, M, BLOCK_D, REST_D, D, False)
                scores = dot(k_rest, tl.trans(q_rest), scores)
            dout = load_tile(dout_ptr + (h0 + g0) * DV, DV, G - g0, M, 0, BLOCK_DV, DV, False)  # [M, Dv]
            dp = dot(v, tl.trans(dout), tl.zeros([N, M], tl.float32), CHAIN)  # [N, M]
            level = tl.load(level_base + g * R, mask=g < G, other=float("inf"))
            delta = tl.load(delta_base + g * R, mask=g < G, other=0.0)
            p = row_weights(tl.where(there[:, None], scores, float("-inf")), level[None, :], scale, False, q.dtype == tl.float32)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            tl.store(ds_base + (tl.arange(0, N)[:, None] * G + g[None, :]), ds, mask=there[:, None] & (g < G)[None, :])
            if LATENT:
                # One sum for both, multiplied by scale in the end: dS times scale would be too small for float16.
                dk = _add(dk, (p * inverse).to(dout.dtype), dout, TRANSPOSED)
            else:
                dv = _add(dv, p.to(dout.dtype), dout, TRANSPOSED)
            dk = _add(dk, ds, q, TRANSPOSED)
            if REST_D > 0:
                dk_rest = _add(dk_rest, ds, q_rest, TRANSPOSED)

        WIDTH: tl.constexpr = D if LATENT else D + DV
        block = again(pid)  # places are worked out again: beside the sums Hopper has no register left to keep them
        s0 = (block % slot_blocks) * N
        share = share_ptr + ((block // slot_blocks).to(tl.int64) * K + s0) * WIDTH
        at = tl.arange(0, N)[:, None] * WIDTH
        column = tl.arange(0, BLOCK_D)
        tl.store(share + (at + column[None, :]), _upright(dk, TRANSPOSED) * scale, mask=there[:, None] & (column < D)[None, :])
        if REST_D > 0:
            rest = BLOCK_D + tl.arange(0, REST_D)
            tl.store(share + (at + rest[None, :]), _upright(dk_rest, TRANSPOSED) * scale, mask=there[:, None] & (rest < D)[None, :])
        if not LATENT:
            value = tl.arange(0, BLOCK_DV)
            tl.store(share + (at + D + value[None, :]), _upright(dv, TRANSPOSED), mask=there[:, None] & (value < DV)[None, :])


@triton.jit(do_not_specialize=["n_pairs"])
def _sum_kernel(key_ptr, order_ptr, share_ptr, sum_ptr, n_pairs, W: tl.constexpr, BLOCK_W: tl.constexpr, PLACES: tl.constexpr):
    """One program: the keys whose pairs begin at one of PLACES places of the sorted list; sum [key, W] += their shares, in order."""
    column = tl.arange(0, BLOCK_W)
    first = tl.program_id(0) * PLACES
    for place in range(first, tl.minimum(first + PLACES, n_pairs)):
        key = tl.load(key_ptr + place)
        before = tl.load(key_ptr + place - 1, mask=place > 0, other=-1)
        if (key != before) & (key != _NO_KEY):
            at = sum_ptr + key.to(tl.int64) * W + column
            total = tl.load(at, mask=column < W, other=0.0)
            p = place
            while tl.load(key_ptr + p, mask=p < n_pairs, other=_NO_KEY) == key:
                for i in tl.static_range(4):  # in flight together
                    same = tl.load(key_ptr + p + i, mask=p + i < n_pairs, other=_NO_KEY) == key
                    pair = tl.load(order_ptr + p + i, mask=same, other=0)
                    total += tl.load(share_ptr + pair * W + column, mask=(column < W) & same, other=0.0)
                p += 4
            tl.store(at, total, mask=column < W)


@triton.jit(do_not_specialize=["first_row", "S", "T_all", "n_sequences"])
def _sparse_queries_kernel(k_ptr, index_ptr, ds_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, seqlens_ptr, first_row, S, T_all, HKV, G, K, n_sequences,
                           stride_kb, stride_ks, stride_kh, scale,
                           D: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                           SLOTS: tl.constexpr, PACKED: tl.constexpr, SEQLENS: tl.constexpr):
    """One program: dQ of M heads of one query and key head."""
    row_blocks = tl.cdiv(G, M)
    pid = tl.program_id(0)
    g0 = (pid % row_blocks) * M
    kv_head = (pid // row_blocks) % HKV
    row = pid // (row_blocks * HKV)
    n = first_row + row
    b, s, k_first, T = keys_of(n, S, T_all, cu_q_ptr, cu_k_ptr, seqlens_ptr, n_sequences, PACKED, SEQLENS)
    k_base = k_ptr + b * stride_kb + k_first.to(tl.int64) * stride_ks + kv_head.to(tl.int64) * stride_kh
    cache = (k_base, k_base, stride_ks, stride_ks, k_base, 0, 0, 0)
    index_at = index_ptr + (n.to(tl.int64) * HKV + kv_head) * K
    end = 0
    for start in range(0, K, SLOTS):
        end = tl.maximum(end, used_slots(index_at, start, K, T, SLOTS))

    g = g0 + tl.arange(0, M)
    ds_at = ds_ptr + (row.to(tl.int64) * HKV + kv_head) * K * G
    dq = tl.zeros([M, BLOCK_D], tl.float32)
    dq_rest = dq
    if REST_D > 0:
        dq_rest = tl.zeros([M, REST_D], tl.float32)
    for start in range(0, end, N):
        slot = start + tl.arange(0, N)
        j = tl.load(index_at + slot, mask=slot < K, other=-1)
        k_at, _, there = cache_rows(j, T, cache, 0)
        ds = tl.load(ds_at + (slot[:, None] * G + g[None, :]), mask=there[:, None] & (g < G)[None, :], other=0.0)  # [N, M]
        k = load_rows(k_at, there, 0, BLOCK_D, D)  # [N, D]
        dq = dot(tl.trans(ds), k, dq)
        if REST_D > 0:
            dq_rest = dot(tl.trans(ds), load_rows(k_at, there, BLOCK_D, REST_D, D), dq_rest)

    dq_at = dq_ptr + ((n.to(tl.int64) * HKV + kv_head) * G + g)[:, None] * D
    column = tl.arange(0, BLOCK_D)
    tl.store(dq_at + column[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=(g < G)[:, None] & (column < D)[None, :])
    if REST_D > 0:
        rest = BLOCK_D + tl.arange(0, REST_D)
        tl.store(dq_at + rest[None, :], (dq_rest * scale).to(dq_ptr.dtype.element_ty), mask=(g < G)[:, None] & (rest < D)[None, :])


def covers(q: Tensor, kv: Tensor, v: Tensor | None, block_table: Tensor | None) -> str | None:
    """Beside what the forward does not cover: why the backward cannot take this call, naming the argument; None if it can."""
    if block_table is not None:
        return "block_table: the backward takes keys that do not lie in pages"
    if kv.dtype == torch.uint8:
        return "kv: quantised latents have no gradient"
    if q.is_cuda and q.dtype == torch.float32 and v is None and q.shape[-1] > 384 and configs.architecture(q.device) == "sm_80":
        return f"q: float32 latents of {q.shape[-1]} columns do not fit the shared memory of this GPU (172032 bytes of 166912)"
    rows = kv[..., 0].numel()
    return f"kv: {rows} rows are not below 2^31 - 1" if rows >= NO_KEY else None


def sparse_attention_backward(q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
                              dq: Tensor, dk: Tensor, dv: Tensor | None, *, scale: float, dlse: Tensor | None = None,
                              sinks: Tensor | None = None, dsinks: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
                              cu_seqlens_k: Tensor | None = None, seqlens: Tensor | None = None, pair_bytes: int = PAIR_BYTES) -> None:
    """Fills dq, dk (of latents kv's gradient) and dv, contiguous, and dsinks [H] float32, from dout and dlse float32, shaped as out, lse.

    The other arguments as sparse_attention's. Extra memory: float32 sums shaped as kv (and v), two (with sinks three) float32 numbers a
    row and head, and for a chunk of queries at least one of, pair_bytes: W float32 numbers, 20 bytes and H numbers of dS a pair.
    """
    # Read again for each block of slots, so a copy of other layouts costs nothing, and constant strides spare Hopper's registers.
    q, dout = q.contiguous(), dout.contiguous()
    x = prepare(q, kv, v, indices, cu_seqlens_q, cu_seqlens_k, seqlens)
    (_, S, H, D), (R, Hkv, K), Dv = x.q.shape, x.indices.shape, out.shape[-1]
    G = H // Hkv
    if dsinks is not None:
        dsinks.zero_()
    width = D if v is None else D + Dv
    sums = torch.zeros(kv.numel() // D * width, dtype=torch.float32, device=q.device).view(*kv.shape[:-1], width)
    if dq.numel() > 0 and K > 0 and kv.numel() > 0:
        level, delta, dsink = row_terms(
            out.view(1, R, H, Dv), dout.view(1, R, H, Dv), lse.view(1, R, H), None if dlse is None else dlse.reshape(1, R, H), sinks)
        if dsink is not None and dsinks is not None:
            torch.sum(dsink, (0, 2), out=dsinks)
        block_d, rest_d, block_dv = widths(D, Dv, x.latent)
        options = dict(PACKED=cu_seqlens_q is not None, SEQLENS=seqlens is not None)
        tile_p, tile_q = (configs_sparse.sparse_tile(name, q.device, q.dtype, block_d + rest_d, block_dv) for name in ("pairs", "queries"))
        m = min(tile_p.m, max(16, triton.next_power_of_2(G)))
        chunk = min(max(pair_bytes // (Hkv * K * (width * 4 + 20 + G * q.element_size())), 1), R)
        share = torch.empty(chunk * Hkv * K * width, dtype=torch.float32, device=q.device)
        keys = torch.empty(chunk * Hkv * K, dtype=torch.int32, device=q.device)
        ds = torch.empty(chunk * H * K, dtype=q.dtype, device=q.device)
        n_sequences = 0 if cu_seqlens_q is None else len(cu_seqlens_q) - 1
        for first in range(0, R, chunk):
            here = min(chunk, R - first)
            n_pairs = here * Hkv * K
            launch(
                _pairs_kernel, (here * Hkv * triton.cdiv(K, tile_p.n),), q, x.k, x.v, x.indices, dout, level, delta, share, keys, ds,
                *x.sequences, first, R, S, x.capacity, Hkv, G, K, n_sequences,
                *x.k.stride()[:3], *x.v.stride()[:3], float(scale), 1.0 / scale,
                D=D, DV=Dv, BLOCK_D=block_d, REST_D=rest_d, BLOCK_DV=block_dv, M=m, N=tile_p.n, LATENT=x.latent,
                TRANSPOSED=configs_sparse.sparse_transposed(q.device, q.dtype),
                warps=tile_p.warps, stages=tile_p.stages, device=q.device, **options)
            sorted_keys, order = torch.sort(keys[:n_pairs], stable=True)
            launch(
                _sum_kernel, (triton.cdiv(n_pairs, WINDOW),), sorted_keys, order, share, sums, n_pairs, W=width,
                BLOCK_W=triton.next_power_of_2(width), PLACES=WINDOW, warps=4, stages=1, device=q.device)
            launch(
                _sparse_queries_kernel, (here * Hkv * triton.cdiv(G, tile_q.m),), x.k, x.indices, ds, dq, *x.sequences, first, S,
                x.capacity, Hkv, G, K, n_sequences, *x.k.stride()[:3], float(scale), D=D, BLOCK_D=block_d, REST_D=rest_d,
                M=tile_q.m, N=tile_q.n, SLOTS=configs.key_split(), warps=tile_q.warps, stages=tile_q.stages, device=q.device, **options)
    else:
        dq.zero_()
    dk.copy_(sums[..., :D])
    if dv is not None:
        dv.copy_(sums[..., D:])
