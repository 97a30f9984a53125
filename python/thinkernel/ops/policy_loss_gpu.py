"""Triton and CUDA kernels of policy_loss and group_advantages: result buffers, launch. ops/grpo.py imports this file to register them.

Shapes: B sequences, S tokens of one, N packed tokens, R samples. Arguments in the ops' order (ops/policy_loss.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thinkernel.ops.memory import empty, rows_contiguous
from thinkernel.ops.policy_loss import (
    METRICS,
    NORMALIZE,
    Numbers,
    advantages_op,
    covers,
    covers_rewards,
    kernel_options,
    normaliser,
    policy_loss_op,
)  # fmt: skip
from thinkernel.reference.policy_loss import REDUCTION, top_entropy_mask


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else rows_contiguous(x)


def _bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _divisor(reduction: str, num_items_in_batch: Tensor | None, n: Numbers, sequences: int, device: torch.device) -> Tensor | None:
    """What the total is divided by, float64 [1] on the device (a count that lies there stays there), or None: the active tokens."""
    if reduction == "global" and num_items_in_batch is not None:
        return num_items_in_batch.detach().to(device, torch.float64).reshape(1)
    total = normaliser(reduction, None, n, sequences)
    return torch.full((1,), total, dtype=torch.float64, device=device) if total else None


@policy_loss_op.kernel("triton", covers)
def _triton(
    logprob: Tensor, old_logprob: Tensor | None, advantages: Tensor, mask: Tensor, ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None, entropy: Tensor | None, num_items_in_batch: Tensor | None, cu_seqlens: Tensor | None,
    needs: list[bool], loss_type: str, kl: str, rollout_correction: str | None, sequence_level: bool, kl_correction: bool,
    numbers: list[float],
) -> tuple[Tensor, ...]:
    from thinkernel.kernels import grpo_policy as kernels

    n, shape = Numbers(*numbers), tuple(logprob.shape)
    sequences = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    options = kernels.Options(
        **kernel_options(loss_type, None if ref_logprob is None else kl, rollout_correction, sequence_level, kl_correction, n)
    )
    loss, metrics = empty((), logprob), empty((len(METRICS),), logprob)
    results = [empty(shape if need else (0,), logprob) for need in needs]
    dlogprob, dentropy, dref = (x if need else None for x, need in zip(results, needs, strict=True))
    top = _top(entropy, mask, n)
    kernels.policy_loss(
        rows_contiguous(logprob), _rows(old_logprob), _rows(advantages) if advantages.shape == logprob.shape else advantages,
        _bytes(rows_contiguous(mask)), options, loss, metrics, ref=_rows(ref_logprob), rollout=_rows(rollout_logprob),
        entropy=_rows(entropy), top=None if top is None else _bytes(top), entropy_coef=n.entropy_coef,
        total=_divisor(REDUCTION[loss_type], num_items_in_batch, n, sequences, logprob.device),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(), dlogprob=dlogprob, dref=dref, dentropy=dentropy,
    )  # fmt: skip
    return loss, metrics, *results


def _top(entropy: Tensor | None, mask: Tensor, n: Numbers) -> Tensor | None:
    """The tokens that the top-entropy mask keeps, bool like mask: a sort of the whole batch, which torch has on every device."""
    if entropy is None or math.isnan(n.top_entropy):
        return None
    return top_entropy_mask(entropy, mask != 0, n.top_entropy).contiguous()


@advantages_op.kernel("triton", covers_rewards)
def _triton_advantages(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, weights: Tensor | None, token_counts: Tensor | None,
    normalize: str, aggregation: str, eps: float, correction: int,
) -> tuple[Tensor, Tensor]:
    from thinkernel.kernels import grpo_advantages as kernels

    advantages, zero = _advantage_buffers(rewards)
    kernels.group_advantages(
        rewards.contiguous(), group_size, group_ids, _floats(weights), _floats(token_counts), advantages, zero.view(torch.uint8),
        normalize=NORMALIZE.index(normalize), normalize_then_sum=aggregation == "normalize_then_sum", eps=eps, correction=correction,
    )
    return advantages, zero


def _advantage_buffers(rewards: Tensor) -> tuple[Tensor, Tensor]:
    return empty((rewards.shape[0],), rewards), empty((rewards.shape[0],), rewards, torch.bool)


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


