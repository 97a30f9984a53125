"""group_advantages: rewards of sampled completions -> advantages within their groups, every rule of reference/advantages.py.

Shapes: R samples with n rewards each, in groups; P ≥ n a power of two, tiles [BLOCK, P]. All sums in float64 and in one order.

_groups_kernel: one program a sample, the first of each group works for all of it: mean, spread, and the rule within the group.
_batch_kernel: what the rules "batch", "whiten" and GDPO's last step take over all samples; each program reduces them all again
(R is thousands) and finishes BLOCK of them. NaN: unscorable; zero variance is max == min and gives exactly 0.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .primitives import launch

GROUP, NONE, BATCH, RLOO, MAXRL, WHITEN = range(6)  # normalize


@triton.jit
def _rewards_of(rewards_ptr, order_ptr, weights_ptr, member, end, n, BLOCK: tl.constexpr, P: tl.constexpr, EACH: tl.constexpr):
    """-> sample [BLOCK] (its own place), values [BLOCK, P] (each reward) or [BLOCK, 1] (the weighted sum, rounded to float32 so
    that sums equal but for their order of adding are equal), weights [P], whether the sample is scorable [BLOCK]."""
    inside = member < end
    if order_ptr is None:
        sample = member.to(tl.int64)
    else:
        sample = tl.load(order_ptr + member, mask=inside, other=0)
    each = tl.arange(0, P)
    reward = tl.load(rewards_ptr + sample[:, None] * n + each[None, :], mask=inside[:, None] & (each < n)[None, :], other=float("nan"))
    reward = reward.to(tl.float64)
    if weights_ptr is None:
        weights = tl.full([P], 1.0, tl.float64)
    else:
        weights = tl.load(weights_ptr + each, mask=each < n, other=0.0).to(tl.float64)
    seen = reward == reward
    scorable = tl.sum(seen.to(tl.int32), 1) > 0
    if EACH:
        values = reward
    else:
        total = tl.sum(tl.where(seen, weights[None, :] * reward, 0.0), 1).to(tl.float32).to(tl.float64)
        values = tl.where(scorable, total, float("nan"))[:, None]
    return sample, values, weights, scorable


@triton.jit(do_not_specialize=["R", "group_size", "n", "correction"])
def _groups_kernel(rewards_ptr, order_ptr, ends_ptr, weights_ptr, total_ptr, result_ptr, zero_ptr, R, group_size, n, eps, correction,
                   BLOCK: tl.constexpr, P: tl.constexpr, NORMALIZE: tl.constexpr, EACH: tl.constexpr):
    """result [R] (NaN: unscorable), total [R] the summed reward (not EACH), zero [R]: the group teaches nothing."""
    first = tl.program_id(0)
    if ends_ptr is None:
        leads = first % group_size == 0
        end = first + group_size
    else:  # a group starts where the one before ends
        leads = (first == 0) | (tl.load(ends_ptr + tl.maximum(first, 1) - 1) == first)
        end = tl.load(ends_ptr + first).to(tl.int32)
    if leads:
        Q: tl.constexpr = P if EACH else 1
        count = tl.zeros([Q], tl.int32)
        mean = tl.zeros([Q], tl.float64)
        low = tl.full([Q], float("inf"), tl.float64)
        high = tl.full([Q], float("-inf"), tl.float64)
        for start in range(first, end, BLOCK):
            _, x, _, _ = _rewards_of(rewards_ptr, order_ptr, weights_ptr, start + tl.arange(0, BLOCK), end, n, BLOCK, P, EACH)
            seen = x == x
            count += tl.sum(seen.to(tl.int32), 0)
            mean += tl.sum(tl.where(seen, x, 0.0), 0)
            low = tl.minimum(low, tl.min(tl.where(seen, x, float("inf")), 0))
            high = tl.maximum(high, tl.max(tl.where(seen, x, float("-inf")), 0))
        mean /= count.to(tl.float64)
        constant = (count <= 1) | (low == high)
        squares = tl.zeros([Q], tl.float64)
        for start in range(first, end, BLOCK):
            _, x, _, _ = _rewards_of(rewards_ptr, order_ptr, weights_ptr, start + tl.arange(0, BLOCK), end, n, BLOCK, P, EACH)
            d = x - mean[None, :]
            squares += tl.sum(tl.where(d == d, d * d, 0.0), 0)
        spread = tl.sqrt(squares / tl.maximum(count - correction, 1).to(tl.float64)) + eps
        teaches = tl.sum((constant == 0).to(tl.int32)) > 0
        for start in range(first, end, BLOCK):
            member = start + tl.arange(0, BLOCK)
            sample, x, weights, scorable = _rewards_of(rewards_ptr, order_ptr, weights_ptr, member, end, n, BLOCK, P, EACH)
            d = x - mean[None, :]
            if EACH:
                z = tl.where(constant[None, :] | (d != d), 0.0, weights[None, :] * (d / spread[None, :]))
            else:
                if NORMALIZE == 0:
                    z = d / spread[None, :]
                elif NORMALIZE == 3:
                    z = d * (count.to(tl.float64) / tl.maximum(count - 1, 1).to(tl.float64))[None, :]
                elif NORMALIZE == 4:
                    z = tl.where(mean[None, :] == 0, 0.0, d / mean[None, :])
                else:
                    z = d
                z = tl.where(constant[None, :], 0.0, z)
                tl.store(total_ptr + sample, tl.sum(x, 1), mask=member < end)
            result = tl.where(scorable, tl.sum(z, 1), float("nan"))
            tl.store(result_ptr + sample, result, mask=member < end)
            tl.store(zero_ptr + sample, tl.where(teaches, 0, 1) + tl.zeros([BLOCK], tl.int32), mask=member < end)


@triton.jit(do_not_specialize=["R", "correction"])
def _batch_kernel(total_ptr, result_ptr, zero_ptr, counts_ptr, advantages_ptr, R, eps, correction, BLOCK: tl.constexpr,
                  SPREAD: tl.constexpr, CENTER: tl.constexpr):
    """advantages [R] float32 from result: as it is; SPREAD: / (std of all totals + eps); CENTER: z-scored over the batch, sample i
    counting counts[i] times. 0 where zero or unscorable."""
    member = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    result = tl.load(result_ptr + member, mask=member < R, other=0.0)
    if SPREAD or CENTER:
        over_ptr = result_ptr if CENTER else total_ptr
        total = tl.zeros([BLOCK], tl.float64)
        often = tl.zeros([BLOCK], tl.float64)
        low = tl.full([BLOCK], float("inf"), tl.float64)
        high = tl.full([BLOCK], float("-inf"), tl.float64)
        for start in range(0, R, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(over_ptr + at, mask=at < R, other=float("nan"))
            seen = x == x
            times = tl.where(seen, 1.0, tl.zeros([BLOCK], tl.float64))
            if counts_ptr is not None:
                times *= tl.load(counts_ptr + at, mask=at < R, other=0.0)
            often += times
            total += tl.where(seen, times * x, 0.0)
            low = tl.minimum(low, tl.where(seen, x, float("inf")))
            high = tl.maximum(high, tl.where(seen, x, float("-inf")))
        count = tl.sum(often)
        mean = tl.sum(total) / count
        constant = tl.min(low) >= tl.max(high)
        squares = tl.zeros([BLOCK], tl.float64)
        for start in range(0, R, BLOCK):
            at = start + tl.arange(0, BLOCK)
            d = tl.load(over_ptr + at, mask=at < R, other=float("nan")) - mean
            times = tl.full([BLOCK], 1.0, tl.float64)
            if counts_ptr is not None:
                times *= tl.load(counts_ptr + at, mask=at < R, other=0.0)
            squares += tl.where(d == d, times * d * d, 0.0)
        spread = tl.sqrt(tl.sum(squares) / tl.maximum(count - correction, 1.0)) + eps
        if CENTER:
            result = tl.where(constant, 0.0, (result - mean) / spread)
        else:
            result /= spread
    nothing = (tl.load(zero_ptr + member, mask=member < R, other=1) != 0) | (result != result)
    tl.store(advantages_ptr + member, tl.where(nothing, 0.0, result).to(tl.float32), mask=member < R)


def group_advantages(rewards: Tensor, group_size: int, group_ids: Tensor | None, weights: Tensor | None, token_counts: Tensor | None,
                     advantages: Tensor, zero_variance: Tensor, *, normalize: int, normalize_then_sum: bool, eps: float,
                     correction: int) -> None:
    """rewards [R, n] float32 contiguous -> advantages [R] float32, zero_variance [R] uint8, given.

    Groups are group_size neighbours, or the samples of equal group_ids [R] where group_size is 0. weights [n], token_counts [R]:
    float32, or None.
    """
    (R, n), device = rewards.shape, rewards.device
    if R == 0:
        return
    order = ends = None
    if group_ids is not None:
        ids, order = torch.sort(group_ids, stable=True)
        ends = torch.searchsorted(ids, ids, right=True)
    total, result = torch.empty((2, R), dtype=torch.float64, device=device)
    center = normalize_then_sum or normalize == WHITEN
    launch(
        _groups_kernel, (R,), rewards, order, ends, weights, total, result, zero_variance, R, group_size, n, eps, correction,
        BLOCK=configs.reward_block(), P=triton.next_power_of_2(n), NORMALIZE=normalize, EACH=normalize_then_sum, warps=1, stages=1,
        device=device)
    block = 16 * configs.reward_block()
    launch(
        _batch_kernel, (triton.cdiv(R, block),), total, result, zero_variance, token_counts if center else None, advantages, R, eps,
        correction, BLOCK=block, SPREAD=normalize == BATCH and not center, CENTER=center, warps=4, stages=1, device=device)
