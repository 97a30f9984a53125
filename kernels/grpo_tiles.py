"""What every log-prob kernel does to a tile of logits: softmax statistics online, their merge, and the gradient of both outputs.

Shapes: a tile is [ROWS, COLUMNS] of logits y, the statistics are [ROWS]. Formulas: grpo.py.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .primitives import tanh


@triton.jit
def logits_of(acc, bias_ptr, v0, V, inverse_temperature, softcap, COLUMNS: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits without bias [ROWS, COLUMNS] of vocabulary columns v0 … -> z, and tanh(y/c) (with a softcap only)."""
    if BIAS:
        column = v0 + tl.arange(0, COLUMNS)
        acc += tl.load(bias_ptr + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
    capped = acc
    if SOFTCAP:
        capped = tanh(acc / softcap)
        acc = softcap * capped
    return acc * inverse_temperature, capped


@triton.jit
def online(z, peak, total, moment):
    """peak = max z, total = Σ exp(z − peak), moment = Σ exp(z − peak)·(z − peak) with the tile z added (−inf: not there)."""
    new_peak = tl.maximum(peak, tl.max(z, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shifted = z - base[:, None]
    weight = tl.exp(shifted)
    decay = tl.exp(peak - base)
    lift = tl.where(peak == float("-inf"), 0.0, peak - base)
    moment = decay * (moment + lift * total) + tl.sum(tl.where(weight > 0, weight * shifted, weight), 1)
    return new_peak, total * decay + tl.sum(weight, 1), moment


@triton.jit
def merge_splits(peak_ptr, total_ptr, moment_ptr, row, live, N, n_splits, ROWS: tl.constexpr, SUMS: tl.constexpr):
    """The statistics [n_splits, N] (sums of type SUMS) of rows row [ROWS], in order -> peak; lse − peak and entropy in float64."""
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], SUMS)
    moment = tl.zeros([ROWS], SUMS)
    for split in range(0, n_splits):
        at = tl.cast(split, tl.int64) * N + row
        next_peak = tl.load(peak_ptr + at, mask=live, other=0.0)
        next_total = tl.load(total_ptr + at, mask=live, other=1.0)
        next_moment = tl.load(moment_ptr + at, mask=live, other=0.0)
        new_peak = tl.maximum(peak, next_peak)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp(peak - base)
        next_decay = tl.exp(next_peak - base)
        lift = tl.where(peak == float("-inf"), 0.0, peak - base)
        next_lift = tl.where(next_peak == float("-inf"), 0.0, next_peak - base)
        moment = decay * (moment + lift * total) + next_decay * (next_moment + next_lift * next_total)
        total = total * decay + next_total * next_decay
        peak = new_peak
    total = total.to(tl.float64)  # lse − peak is 11 for 60,000 equal tokens: rounded to float32 it is off by up to 5e-7
    log_total = tl.log(total)
    return peak, log_total, log_total - moment / total


@triton.jit
def in_two(lse):
    """float64 lse -> its float32 value and the float32 rest: rounded alone it would tilt every probability of its row (5e-7 at 10)."""
    high = lse.to(tl.float32)
    return high, (lse - high.to(tl.float64)).to(tl.float32)


@triton.jit
def gradient(acc, bias_ptr, v0, V, target, lse, lse_rest, entropy, g, g_entropy, inverse_temperature, softcap,
             COLUMNS: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr):
    """Logits without bias [ROWS, COLUMNS] of columns v0 … -> dy; target, lse (in two), entropy, g = dlogprob, g_entropy = dentropy."""
    z, capped = logits_of(acc, bias_ptr, v0, V, inverse_temperature, softcap, COLUMNS, BIAS, SOFTCAP)
    log_p = (z - lse[:, None]) - lse_rest[:, None]
    p = tl.exp(log_p)
    column = v0 + tl.arange(0, COLUMNS)
    dz = g[:, None] * tl.where(column[None, :] == target[:, None], 1.0 - p, -p)
    if ENTROPY:  # p·log p is 0 where p is 0
        dz -= g_entropy[:, None] * p * (tl.maximum(log_p, -1e30) + entropy[:, None])
    if SOFTCAP:
        dz *= 1.0 - capped * capped
    return dz * inverse_temperature
