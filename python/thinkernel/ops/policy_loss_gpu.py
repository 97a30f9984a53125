"""Triton and CUDA kernels of policy_loss and group_advantages: result buffers, launch. ops/grpo.py imports this file to register them.

Shapes: B sequences, S tokens of one, N packed tokens, R samples. Arguments in the ops' order (ops/policy_loss.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinkernel.ops.memory import empty, rows_contiguous
from thinkernel.ops.policy_loss import METRICS, NORMALIZE, advantages_op, covers, covers_rewards, kernel_options, policy_loss_op
from thinkernel.reference.policy_loss import REDUCTION, top_entropy_mask


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else rows_contiguous(x)


def _bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _divisor(
    loss_type: str, num_items_in_batch: Tensor | None, items: float | None, sequences: int, max_completion_length: int | None,
    device: torch.device,
) -> Tensor | None:
    """What the total is divided by, float64 [1] on the device (a count that lies there stays there), or None: the active tokens."""
    reduction = REDUCTION[loss_type]
    if reduction == "fixed":
        return torch.full((1,), max(sequences, 1) * (max_completion_length or 1), dtype=torch.float64, device=device)
    if reduction != "global" or (num_items_in_batch is None and items is None):
        return None
    if num_items_in_batch is not None:
        return num_items_in_batch.detach().to(device, torch.float64).reshape(1)
    return torch.full((1,), float(items or 0), dtype=torch.float64, device=device)


@policy_loss_op.kernel("triton", covers)
def _triton(
    logprob: Tensor, old_logprob: Tensor | None, advantages: Tensor, mask: Tensor, ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None, entropy: Tensor | None, num_items_in_batch: Tensor | None, cu_seqlens: Tensor | None,
    need_logprob: bool, need_entropy: bool, need_ref: bool, loss_type: str, epsilon: float, epsilon_high: float | None,
    delta: float | None, beta: float, kl: str, kl_correction: bool, importance_sampling_level: str,
    rollout_correction: str | None, rollout_low: float | None, rollout_high: float | None,
    off_policy_threshold: float | None, entropy_coef: float, top_entropy: float | None, items: float | None,
    max_completion_length: int | None, log_ratio_clamp: float | None, tau_positive: float, tau_negative: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from thinkernel.kernels import grpo_policy as kernels

    shape = tuple(logprob.shape)
    sequences = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    options = kernels.Options(**kernel_options(
        loss_type, epsilon, epsilon_high, delta, beta, kl if ref_logprob is not None else None, kl_correction,
        importance_sampling_level, rollout_correction, rollout_low, rollout_high, off_policy_threshold, log_ratio_clamp,
        tau_positive, tau_negative,
    ))  # fmt: skip
    loss, metrics = empty((), logprob), empty((len(METRICS),), logprob)
    dlogprob, dentropy, dref = (empty(shape if need else (0,), logprob) for need in (need_logprob, need_entropy, need_ref))
    top = None if top_entropy is None or entropy is None else top_entropy_mask(entropy, mask != 0, top_entropy)
    kernels.policy_loss(
        rows_contiguous(logprob), _rows(old_logprob), _rows(advantages) if advantages.shape == logprob.shape else advantages,
        _bytes(rows_contiguous(mask)), options, loss, metrics, ref=_rows(ref_logprob), rollout=_rows(rollout_logprob),
        entropy=_rows(entropy), top=None if top is None else _bytes(top.contiguous()),
        total=_divisor(loss_type, num_items_in_batch, items, sequences, max_completion_length, logprob.device),
        entropy_coef=entropy_coef, cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        dlogprob=dlogprob if need_logprob else None, dref=dref if need_ref else None, dentropy=dentropy if need_entropy else None,
    )  # fmt: skip
    return loss, metrics, dlogprob, dentropy, dref


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


