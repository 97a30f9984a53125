"""policy_loss: every loss of the GRPO family over [B, S] tokens, with its gradients and metrics, in fixed order and without atomics.

Shapes: B sequences of S tokens (packed: N tokens, sequence b at cu_seqlens[b] … cu_seqlens[b+1]−1), in blocks of BLOCK tokens from
each sequence's first one. A slot is the place of one block's partial sums.

Formulas: reference/policy_loss.py; steps, names and gradients are those of csrc/include/policy_math.h (r the ratio, w its log):
  1  _sequence_kernel, one program a sequence: Σ of log ratios and counts, where anything per sequence or batch is wanted;
  2  _token_kernel, one program a block: the token losses, gradients with the reduction's weight in them, partial metrics;
  3  _sequence_ratio_kernel: where the ratio is the sequence's, its gradient comes back to the sequence's tokens;
  4  _metrics_kernel, one program: the partial sums in order -> metrics.
dapo with num_items_in_batch is steps 2 and 4 alone: one read, one write. Sums are carried in float64.
"""
from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .primitives import launch

CLIPPED, CISPO, SAPO, VESPO, REINFORCE = range(5)  # form
TOKEN, SEQUENCE_MEAN, SEQUENCE_SUM = range(3)  # level
REDUCE_SEQUENCE_MEAN, REDUCE_SEQUENCE_SUM, REDUCE_TOTAL = range(3)  # reduction
NO_KL, K1, K2, K3 = range(4)
NO_ROLLOUT, TOKEN_TRUNCATE, TOKEN_MASK, SEQUENCE_TRUNCATE, SEQUENCE_MASK = range(5)
METRICS = (
    "policy_loss", "approx_kl", "ratio_mean", "ratio_min", "ratio_max", "clip_low", "clip_high", "clip_fraction", "tokens",
    "kl", "rollout_ratio", "off_policy_kept", "entropy",
)
SUMS = 6  # of a sequence: clamped log ratio, drift, old − rollout, vespo's log weight, active tokens, those the entropy bonus counts
PARTIALS = 16  # of a slot: see the stores at the end of _token_kernel


class Options(NamedTuple):
    """As in csrc/include/policy_math.h."""

    form: int = CLIPPED
    level: int = TOKEN
    reduction: int = REDUCE_TOTAL
    kl: int = NO_KL
    rollout: int = NO_ROLLOUT
    kl_correction: bool = False
    off_policy: bool = False
    ratio_low: float = 0.0
    ratio_high: float = 0.0
    delta: float = float("inf")
    log_ratio_clamp: float = float("inf")
    beta: float = 0.0
    rollout_low: float = float("-inf")
    rollout_high: float = float("inf")
    off_policy_threshold: float = 0.0
    tau_positive: float = 1.0
    tau_negative: float = 1.05


@triton.jit
def _least(a, b):
    """min, and b where either is NaN: _least(limit, x) keeps a NaN x."""
    return tl.where(a < b, a, b)


@triton.jit
def _most(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _clamp(x, low, high):
    return _least(high, _most(low, x))


@triton.jit
def _exp(x):
    """exp to 2 ulp at any x: the hardware's alone is off by |x| ulp."""
    n = tl.minimum(tl.maximum(tl.floor(x * 1.4426950408889634), -160.0), 128.0)
    return tl.exp2(n) * tl.exp((x - n * 0.693359375) + n * 2.1219444005469058e-4)


@triton.jit
def _exp_past_first_order(x):
    """e^x − 1 − x, without its cancellation at small x."""
    series = x * x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320)))))))
    return tl.where(tl.abs(x) < 0.5, series, _exp(x) - 1.0 - x)


@triton.jit
def _first_slot(cu_ptr, b, blocks, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Slot of sequence b's first block. Packed: as many as fit before cu_seqlens[b], and one for each sequence's last, short one."""
    if PACKED:
        slot = tl.load(cu_ptr + b) // BLOCK + b
    else:
        slot = b * blocks
    return slot


@triton.jit
def _sequence_of(cu_ptr, slot, B, blocks, search_steps, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """The sequence that a slot belongs to: packed, the last one whose first slot is not after it."""
    if PACKED:
        b = 0
        for step in range(0, search_steps):
            ahead = b + (1 << (search_steps - 1 - step))
            there = tl.minimum(ahead, B - 1)
            b = tl.where((ahead < B) & (_first_slot(cu_ptr, there, blocks, BLOCK, PACKED) <= slot), there, b)
    else:
        b = slot // blocks
    return b


@triton.jit
def _extent(cu_ptr, b, S, PACKED: tl.constexpr):
    """-> place of sequence b's first token in contiguous tensors, its length."""
    if PACKED:
        start = tl.load(cu_ptr + b).to(tl.int64)
        length = tl.load(cu_ptr + b + 1).to(tl.int64) - start
    else:
        start = tl.cast(b, tl.int64) * S
        length = tl.cast(S, tl.int64)
    return start, length


@triton.jit
def _load(pointer, stride, start, b, token, active, PACKED: tl.constexpr):
    """Values of a token tensor (packed [N], else [B, S] with that row stride), 0 where not active."""
    if PACKED:
        at = pointer + start
    else:
        at = pointer + tl.cast(b, tl.int64) * stride
    return tl.load(at + token, mask=active, other=0.0)


@triton.jit
def _log_probs(logprob_ptr, old_ptr, rollout_ptr, logprob_stride, old_stride, rollout_stride, start, b, token, active,
               PACKED: tl.constexpr):
    """-> logprob, old (logprob itself where there is none), rollout (old where there is none or it is NaN)."""
    logprob = _load(logprob_ptr, logprob_stride, start, b, token, active, PACKED)
    old = logprob
    if old_ptr is not None:
        old = _load(old_ptr, old_stride, start, b, token, active, PACKED)
    rollout = old
    if rollout_ptr is not None:
        rollout = _load(rollout_ptr, rollout_stride, start, b, token, active, PACKED)
        rollout = tl.where(rollout != rollout, old, rollout)
    return logprob, old, rollout


@triton.jit(do_not_specialize=["B", "S", "logprob_stride", "old_stride", "rollout_stride", "mask_stride"])
def _sequence_kernel(logprob_ptr, old_ptr, rollout_ptr, mask_ptr, top_ptr, cu_ptr, sums_ptr, B, S, logprob_stride, old_stride,
                     rollout_stride, mask_stride, log_ratio_clamp, rollout_log_low, rollout_log_high,
                     BLOCK: tl.constexpr, PACKED: tl.constexpr, RATIOS: tl.constexpr, VESPO_WEIGHT: tl.constexpr, TRUNCATE: tl.constexpr):
    """sums [SUMS, B] of one sequence over its active tokens; without RATIOS the two counts alone."""
    b = tl.program_id(0)
    start, length = _extent(cu_ptr, b, S, PACKED)
    sum_log_ratio = tl.zeros([BLOCK], tl.float64)
    sum_drift = tl.zeros([BLOCK], tl.float64)
    sum_rollout = tl.zeros([BLOCK], tl.float64)
    sum_weight = tl.zeros([BLOCK], tl.float64)
    tokens = tl.zeros([BLOCK], tl.int32)
    bonus = tl.zeros([BLOCK], tl.int32)
    for first in range(0, length, BLOCK):
        token = first + tl.arange(0, BLOCK)
        active = _load(mask_ptr, mask_stride, start, b, token, token < length, PACKED) != 0
        tokens += active.to(tl.int32)
        if top_ptr is not None:
            bonus += (tl.load(top_ptr + start + token, mask=active, other=0) != 0).to(tl.int32)
        if RATIOS:
            logprob, old, rollout = _log_probs(logprob_ptr, old_ptr, rollout_ptr, logprob_stride, old_stride, rollout_stride, start, b,
                                               token, active, PACKED)
            log_ratio = logprob - old
            sum_log_ratio += _clamp(log_ratio, -log_ratio_clamp, log_ratio_clamp)
            sum_drift += rollout - logprob
            sum_rollout += old - rollout
            if VESPO_WEIGHT:
                sum_weight += _clamp(log_ratio, -20.0, 20.0)
                if rollout_ptr is not None:  # a truncated ratio's log is clamped, a masked one counts as the least
                    is_ratio = old - rollout
                    if TRUNCATE:
                        is_ratio = _clamp(is_ratio, rollout_log_low, rollout_log_high)
                    else:
                        is_ratio = tl.where((is_ratio < rollout_log_low) | (is_ratio > rollout_log_high), float("-inf"), is_ratio)
                    sum_weight += tl.where(active, _clamp(is_ratio, -18.420680743952367, 20.0), 0.0)
    at = sums_ptr + b
    tl.store(at, tl.sum(sum_log_ratio))
    tl.store(at + B, tl.sum(sum_drift))
    tl.store(at + 2 * B, tl.sum(sum_rollout))
    tl.store(at + 3 * B, tl.sum(sum_weight))
    tl.store(at + 4 * B, tl.sum(tokens).to(tl.float64))
    if top_ptr is None:
        bonus = tokens
    tl.store(at + 5 * B, tl.sum(bonus).to(tl.float64))


@triton.jit
def _count(sums_ptr, which: tl.constexpr, B, BLOCK: tl.constexpr):
    """A count summed over all sequences: integers, so in any order."""
    found = tl.zeros([BLOCK], tl.float64)
    for first in range(0, B, BLOCK):
        b = first + tl.arange(0, BLOCK)
        found += tl.load(sums_ptr + which * B + b, mask=b < B, other=0.0)
    return tl.sum(found)


@triton.jit
def _vespo_weight(log_weight, k, rate):
    """exp(λ + k·ln w − λ·w), 1 at w = 1."""
    log_w = _clamp(log_weight, -18.420680743952367, 20.0)
    return tl.exp(rate + k * log_w - rate * tl.exp(log_w)).to(tl.float32)


@triton.jit(do_not_specialize=[
    "B", "S", "blocks", "search_steps", "logprob_stride", "old_stride", "ref_stride", "rollout_stride", "entropy_stride",
    "advantages_stride", "mask_stride"])
def _token_kernel(logprob_ptr, old_ptr, ref_ptr, rollout_ptr, entropy_ptr, advantages_ptr, mask_ptr, top_ptr, cu_ptr, sums_ptr, total_ptr,
                  dlogprob_ptr, dref_ptr, dentropy_ptr, partial_ptr, B, S, blocks, search_steps, logprob_stride, old_stride, ref_stride,
                  rollout_stride, entropy_stride, advantages_stride, mask_stride, ratio_low, ratio_high, delta, log_ratio_clamp, beta,
                  rollout_low, rollout_high, off_policy_threshold, tau_positive, tau_negative, entropy_coef,
                  entropy_coef_rest, FORM: tl.constexpr, LEVEL: tl.constexpr, REDUCTION: tl.constexpr, KL: tl.constexpr,
                  ROLLOUT: tl.constexpr, KL_CORRECTION: tl.constexpr, OFF_POLICY: tl.constexpr, PER_TOKEN: tl.constexpr,
                  PACKED: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.program_id(0)
    b = _sequence_of(cu_ptr, slot, B, blocks, search_steps, BLOCK, PACKED)
    start, length = _extent(cu_ptr, b, S, PACKED)
    token = (slot - _first_slot(cu_ptr, b, blocks, BLOCK, PACKED)) * BLOCK + tl.arange(0, BLOCK)
    inside = token < length
    active = _load(mask_ptr, mask_stride, start, b, token, inside, PACKED) != 0
    one = tl.full([BLOCK], 1.0, tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)

    # ---- what the sequence and the batch give: weight of the reduction, ratio, masks
    tokens = tl.full([], 1.0, tl.float64)
    if sums_ptr is not None:
        tokens = tl.maximum(tl.load(sums_ptr + 4 * B + b), 1.0)
    if REDUCTION == 0:
        weight = 1.0 / (tokens * B)
    elif REDUCTION == 1:
        weight = tl.full([], 1.0, tl.float64) / B
    elif total_ptr is not None:
        weight = 1.0 / tl.maximum(tl.load(total_ptr), 1.0)
    else:
        weight = 1.0 / tl.maximum(_count(sums_ptr, 4, B, BLOCK), 1.0)
    logprob, old, rollout = _log_probs(logprob_ptr, old_ptr, rollout_ptr, logprob_stride, old_stride, rollout_stride, start, b, token,
                                       active, PACKED)
    if PER_TOKEN:
        a = _load(advantages_ptr, advantages_stride, start, b, token, active, PACKED)
    else:
        a = tl.where(active, tl.load(advantages_ptr + tl.cast(b, tl.int64) * advantages_stride), 0.0)

    # ---- ratio
    raw = logprob - old
    log_ratio = _clamp(raw, -log_ratio_clamp, log_ratio_clamp)
    passes = log_ratio == raw  # a clamp passes the gradient, at its bounds too
    rest = _exp_past_first_order(log_ratio)
    if LEVEL == 0:
        r = _exp(log_ratio)
    else:
        log_weight = tl.load(sums_ptr + b)
        if LEVEL == 1:
            log_weight /= tokens
        else:
            limit = tl.cast(log_ratio_clamp, tl.float64)
            log_weight = _clamp(log_weight, -limit, limit)
        r = tl.exp(log_weight).to(tl.float32) + zero

    # ---- loss: its value, its gradient past the ratio (direct) and to the log weight (slope)
    direct = zero
    slope = zero
    clipped_low = zero
    clipped_high = zero
    if FORM == 0:
        x = _least(delta, r) * a
        y = _clamp(r, ratio_low, ratio_high) * a
        pass_x = tl.where(r > delta, 0.0, one)
        pass_y = tl.where((r < ratio_low) | (r > ratio_high), 0.0, one)
        loss = -_least(x, y)
        slope = -a * tl.where(x < y, pass_x, tl.where(x > y, pass_y, 0.5 * (pass_x + pass_y))) * r
        clipped_low = tl.where((r < ratio_low) & (a < 0), 1.0, zero)
        clipped_high = tl.where((r > ratio_high) & (a > 0), 1.0, zero)
    elif FORM == 1:
        direct = -_least(ratio_high, r) * a
        loss = direct * logprob
        clipped_high = tl.where((r > ratio_high) & (a > 0), 1.0, zero)
    elif FORM == 2:
        tau = tl.where(a > 0, tau_positive, tau_negative)
        x = tau * (r - 1.0)
        e = _exp(-tl.abs(x))
        q = 1.0 / (1.0 + e)  # σ(|x|)
        loss = -tl.where(x < 0, e * q, q) * (4.0 / tau) * a
        slope = -4.0 * a * (e * q * q) * r
    else:
        direct = -a
        if FORM == 3:
            log_weight = tl.load(sums_ptr + 3 * B + b)
            direct *= tl.where(a >= 0, _vespo_weight(log_weight, 2.0, 3.0), _vespo_weight(log_weight, 3.0, 2.0))
        loss = direct * logprob

    # ---- masks and the rollout correction
    factor = one
    top = active
    if top_ptr is not None:
        top = tl.load(top_ptr + start + token, mask=active, other=0) != 0
        factor = tl.where(top, 1.0, zero)
    kept = one
    if OFF_POLICY:
        near = tl.load(sums_ptr + B + b) / tokens <= tl.cast(off_policy_threshold, tl.float64)
        kept = tl.where(a >= 0, 1.0, tl.where(near, 1.0, zero))
        factor *= kept
    is_ratio = one
    if ROLLOUT != 0:
        if ROLLOUT <= 2:
            is_ratio = _exp(old - rollout)
        else:
            is_ratio = tl.exp(tl.load(sums_ptr + 2 * B + b)).to(tl.float32) + zero
        if ROLLOUT == 1 or ROLLOUT == 3:
            is_ratio = _clamp(is_ratio, rollout_low, rollout_high)
        else:
            is_ratio = tl.where((is_ratio < rollout_low) | (is_ratio > rollout_high), 0.0, is_ratio)
        if FORM != 3:
            factor *= is_ratio
    loss *= factor
    direct *= factor
    slope *= factor

    # ---- KL
    kl = zero
    dref = zero
    if KL != 0:
        d = logprob - _load(ref_ptr, ref_stride, start, b, token, active, PACKED)
        if KL == 1:
            kl = d
            dkl = one
        elif KL == 2:
            kl = 0.5 * d * d
            dkl = d
        else:
            kl = _exp_past_first_order(-d)
            dkl = d - kl
        if KL_CORRECTION:
            kl *= r
            dkl *= r
            slope += beta * kl
        loss += beta * kl
        direct += beta * dkl
        dref = -beta * dkl

    # ---- gradients
    if LEVEL == 0:
        direct += tl.where(passes, slope, 0.0)
    if dlogprob_ptr is not None:
        tl.store(dlogprob_ptr + start + token, tl.where(active, (weight * direct).to(tl.float32), 0.0), mask=inside)
    if dref_ptr is not None:
        tl.store(dref_ptr + start + token, tl.where(active, (weight * dref).to(tl.float32), 0.0), mask=inside)
    entropy = zero
    if entropy_ptr is not None:
        entropy = _load(entropy_ptr, entropy_stride, start, b, token, active, PACKED)
    if dentropy_ptr is not None:
        coefficient = tl.cast(entropy_coef, tl.float64) + entropy_coef_rest
        bonus = (-coefficient / tl.maximum(_count(sums_ptr, 5, B, BLOCK), 1.0)).to(tl.float32)
        tl.store(dentropy_ptr + start + token, tl.where(active & top, bonus, 0.0), mask=inside)

    # ---- partial sums
    at = partial_ptr + tl.cast(slot, tl.int64) * 16
    tl.store(at, tl.sum(tl.where(active, loss, 0.0)) * weight)
    tl.store(at + 1, tl.sum(tl.where(active, slope, 0.0)) * weight)
    tl.store(at + 2, tl.sum(tl.where(active, rest, 0.0)).to(tl.float64))
    tl.store(at + 3, tl.sum(tl.where(active, r, 0.0)).to(tl.float64))
    tl.store(at + 4, tl.min(tl.where(active, r, float("inf"))).to(tl.float64))
    tl.store(at + 5, tl.max(tl.where(active, r, float("-inf"))).to(tl.float64))
    tl.store(at + 6, tl.sum(tl.where(active, clipped_low, 0.0)).to(tl.float64))
    tl.store(at + 7, tl.sum(tl.where(active, clipped_high, 0.0)).to(tl.float64))
    tl.store(at + 8, tl.sum(tl.where(active, kl, 0.0)).to(tl.float64))
    tl.store(at + 9, tl.sum(active.to(tl.int32)).to(tl.float64))
    tl.store(at + 10, tl.sum(tl.where(active, is_ratio, 0.0)).to(tl.float64))
    tl.store(at + 11, tl.sum(tl.where(active, kept, 0.0)).to(tl.float64))
    tl.store(at + 12, tl.sum(tl.where(active, entropy, 0.0)).to(tl.float64))
    tl.store(at + 13, tl.sum(tl.where(active & top, entropy, 0.0)).to(tl.float64))
    tl.store(at + 14, tl.sum((active & top).to(tl.int32)).to(tl.float64))
    tl.store(at + 15, tl.full([], 0.0, tl.float64))


@triton.jit(do_not_specialize=["B", "S", "blocks", "search_steps", "logprob_stride", "old_stride", "mask_stride"])
def _sequence_ratio_kernel(logprob_ptr, old_ptr, mask_ptr, cu_ptr, sums_ptr, partial_ptr, dlogprob_ptr, B, S, blocks, search_steps,
                           logprob_stride, old_stride, mask_stride, log_ratio_clamp, LEVEL: tl.constexpr, PACKED: tl.constexpr,
                           BLOCK: tl.constexpr):
    """dlogprob += d log weight / d logprob · Σ_sequence weight·slope, for one block."""
    slot = tl.program_id(0)
    b = _sequence_of(cu_ptr, slot, B, blocks, search_steps, BLOCK, PACKED)
    start, length = _extent(cu_ptr, b, S, PACKED)
    first_slot = _first_slot(cu_ptr, b, blocks, BLOCK, PACKED)
    token = (slot - first_slot) * BLOCK + tl.arange(0, BLOCK)
    active = _load(mask_ptr, mask_stride, start, b, token, token < length, PACKED) != 0
    g = tl.full([], 0.0, tl.float64)
    for block in range(0, tl.cdiv(length, BLOCK)):
        g += tl.load(partial_ptr + (first_slot + block) * 16 + 1)
    if LEVEL == 1:
        g /= tl.maximum(tl.load(sums_ptr + 4 * B + b), 1.0)
    else:
        log_weight = tl.load(sums_ptr + b)
        limit = tl.cast(log_ratio_clamp, tl.float64)
        g = tl.where((log_weight < -limit) | (log_weight > limit), 0.0, g)
    logprob = _load(logprob_ptr, logprob_stride, start, b, token, active, PACKED)
    old = logprob
    if old_ptr is not None:
        old = _load(old_ptr, old_stride, start, b, token, active, PACKED)
    raw = logprob - old
    passes = active & (_clamp(raw, -log_ratio_clamp, log_ratio_clamp) == raw)
    before = tl.load(dlogprob_ptr + start + token, mask=passes, other=0.0)
    tl.store(dlogprob_ptr + start + token, before + g.to(tl.float32), mask=passes)


@triton.jit
def _entry(values, column, which: tl.constexpr):
    return tl.sum(tl.where(column == which, values, 0.0))


@triton.jit(do_not_specialize=["slots"])
def _metrics_kernel(partial_ptr, loss_ptr, metrics_ptr, slots, entropy_coef, entropy_coef_rest, ROWS: tl.constexpr):
    """partial [slots, 16], in order -> loss, and metrics [13] in the order of METRICS."""
    column = tl.arange(0, 16)
    low = tl.full([ROWS, 16], float("inf"), tl.float64)
    high = tl.full([ROWS, 16], float("-inf"), tl.float64)
    total = tl.zeros([ROWS, 16], tl.float64)
    for first in range(0, slots, ROWS):
        slot = first + tl.arange(0, ROWS)
        inside = (slot < slots)[:, None]
        found = tl.load(partial_ptr + slot[:, None].to(tl.int64) * 16 + column[None, :], mask=inside, other=0.0)
        total += tl.where((column == 4) | (column == 5), 0.0, found)
        low = tl.minimum(low, tl.where(inside, found, float("inf")))
        high = tl.maximum(high, tl.where(inside, found, float("-inf")))
    total = tl.sum(total, 0)  # [16]
    least = _entry(tl.min(low, 0), column, 4)
    most = _entry(tl.max(high, 0), column, 5)
    tokens = _entry(total, column, 9)
    count = tl.maximum(tokens, 1.0)
    policy = _entry(total, column, 0)
    bonus = (tl.cast(entropy_coef, tl.float64) + entropy_coef_rest) * _entry(total, column, 13) / tl.maximum(_entry(total, column, 14), 1.0)
    ratio = _entry(total, column, 3)
    clip_low = _entry(total, column, 6) / count
    clip_high = _entry(total, column, 7) / count
    tl.store(loss_ptr, tl.where(entropy_coef != 0, policy - bonus, policy).to(tl.float32))
    tl.store(metrics_ptr, policy.to(tl.float32))
    tl.store(metrics_ptr + 1, (_entry(total, column, 2) / count).to(tl.float32))
    tl.store(metrics_ptr + 2, (ratio / count).to(tl.float32))
    tl.store(metrics_ptr + 3, tl.where(ratio != ratio, ratio, least).to(tl.float32))  # min and max pass NaN over, the sum does not
    tl.store(metrics_ptr + 4, tl.where(ratio != ratio, ratio, most).to(tl.float32))
    tl.store(metrics_ptr + 5, clip_low.to(tl.float32))
    tl.store(metrics_ptr + 6, clip_high.to(tl.float32))
    tl.store(metrics_ptr + 7, (clip_low + clip_high).to(tl.float32))
    tl.store(metrics_ptr + 8, tokens.to(tl.float32))
    tl.store(metrics_ptr + 9, (_entry(total, column, 8) / count).to(tl.float32))
    tl.store(metrics_ptr + 10, (_entry(total, column, 10) / count).to(tl.float32))
    tl.store(metrics_ptr + 11, (_entry(total, column, 11) / count).to(tl.float32))
    tl.store(metrics_ptr + 12, (_entry(total, column, 12) / count).to(tl.float32))


def _needs_sequence_sums(o: Options) -> bool:
    return o.level != TOKEN or o.form == VESPO or o.rollout in (SEQUENCE_TRUNCATE, SEQUENCE_MASK) or o.off_policy


def policy_loss(logprob: Tensor, old: Tensor | None, advantages: Tensor, mask: Tensor, options: Options, loss: Tensor, metrics: Tensor, *,
                ref: Tensor | None = None, rollout: Tensor | None = None, entropy: Tensor | None = None, top: Tensor | None = None,
                total: Tensor | None = None, entropy_coef: float = 0.0, cu_seqlens: Tensor | None = None, dlogprob: Tensor | None = None,
                dref: Tensor | None = None, dentropy: Tensor | None = None) -> None:
    """Fills loss [], metrics [13] (METRICS) and those of dlogprob, dref, dentropy that are given: d loss / d input, all float32 contiguous.

    logprob, old, ref, rollout, entropy: float32 [B, S], contiguous in the last dimension (packed: [N] contiguous); advantages likewise
    or [B]; mask, top: bool (top contiguous: the tokens that the top-entropy mask keeps). total [1] float64: what
    REDUCE_TOTAL divides by; None: the active tokens. cu_seqlens [B + 1] integers.
    """
    packed = cu_seqlens is not None
    B, S = (len(cu_seqlens) - 1, 0) if cu_seqlens is not None else logprob.shape
    block, device = configs.policy_block(), logprob.device
    blocks = triton.cdiv(S, block)
    slots = logprob.numel() // block + B if packed else B * blocks
    for gradient in (dlogprob, dref, dentropy) if packed or slots == 0 else ():
        if gradient is not None:
            gradient.zero_()  # tokens that belong to no sequence
    sums = torch.empty((SUMS, B), dtype=torch.float64, device=device)
    partial = torch.empty((slots, PARTIALS), dtype=torch.float64, device=device)
    needs_sums = _needs_sequence_sums(options)
    counts = needs_sums or options.reduction == REDUCE_SEQUENCE_MEAN or dentropy is not None
    counts = counts or (options.reduction == REDUCE_TOTAL and total is None)
    steps = max(B - 1, 1).bit_length()
    rounded = struct.unpack("f", struct.pack("f", entropy_coef))[0]
    coefficient = (rounded, entropy_coef - rounded)  # a kernel's float arguments are float32: two make a float64
    sizes: dict[str, Any] = dict(BLOCK=block, PACKED=packed, warps=4, stages=1, device=device)

    def stride(x: Tensor | None) -> int:
        return 0 if x is None or packed and x.dim() == 1 and x is not advantages else x.stride(0)

    if counts and slots:
        low, high = (-math.inf if x <= 0 else math.log(x) for x in (options.rollout_low, options.rollout_high))
        launch(
            _sequence_kernel, (B,), logprob, old, rollout if options.rollout != NO_ROLLOUT or options.off_policy else None, mask, top,
            cu_seqlens, sums, B, S, stride(logprob), stride(old), stride(rollout), stride(mask), options.log_ratio_clamp, low, high,
            RATIOS=needs_sums, VESPO_WEIGHT=options.form == VESPO, TRUNCATE=options.rollout == TOKEN_TRUNCATE, **sizes)
    if slots:
        launch(
            _token_kernel, (slots,), logprob, old, ref, rollout if options.rollout != NO_ROLLOUT else None, entropy, advantages, mask, top,
            cu_seqlens, sums if counts else None, total, dlogprob, dref, dentropy, partial, B, S, blocks, steps, stride(logprob),
            stride(old), stride(ref), stride(rollout), stride(entropy), stride(advantages), stride(mask), options.ratio_low,
            options.ratio_high, options.delta, options.log_ratio_clamp, options.beta, options.rollout_low, options.rollout_high,
            options.off_policy_threshold, options.tau_positive, options.tau_negative, *coefficient, FORM=options.form, LEVEL=options.level,
            REDUCTION=options.reduction, KL=options.kl, ROLLOUT=options.rollout,
            KL_CORRECTION=bool(options.kl_correction), OFF_POLICY=bool(options.off_policy), PER_TOKEN=advantages.shape == logprob.shape,
            **sizes)
    if options.level != TOKEN and dlogprob is not None and slots:
        launch(
            _sequence_ratio_kernel, (slots,), logprob, old, mask, cu_seqlens, sums, partial, dlogprob, B, S, blocks, steps,
            stride(logprob), stride(old), stride(mask), options.log_ratio_clamp, LEVEL=options.level, **sizes)
    launch(_metrics_kernel, (1,), partial, loss, metrics, slots, *coefficient, ROWS=64, warps=4, stages=1, device=device)
