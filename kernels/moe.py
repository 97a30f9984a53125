"""The experts' feed-forward: grouped products with the gather, the activation and the weighting fused in.

Shapes: N tokens, H hidden, I inner, C columns of the first product (2I; I for relu2), E experts, K experts a token, slots as in
moe_route.py, M ≤ N·K of them here; rows are slots in the order of their experts; a tile is BLOCK_M rows of one expert × BLOCK_N.

    z = s_in·(x·W1_e) + b1_e,  a = act(z),  y_t = Σ_k s_out·(a·W2_e + b2_e), in k order

The weight of a slot is s_in or s_out, the other is 1. Forward: one kernel gathers x and makes a [M, I] (and keeps z [M, C] for the
backward), one multiplies it into results of slots, one adds each token's slots up. The results of all slots would be K times
the output, so they are held and added for as many columns at a time as fit a buffer of fixed size. Which rows a tile holds is
written down by the GPU: nothing waits for the counts. A row's sums over k are one chain in ascending order: its bits depend
neither on its neighbours nor on the tile.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs_moe
from .linear import grouped, load_operand
from .moe_activation import ACTIVATIONS, GPT_OSS, RELU2, activate
from .moe_route import sort_slots
from .primitives import convert, dot, launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["E", "n_tiles"])
def _tiles_kernel(offsets_ptr, tiles_ptr, E, n_tiles, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """tiles [2, n_tiles]: of each tile the expert (−1: no such tile) and its first row. One program an expert, one for the rest."""
    e = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    rows = tl.load(offsets_ptr + expert + 1, mask=expert < E, other=0) - tl.load(offsets_ptr + expert, mask=expert < E, other=0)
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    before = tl.sum(tl.where(expert < e, tiles, 0), 0)
    own = tl.where(e < E, tl.sum(tl.where(expert == e, tiles, 0), 0), n_tiles - before)
    first_row = tl.load(offsets_ptr + e)
    for first in range(0, own, 128):
        j = first + tl.arange(0, 128)
        tl.store(tiles_ptr + before + j, tl.where(e < E, e, -1) + tl.zeros_like(j), mask=j < own)
        tl.store(tiles_ptr + n_tiles + before + j, first_row + j * BLOCK_M, mask=j < own)


@triton.jit
def rows_product(acc, x_ptr, row_at, w_ptr, column_at, column_inside, depth_of_all, stride_wk, BLOCK_K: tl.constexpr,
                 EVEN_K: tl.constexpr, CLAMP_W: tl.constexpr):
    """acc [BLOCK_M, BLOCK_N] + x·wᵀ for rows at x_ptr + row_at and columns at w_ptr + column_at (CLAMP_W: all of which exist)."""
    depth = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row_at[:, None] + depth[None, :]
    w_at = w_ptr + column_at[:, None] + (depth * stride_wk)[None, :]
    for k0 in range(0, depth_of_all, BLOCK_K):
        x = load_operand(x_at, column_inside, depth, depth_of_all - k0, True, EVEN_K)  # [BLOCK_M, BLOCK_K]
        w = load_operand(w_at, column_inside, depth, depth_of_all - k0, CLAMP_W, EVEN_K)  # [BLOCK_N, BLOCK_K]
        acc = dot(x, tl.trans(w), acc)
        x_at += BLOCK_K
        w_at += BLOCK_K * stride_wk
    return acc


@triton.jit
def rows_of(tiles_ptr, offsets_ptr, order_ptr, tile, n_tiles, e, BLOCK_M: tl.constexpr):
    """The tile's rows (past the expert's last one it is repeated), their slots, and which are there."""
    end = tl.load(offsets_ptr + e + 1)
    row = tl.load(tiles_ptr + n_tiles + tile) + tl.arange(0, BLOCK_M)
    live = row < end
    row = tl.minimum(row, end - 1)
    return row, tl.load(order_ptr + row), live


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    left, right = halves(tile, ROWS, COLUMNS)
    first, second = halves(left, ROWS, COLUMNS // 2)
    third, fourth = halves(right, ROWS, COLUMNS // 2)
    return first, second, third, fourth


@triton.jit
def _kept(z, limit, below, ACTIVATION: tl.constexpr):
    """z as it is kept. Beyond the limit its size has no effect, but rounded it could come to lie on it, where it has a gradient."""
    if ACTIVATION != RELU2:
        z = tl.where(z > limit, 2.0 * limit, tl.where((z < -limit) & below, -2.0 * limit, z))
    return z


@triton.jit
def _finish(gate, up, row, live, n0, a_ptr, z_ptr, I, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr,
            JOINED: tl.constexpr, KEEP: tl.constexpr):
    """Stores a and z of COLUMNS inner columns from n0; JOINED: gate holds [gate, up] side by side, [ROWS, 2·COLUMNS]."""
    GATED: tl.constexpr = ACTIVATION != RELU2
    C = 2 * I if GATED else I
    z_row = row.to(tl.int64)[:, None] * C
    if KEEP and ACTIVATION == GPT_OSS:
        column = 2 * n0 + tl.arange(0, 2 * COLUMNS)
        kept = _kept(gate, limit, (column % 2 == 1)[None, :], ACTIVATION)
        tl.store(z_ptr + z_row + column[None, :], convert(kept, z_ptr.dtype.element_ty), mask=live[:, None] & (column < C)[None, :])
    if GATED and JOINED:
        gate, up = tl.split(tl.reshape(gate, (ROWS, COLUMNS, 2)))
    inner = n0 + tl.arange(0, COLUMNS)
    inside = live[:, None] & (inner < I)[None, :]
    if KEEP and ACTIVATION != GPT_OSS:
        tl.store(z_ptr + z_row + inner[None, :], convert(_kept(gate, limit, False, ACTIVATION), z_ptr.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(z_ptr + z_row + I + inner[None, :], convert(_kept(up, limit, True, ACTIVATION), z_ptr.dtype.element_ty), mask=inside)
    a = activate(gate, up, limit, ACTIVATION, a_ptr.dtype.element_ty == tl.float32)
    tl.store(a_ptr + row.to(tl.int64)[:, None] * I + inner[None, :], convert(a, a_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_tiles", "K"])
def _up_kernel(x_ptr, w_ptr, bias_ptr, weights_ptr, order_ptr, offsets_ptr, tiles_ptr, a_ptr, z_ptr, n_tiles, H, I, K, stride_x, stride_we,
               stride_wn, stride_wk, limit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
               EVEN_K: tl.constexpr, CLAMP_W: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
               KEEP: tl.constexpr):
    """a [M, I], and z [M, C] (KEEP) in the weight's order of columns. Gate and up are columns of one product: side by side where W1 has
    them so or has columns as rows, which can be taken in any order; else one half of the tile each."""
    GATED: tl.constexpr = ACTIVATION != RELU2
    BESIDE: tl.constexpr = ACTIVATION == GPT_OSS  # in W1
    PAIRS: tl.constexpr = BESIDE or CLAMP_W  # in the tile
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    tile, n_block = grouped(tl.program_id(0), n_tiles, tl.cdiv(I, BLOCK_N), GROUP)
    e = tl.load(tiles_ptr + tile)
    if e >= 0:
        row, slot, live = rows_of(tiles_ptr, offsets_ptr, order_ptr, tile, n_tiles, e, BLOCK_M)
        n0 = n_block * BLOCK_N
        j = tl.arange(0, WIDTH)
        if BESIDE:
            column = 2 * n0 + j
            column_inside = column < 2 * I
            if CLAMP_W:
                column = tl.minimum(column, 2 * I - 1)
        else:
            inner = n0 + (j if not GATED else j // 2 if PAIRS else j % BLOCK_N)
            column_inside = inner < I
            if CLAMP_W:
                inner = tl.minimum(inner, I - 1)
            column = inner
            if GATED:
                column += (j % 2 if PAIRS else j // BLOCK_N) * I
        acc = rows_product(tl.zeros([BLOCK_M, WIDTH], tl.float32), x_ptr, (slot // K).to(tl.int64) * stride_x,
                           w_ptr + e.to(tl.int64) * stride_we, column.to(tl.int64) * stride_wn, column_inside, H, stride_wk,
                           BLOCK_K, EVEN_K, CLAMP_W)
        if SCALED:
            acc *= tl.load(weights_ptr + slot)[:, None]
        C = 2 * I if GATED else I
        if BIAS:
            acc += tl.load(bias_ptr + e.to(tl.int64) * C + column, mask=column_inside, other=0.0)[None, :]
        # A quarter of the columns at a time: whole, or in two halves, the tile spills registers.
        PART: tl.constexpr = BLOCK_N // 4
        JOINED: tl.constexpr = PAIRS or not GATED
        if JOINED:
            g0, g1, g2, g3 = quarters(acc, BLOCK_M, WIDTH)
            u0, u1, u2, u3 = g0, g1, g2, g3
        else:
            gate, up = halves(acc, BLOCK_M, WIDTH)
            g0, g1, g2, g3 = quarters(gate, BLOCK_M, BLOCK_N)
            u0, u1, u2, u3 = quarters(up, BLOCK_M, BLOCK_N)
        _finish(g0, u0, row, live, n0, a_ptr, z_ptr, I, limit, BLOCK_M, PART, ACTIVATION, JOINED, KEEP)
        _finish(g1, u1, row, live, n0 + PART, a_ptr, z_ptr, I, limit, BLOCK_M, PART, ACTIVATION, JOINED, KEEP)
        _finish(g2, u2, row, live, n0 + 2 * PART, a_ptr, z_ptr, I, limit, BLOCK_M, PART, ACTIVATION, JOINED, KEEP)
        _finish(g3, u3, row, live, n0 + 3 * PART, a_ptr, z_ptr, I, limit, BLOCK_M, PART, ACTIVATION, JOINED, KEEP)


@triton.jit(do_not_specialize=["n_tiles"])
def _slots_kernel(x_ptr, w_ptr, bias_ptr, order_ptr, offsets_ptr, tiles_ptr, slots_ptr, n_tiles, columns, depth, stride_x, stride_we,
                  stride_wn, stride_wk, stride_be, stride_s, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  GROUP: tl.constexpr, EVEN_K: tl.constexpr, CLAMP_W: tl.constexpr, BIAS: tl.constexpr):
    """slots [N·K, columns]: each row of x [M, depth] times its expert's w (+ bias), at its slot."""
    tile, n_block = grouped(tl.program_id(0), n_tiles, tl.cdiv(columns, BLOCK_N), GROUP)
    e = tl.load(tiles_ptr + tile)
    if e >= 0:
        row, slot, live = rows_of(tiles_ptr, offsets_ptr, order_ptr, tile, n_tiles, e, BLOCK_M)
        column = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < columns
        at = tl.minimum(column, columns - 1) if CLAMP_W else column
        acc = rows_product(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x_ptr, row.to(tl.int64) * stride_x,
                           w_ptr + e.to(tl.int64) * stride_we, at.to(tl.int64) * stride_wn, inside, depth, stride_wk,
                           BLOCK_K, EVEN_K, CLAMP_W)
        if BIAS:
            acc += tl.load(bias_ptr + e.to(tl.int64) * stride_be + column, mask=inside, other=0.0)[None, :]
        tl.store(slots_ptr + slot.to(tl.int64)[:, None] * stride_s + column[None, :], convert(acc, slots_ptr.dtype.element_ty),
                 mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["N", "E", "K"])
def _combine_kernel(slots_ptr, experts_ptr, weights_ptr, out_ptr, N, E, K, columns, stride_s, stride_o, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr):
    """out [N, columns]: every token's slots, weighted, added in k order."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < N)[:, None] & (column < columns)[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, K):
        slot = token.to(tl.int64) * K + k
        e = tl.load(experts_ptr + slot, mask=token < N, other=-1)
        mine = (e >= 0) & (e < E)
        value = tl.load(slots_ptr + slot[:, None] * stride_s + column[None, :], mask=mine[:, None] & inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + slot, mask=mine, other=0.0)[:, None]
        acc += value
    tl.store(out_ptr + token.to(tl.int64)[:, None] * stride_o + column[None, :], convert(acc, out_ptr.dtype.element_ty), mask=inside)


class Slots:
    """The slots of experts [N, K] int32 by expert: order [N·K], offsets [E + 1], and the tiles of a grouped product."""

    def __init__(self, experts: Tensor, n_expert: int) -> None:
        self.experts, self.n_expert, (self.tokens, self.top_k) = experts, n_expert, experts.shape
        sizes = (n_expert, experts.numel(), n_expert + 1)
        counts, self.order, self.offsets = (torch.empty(n, dtype=torch.int32, device=experts.device) for n in sizes)
        sort_slots(experts, counts, self.order, self.offsets)
        self._tiles: dict[int, Tensor] = {}

    def tiles(self, rows: int) -> Tensor:
        """[2, tiles] int32, at least as many as `rows` rows a tile can need."""
        if rows not in self._tiles:
            n, E = self.experts.numel(), self.n_expert
            found = torch.empty((2, n // rows + min(E, n)), dtype=torch.int32, device=self.experts.device)
            launch(
                _tiles_kernel, (E + 1,), self.offsets, found, E, found.shape[1], BLOCK_E=triton.next_power_of_2(E), BLOCK_M=rows,
                warps=4, stages=1, device=self.experts.device)
            self._tiles[rows] = found
        return self._tiles[rows]

    def few(self) -> bool:
        """Whether most experts have a few rows, if any."""
        return self.experts.numel() <= 32 * self.n_expert or self.tokens <= 64


def up(x: Tensor, w: Tensor, inner: int, bias: Tensor | None, weights: Tensor | None, slots: Slots,
       a: Tensor, z: Tensor | None, activation: str, limit: float) -> None:
    """w [E, C, H] in any layout -> a [N·K, I] and z [N·K, C], of which the first M rows are written. weights: on the input."""
    tile = configs_moe.experts(x.device, x.dtype, "up few" if slots.few() else "up", activation, z is not None)
    tiles = slots.tiles(tile.m)
    launch(
        _up_kernel, (tiles.shape[1] * triton.cdiv(inner, tile.n),), x, w, bias, weights, slots.order, slots.offsets, tiles, a, z,
        tiles.shape[1], x.shape[1], inner, slots.top_k, x.stride(0), *w.stride(), limit, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        GROUP=tile.group, EVEN_K=x.shape[1] % tile.k == 0, CLAMP_W=w.stride(2) == 1, ACTIVATION=ACTIVATIONS.index(activation),
        BIAS=bias is not None, SCALED=weights is not None, KEEP=z is not None, warps=tile.warps, stages=tile.stages, device=x.device)


def product_and_sum(x: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor | None, slots: Slots, out: Tensor, kind: str,
                    seen: Callable[[Tensor, int], None] | None = None) -> None:
    """out [N, columns] = Σ_k weights·(x·w + bias) of rows x [N·K, depth] and w [E, columns, depth] in any layout, in k order; for some
    columns at a time, whose slots [N·K, ..] and first column `seen` is shown."""
    columns, n_slots = out.shape[1], slots.experts.numel()
    step = max(configs_moe.SLOTS_BYTES // (n_slots * x.element_size()) // configs_moe.SLOTS_STEP, 1) * configs_moe.SLOTS_STEP
    buffer = torch.empty((n_slots, min(step, columns)), dtype=x.dtype, device=x.device)
    tile = configs_moe.experts(x.device, x.dtype, f"{kind} few" if slots.few() else kind)
    tiles = slots.tiles(tile.m)
    rows, width = configs_moe.combine_tile()
    for first in range(0, columns, step):
        n = min(step, columns - first)
        launch(
            _slots_kernel, (tiles.shape[1] * triton.cdiv(n, tile.n),), x, w[:, first:],
            None if bias is None else bias[:, first:], slots.order, slots.offsets, tiles, buffer, tiles.shape[1], n, x.shape[1],
            x.stride(0), *w.stride(), 0 if bias is None else bias.stride(0), buffer.stride(0), BLOCK_M=tile.m, BLOCK_N=tile.n,
            BLOCK_K=tile.k, GROUP=tile.group, EVEN_K=x.shape[1] % tile.k == 0, CLAMP_W=w.stride(2) == 1, BIAS=bias is not None,
            warps=tile.warps, stages=tile.stages, device=x.device)
        launch(
            _combine_kernel, (triton.cdiv(slots.tokens, rows), triton.cdiv(n, width)), buffer, slots.experts, weights, out[:, first:],
            slots.tokens, slots.n_expert, slots.top_k, n, buffer.stride(0), out.stride(0), ROWS=rows, COLUMNS=width,
            WEIGHTED=weights is not None, warps=4, stages=1, device=x.device)
        if seen is not None:
            seen(buffer[:, :n], first)


def columns_first(w: Tensor, layout: str) -> Tensor:
    """A weight of either layout as [E, columns, depth]."""
    return w if layout == "out_in" else w.transpose(1, 2)


def covers(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor) -> str | None:
    """Why the kernels cannot take this call, naming the argument; None if they can."""
    if x.dtype not in DTYPES:
        return f"x: {x.dtype} is not one of {DTYPES}"
    for name, w in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        if w.dtype != x.dtype:
            return f"{name}: {w.dtype} differs from x's {x.dtype}"
        if 0 in w.shape:
            return f"{name}: shape {list(w.shape)} has an empty dimension"
    return "weights: they are float32 here, not float64" if weights.dtype == torch.float64 else None


def moe_forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None,
    y: Tensor, z: Tensor | None, *, activation: str, weight_on: str, layout: str, limit: float,
) -> None:
    """x [N, H] -> y [N, H] and, if given, z [N·K, C]: the kept pre-activations by expert, of which the first M rows are written.

    weights, biases float32, experts int32, all contiguous; x and the weights contiguous in the last dimension.
    """
    if experts.numel() == 0:
        y.zero_()
        return
    w1, w2, on_input = columns_first(w_gate_up, layout), columns_first(w_down, layout), weight_on == "input"
    slots, inner = Slots(experts, len(w1)), w2.shape[2]
    a = torch.empty((experts.numel(), inner), dtype=x.dtype, device=x.device)
    up(x, w1, inner, b_gate_up, weights if on_input else None, slots, a, z, activation, limit)
    product_and_sum(a, w2, b_down, None if on_input else weights, slots, y, "down")
