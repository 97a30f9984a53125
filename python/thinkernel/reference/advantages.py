"""Advantages from rewards, relative to the other samples of the same prompt (entry module: grpo.py).

Shapes: R samples, n reward functions, P prompts (groups), G samples of one prompt; a ragged group is padded to G
with NaN, which is what an unscorable sample is anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMALIZE = ("group", "none", "batch", "rloo", "maxrl", "whiten")


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    normalize: str = "group",
    aggregation: str = "sum_then_normalize",
    whiten_over: str = "samples",
    weights: Tensor | None = None,
    eps: float = 1e-6,
    correction: int = 1,
    token_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """rewards [R] or [R, n] -> advantages [R], zero_variance bool [R] (the sample's group teaches nothing).

    Groups are ``group_size`` neighbours, or the samples with the same entry of ``group_ids`` [R] (any sizes, any
    order). With r the reward, m and s the mean and standard deviation (n − ``correction``) of its group:

    ========  ===========================================  =====================================================
    "group"   (r − m) / (s + eps)                          GRPO
    "none"    r − m                                        Dr. GRPO
    "batch"   (r − m) / (s over all samples + eps)         Lite PPO
    "rloo"    r − mean of the others = (r − m)·n/(n − 1)   RLOO
    "maxrl"   (r − m) / m, 0 where m = 0                   MaxRL
    "whiten"  d = r − m, then (d − mean d) / (std d + eps) REINFORCE++, over all samples
    ========  ===========================================  =====================================================

    Several rewards: "sum_then_normalize" takes r = Σ weights·rewards; "normalize_then_sum" (GDPO) the z-score of each
    reward in its group, summed with ``weights``, then z-scored over the batch. ``whiten_over`` says what the statistics of
    that z-score, and of "whiten", count: "samples" (TRL) or "tokens" (verl), each sample ``token_counts`` [R] times.
    NaN = unscorable: left out of every statistic; next to other rewards it adds 0; all NaN gives advantage 0.
    Zero variance is max == min over the scorable rewards of the group (of each reward for GDPO), and gives exactly 0:
    the formula alone leaves rounding noise there, which eps then blows up.
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize: got {normalize!r}, takes one of {NORMALIZE}")
    if aggregation not in ("sum_then_normalize", "normalize_then_sum"):
        raise ValueError(f"aggregation: got {aggregation!r}, takes 'sum_then_normalize' or 'normalize_then_sum'")
    if whiten_over not in ("samples", "tokens"):
        raise ValueError(f"whiten_over: got {whiten_over!r}, takes 'samples' or 'tokens'")
    if (whiten_over == "tokens") != (token_counts is not None):
        raise ValueError("token_counts: takes the tokens of each sample [R] with whiten_over='tokens', and with that alone")
    r = rewards if rewards.dtype == torch.float64 else rewards.float()
    r = r.unsqueeze(-1) if r.dim() == 1 else r  # [R, n]
    w = r.new_ones(r.shape[-1]) if weights is None else weights.to(r)  # [n]
    place, shape = _group_places(r, group_size, group_ids)
    often = r.new_ones(r.shape[0]) if token_counts is None else token_counts.to(r)  # [R]
    unscorable = r.isnan().all(-1)  # [R]

    if aggregation == "normalize_then_sum":
        grouped = _to_groups(r, place, shape)  # [P, G, n]
        d, s, constant = _center(grouped, correction)
        z = (d / (s + eps)).masked_fill(constant, 0)
        a = _from_groups(z, place)  # [R, n]
        zero_variance = _from_groups(constant.all(-1).expand(shape), place)
        a = _z_score((a * w).nansum(-1).masked_fill(unscorable, torch.nan), often, eps, correction)
    else:
        total = (r * w).nansum(-1).masked_fill(unscorable, torch.nan)  # [R]
        grouped = _to_groups(total.unsqueeze(-1), place, shape)  # [P, G, 1]
        d, s, constant = _center(grouped, correction)
        m = grouped.nanmean(1, keepdim=True)
        if normalize == "group":
            d = d / (s + eps)
        elif normalize == "batch":
            d = d / (_center(total.view(1, -1, 1), correction)[1] + eps)
        elif normalize == "rloo":
            n = (~grouped.isnan()).sum(1, keepdim=True)
            d = d * n / (n - 1).clamp(min=1)
        elif normalize == "maxrl":
            d = (d / m).masked_fill(m == 0, 0)
        a = _from_groups(d.squeeze(-1), place)  # [R]
        zero_variance = _from_groups(constant.squeeze(-1).expand(shape), place)
        if normalize == "whiten":
            a = _z_score(a.masked_fill(zero_variance & ~unscorable, 0), often, eps, correction)
    return a.masked_fill(zero_variance | unscorable, 0), zero_variance


def _center(x: Tensor, correction: int) -> tuple[Tensor, Tensor, Tensor]:
    """Over the non-NaN entries of dim 1 of x [P, G, n]: x − mean, std [P, 1, n], constant (max == min) [P, 1, n]."""
    seen = ~x.isnan()
    count = seen.sum(1, keepdim=True)
    d = x - x.nanmean(1, keepdim=True)
    variance = d.square().nansum(1, keepdim=True) / (count - correction).clamp(min=1)
    high = x.masked_fill(~seen, -torch.inf).amax(1, keepdim=True)
    low = x.masked_fill(~seen, torch.inf).amin(1, keepdim=True)
    return d, variance.sqrt(), (count <= 1) | (high == low)


def _z_score(a: Tensor, often: Tensor, eps: float, correction: int) -> Tensor:
    """(a − mean) / (std + eps) over the non-NaN entries of a [R], entry i counting often[i] times; 0 when all are equal."""
    seen = ~a.isnan()
    n = often * seen  # [R]
    total = n.sum()
    d = a - (n * a.masked_fill(~seen, 0)).sum() / total
    std = ((n * d.masked_fill(~seen, 0).square()).sum() / (total - correction).clamp(min=1)).sqrt()
    return (d / (std + eps)).masked_fill(_center(a.view(1, -1, 1), correction)[2].flatten(), 0)


def _group_places(r: Tensor, group_size: int | None, group_ids: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
    """Each sample's place in the flattened [P, G] table, and (P, G)."""
    n_sample = r.shape[0]
    if (group_size is None) == (group_ids is None):
        raise ValueError("group_size: give either group_size or group_ids")
    if group_size is not None:
        if group_size < 1 or n_sample % group_size:
            raise ValueError(f"group_size: got {group_size}, takes a divisor of the {n_sample} rewards")
        return torch.arange(n_sample, device=r.device), (n_sample // group_size, group_size)
    assert group_ids is not None
    if group_ids.shape != (n_sample,):
        raise ValueError(f"group_ids: got shape {tuple(group_ids.shape)}, takes ({n_sample},)")
    _, index, counts = group_ids.unique(return_inverse=True, return_counts=True)
    widest = int(counts.max()) if n_sample else 0
    order = index.argsort(stable=True)
    start = counts.cumsum(0) - counts
    rank = torch.empty_like(index)
    rank[order] = torch.arange(n_sample, device=r.device) - start[index[order]]
    return index * widest + rank, (counts.numel(), widest)


def _to_groups(x: Tensor, place: Tensor, shape: tuple[int, int]) -> Tensor:
    """x [R, n] -> [P, G, n], NaN where a ragged group has no sample."""
    table = x.new_full((shape[0] * shape[1], x.shape[-1]), torch.nan)
    table[place] = x
    return table.view(*shape, x.shape[-1])


def _from_groups(table: Tensor, place: Tensor) -> Tensor:
    """[P, G, ...] -> [R, ...]."""
    return table.flatten(0, 1)[place]
