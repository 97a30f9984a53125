"""The loss that trains the indexer, forward and backward, over named keys (sparse stage) or over all visible ones (warm-up).

Shapes: B batch, S queries and T keys of a sequence, R = B·S rows; Hi index heads, Di index dim; of the attention that is followed
H heads, Hkv key heads, G = H / Hkv, D head dim; K slots of a row. N is T, or K with SLOTS: key n is the one that slot n names.

    m[t, s] = Σ_h a_h·exp(scale·q_h·k_s − x_h) with a_h·exp(−x_h) = exp(−lse_h),  p = m / Σ_s m,
    L[t] = Σ_s p·log p − p·(I − log Σ_s exp I)      (DeepSeek-V3.2-Exp)
    dI = dL·(softmax(I) − p), and on to q, k and w of the indexer as in indexer.py

x is the largest score, not lse: the exponentials then have no error of lse's rounding. Scores I and masses m over slots are
[R, K]. Over all keys they are made for as many rows as fit configs_sparse.workspace() bytes (at least 64), and made again in the backward.
dk over slots: each row writes what it gives to each of its keys, and where; then each key adds up its rows in order. That, too, for
as many rows as fit the workspace.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs_sparse, indexer
from .attention_tiles import load_rows
from .indexer import FLOAT_DEPTH, add_product, block_dim, chunks, columns, head_block, slot_keys
from .primitives import dot, launch


@triton.jit
def _load_part(at, there, d, D: tl.constexpr, DEPTH: tl.constexpr):
    """Columns d … d + DEPTH − 1 of rows of D."""
    column = d + tl.arange(0, DEPTH)
    if D % DEPTH == 0:
        part = tl.load(at[:, None] + column[None, :], mask=there[:, None], other=0.0)
    else:
        part = tl.load(at[:, None] + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0.0)
    return part


@triton.jit
def _product(z, a_at, a_there, b_at, b_there, D: tl.constexpr, DEPTH: tl.constexpr):
    """z + a·bᵀ for the rows of D columns at these addresses."""
    for d in range(0, D, DEPTH):
        a = _load_part(a_at, a_there, d, D, DEPTH)
        b = _load_part(b_at, b_there, d, D, DEPTH)
        z = dot(a, tl.trans(b), z)
    return z


@triton.jit
def _tile(tile, first_row, last_row, S, QUERIES: tl.constexpr):
    """Tile number -> its sequence, its first row, the end of its rows: QUERIES rows of one sequence among first_row … last_row − 1."""
    per_sequence = tl.cdiv(tl.minimum(S, last_row - first_row), QUERIES)
    b = first_row // S + tile // per_sequence
    r = tl.maximum(first_row, b * S) + (tile % per_sequence) * QUERIES
    return b, r, tl.minimum(tl.minimum(last_row, (b + 1) * S), r + QUERIES)


@triton.jit(do_not_specialize=["first_row", "last_row", "S", "T", "slots"])
def _target_lse_kernel(q_ptr, k_ptr, shift_ptr, indices_ptr, first_row, last_row, S, T, slots, stride_kb, stride_ks, stride_kh,
                       stride_shift, scale, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, M: tl.constexpr,
                       N: tl.constexpr, HB: tl.constexpr, SLOTS: tl.constexpr):
    """One program: x, a of M / HB rows, HB heads of one key head -> shift [R, H, 2], 0 where a row sees nothing."""
    G: tl.constexpr = H // HKV
    BLOCKS: tl.constexpr = (G + HB - 1) // HB
    b, r, r_stop = _tile(tl.program_id(0) // (HKV * BLOCKS), first_row, last_row, S, 1 if SLOTS else M // HB)
    kv_head = (tl.program_id(0) // BLOCKS) % HKV
    row, head, live = columns(r, tl.program_id(0) % BLOCKS, r_stop, G, M, HB)
    pair = row.to(tl.int64) * H + kv_head * G + head
    k_ptr += tl.cast(b, tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    last_seen = row - b * S + T - S
    end = tl.minimum(T, r_stop - 1 - b * S + T - S + 1)
    if SLOTS:
        end = slots
    total = tl.zeros([M], tl.float32)
    peak = tl.full([M], float("-inf"), tl.float32)
    for n_first in range(0, end, N):
        n = n_first + tl.arange(0, N)
        key = n
        there = n < T
        if SLOTS:
            key, there = slot_keys(indices_ptr, r, n, slots, T)
        z = _product(tl.zeros([M, N], tl.float32), q_ptr + pair * D, live, k_ptr + key.to(tl.int64) * stride_ks, there, D, DEPTH)
        seen = there[None, :]
        if not SLOTS:
            seen = seen & (n[None, :] <= last_seen[:, None])
        s = tl.where(seen, z * scale, float("-inf"))
        above = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(s - base[:, None]), 1)
        peak = above
    at = shift_ptr + row.to(tl.int64) * stride_shift + (kv_head * G + head) * 2
    nothing = peak == float("-inf")
    tl.store(at, tl.where(nothing, 0.0, peak), mask=live)
    tl.store(at + 1, tl.where(nothing, 0.0, 1.0 / total), mask=live)


@triton.jit(do_not_specialize=["first_row", "last_row", "S", "T", "slots"])
def _target_kernel(q_ptr, k_ptr, shift_ptr, mass_ptr, indices_ptr, first_row, last_row, S, T, slots,
                   stride_kb, stride_ks, stride_kh, stride_shift, stride_mass, scale,
                   H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
                   HB: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr):
    """One program: m[t, n] of QUERIES rows of one sequence and KEYS keys -> mass [rows from first_row, N]."""
    G: tl.constexpr = H // HKV
    QB: tl.constexpr = COLUMNS // HB
    width = T
    if SLOTS:
        width = slots
    blocks = tl.cdiv(width, KEYS)
    b, r_first, r_last = _tile(tl.program_id(0) // blocks, first_row, last_row, S, QUERIES)
    n_first = (tl.program_id(0) % blocks) * KEYS
    n = n_first + tl.arange(0, KEYS)
    key = n
    there = n < T
    if SLOTS:
        key, there = slot_keys(indices_ptr, r_first, n, slots, T)
    else:
        r_first = tl.maximum(r_first, n_first + b * S - T + S)  # the first that sees any of these keys
    k_at = k_ptr + tl.cast(b, tl.int64) * stride_kb + key.to(tl.int64) * stride_ks
    for r in range(r_first, r_last, QB):
        acc = tl.zeros([KEYS, QB], tl.float32)
        for kv_head in range(HKV):
            for block in tl.static_range((G + HB - 1) // HB):
                row, head, live = columns(r, block, r_last, G, COLUMNS, HB)
                pair = row.to(tl.int64) * H + kv_head * G + head
                shift_at = shift_ptr + row.to(tl.int64) * stride_shift + (kv_head * G + head) * 2
                x = tl.load(shift_at, mask=live, other=0.0)
                a = tl.load(shift_at + 1, mask=live, other=0.0)
                z = _product(tl.zeros([KEYS, COLUMNS], tl.float32), k_at + tl.cast(kv_head, tl.int64) * stride_kh, there,
                             q_ptr + pair * D, live, D, DEPTH)
                mass = a[None, :] * tl.exp(z * scale - x[None, :])
                acc += tl.sum(tl.reshape(mass, (KEYS, QB, HB)), 2)
        row = r + tl.arange(0, QB)
        tl.store(mass_ptr + (row - first_row).to(tl.int64)[None, :] * stride_mass + n[:, None], tl.where(there[:, None], acc, 0.0),
                 mask=(n < width)[:, None] & (row < r_last)[None, :])


@triton.jit(do_not_specialize=["first_row", "S", "T", "slots"])
def _finish_kernel(scores_ptr, mass_ptr, indices_ptr, loss_ptr, kept_ptr, first_row, S, T, slots, stride_scores, stride_mass,
                   stride_kept, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row; loss [R], and over all keys x, a with softmax(I) = a·exp(I − x) and Σ m -> kept [R, …], over slots
    softmax(I) − p in the place of I."""
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    scores_ptr += local * stride_scores
    mass_ptr += local * stride_mass
    end = tl.minimum(tl.maximum(row % S + T - S + 1, 0), T).to(tl.int32)
    if SLOTS:
        end = slots
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    masses = tl.zeros([BLOCK], tl.float32)
    for n_first in range(0, end, BLOCK):
        n = n_first + tl.arange(0, BLOCK)
        seen = n < end
        if SLOTS:
            _, seen = slot_keys(indices_ptr, row, n, slots, T)
        score = tl.load(scores_ptr + n, mask=seen, other=float("-inf"))
        above = tl.maximum(peak, score)
        base = tl.where(above == float("-inf"), 0.0, above)
        sums = sums * tl.exp(peak - base) + tl.exp(score - base)
        peak = above
        masses += tl.load(mass_ptr + n, mask=seen, other=0.0)
    top = tl.max(peak, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.sum(sums * tl.exp(peak - top), 0)
    log_weights = tl.log(weights)
    total = tl.sum(masses, 0)
    inverse = tl.maximum(total, 1.1754943508222875e-38)
    losses = tl.zeros([BLOCK], tl.float32)
    for n_first in range(0, end, BLOCK):
        n = n_first + tl.arange(0, BLOCK)
        seen = n < end
        if SLOTS:
            _, seen = slot_keys(indices_ptr, row, n, slots, T)
        score = tl.load(scores_ptr + n, mask=seen, other=0.0)
        p = tl.load(mass_ptr + n, mask=seen, other=0.0) / inverse
        log_q = (score - top) - log_weights
        losses += tl.where(seen, tl.where(p == 0, 0.0, p * tl.log(p)) - p * log_q, 0.0)
        if SLOTS:
            tl.store(scores_ptr + n, tl.where(seen, tl.exp(score - top) / weights - p, 0.0), mask=n < end)
    tl.store(loss_ptr + row, tl.sum(losses, 0))
    if not SLOTS:
        tl.store(kept_ptr + row * stride_kept, top)
        tl.store(kept_ptr + row * stride_kept + 1, 1.0 / weights)
        tl.store(kept_ptr + row * stride_kept + 2, total)


@triton.jit(do_not_specialize=["first_row", "S", "T"])
def _residual_kernel(scores_ptr, mass_ptr, kept_ptr, first_row, S, T, stride_scores, stride_mass, stride_kept, BLOCK: tl.constexpr):
    """One program: BLOCK keys of one row; softmax(I) − p in the place of I, from kept [R, …]: x, a, Σ m, …"""
    blocks = tl.cdiv(T, BLOCK)
    local = tl.program_id(0).to(tl.int64) // blocks
    row = first_row + local
    n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    seen = n < tl.minimum(row % S + T - S + 1, T)
    x = tl.load(kept_ptr + row * stride_kept)
    a = tl.load(kept_ptr + row * stride_kept + 1)
    total = tl.load(kept_ptr + row * stride_kept + 2)
    at = scores_ptr + local * stride_scores + n
    p = tl.load(mass_ptr + local * stride_mass + n, mask=seen, other=0.0) / tl.maximum(total, 1.1754943508222875e-38)
    tl.store(at, a * tl.exp(tl.load(at, mask=seen, other=0.0) - x) - p, mask=seen)


@triton.jit(do_not_specialize=["first_row", "S", "T", "slots"])
def _contribution_kernel(q_ptr, k_ptr, w_ptr, g_ptr, dloss_ptr, indices_ptr, part_ptr, where_ptr, first_row, S, T, slots,
                         stride_kb, stride_ks, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
                         HB: tl.constexpr):
    """One program: what one row gives to dk of KEYS of its slots -> part [rows from first_row, K, D], where [rows, T]: a key's slot."""
    blocks = tl.cdiv(slots, KEYS)
    row = first_row + tl.program_id(0) // blocks
    local = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * KEYS + tl.arange(0, KEYS)
    key, there = slot_keys(indices_ptr, row, n, slots, T)
    tl.store(where_ptr + local * T + key, n, mask=there)
    k = load_rows(k_ptr + tl.cast(row // S, tl.int64) * stride_kb + key.to(tl.int64) * stride_ks, there, 0, BLOCK_D, D)
    g = tl.load(g_ptr + row.to(tl.int64) * slots + n, mask=there, other=0.0) * tl.load(dloss_ptr + row)
    acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for block in range((H + HB - 1) // HB):
        _, head, live = columns(row, block, row + 1, H, HB, HB)
        pair = row.to(tl.int64) * H + head
        q = load_rows(q_ptr + pair * D, live, 0, BLOCK_D, D)  # [HB, D]
        w = tl.load(w_ptr + pair, mask=live, other=0.0)
        z = dot(k, tl.trans(q), tl.zeros([KEYS, HB], tl.float32), FLOAT_DEPTH)
        acc = add_product(acc, tl.where(z <= 0, 0.0, g[:, None] * w[None, :]), q)
    column = tl.arange(0, BLOCK_D)
    tl.store(part_ptr + (local * slots + n)[:, None] * D + column[None, :], acc, mask=there[:, None] & (column < D)[None, :])


@triton.jit(do_not_specialize=["first_row", "last_row", "S", "T", "slots"])
def _collect_kernel(part_ptr, where_ptr, dk_ptr, first_row, last_row, S, T, slots, D: tl.constexpr, BLOCK_D: tl.constexpr,
                    KEYS: tl.constexpr):
    """One program: dk [B, T, D] of KEYS keys of one sequence, continued by its rows among first_row … last_row − 1, in order."""
    blocks = tl.cdiv(T, KEYS)
    b = first_row // S + tl.program_id(0) // blocks
    n = (tl.program_id(0) % blocks) * KEYS + tl.arange(0, KEYS)
    column = tl.arange(0, BLOCK_D)
    dk_at = dk_ptr + (tl.cast(b, tl.int64) * T + n)[:, None] * D + column[None, :]
    inside = (n < T)[:, None] & (column < D)[None, :]
    acc = tl.load(dk_at, mask=inside, other=0.0)
    for row in range(tl.maximum(first_row, b * S), tl.minimum(last_row, (b + 1) * S)):
        local = tl.cast(row - first_row, tl.int64)
        slot = tl.load(where_ptr + local * T + n, mask=n < T, other=-1)
        at = part_ptr + (local * slots + slot)[:, None] * D + column[None, :]
        acc += tl.load(at, mask=(slot >= 0)[:, None] & inside, other=0.0)
    tl.store(dk_at, acc, mask=inside)


# ---- host ------------------------------------------------------------------------------------------------------


def covers(target_q: Tensor, target_kv: Tensor) -> str | None:
    """Why the kernels cannot follow this attention, naming the argument; None if they can."""
    if target_q.dtype not in indexer.DTYPES:
        return f"target_q: {target_q.dtype} is not one of {indexer.DTYPES}"
    return None if target_kv.dtype == target_q.dtype else f"target_kv: {target_kv.dtype} differs from target_q's {target_q.dtype}"


class Target:
    """The attention that is followed: q [R,H,D] contiguous, k [B,T,Hkv,D], and what its kernels' launches share."""

    def __init__(self, q: Tensor, k: Tensor, S: int, indices: Tensor | None, scale: float):
        self.q, self.k, self.S, self.indices, self.scale = q, k, S, indices, scale
        (_, self.H, D), self.Hkv = q.shape, k.shape[2]
        depth = min(configs_sparse.target_depth(q.dtype), block_dim(D))
        self.constants = dict(H=self.H, HKV=self.Hkv, D=D, DEPTH=depth, SLOTS=indices is not None)
        self.width = k.shape[1] if indices is None else indices.shape[1]

    def lse(self, shift: Tensor) -> None:
        """-> shift [R,2H] float32: x, a of each head, a·exp(s − x) being its softmax"""
        tile = configs_sparse.indexer("lse", self.q.device, self.q.dtype, 64)
        slots, group, rows = self.indices is not None, self.H // self.Hkv, len(self.q)
        hb = tile.m if slots else head_block(group, tile.m)
        tiles = rows // self.S * triton.cdiv(self.S, 1 if slots else tile.m // hb)
        launch(
            _target_lse_kernel, (tiles * self.Hkv * triton.cdiv(group, hb),), self.q, self.k, shift, self.indices, 0, rows, self.S,
            self.k.shape[1], self.width, *self.k.stride()[:3], shift.stride(0), self.scale, M=tile.m, N=tile.n, HB=hb, **self.constants,
            warps=tile.warps, stages=tile.stages, device=self.q.device)

    def mass(self, shift: Tensor, mass: Tensor, rows: tuple[int, int]) -> None:
        """Σ_h a·exp(scale·q·k − x) of rows first … last − 1 -> mass [last − first, T or K]; invisible keys as may be."""
        first, last = rows
        tile = configs_sparse.indexer("target", self.q.device, self.q.dtype, 64)
        queries = 1 if self.indices is not None else min(64, triton.next_power_of_2(self.S))
        tiles = triton.cdiv(last - first, self.S) * triton.cdiv(min(self.S, last - first), queries)
        launch(
            _target_kernel, (tiles * triton.cdiv(self.width, tile.n),), self.q, self.k, shift, mass, self.indices, first, last, self.S,
            self.k.shape[1], self.width, *self.k.stride()[:3], shift.stride(0), mass.stride(0), self.scale, KEYS=tile.n, COLUMNS=tile.m,
            HB=head_block(self.H // self.Hkv, tile.m), QUERIES=queries, **self.constants, warps=tile.warps, stages=tile.stages,
            device=self.q.device)


def indexer_loss(q: Tensor, k: Tensor, w: Tensor, target: Target, lse: Tensor | None, loss: Tensor, kept: Tensor) -> None:
    """The loss of each row -> loss [R], and what the backward needs -> kept [R,K], or over all keys [R,3+2H], all float32 and given.

    q [R,Hi,Di] and w [R,Hi] (float32) contiguous, k [B,T,Di]; lse [R,H] float32 or None.
    """
    R, S, T, indices = len(q), target.S, k.shape[1], target.indices
    shift = kept[:, 3:] if indices is None else torch.empty((R, 2 * target.H), device=q.device)
    if lse is None:
        target.lse(shift)
    else:
        shift[:, ::2], shift[:, 1::2] = lse.masked_fill(lse.isneginf(), 0.0), 1.0

    def finish(scores: Tensor, mass: Tensor, rows: tuple[int, int]) -> None:
        block = configs_sparse.loss_block()
        launch(
            _finish_kernel, (rows[1] - rows[0],), scores, mass, indices, loss, kept, rows[0], S, T, target.width,
            scores.stride(0), mass.stride(0), kept.stride(0), SLOTS=indices is not None, BLOCK=block, warps=8, stages=1, device=q.device)

    if indices is not None:
        mass = torch.empty_like(kept)
        indexer.write_scores(q, k, w, kept, (0, R), S, causal=False, indices=indices, fill=True)
        target.mass(shift, mass, (0, R))
        finish(kept, mass, (0, R))
    else:
        for rows, scores, mass in _over_all_keys(q, k, w, target, shift):
            finish(scores, mass, rows)


def _over_all_keys(q: Tensor, k: Tensor, w: Tensor, target: Target, shift: Tensor) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """-> (first row, last row + 1), scores [≥ rows, T], mass: chunk by chunk in the same memory."""
    S, T = target.S, k.shape[1]
    pieces = list(chunks(len(q) // S, S, configs_sparse.workspace() // (8 * T)))
    scores, mass = torch.empty((2, max(last - first for first, last in pieces), T), device=q.device)
    for rows in pieces:
        indexer.write_scores(q, k, w, scores, rows, S, causal=True)
        target.mass(shift, mass, rows)
        yield rows, scores, mass


def indexer_loss_backward(q: Tensor, k: Tensor, w: Tensor, target: Target, kept: Tensor, dloss: Tensor, dq: Tensor, dk: Tensor,
                          dw: Tensor) -> None:
    """dloss [R] and kept -> dq [R,Hi,Di], dk [B,T,Di] float32, zeroed before, dw [R,Hi] float32."""
    (R, H, D), S, T, indices = q.shape, target.S, k.shape[1], target.indices
    if indices is None:
        block = configs_sparse.loss_block()
        for rows, scores, mass in _over_all_keys(q, k, w, target, kept[:, 3:]):
            launch(
                _residual_kernel, ((rows[1] - rows[0]) * triton.cdiv(T, block),), scores, mass, kept, rows[0], S, T, scores.stride(0),
                mass.stride(0), kept.stride(0), BLOCK=block, warps=4, stages=1, device=q.device)
            indexer.query_gradients(q, k, w, scores, dq, dw, rows, S, causal=True, dloss=dloss)
            indexer.key_gradients(q, k, w, scores, dk, rows, S, causal=True, dloss=dloss)
        return
    indexer.query_gradients(q, k, w, kept, dq, dw, (0, R), S, causal=False, dloss=dloss, indices=indices)
    K, tile, collect = indices.shape[1], configs_sparse.indexer("key", q.device, q.dtype, D), configs_sparse.collect_block()
    pieces = list(chunks(R // S, S, configs_sparse.workspace() // (4 * (K * D + T))))
    most = max(last - first for first, last in pieces)
    part, where = torch.empty((most, K, D), device=q.device), torch.empty((most, T), dtype=torch.int32, device=q.device)
    for first, last in pieces:
        where.fill_(-1)
        launch(
            _contribution_kernel, ((last - first) * triton.cdiv(K, tile.n),), q, k, w, kept, dloss, indices, part, where, first, S, T, K,
            *k.stride()[:2], H=H, D=D, BLOCK_D=block_dim(D), KEYS=tile.n, HB=tile.m, warps=tile.warps, stages=tile.stages, device=q.device)
        launch(
            _collect_kernel, (triton.cdiv(last - first, S) * triton.cdiv(T, collect),), part, where, dk, first, last, S, T, K,
            D=D, BLOCK_D=block_dim(D), KEYS=collect, warps=4, stages=1, device=q.device)
