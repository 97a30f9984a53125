"""Which blocks of keys a query attends to: the choice of NSA and of MoBA (native_sparse.py: attention over what is chosen).

Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, X choosing heads (NSA Hkv, MoBA H), D head dim, Tc compressed
keys, n blocks of a choice. l', l, d: sizes of a block, of a compressed block, and the latter's stride. Query i sits at p = i + T − S.

    NSA:   p_cmp = exp(scale·q·kc − lse) over visible compressed keys,  score[j] = Σ_{m<l'/d} Σ_{n<l/d} Σ_group p_cmp[(l'/d)·j + m − n];
           block 0, the query's own and the one before it, then the largest scores   (arXiv 2502.11089)
    MoBA:  score[j] = q·mean(keys of block j);  the query's own block, then the largest of those before it   (arXiv 2502.13189)

Ties go to the lower block, NaN comes last. The scores are float32 whatever the dtype. A chunk of queries has its scores in memory at a time
(configs_sparse.SCORE_BYTES), all blocks of a query; keeping the n best while scoring would sort once per tile, ten times the products'
time.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, configs_sparse
from .attention_tiles import LOG2E, blocks, floor_divide, load_rows, packed_rows, packed_tile, power, tiles
from .primitives import convert, dot, launch

_LOWEST = tl.constexpr(-(2**63))
_HIGHEST = tl.constexpr(2**63 - 1)
MOST = 1024  # block scores of a row looked at at a time
MAX_SPAN = 128  # compressed keys that one block's score may sum


@triton.jit
def locate(tile, n_tiles, cu_ptr, seqlens_ptr, S, T, n_sequences, QUERIES: tl.constexpr, PACKED: tl.constexpr, CACHE: tl.constexpr):
    """Tile number `tile` of all, QUERIES of one sequence each (past the end: an idle one) -> row b of the batch, sequence, the sequence's
    first token in packed tensors, the tile's first query, S and T of the sequence."""
    b = (tile // n_tiles).to(tl.int64)
    sequence = b
    first = b * 0
    q0 = (tile % n_tiles) * QUERIES
    if PACKED:
        b = b * 0
        sequence, q0 = packed_tile(tile, cu_ptr, n_sequences, QUERIES)
        first, S = packed_rows(sequence, cu_ptr, S)
        first = first.to(tl.int64)
        T = S
    if CACHE:
        T = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b).to(tl.int32), 0), T)
    return b, sequence, first, q0, S, T


@triton.jit
def _exact_sums(x, weights):
    """x [M, N] float32 times small whole numbers [N, C] -> [M, C] float32: on tensor cores in three bfloat16 parts of x, which hold all
    of its 24 bits."""
    high = convert(x, tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = convert(rest, tl.bfloat16)
    low = convert(rest - middle.to(tl.float32), tl.bfloat16)
    w = weights.to(tl.bfloat16)
    sums = dot(low, w, tl.zeros([x.shape[0], w.shape[1]], tl.float32))
    return dot(high, w, dot(middle, w, sums))


@triton.jit(do_not_specialize=["S", "T", "n_tiles", "n_sequences", "first_tile", "ld"])
def _probability_kernel(q_ptr, k_ptr, lse_ptr, score_ptr, cu_ptr, cu_keys_ptr, seqlens_ptr, S, T, HKV, G, n_tiles, n_sequences,
                        first_tile, ld, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, scale,
                        D: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr,
                        HEAD_TILES: tl.constexpr, N: tl.constexpr, PER: tl.constexpr, COLUMNS: tl.constexpr,
                        BLOCK: tl.constexpr, COMPRESS: tl.constexpr, STRIDE: tl.constexpr, PACKED: tl.constexpr, CACHE: tl.constexpr):
    """One program: NSA's scores of all blocks for QUERIES queries and one key head; HEADS heads of the group are rows at a time."""
    STEP: tl.constexpr = BLOCK // STRIDE
    SHIFTS: tl.constexpr = COMPRESS // STRIDE
    M: tl.constexpr = QUERIES * HEADS
    S_all = S
    pid = tl.program_id(0)
    g = pid % HKV
    local = pid // HKV
    b, sequence, first, q0, S, T = locate(first_tile + local, n_tiles, cu_ptr, seqlens_ptr, S, T, n_sequences, QUERIES, PACKED, CACHE)
    if q0 < S:
        key_first = b * 0
        if PACKED:
            key_first = tl.load(cu_keys_ptr + sequence).to(tl.int64)
        keys = tl.maximum(floor_divide(T - COMPRESS, STRIDE) + 1, 0)
        row = tl.arange(0, M)
        t = q0 + row // HEADS  # [M]
        p = t + T - S
        seen = tl.minimum(tl.maximum(floor_divide(p + 1 - COMPRESS, STRIDE) + 1, 0), keys)
        p_last = tl.minimum(q0 + QUERIES, S) - 1 + T - S
        count = tl.where(p_last >= 0, p_last // BLOCK + 1, 0)
        q_at = q_ptr + b * stride_qb + (first + t) * stride_qs  # [M]
        lse_at = lse_ptr + (b * S_all + first + t) * (HKV * G)
        k_base = k_ptr + b * stride_kb + g.to(tl.int64) * stride_kh + key_first * stride_ks

        lane = tl.arange(0, N)
        column = tl.arange(0, COLUMNS)
        offset = lane[:, None] - column[None, :] * STEP  # of a tile's keys from the first that a block sums
        SPAN: tl.constexpr = STEP + SHIFTS - 1
        weights = tl.minimum(tl.minimum(offset + 1, SPAN - offset), STEP if STEP < SHIFTS else SHIFTS)
        weights = tl.where((offset >= 0) & (offset < SPAN), weights, 0).to(tl.float32)  # [N, COLUMNS]
        EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
        factor = scale
        if not EXACT:
            factor = factor * LOG2E
        for j0 in range(0, count, PER):
            key = j0 * STEP - (SHIFTS - 1) + lane
            there = (key >= 0) & (key < keys) & (lane < PER * STEP + SHIFTS - 1)
            k_at = k_base + key.to(tl.int64) * stride_ks
            k = load_rows(k_at, there, 0, BLOCK_D, D)  # [N, D]
            k_rest = k
            if REST_D > 0:
                k_rest = load_rows(k_at, there, BLOCK_D, REST_D, D)
            total = tl.zeros([QUERIES, COLUMNS], tl.float32)
            for part in tl.static_range(0, HEAD_TILES):
                r = part * HEADS + row % HEADS
                h = g * G + r
                live = (r < G) & (t < S)
                at = q_at + h.to(tl.int64) * stride_qh
                q = load_rows(at, live, 0, BLOCK_D, D)  # [M, D]
                s = dot(q, tl.trans(k), tl.zeros([M, N], tl.float32))
                if REST_D > 0:
                    s = dot(load_rows(at, live, BLOCK_D, REST_D, D), tl.trans(k_rest), s)
                level = tl.load(lse_at + h, mask=live, other=0.0)
                if not EXACT:
                    level = level * LOG2E
                probability = power(tl.fma(s, tl.full(s.shape, factor, tl.float32), tl.broadcast_to(-level[:, None], s.shape)), EXACT)
                shown = there[None, :] & (key[None, :] < seen[:, None]) & live[:, None]
                probability = tl.where(shown, probability, 0.0)
                if EXACT:
                    sums = dot(probability, weights, tl.zeros([M, COLUMNS], tl.float32))
                else:
                    sums = _exact_sums(probability, weights)
                total += tl.sum(tl.reshape(sums, (QUERIES, HEADS, COLUMNS)), 1)
            i = tl.arange(0, QUERIES)
            j = j0 + column
            to = score_ptr + ((local.to(tl.int64) * QUERIES + i) * HKV + g)[:, None] * ld + j[None, :]
            tl.store(to, total, mask=(q0 + i < S)[:, None] & ((column < PER) & (j < count))[None, :])


@triton.jit(do_not_specialize=["T", "n_blocks", "n_sequences"])
def _means_kernel(k_ptr, mean_ptr, cu_ptr, T, HKV, n_blocks, n_sequences, stride_kb, stride_ks, stride_kh,
                  D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """One program: the mean of one block of keys of one head [D], float32; ROWS keys at a time, in order."""
    pid = tl.program_id(0)
    g = pid % HKV
    tile = pid // HKV
    b, _, first, n0, T, _ = locate(tile, n_blocks, cu_ptr, cu_ptr, T, T, n_sequences, BLOCK, PACKED, False)
    if n0 < T:
        size = tl.minimum(T - n0, BLOCK)
        total = tl.zeros([BLOCK_D], tl.float32)
        for at in range(0, size, ROWS):
            i = at + tl.arange(0, ROWS)
            k_at = k_ptr + b * stride_kb + (first + n0 + i) * stride_ks + g.to(tl.int64) * stride_kh
            total += tl.sum(load_rows(k_at, i < size, 0, BLOCK_D, D).to(tl.float32), 0)
        d = tl.arange(0, BLOCK_D)
        tl.store(mean_ptr + (tile.to(tl.int64) * HKV + g) * D + d, total / size.to(tl.float32), mask=d < D)


@triton.jit(do_not_specialize=["S", "T", "n_tiles", "n_blocks", "n_sequences", "first_tile", "ld"])
def _mean_score_kernel(q_ptr, mean_ptr, score_ptr, cu_ptr, S, T, H, G, n_tiles, n_blocks, n_sequences, first_tile, ld,
                       stride_qb, stride_qs, stride_qh, D: tl.constexpr, DEPTH: tl.constexpr, QUERIES: tl.constexpr, N: tl.constexpr,
                       BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """One program: MoBA's scores of all past blocks for QUERIES queries of one head."""
    pid = tl.program_id(0)
    h = pid % H
    local = pid // H
    b, sequence, first, q0, S, T = locate(first_tile + local, n_tiles, cu_ptr, cu_ptr, S, T, n_sequences, QUERIES, PACKED, False)
    if q0 < S:
        i = tl.arange(0, QUERIES)
        past = tl.maximum(tl.minimum(q0 + QUERIES, S) - 1 + T - S, 0) // BLOCK  # blocks before the last query's own
        q_at = q_ptr + b * stride_qb + (first + q0 + i) * stride_qs + h.to(tl.int64) * stride_qh
        first_block = b * n_blocks
        if PACKED:
            first_block = (first + sequence.to(tl.int64) * (BLOCK - 1)) // BLOCK  # as packed_tile counts
        for j0 in range(0, past, N):
            j = j0 + tl.arange(0, N)
            mean_at = mean_ptr + ((first_block + j) * (H // G) + h // G) * D
            score = tl.zeros([QUERIES, N], tl.float32)
            for d in tl.static_range(0, D, DEPTH):
                q = load_rows(q_at, q0 + i < S, d, DEPTH, D).to(tl.float32)
                score = dot(q, tl.trans(load_rows(mean_at, j < past, d, DEPTH, D)), score)
            to = score_ptr + ((local.to(tl.int64) * QUERIES + i) * H + h)[:, None] * ld + j[None, :]
            tl.store(to, score, mask=(q0 + i < S)[:, None] & (j < past)[None, :])


@triton.jit
def _keys(score_at, j, count, own, MEANS: tl.constexpr):
    """Of blocks j, for rows of `count` blocks each: whole numbers in the order of the choice, all different; what is always chosen comes
    first, blocks past the end last. [ROWS, SOME]"""
    if MEANS:
        forced = j[None, :] == own[:, None]
    else:
        forced = (j == 0)[None, :] | (j[None, :] >= own[:, None] - 1)
    there = j[None, :] < count[:, None]
    score = tl.load(score_at[:, None] + j[None, :], mask=there & ~forced, other=0.0)
    score = tl.where(score == score, tl.maximum(score, -3e38), -3e38) + 0.0  # NaN last; −0 is 0
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(forced, 0x7FFFFFFF, order).to(tl.int64)
    return tl.where(there, order * 4294967296 + (2147483647 - j[None, :]).to(tl.int64), _LOWEST)


@triton.jit(do_not_specialize=["S", "T", "n_tiles", "n_sequences", "first_tile", "ld", "slots"])
def _choose_kernel(score_ptr, indices_ptr, cu_ptr, seqlens_ptr, S, T, X, n_tiles, n_sequences, first_tile, ld, slots,
                   QUERIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MEANS: tl.constexpr, SOME: tl.constexpr,
                   ALL: tl.constexpr, PACKED: tl.constexpr, CACHE: tl.constexpr):
    """One program: the choices of ROWS queries of a tile and one choosing head, ascending, −1 behind. SOME blocks at a time; ALL: one time
    is enough."""
    PARTS: tl.constexpr = QUERIES // ROWS
    pid = tl.program_id(0)
    x = pid % X
    local = pid // X // PARTS
    S_all = S
    b, sequence, first, q0, S, T = locate(first_tile + local, n_tiles, cu_ptr, seqlens_ptr, S, T, n_sequences, QUERIES, PACKED, CACHE)
    i = (pid // X) % PARTS * ROWS + tl.arange(0, ROWS)
    t = q0 + i  # [ROWS]
    own = floor_divide(t + T - S, BLOCK)
    count = tl.where(t < S, tl.maximum(own + 1, 0), 0)
    most = tl.max(count, 0)
    kept = tl.minimum(slots, count)
    score_at = score_ptr + ((local.to(tl.int64) * QUERIES + i) * X + x) * ld
    to = indices_ptr + ((b * S_all + first + t) * X + x) * slots
    j = tl.arange(0, SOME)
    key = _keys(score_at, j, count if ALL else count * 0, own, MEANS)

    # Each row's kept-th largest key: time after time the largest below the one before.
    least = tl.where(kept == count, _LOWEST + 1, _HIGHEST)
    for step in range(0, tl.max(tl.where(kept == count, 0, kept), 0)):
        best = tl.full([ROWS], _LOWEST, tl.int64)
        if ALL:
            best = tl.max(tl.where(key < least[:, None], key, _LOWEST), 1)
        else:
            for at in range(0, most, SOME):
                some = _keys(score_at, at + j, count, own, MEANS)
                best = tl.maximum(best, tl.max(tl.where(some < least[:, None], some, _LOWEST), 1))
        least = tl.where((step < kept) & (kept < count), best, least)

    done = tl.zeros([ROWS], tl.int32)
    for at in range(0, most, SOME):
        chosen = (_keys(score_at, at + j, count, own, MEANS) >= least[:, None]).to(tl.int32)
        place = done[:, None] + tl.cumsum(chosen, 1) - 1
        tl.store(to[:, None] + place, tl.broadcast_to((at + j)[None, :], place.shape), mask=chosen > 0)
        done += tl.sum(chosen, 1)
    for at in range(0, slots, SOME):
        behind = (at + j < slots)[None, :] & (at + j[None, :] >= kept[:, None]) & (t < S)[:, None]
        tl.store(to[:, None] + (at + j)[None, :], tl.full([ROWS, SOME], -1, tl.int32), mask=behind)


def choose(q: Tensor, k: Tensor, lse: Tensor | None, indices: Tensor, *, T: int, block: int, compress_block: int = 0, stride: int = 1,
           scale: float = 1.0, cu_seqlens: Tensor | None = None, cu_compressed: Tensor | None = None,
           seqlens: Tensor | None = None) -> None:
    """Fills indices int32 [B,S,X,n]: ascending, −1 behind.

    NSA: X = Hkv, k are the compressed keys [B,Tc,Hkv,D] and lse [B,S,H] that of attention over them. MoBA (compress_block 0): X = H, k are
    the keys. T: keys that are chosen from (a cache's capacity). Packed: [N,·,·] with cu_seqlens and cu_compressed [sequences + 1] int32.
    """
    n_sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    if cu_seqlens is not None:
        q, k, indices = q[None], k[None], indices[None]
    B, S, H, D = q.shape
    Hkv, X, slots = k.shape[2], *indices.shape[2:]
    if indices.numel() == 0:
        return
    G, means = H // Hkv, compress_block == 0
    block_d, rest_d = blocks(D)
    tile = configs_sparse.block_sparse_tile("means" if means else "scores", q.device, q.dtype, block_d + rest_d)
    heads = 1 if means else min(triton.next_power_of_2(G), tile.m)
    queries, ld = tile.m // heads, triton.cdiv(T, block)
    n_tiles = tiles(S, queries, cu_seqlens)
    every = n_tiles * B
    chunk = min(every, max(1, configs_sparse.SCORE_BYTES // (4 * queries * X * max(ld, 1))))
    scores = torch.empty(chunk * queries * X * ld, dtype=torch.float32, device=q.device)
    packed, some = cu_seqlens is not None, max(16, min(MOST, triton.next_power_of_2(max(ld, 1))))
    rows = queries if configs.INTERPRET else min(queries, 4)
    n_blocks, averages = tiles(T, block, cu_seqlens), None
    if means:
        averages = torch.empty((B * n_blocks, Hkv, D), dtype=torch.float32, device=q.device)
        launch(
            _means_kernel, (B * n_blocks * Hkv,), k, averages, cu_seqlens, T, Hkv, n_blocks, n_sequences, *k.stride()[:3],
            D=D, BLOCK_D=triton.next_power_of_2(max(D, 16)), ROWS=16 if configs.INTERPRET else 32, BLOCK=block, PACKED=packed,
            warps=4, stages=2, device=q.device)
    for first in range(0, every, chunk):
        count = min(chunk, every - first)
        if means:
            launch(
                _mean_score_kernel, (count * H,), q, averages, scores, cu_seqlens, S, T, H, G, n_tiles, n_blocks, n_sequences, first, ld,
                *q.stride()[:3], D=D, DEPTH=32, QUERIES=queries, N=tile.n, BLOCK=block, PACKED=packed,
                warps=tile.warps, stages=tile.stages, device=q.device)
        else:
            step, shifts = block // stride, compress_block // stride
            keys = max(tile.n, triton.next_power_of_2(step + shifts - 1))
            per = (keys - shifts + 1) // step
            launch(
                _probability_kernel, (count * Hkv,), q, k, lse, scores, cu_seqlens, cu_compressed, seqlens, S, T, Hkv, G, n_tiles,
                n_sequences, first, ld, *q.stride()[:3], *k.stride()[:3], float(scale), D=D, BLOCK_D=block_d, REST_D=rest_d,
                QUERIES=queries, HEADS=heads, HEAD_TILES=triton.cdiv(G, heads), N=keys, PER=per,
                COLUMNS=max(16, triton.next_power_of_2(per)), BLOCK=block, COMPRESS=compress_block, STRIDE=stride, PACKED=packed,
                CACHE=seqlens is not None, warps=tile.warps, stages=tile.stages, device=q.device)
        launch(
            _choose_kernel, (count * (queries // rows) * X,), scores, indices, cu_seqlens, seqlens, S, T, X, n_tiles, n_sequences,
            first, ld, slots,
            QUERIES=queries, ROWS=rows, BLOCK=block, MEANS=means, SOME=some, ALL=ld <= some, PACKED=packed, CACHE=seqlens is not None,
            warps=1 if some <= 256 else 4, stages=1, device=q.device)
