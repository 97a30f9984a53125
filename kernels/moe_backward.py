"""Gradients of the experts' feed-forward from x, the kept pre-activations z and the routing; the rest is computed again.

Shapes as in moe.py; rows are slots in the order of their experts, dy' = dy of the row's token. Formulas:

    weight on the output: da' = dy'·W2ᵀ,  ds = ⟨da', a⟩ + ⟨dy', b2⟩,  dz = act'(s·da'),  dx = Σ_k dz·W1ᵀ
                          dW2 = (s·a)ᵀ·dy',  db2 = Σ s·dy',  dW1 = x'ᵀ·dz,  db1 = Σ dz
    weight on the input:  da' = dy'·W2ᵀ,  dz = act'(da'),  dx' = dz·W1ᵀ,  ds = ⟨dx', x'⟩,  dx = Σ_k s·dx'
                          dW2 = aᵀ·dy',  db2 = Σ dy',  dW1 = (s·x')ᵀ·dz,  db1 = Σ dz

The expert's output is not needed. Every sum has one order: k for dx, the expert's rows for the weights' gradients, ascending
column blocks of fixed size for ds. No slot of an expert outside [0, E) is read, its ds is 0.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs_moe
from .linear import grouped
from .moe import Slots, columns_first, product_and_sum, quarters, rows_of, rows_product, up
from .moe_activation import ACTIVATIONS, GPT_OSS, RELU2, activate_backward
from .primitives import convert, dot, launch


@triton.jit
def _dz_part(da, row, live, s, n0, z_ptr, dz_ptr, a_ptr, I, limit, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr):
    """da' [ROWS, COLUMNS] of inner columns from n0: stores dz and s·a -> ⟨da', a⟩ [ROWS]."""
    BESIDE: tl.constexpr = ACTIVATION == GPT_OSS
    GATED: tl.constexpr = ACTIVATION != RELU2
    inner = n0 + tl.arange(0, COLUMNS)
    inside = live[:, None] & (inner < I)[None, :]
    columns = (2 * inner if BESIDE else inner)[None, :]
    to_up = 1 if BESIDE else I
    at = row.to(tl.int64)[:, None] * (2 * I if GATED else I) + columns
    gate = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rise = gate
    if GATED:
        rise = tl.load(z_ptr + at + to_up, mask=inside, other=0.0).to(tl.float32)
    a, by_gate, by_up = activate_backward(gate, rise, limit, ACTIVATION, a_ptr.dtype.element_ty == tl.float32)
    ds = s
    if SCALED:
        ds = tl.sum(tl.where(inside, da * a, 0.0), 1)
        da *= s[:, None]
        a *= s[:, None]
    tl.store(a_ptr + row.to(tl.int64)[:, None] * I + inner[None, :], convert(a, a_ptr.dtype.element_ty), mask=inside)
    tl.store(dz_ptr + at, convert(da * by_gate, dz_ptr.dtype.element_ty), mask=inside)
    if GATED:
        tl.store(dz_ptr + at + to_up, convert(da * by_up, dz_ptr.dtype.element_ty), mask=inside)
    return ds


@triton.jit(do_not_specialize=["n_tiles", "K", "n_slots"])
def _dz_kernel(dy_ptr, w_ptr, z_ptr, weights_ptr, order_ptr, offsets_ptr, tiles_ptr, dz_ptr, a_ptr, ds_ptr, n_tiles, n_slots, H, I, K,
               stride_dy, stride_we, stride_wn, stride_wk, limit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
               GROUP: tl.constexpr, EVEN_K: tl.constexpr, CLAMP_W: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr):
    """dz [M, C], s·a [M, I], and ⟨da', a⟩ of each column block: ds [blocks, N·K]. SCALED: the weight is on the output, else s = 1."""
    tile, n_block = grouped(tl.program_id(0), n_tiles, tl.cdiv(I, BLOCK_N), GROUP)
    e = tl.load(tiles_ptr + tile)
    if e >= 0:
        row, slot, live = rows_of(tiles_ptr, offsets_ptr, order_ptr, tile, n_tiles, e, BLOCK_M)
        inner = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
        at = tl.minimum(inner, I - 1) if CLAMP_W else inner
        da = rows_product(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), dy_ptr, (slot // K).to(tl.int64) * stride_dy,
                          w_ptr + e.to(tl.int64) * stride_we, at.to(tl.int64) * stride_wn, inner < I, H, stride_wk,
                          BLOCK_K, EVEN_K, CLAMP_W)
        s = row.to(tl.float32)
        if SCALED:
            s = tl.load(weights_ptr + slot)
        # A quarter of the columns at a time: whole, or in two halves, the tile spills registers.
        PART: tl.constexpr = BLOCK_N // 4
        n0 = n_block * BLOCK_N
        first, second, third, fourth = quarters(da, BLOCK_M, BLOCK_N)
        ds = _dz_part(first, row, live, s, n0, z_ptr, dz_ptr, a_ptr, I, limit, PART, ACTIVATION, SCALED)
        ds += _dz_part(second, row, live, s, n0 + PART, z_ptr, dz_ptr, a_ptr, I, limit, PART, ACTIVATION, SCALED)
        ds += _dz_part(third, row, live, s, n0 + 2 * PART, z_ptr, dz_ptr, a_ptr, I, limit, PART, ACTIVATION, SCALED)
        ds += _dz_part(fourth, row, live, s, n0 + 3 * PART, z_ptr, dz_ptr, a_ptr, I, limit, PART, ACTIVATION, SCALED)
        if SCALED:
            tl.store(ds_ptr + n_block.to(tl.int64) * n_slots + slot, ds, mask=live)


@triton.jit
def _rows_at(pointer, row, slot, s, K, stride, column, mask, GATHERED: tl.constexpr, SCALED: tl.constexpr):
    """[ROWS, COLUMNS] of a matrix of rows, or (GATHERED) of tokens, times s."""
    if GATHERED:
        row = slot // K
    tile = tl.load(pointer + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
    if SCALED:
        tile = convert(tile.to(tl.float32) * s[:, None], tile.dtype)
    return tile


@triton.jit(do_not_specialize=["K"])
def _dw_kernel(p_ptr, q_ptr, weights_ptr, order_ptr, offsets_ptr, out_ptr, P, Q, K, stride_p, stride_q, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATHER_P: tl.constexpr, GATHER_Q: tl.constexpr, SCALE_P: tl.constexpr,
               SCALE_Q: tl.constexpr):
    """out [E, P, Q]: Σ over an expert's rows of p [.., P] ⊗ q [.., Q], which are rows or gathered tokens, perhaps times their weight."""
    blocks = tl.cdiv(P, BLOCK_M) * tl.cdiv(Q, BLOCK_N)
    e = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    i = block % tl.cdiv(P, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = block // tl.cdiv(P, BLOCK_M) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    end = tl.load(offsets_ptr + e + 1)
    for first in range(tl.load(offsets_ptr + e), end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        live = row < end
        slot = row
        s = row
        if GATHER_P or GATHER_Q or SCALE_P or SCALE_Q:
            slot = tl.load(order_ptr + row, mask=live, other=0)
        if SCALE_P or SCALE_Q:
            s = tl.load(weights_ptr + slot, mask=live, other=0.0)
        p = _rows_at(p_ptr, row, slot, s, K, stride_p, i, live[:, None] & (i < P)[None, :], GATHER_P, SCALE_P)
        q = _rows_at(q_ptr, row, slot, s, K, stride_q, j, live[:, None] & (j < Q)[None, :], GATHER_Q, SCALE_Q)
        acc = dot(tl.trans(p), q, acc)
    to = out_ptr + (e.to(tl.int64) * P + i)[:, None] * Q + j[None, :]
    tl.store(to, convert(acc, out_ptr.dtype.element_ty), mask=(i < P)[:, None] & (j < Q)[None, :])


@triton.jit(do_not_specialize=["K"])
def _db_kernel(q_ptr, weights_ptr, order_ptr, offsets_ptr, out_ptr, Q, K, stride_q, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               GATHERED: tl.constexpr, SCALED: tl.constexpr):
    """out [E, Q] float32: Σ over an expert's rows of q [.., Q]."""
    e = tl.program_id(0)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    end = tl.load(offsets_ptr + e + 1)
    for first in range(tl.load(offsets_ptr + e), end, ROWS):
        row = first + tl.arange(0, ROWS)
        live = row < end
        slot = tl.load(order_ptr + row, mask=live, other=0)
        tile = _rows_at(q_ptr, row, slot, row, K, stride_q, j, live[:, None] & (j < Q)[None, :], GATHERED, False).to(tl.float32)
        if SCALED:
            tile *= tl.load(weights_ptr + slot, mask=live, other=0.0)[:, None]
        acc += tile
    tl.store(out_ptr + e.to(tl.int64) * Q + j, tl.sum(acc, 0), mask=j < Q)


@triton.jit(do_not_specialize=["n_slots", "E", "K", "n_partial"])
def _ds_kernel(p_ptr, q_ptr, experts_ptr, partial_ptr, out_ptr, n_slots, E, K, columns, stride_p, stride_q, n_partial,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_EXPERT: tl.constexpr, CONTINUE: tl.constexpr):
    """out [N·K] (CONTINUE: +=) Σ of partial [n_partial, N·K], and ⟨p of the token, q of the expert or the slot⟩; 0 where not here."""
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = slot < n_slots
    e = tl.load(experts_ptr + slot, mask=inside, other=-1)
    mine = (e >= 0) & (e < E)
    acc = tl.zeros([ROWS], tl.float32)
    if CONTINUE:
        acc = tl.load(out_ptr + slot, mask=inside, other=0.0)
    for i in range(0, n_partial):
        acc += tl.load(partial_ptr + tl.cast(i, tl.int64) * n_slots + slot, mask=mine, other=0.0)
    p_at = p_ptr + (slot // K).to(tl.int64)[:, None] * stride_p
    q_at = q_ptr + (e if BY_EXPERT else slot).to(tl.int64)[:, None] * stride_q
    for first in range(0, columns, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        here = mine[:, None] & (column < columns)
        p = tl.load(p_at + column, mask=here, other=0.0).to(tl.float32)
        acc += tl.sum(p * tl.load(q_at + column, mask=here, other=0.0).to(tl.float32), 1)
    tl.store(out_ptr + slot, tl.where(mine, acc, 0.0), mask=inside)


def _weight_gradient(rows: Tensor, tokens: Tensor, tokens_first: bool, scaled: bool, slots: Slots, weights: Tensor, out: Tensor) -> None:
    """out [E, P, Q] from rows [N·K, ..] and gathered tokens [N, ..] (scaled: times their slot's weight); tokens_first: P is theirs."""
    p, q = (tokens, rows) if tokens_first else (rows, tokens)
    E, P, Q = out.shape
    tile = configs_moe.experts(p.device, p.dtype, "dw")
    launch(
        _dw_kernel, (E * triton.cdiv(P, tile.m) * triton.cdiv(Q, tile.n),), p, q, weights, slots.order, slots.offsets, out, P, Q,
        slots.top_k, p.stride(0), q.stride(0), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GATHER_P=tokens_first,
        GATHER_Q=not tokens_first, SCALE_P=tokens_first and scaled, SCALE_Q=not tokens_first and scaled, warps=tile.warps,
        stages=tile.stages, device=p.device)


def _bias_gradient(q: Tensor, gathered: bool, scaled: bool, slots: Slots, weights: Tensor, out: Tensor) -> None:
    E, Q = out.shape
    rows, columns = configs_moe.bias_tile()
    launch(
        _db_kernel, (E, triton.cdiv(Q, columns)), q, weights, slots.order, slots.offsets, out, Q, slots.top_k, q.stride(0), ROWS=rows,
        COLUMNS=columns, GATHERED=gathered, SCALED=scaled, warps=4, stages=1, device=q.device)


def _dot_slots(p: Tensor, q: Tensor | None, by_expert: bool, partial: Tensor | None, slots: Slots, out: Tensor, again: bool) -> None:
    """out [N, K] (again: +=) partial [.., N·K] summed + ⟨p [N, columns], q⟩, q [E, columns] by expert or [N·K, columns]."""
    rows, width = configs_moe.dot_tile()
    columns, q = (0, p) if q is None else (q.shape[1], q)
    n_partial, partial = (0, out) if partial is None else (len(partial), partial)
    launch(
        _ds_kernel, (triton.cdiv(out.numel(), rows),), p, q, slots.experts, partial, out, out.numel(), slots.n_expert, slots.top_k,
        columns, p.stride(0), q.stride(0), n_partial, ROWS=rows, COLUMNS=width, BY_EXPERT=by_expert, CONTINUE=again, warps=4, stages=1,
        device=p.device)


def moe_backward(
    dy: Tensor, z: Tensor | None, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor,
    b_gate_up: Tensor | None, b_down: Tensor | None, dx: Tensor | None, dw_gate_up: Tensor | None, dw_down: Tensor | None,
    dweights: Tensor | None, db_gate_up: Tensor | None, db_down: Tensor | None, *, activation: str, weight_on: str, layout: str,
    limit: float,
) -> None:
    """dy [N, H] -> those gradients that are given, all contiguous; dweights [N, K] and the biases' are float32.

    z is the forward's, or None: computed again. Inputs as for moe_forward.
    """
    results = (dx, dw_gate_up, dw_down, dweights, db_gate_up, db_down)
    if experts.numel() == 0:
        for g in results:
            if g is not None:
                g.zero_()
        return
    H, n_slots, on_input, in_out = x.shape[1], experts.numel(), weight_on == "input", layout == "in_out"
    w1, w2 = columns_first(w_gate_up, layout), columns_first(w_down, layout)
    slots, C, inner = Slots(experts, len(w1)), w1.shape[1], w2.shape[2]
    dz, a = (torch.empty((n_slots, width), dtype=x.dtype, device=x.device) for width in (C, inner))
    if z is None:
        z = torch.empty_like(dz)
        up(x, w1, inner, b_gate_up, weights if on_input else None, slots, a, z, activation, limit)

    tile = configs_moe.experts(x.device, x.dtype, "dz")
    tiles, blocks, w2_depth = slots.tiles(tile.m), triton.cdiv(inner, tile.n), w2.transpose(1, 2)  # [E, I, H]
    partial = None if on_input else torch.empty((blocks, n_slots), dtype=torch.float32, device=x.device)
    launch(
        _dz_kernel, (tiles.shape[1] * blocks,), dy, w2_depth, z, weights, slots.order, slots.offsets, tiles, dz, a, partial,
        tiles.shape[1], n_slots, H, inner, slots.top_k, dy.stride(0), *w2_depth.stride(), limit, BLOCK_M=tile.m, BLOCK_N=tile.n,
        BLOCK_K=tile.k, GROUP=tile.group, EVEN_K=H % tile.k == 0, CLAMP_W=w2_depth.stride(2) == 1,
        ACTIVATION=ACTIVATIONS.index(activation), SCALED=not on_input, warps=tile.warps, stages=tile.stages, device=x.device)

    if dw_down is not None:  # [E, H, I], or [E, I, H]
        _weight_gradient(a, dy, not in_out, False, slots, weights, dw_down)
    del a
    if dw_gate_up is not None:  # [E, C, H], or [E, H, C]
        _weight_gradient(dz, x, in_out, on_input, slots, weights, dw_gate_up)
    if db_gate_up is not None:
        _bias_gradient(dz, False, False, slots, weights, db_gate_up)
    if db_down is not None:
        _bias_gradient(dy, True, not on_input, slots, weights, db_down)
    if dweights is not None and not on_input:
        _dot_slots(dy, b_down, True, partial, slots, dweights, False)
    if dx is not None or (dweights is not None and on_input):
        def dot_with_x(of_slots: Tensor, first: int) -> None:
            if dweights is not None and on_input:
                _dot_slots(x[:, first:], of_slots, False, None, slots, dweights, first > 0)

        product_and_sum(
            dz, w1.transpose(1, 2), None, weights if on_input else None, slots, torch.empty_like(x) if dx is None else dx, "dx",
            dot_with_x)
