"""logprob: log-probability of chosen tokens and entropy from given logits: one read of memory forward, one read and one write backward.

Shapes: N rows (tokens; or B sequences of S: N = B·S), V vocabulary. Formulas: grpo.py.
A program owns ROWS rows and SPLIT columns, COLUMNS at a time.

The vocabulary is cut into splits of fixed size, reduced online and merged in order, so a row's bits depend on that row alone; a
short vocabulary puts several rows into one program. Rows whose target is ignored (or outside 0 … V−1) are not read.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .grpo_tiles import gradient, in_two, logits_of, merge_splits, online
from .primitives import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _row_targets(target_ptr, row, N, V, ignore_index):
    """-> target [ROWS] and whether each row counts."""
    target = tl.load(target_ptr + row, mask=row < N, other=-1)
    return target, (target >= 0) & (target < V) & (target != ignore_index)


@triton.jit
def _row_starts(row, S, stride_b, stride_s):
    """Offsets of rows row [ROWS] of [B, S, V]; [N, V] has S = N."""
    return (row // S) * stride_b + (row % S) * stride_s


@triton.jit(do_not_specialize=["N", "S", "n_splits", "ignore_index"])
def _logits_forward_kernel(logits_ptr, target_ptr, peak_ptr, total_ptr, moment_ptr, chosen_ptr, N, V, S, n_splits, stride_b, stride_s,
                           ignore_index, inverse_temperature, softcap, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
                           SOFTCAP: tl.constexpr):
    """ROWS rows × SPLIT columns -> peak, total, moment [n_splits, N] and, from the one split that holds it, chosen [N] = z[target]."""
    split = tl.program_id(0) % n_splits
    row = (tl.program_id(0) // n_splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target, live = _row_targets(target_ptr, row, N, V, ignore_index)
    at = _row_starts(row, S, stride_b, stride_s)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float64)  # one addition a tile: float64 costs nothing and spares the rounding of a hundred tiles
    moment = tl.zeros([ROWS], tl.float64)
    chosen = tl.zeros([ROWS], tl.float32)
    for v0 in range(split * SPLIT, tl.minimum(V, (split + 1) * SPLIT), COLUMNS):
        column = v0 + tl.arange(0, COLUMNS)
        y = tl.load(logits_ptr + at[:, None] + column[None, :], mask=live[:, None] & (column < V)[None, :], other=0.0)
        z, _ = logits_of(y.to(tl.float32), None, v0, V, inverse_temperature, softcap, COLUMNS, False, SOFTCAP)
        chosen += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
        peak, total, moment = online(tl.where((column < V)[None, :], z, float("-inf")), peak, total, moment)
    at = split.to(tl.int64) * N + row
    tl.store(peak_ptr + at, peak, mask=live)
    tl.store(total_ptr + at, total, mask=live)
    tl.store(moment_ptr + at, moment, mask=live)
    tl.store(chosen_ptr + row, chosen, mask=live & (target >= split * SPLIT) & (target < (split + 1) * SPLIT))


@triton.jit(do_not_specialize=["N", "V", "n_splits", "ignore_index"])
def _logits_merge_kernel(peak_ptr, total_ptr, moment_ptr, chosen_ptr, target_ptr, logprob_ptr, entropy_ptr, lse_ptr, N, V, n_splits,
                         ignore_index, ROWS: tl.constexpr, ENTROPY: tl.constexpr):
    """Splits, in order -> logprob, entropy, lse [N]; 0, 0, 0 for ignored rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    _, live = _row_targets(target_ptr, row, N, V, ignore_index)
    peak, log_total, entropy = merge_splits(peak_ptr, total_ptr, moment_ptr, row, live, N, n_splits, ROWS, tl.float64)
    chosen = tl.load(chosen_ptr + row, mask=live, other=0.0)
    tl.store(logprob_ptr + row, tl.where(live, (chosen - peak) - log_total, 0.0), mask=row < N)
    tl.store(lse_ptr + row, tl.where(live, peak + log_total, 0.0), mask=row < N)
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(live, entropy, 0.0), mask=row < N)


@triton.jit(do_not_specialize=["N", "S", "n_splits", "ignore_index"])
def _logits_backward_kernel(logits_ptr, target_ptr, lse_ptr, entropy_ptr, dlogprob_ptr, dentropy_ptr, dlogits_ptr, N, V, S, n_splits,
                            stride_b, stride_s, ignore_index, inverse_temperature, softcap, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                            SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr):
    """ROWS rows × SPLIT columns of dlogits; 0 in ignored rows."""
    split = tl.program_id(0) % n_splits
    row = (tl.program_id(0) // n_splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target, live = _row_targets(target_ptr, row, N, V, ignore_index)
    target = target.to(tl.int32)
    at = _row_starts(row, S, stride_b, stride_s)
    lse, lse_rest = in_two(tl.load(lse_ptr + row, mask=live, other=0.0))
    g = tl.load(dlogprob_ptr + row, mask=live, other=0.0)
    entropy = lse
    g_entropy = g
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row, mask=live, other=0.0)
        g_entropy = tl.load(dentropy_ptr + row, mask=live, other=0.0)
    for v0 in range(split * SPLIT, tl.minimum(V, (split + 1) * SPLIT), COLUMNS):
        column = v0 + tl.arange(0, COLUMNS)
        y = tl.load(logits_ptr + at[:, None] + column[None, :], mask=live[:, None] & (column < V)[None, :], other=0.0)
        dy = gradient(y.to(tl.float32), None, v0, V, target, lse, lse_rest, entropy, g, g_entropy, inverse_temperature, softcap,
                      COLUMNS, False, SOFTCAP, ENTROPY)
        dy = tl.where(live[:, None], dy, 0.0).to(dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_ptr + row[:, None] * V + column[None, :], dy, mask=(row < N)[:, None] & (column < V)[None, :])


def covers(logits: Tensor) -> str | None:
    """Why logprob's kernels cannot take this call, naming the argument; None if they can."""
    if logits.dtype not in DTYPES:
        return f"logits: {logits.dtype} is not one of {DTYPES}"
    if logits.numel() and logits.stride(-1) != 1 and logits.shape[-1] > 1:
        return f"logits: the last dimension has stride {logits.stride(-1)}, not 1"
    return None


def _strides(logits: Tensor) -> tuple[int, int, int]:
    """-> S and the strides of B and S; [N, V] is one sequence of N."""
    return (logits.shape[-2], 0 if logits.dim() == 2 else logits.stride(0), logits.stride(-2))


def _grid(V: int, dtype: torch.dtype) -> tuple[configs.Rows, int, dict[str, int]]:
    """-> tile, number of vocabulary splits, block sizes."""
    tile = configs.logits(dtype)
    columns = min(tile.columns, triton.next_power_of_2(V))
    return tile, triton.cdiv(V, tile.split), dict(ROWS=tile.elements // columns, COLUMNS=columns, SPLIT=tile.split)


def logprob_forward(logits: Tensor, target: Tensor, logprob: Tensor, entropy: Tensor | None, lse: Tensor, *, temperature: float = 1.0,
                    softcap: float | None = None, ignore_index: int = -100) -> None:
    """logits [N,V] or [B,S,V], target [N] or [B,S] -> logprob, entropy (may be None) float32, lse float64 like target, given.

    Ignored rows get 0, 0, 0. target and the results are contiguous.
    """
    N, V = target.numel(), logits.shape[-1]
    S, stride_b, stride_s = _strides(logits)
    if N == 0:
        return
    tile, n_splits, blocks = _grid(V, logits.dtype)
    total, moment = torch.empty((2, n_splits, N), dtype=torch.float64, device=logits.device)
    peak, chosen = (torch.empty(n, dtype=torch.float32, device=logits.device) for n in (n_splits * N, N))
    launch(
        _logits_forward_kernel, (triton.cdiv(N, blocks["ROWS"]) * n_splits,), logits, target, peak, total, moment, chosen, N, V, S,
        n_splits, stride_b, stride_s, ignore_index, 1.0 / temperature, float(softcap or 0.0), **blocks, SOFTCAP=bool(softcap),
        warps=tile.warps, stages=tile.stages, device=logits.device)
    launch(
        _logits_merge_kernel, (triton.cdiv(N, 128),), peak, total, moment, chosen, target, logprob, entropy, lse, N, V, n_splits,
        ignore_index, ROWS=128, ENTROPY=entropy is not None, warps=4, stages=1, device=logits.device)


def logprob_backward(logits: Tensor, target: Tensor, lse: Tensor, entropy: Tensor | None, dlogprob: Tensor, dentropy: Tensor | None,
                     dlogits: Tensor, *, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100) -> None:
    """Fills dlogits, contiguous, from dlogprob and dentropy (or None), float32 like target; lse and entropy are the forward's."""
    N, V = target.numel(), logits.shape[-1]
    S, stride_b, stride_s = _strides(logits)
    if N == 0:
        return
    tile, n_splits, blocks = _grid(V, logits.dtype)
    launch(
        _logits_backward_kernel, (triton.cdiv(N, blocks["ROWS"]) * n_splits,), logits, target, lse, entropy, dlogprob, dentropy, dlogits,
        N, V, S, n_splits, stride_b, stride_s, ignore_index, 1.0 / temperature, float(softcap or 0.0), **blocks,
        SOFTCAP=bool(softcap), ENTROPY=dentropy is not None, warps=tile.warps, stages=tile.stages, device=logits.device)
