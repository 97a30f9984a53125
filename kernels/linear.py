"""Batch-invariant matrix products: y = x·Wᵀ + b, and the product with epilogue that linear_logprob's backward uses.

Shapes: M rows, K inputs (the summed dimension), N outputs; a tile is [BLOCK_M, BLOCK_N], k goes in steps of BLOCK_K.

A row's sum over k is one chain of multiply-adds in ascending k inside one program (no split over k), so its bits depend
neither on the other rows nor on the tile. Both operands may have any strides: dx = linear(dy, W.t()) and
dW = linear(dy.t(), x.t()) are this same kernel.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .primitives import dot, is_wide, launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def grouped(pid, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Program number -> (row block, column block): GROUP row blocks walk the columns together, rows fastest."""
    per_group = GROUP * column_blocks
    group = pid // per_group
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    inside = pid % per_group
    return group * GROUP + inside % height, inside // height


@triton.jit
def load_operand(at, inside, depth, left_over, CLAMPED: tl.constexpr, EVEN_K: tl.constexpr):
    if CLAMPED and EVEN_K:
        operand = tl.load(at)
    elif CLAMPED:
        operand = tl.load(at, mask=(depth < left_over)[None, :], other=0.0)
    elif EVEN_K:
        operand = tl.load(at, mask=inside[:, None], other=0.0)
    else:
        operand = tl.load(at, mask=inside[:, None] & (depth < left_over)[None, :], other=0.0)
    return operand


@triton.jit
def add_product(acc, x_ptr, w_ptr, rows_left, columns_left, K, stride_xm, stride_xk, stride_wn, stride_wk,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
                CLAMP_X: tl.constexpr, CLAMP_W: tl.constexpr, WIDE: tl.constexpr):
    """acc [BLOCK_M, BLOCK_N] + x·wᵀ, for the rows at x_ptr [.., K] and the columns at w_ptr [.., K].

    Rows past the end repeat the last one where k is contiguous (CLAMP: no mask in the loop; their results are not to be
    stored) and are masked where the rows are: there clamping would break the loads into single elements.
    """
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_inside = row < rows_left
    column_inside = column < columns_left
    if CLAMP_X:
        row = tl.minimum(row, rows_left - 1)
    if CLAMP_W:
        column = tl.minimum(column, columns_left - 1)
    at = depth
    x_step = BLOCK_K * stride_xk
    w_step = BLOCK_K * stride_wk
    if WIDE:
        row = row.to(tl.int64)
        column = column.to(tl.int64)
        at = depth.to(tl.int64)
        x_step = tl.cast(stride_xk, tl.int64) * BLOCK_K
        w_step = tl.cast(stride_wk, tl.int64) * BLOCK_K
    x_at = x_ptr + row[:, None] * stride_xm + at[None, :] * stride_xk
    w_at = w_ptr + column[:, None] * stride_wn + at[None, :] * stride_wk
    for k0 in range(0, K, BLOCK_K):
        x = load_operand(x_at, row_inside, depth, K - k0, CLAMP_X, EVEN_K)  # [BLOCK_M, BLOCK_K]
        w = load_operand(w_at, column_inside, depth, K - k0, CLAMP_W, EVEN_K)  # [BLOCK_N, BLOCK_K]
        acc = dot(x, tl.trans(w), acc)
        x_at += x_step
        w_at += w_step
    return acc


@triton.jit
def _product_kernel(x_ptr, w_ptr, bias_ptr, acc_ptr, out_ptr, rows_ptr, live_ptr, M, N, K,
                    stride_xm, stride_xk, stride_wn, stride_wk, stride_am, stride_om, stride_on,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
                    BIAS: tl.constexpr, CONTINUE: tl.constexpr, SCATTER: tl.constexpr, LIVE: tl.constexpr, CLAMP_X: tl.constexpr,
                    CLAMP_W: tl.constexpr, WIDE: tl.constexpr):
    """out[m, n] = acc[m, n] + Σ_k x[m, k]·w[n, k] + bias[n]; acc (CONTINUE) is the float32 result of the k before these.

    SCATTER: row m goes to row rows[m] of out. LIVE: 0 takes everything; 1 takes rows < live[0] and gives 0 for the
    others; 2 sums k < live[0] only. The counts stay on the GPU.
    """
    m_block, n_block = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m0 = m_block * BLOCK_M
    n0 = n_block * BLOCK_N
    row = m0 + tl.arange(0, BLOCK_M)
    column = n0 + tl.arange(0, BLOCK_N)
    inside = (row < M)[:, None] & (column < N)[None, :]
    live_rows = M
    depth = K
    if LIVE == 1:
        live_rows = tl.load(live_ptr)
        depth = tl.where(m0 < live_rows, K, 0)
    if LIVE == 2:
        depth = tl.load(live_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if CONTINUE:
        acc = tl.load(acc_ptr + row[:, None].to(tl.int64) * stride_am + column[None, :], mask=inside, other=0.0)
    acc = add_product(acc, x_ptr + m0.to(tl.int64) * stride_xm, w_ptr + n0.to(tl.int64) * stride_wn, M - m0, N - n0, depth,
                      stride_xm, stride_xk, stride_wn, stride_wk, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, CLAMP_X, CLAMP_W, WIDE)
    if BIAS:
        acc += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if LIVE == 1:
        acc = tl.where((row < live_rows)[:, None], acc, 0.0)
    to = row.to(tl.int64)
    if SCATTER:
        to = tl.load(rows_ptr + row, mask=row < M, other=0).to(tl.int64)
    tl.store(out_ptr + to[:, None] * stride_om + column[None, :].to(tl.int64) * stride_on, acc.to(out_ptr.dtype.element_ty), mask=inside)


def covers(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why linear cannot take this call, naming the argument; None if it can."""
    for name, t in (("x", x), ("weight", weight)):
        if t.dtype not in DTYPES:
            return f"{name}: {t.dtype} is not one of {DTYPES}"
    if weight.dtype != x.dtype:
        return f"weight: {weight.dtype} differs from x's {x.dtype}"
    return None


def product(x: Tensor, weight: Tensor, out: Tensor, *, bias: Tensor | None = None, continue_from: Tensor | None = None,
            rows: Tensor | None = None, live_rows: Tensor | None = None, live_depth: Tensor | None = None) -> None:
    """out [M,N] = continue_from [M,N] (float32) + x [M,K]·weight [N,K]ᵀ + bias [N], any strides.

    rows [M]: out's row for each row of x. live_rows, live_depth [1] int32 on the GPU: rows, or k, from there on count as 0.
    """
    (M, K), N = x.shape, weight.shape[0]
    if M * N == 0:
        return
    if K == 0 and continue_from is None and bias is None:
        out.zero_()
        return
    tile = configs.product(x.device, x.dtype, M, continue_from is not None)
    x_steps, w_steps = (max(abs(t.stride(0)) * n, abs(t.stride(1)) * tile.k) for t, n in ((x, tile.m), (weight, tile.n)))
    live = live_rows if live_rows is not None else live_depth
    launch(
        _product_kernel, (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),), x, weight, bias, continue_from, out, rows, live, M, N, K,
        x.stride(0), x.stride(1), weight.stride(0), weight.stride(1), 0 if continue_from is None else continue_from.stride(0),
        out.stride(0), out.stride(1), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tile.group,
        EVEN_K=K % tile.k == 0 and live_depth is None, BIAS=bias is not None, CONTINUE=continue_from is not None, SCATTER=rows is not None,
        LIVE=1 if live_rows is not None else 2 if live_depth is not None else 0,
        CLAMP_X=x.stride(1) == 1 or x.stride(0) != 1, CLAMP_W=weight.stride(1) == 1 or weight.stride(0) != 1,
        WIDE=is_wide(x_steps, 2) or is_wide(w_steps, 2),
        warps=tile.warps, stages=tile.stages, device=x.device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [M, O] = x [M, I]·weight [O, I]ᵀ + bias [O], accumulated in float32 and rounded once; any strides."""
    product(x, weight, out, bias=bias)
