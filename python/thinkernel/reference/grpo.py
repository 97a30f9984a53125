"""The log-probability of chosen tokens, and the GRPO loss on top of it, in plain torch.

Shapes: N tokens (or [B, S]: B sequences of S tokens), D hidden, V vocabulary.

This file is the specification: every backend is compared with it. float16 and bfloat16 are computed in
float32, float64 stays float64; log-probabilities, entropies and losses come back in that computing dtype.
Advantages live in advantages.py and the policy loss in policy_loss.py; both are names of this module too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .advantages import group_advantages
from .policy_loss import LOSS_TYPES, policy_loss

__all__ = ["LOSS_TYPES", "group_advantages", "grpo_loss", "linear_logprob", "logprob", "policy_loss"]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
    keep_logits: bool = False,
    group: object | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of ``target`` and entropy of the next-token distribution of a linear head.

    ``y = hidden·weightᵀ + bias``, ``z = c·tanh(y/c) / τ`` (without softcap ``y / τ``), then both of softmax(z):
    ``logprob = z_target − logsumexp(z)``, ``entropy = −Σ p·log p`` with 0·log 0 = 0. Both are differentiable:
    ``dz = g_lp·(1[target] − p) − g_H·p·(log p + H)``.

    hidden [N, D] or [B, S, D], weight [V, D], target [N] or [B, S], bias [V] -> logprob, entropy like target.
    Rows whose target is ``ignore_index`` are left out of the work: 0, 0 and gradient 0, whatever hidden holds.
    With ``entropy=False`` the second output is None. ``keep_logits`` trades memory for time elsewhere and changes
    nothing here.
    """
    if group is not None:
        raise NotImplementedError("group: the reference has no vocabulary-parallel linear_logprob")
    compute = _compute_dtype(hidden)
    keep = target != ignore_index
    logits = hidden[keep].to(compute) @ weight.to(compute).T  # [n, V], the n rows that count
    if bias is not None:
        logits = logits + bias.to(compute)
    lp, ent = _logprob_rows(logits, target[keep], temperature, softcap, entropy)
    return _scatter(lp, keep), None if ent is None else _scatter(ent, keep)


def logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`linear_logprob` from given logits: logits [N, V] or [B, S, V], target [N] or [B, S]."""
    keep = target != ignore_index
    rows = logits[keep].to(_compute_dtype(logits))  # [n, V]
    lp, ent = _logprob_rows(rows, target[keep], temperature, softcap, entropy)
    return _scatter(lp, keep), None if ent is None else _scatter(ent, keep)


def _logprob_rows(
    y: Tensor, target: Tensor, temperature: float, softcap: float | None, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """y [n, V], target [n] -> logprob [n], entropy [n] or None."""
    outside = (target < 0) | (target >= y.shape[-1])
    if bool(outside.any()):
        raise ValueError(
            f"target: got {int(target[outside][0])}, takes a token number in [0, {y.shape[-1]}) or ignore_index"
        )
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    log_p = (y / temperature).log_softmax(-1)  # [n, V]
    chosen = log_p.gather(-1, target.long().unsqueeze(-1)).squeeze(-1)  # [n]
    if not entropy:
        return chosen, None
    p = log_p.exp()
    # p == 0 also where log p is -inf (a logit of -inf): without the fill 0·(-inf) is NaN, in the gradient too.
    return chosen, -(p * log_p.masked_fill(p == 0, 0)).sum(-1)


def _scatter(rows: Tensor, keep: Tensor) -> Tensor:
    """rows [n] to the places where keep [...] is set, 0 elsewhere."""
    return rows.new_zeros(keep.shape).masked_scatter(keep, rows)


def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
    keep_logits: bool = False,
    group: object | None = None,
    **policy: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`linear_logprob`, then :func:`policy_loss` with its keyword arguments -> loss, metrics.

    hidden [B, S, D], target and mask [B, S] (packed: [N, D], [N] with ``cu_seqlens``). Masked tokens are skipped like
    ignored ones. ``entropy=False`` leaves the entropy out of the metrics; the entropy bonus and the top-entropy mask
    need it.
    """
    lp, ent = linear_logprob(
        hidden,
        weight,
        target.masked_fill(mask == 0, ignore_index),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        entropy=entropy,
        keep_logits=keep_logits,
        group=group,
    )
    return policy_loss(lp, old_logprob, advantages, mask, entropy=ent, **policy)
