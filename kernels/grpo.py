"""linear_logprob: log-probability and entropy of a linear head, forward and backward, without an [N, V] tensor.

Shapes: N rows (tokens), D hidden, V vocabulary; tiles [BLOCK_M rows, BLOCK_N columns], depth in steps of BLOCK_K.

    y = h·Wᵀ + b,  z = c·tanh(y/c)/τ (no softcap: y/τ),  logprob = z_target − lse,  entropy = −Σ p·log p,  p = exp(z − lse)
    dz = g_lp·(1[target] − p) − g_H·p·(log p + H),  dy = dz/τ·(1 − (τz/c)²),  dh = dy·W,  dW = dyᵀ·h,  db = Σ dy

Forward: each program owns BLOCK_M rows and one vocabulary split of fixed size and keeps (max, sum, entropy sum) online;
a second kernel merges the splits in order. Backward: for a bounded chunk of the vocabulary, dy is recomputed into a
buffer in the input dtype, then multiplied into dW (final for that chunk) and into a float32 dh that continues from
chunk to chunk; the sums over the vocabulary are one chain in ascending order, so the chunk's size is not in the bits.
Ignored rows are sorted to the end and the work stops before them; the count stays on the GPU.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .grpo_tiles import gradient, in_two, logits_of, merge_splits, online
from .linear import add_product, grouped, product
from .primitives import is_wide, launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["N", "V", "n_splits"])
def _forward_kernel(h_ptr, w_ptr, bias_ptr, target_ptr, live_ptr, peak_ptr, total_ptr, moment_ptr, chosen_ptr, N, D, V, n_splits,
                    stride_hm, stride_wv, inverse_temperature, softcap,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
                    EVEN_K: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr):
    """One program: BLOCK_M rows × SPLIT columns -> peak = max z, total = Σ exp(z − peak), moment = Σ exp(z − peak)·(z − peak), each
    [n_splits, N], and chosen [N] = z[target] from the one split that holds it."""
    m_block, split = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_M), n_splits, GROUP)
    m0 = m_block * BLOCK_M
    live = tl.load(live_ptr)
    if m0 < live:
        row = m0 + tl.arange(0, BLOCK_M)
        target = tl.load(target_ptr + row, mask=row < live, other=-1)  # [BLOCK_M]
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        moment = tl.zeros([BLOCK_M], tl.float32)
        chosen = tl.zeros([BLOCK_M], tl.float32)
        for v0 in range(split * SPLIT, tl.minimum(V, (split + 1) * SPLIT), BLOCK_N):
            acc = add_product(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), h_ptr + m0.to(tl.int64) * stride_hm,
                              w_ptr + tl.cast(v0, tl.int64) * stride_wv, live - m0, V - v0, D, stride_hm, 1, stride_wv, 1,
                              BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, True, True, WIDE)
            z, _ = logits_of(acc, bias_ptr, v0, V, inverse_temperature, softcap, BLOCK_N, BIAS, SOFTCAP)
            column = v0 + tl.arange(0, BLOCK_N)
            chosen += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
            peak, total, moment = online(tl.where((column < V)[None, :], z, float("-inf")), peak, total, moment)
        at = tl.cast(split, tl.int64) * N + row
        tl.store(peak_ptr + at, peak, mask=row < live)
        tl.store(total_ptr + at, total, mask=row < live)
        tl.store(moment_ptr + at, moment, mask=row < live)
        here = (target >= split * SPLIT) & (target < (split + 1) * SPLIT)
        tl.store(chosen_ptr + row, chosen, mask=(row < live) & here)


@triton.jit(do_not_specialize=["N", "n_splits"])
def _merge_kernel(peak_ptr, total_ptr, moment_ptr, chosen_ptr, order_ptr, live_ptr, logprob_ptr, entropy_ptr, lse_ptr, N, n_splits,
                  BLOCK_M: tl.constexpr, ENTROPY: tl.constexpr):
    """Splits, in order -> logprob, entropy, lse [N] at each row's own place; rows past the live ones give 0, 0, 0."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < tl.load(live_ptr)
    peak, log_total, entropy = merge_splits(peak_ptr, total_ptr, moment_ptr, row, live, N, n_splits, BLOCK_M, tl.float32)
    chosen = tl.load(chosen_ptr + row, mask=live, other=0.0)
    to = tl.load(order_ptr + row, mask=row < N, other=0)
    tl.store(logprob_ptr + to, tl.where(live, (chosen - peak) - log_total, 0.0), mask=row < N)
    tl.store(lse_ptr + to, tl.where(live, peak + log_total, 0.0), mask=row < N)
    if ENTROPY:
        tl.store(entropy_ptr + to, tl.where(live, entropy, 0.0), mask=row < N)


@triton.jit(do_not_specialize=["N", "V", "first", "columns"])
def _dlogits_kernel(h_ptr, w_ptr, bias_ptr, target_ptr, order_ptr, live_ptr, lse_ptr, entropy_ptr, dlogprob_ptr, dentropy_ptr, dy_ptr,
                    N, D, V, first, columns, stride_hm, stride_wv, stride_dy, inverse_temperature, softcap,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
                    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, WIDE: tl.constexpr):
    """dy [N, columns] for vocabulary columns first … first+columns−1, live rows only."""
    m_block, n_block = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    m0 = m_block * BLOCK_M
    live = tl.load(live_ptr)
    if m0 < live:
        row = m0 + tl.arange(0, BLOCK_M)
        v0 = first + n_block * BLOCK_N
        acc = add_product(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), h_ptr + m0.to(tl.int64) * stride_hm,
                          w_ptr + v0.to(tl.int64) * stride_wv, live - m0, V - v0, D, stride_hm, 1, stride_wv, 1,
                          BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, True, True, WIDE)
        place = tl.load(order_ptr + row, mask=row < live, other=0)
        target = tl.load(target_ptr + row, mask=row < live, other=-1).to(tl.int32)
        lse, lse_rest = in_two(tl.load(lse_ptr + place))
        g = tl.load(dlogprob_ptr + place)
        entropy = lse
        g_entropy = g
        if ENTROPY:
            entropy = tl.load(entropy_ptr + place)
            g_entropy = tl.load(dentropy_ptr + place)
        # The epilogue takes the tile in two halves: whole, it spills registers.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        local = tl.arange(0, BLOCK_M)[:, None] * stride_dy + tl.arange(0, HALF)[None, :]
        inside = n_block * BLOCK_N + tl.arange(0, HALF)
        dy_at = dy_ptr + m0.to(tl.int64) * stride_dy + n_block * BLOCK_N
        dy = gradient(left, bias_ptr, v0, V, target, lse, lse_rest, entropy, g, g_entropy, inverse_temperature, softcap,
                       HALF, BIAS, SOFTCAP, ENTROPY)
        tl.store(dy_at + local, dy.to(dy_ptr.dtype.element_ty), mask=(row < live)[:, None] & (inside < columns)[None, :])
        dy = gradient(right, bias_ptr, v0 + HALF, V, target, lse, lse_rest, entropy, g, g_entropy, inverse_temperature, softcap,
                       HALF, BIAS, SOFTCAP, ENTROPY)
        tl.store(dy_at + HALF + local, dy.to(dy_ptr.dtype.element_ty), mask=(row < live)[:, None] & (inside + HALF < columns)[None, :])


def covers(hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, keep_logits: bool = False,
           group: object | None = None) -> str | None:
    """Why linear_logprob's kernels cannot take this call, naming the argument; None if they can."""
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.dtype not in DTYPES:
            return f"{name}: {x.dtype} is not one of {DTYPES}"
        if x.numel() and x.stride(-1) != 1 and x.shape[-1] > 1:
            return f"{name}: the last dimension has stride {x.stride(-1)}, not 1"
    if weight.dtype != hidden.dtype:
        return f"weight: {weight.dtype} differs from hidden's {hidden.dtype}"
    if hidden.shape[-1] == 0:
        return "hidden: the last dimension is empty"
    if keep_logits:
        return "keep_logits: the logits are recomputed"
    if group is not None:
        return "group: a vocabulary-parallel head"
    return None


def _live_first(hidden: Tensor, target: Tensor, V: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> hidden and target with the rows that count first, order [N] (where each row came from), live [1] int32: their number.

    A target outside [0, V) counts as ignored.
    """
    ignored = (target == ignore_index) | (target < 0) | (target >= V)
    order = torch.sort(ignored.to(torch.uint8), stable=True).indices  # [N]
    live = (~ignored).sum(dtype=torch.int32).reshape(1)
    return hidden.index_select(0, order), target.index_select(0, order), order, live


def linear_logprob_forward(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, logprob: Tensor,
                           entropy: Tensor | None, lse: Tensor, *, temperature: float = 1.0, softcap: float | None = None,
                           ignore_index: int = -100) -> None:
    """hidden [N,D], weight [V,D], target [N], bias [V] or None -> logprob, entropy (may be None) [N] float32, lse [N] float64, given.

    Ignored rows get 0, 0, 0. Extra memory: 3 floats per row and vocabulary split, and the reordered hidden.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    if N == 0:
        return
    tile, split = configs.logprob(hidden.device, hidden.dtype, "forward"), configs.vocabulary_split()
    n_splits = triton.cdiv(V, split)
    h, chosen_target, order, live = _live_first(hidden, target, V, ignore_index)
    peak, total, moment = torch.empty((3, n_splits, N), dtype=torch.float32, device=hidden.device)
    chosen = torch.empty(N, dtype=torch.float32, device=hidden.device)
    launch(
        _forward_kernel, (triton.cdiv(N, tile.m) * n_splits,), h, weight, bias, chosen_target, live, peak, total, moment, chosen,
        N, D, V, n_splits, h.stride(0), weight.stride(0), 1.0 / temperature, float(softcap or 0.0),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tile.group, SPLIT=split,
        EVEN_K=D % tile.k == 0, BIAS=bias is not None, SOFTCAP=bool(softcap), WIDE=is_wide(weight.stride(0), tile.n),
        warps=tile.warps, stages=tile.stages, device=hidden.device)
    launch(
        _merge_kernel, (triton.cdiv(N, 128),), peak, total, moment, chosen, order, live, logprob, entropy, lse, N, n_splits,
        BLOCK_M=128, ENTROPY=entropy is not None, warps=4, stages=1, device=hidden.device)


def linear_logprob_backward(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, lse: Tensor, entropy: Tensor | None,
                            dlogprob: Tensor, dentropy: Tensor | None, dhidden: Tensor | None, dweight: Tensor | None,
                            dbias: Tensor | None, *, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100,
                            buffer_bytes: int | None = None) -> None:
    """Fills those of dhidden [N,D], dweight [V,D], dbias [V] that are given, from dlogprob [N] and dentropy [N] (or None), float32.

    lse and entropy are the forward's; dentropy needs entropy. buffer_bytes bounds the d(logits) buffer, and changes no bits
    of dhidden and dweight.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    if N == 0:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
        return
    tile = configs.logprob(hidden.device, hidden.dtype, "backward")
    h, chosen_target, order, live = _live_first(hidden, target, V, ignore_index)
    budget = configs.DLOGITS_BYTES if buffer_bytes is None else buffer_bytes
    step = max(budget // (N * hidden.element_size() * tile.n), 1) * tile.n
    step = min(step, triton.cdiv(V, tile.n) * tile.n)
    dy = torch.empty((N, step), dtype=hidden.dtype, device=hidden.device)
    running = torch.empty((N, D) if dhidden is not None and step < V else 0, dtype=torch.float32, device=hidden.device)
    for first in range(0, V, step):
        columns = min(step, V - first)
        launch(
            _dlogits_kernel, (triton.cdiv(N, tile.m) * triton.cdiv(columns, tile.n),), h, weight, bias, chosen_target, order, live,
            lse, entropy, dlogprob, dentropy, dy, N, D, V, first, columns, h.stride(0), weight.stride(0), step,
            1.0 / temperature, float(softcap or 0.0),
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tile.group, EVEN_K=D % tile.k == 0, BIAS=bias is not None,
            SOFTCAP=bool(softcap), ENTROPY=dentropy is not None, WIDE=is_wide(weight.stride(0), tile.n),
            warps=tile.warps, stages=tile.stages, device=hidden.device)
        chunk = dy[:, :columns]
        if dweight is not None:
            product(chunk.t(), h.t(), dweight[first:first + columns], live_depth=live)
        if dbias is not None:
            alive = torch.arange(N, device=hidden.device)[:, None] < live
            dbias[first:first + columns] = torch.where(alive, chunk, 0).sum(0, dtype=torch.float32)
        if dhidden is not None:
            last = first + columns == V
            product(chunk, weight[first:first + columns].t(), dhidden if last else running, continue_from=running if first else None,
                    rows=order if last else None, live_rows=live)
