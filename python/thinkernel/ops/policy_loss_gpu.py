"""Triton and CUDA kernels of policy_loss and group_advantages: result buffers, launch. ops/grpo.py imports this file to register them.

Shapes: B sequences, S tokens of one, N packed tokens, R samples. Arguments in the ops' order (ops/policy_loss.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import empty, pointer, rows_contiguous
from thinkernel.ops.policy_loss import (
    METRICS,
    NORMALIZE,
    Numbers,
    advantage_buffers,
    advantages_op,
    covers,
    covers_rewards,
    floats,
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
        rows_contiguous(logprob), _rows(old_logprob), rows_contiguous(advantages) if advantages.shape == logprob.shape else advantages,
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


@policy_loss_op.kernel("cuda", covers)
def _cuda(
    logprob: Tensor, old_logprob: Tensor | None, advantages: Tensor, mask: Tensor, ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None, entropy: Tensor | None, num_items_in_batch: Tensor | None, cu_seqlens: Tensor | None,
    needs: list[bool], loss_type: str, kl: str, rollout_correction: str | None, sequence_level: bool, kl_correction: bool,
    numbers: list[float],
) -> tuple[Tensor, ...]:
    """csrc/cuda/policy_loss_kernel.cuh."""
    n, shape = Numbers(*numbers), tuple(logprob.shape)
    per_token = advantages.shape == logprob.shape
    options = kernel_options(loss_type, None if ref_logprob is None else kl, rollout_correction, sequence_level, kl_correction, n)
    loss, metrics = empty((), logprob), empty((len(METRICS),), logprob)
    gradient = empty if cu_seqlens is None else _zeros  # packed: tokens of no sequence
    results = [gradient(shape if need else (0,), logprob) for need in needs]
    dlogprob, dentropy, dref = (pointer(x) if need else 0 for x, need in zip(results, needs, strict=True))
    tokens = dict(
        logprob=rows_contiguous(logprob), old_logprob=_rows(old_logprob), ref_logprob=_rows(ref_logprob),
        rollout_logprob=_rows(rollout_logprob), entropy=_rows(entropy), advantages=_rows(advantages) if per_token else advantages,
        mask=_bytes(rows_contiguous(mask if mask.dtype == torch.bool else mask != 0)),
    )  # fmt: skip
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.long().contiguous()
    sequences = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    top = _top(entropy, mask, n)
    divisor = _divisor(REDUCTION[loss_type], num_items_in_batch, n, sequences, logprob.device)
    fields = dict(
        **options, **{name: pointer(x) for name, x in tokens.items()},
        **{f"{name}_stride": 0 if x is None else x.stride(0) for name, x in tokens.items()},
        sequences=sequences, length=shape[-1] if cu_seqlens is None else 0, tokens=logprob.numel(), cu_seqlens=pointer(cu_seqlens),
        advantage_per_token=int(per_token), mask_bytes=1, top=pointer(top), divisor=pointer(divisor), entropy_coef=n.entropy_coef,
        loss=pointer(loss), metrics=pointer(metrics), dlogprob=dlogprob, dref_logprob=dref, dentropy=dentropy,
    )  # fmt: skip
    with torch.cuda.device(logprob.device):
        size = C.policy_loss_cuda_workspace_bytes(C.PolicyLossCudaParams(**fields))
        workspace = logprob.new_empty(size, dtype=torch.uint8)
        params = C.PolicyLossCudaParams(**fields, workspace=pointer(workspace), workspace_bytes=size)
        C.policy_loss_cuda(params, torch.cuda.current_stream().cuda_stream)
    return loss, metrics, *results


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_zeros(shape)


@advantages_op.kernel("triton", covers_rewards)
def _triton_advantages(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, weights: Tensor | None, token_counts: Tensor | None,
    normalize: str, aggregation: str, eps: float, correction: int,
) -> tuple[Tensor, Tensor]:
    from thinkernel.kernels import grpo_advantages as kernels

    advantages, zero = advantage_buffers(rewards)
    kernels.group_advantages(
        rewards.contiguous(), group_size, group_ids, floats(weights), floats(token_counts), advantages, zero.view(torch.uint8),
        normalize=NORMALIZE.index(normalize), normalize_then_sum=aggregation == "normalize_then_sum", eps=eps, correction=correction,
    )
    return advantages, zero


@advantages_op.kernel("cuda", covers_rewards)
def _cuda_advantages(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, weights: Tensor | None, token_counts: Tensor | None,
    normalize: str, aggregation: str, eps: float, correction: int,
) -> tuple[Tensor, Tensor]:
    """csrc/cuda/advantages_kernel.cuh."""
    advantages, zero = advantage_buffers(rewards)
    if rewards.shape[0] == 0:
        return advantages, zero
    rewards, weights, token_counts = rewards.contiguous(), floats(weights), floats(token_counts)
    order = ends = None
    if group_ids is not None:
        ids, order = torch.sort(group_ids, stable=True)
        ends = torch.searchsorted(ids, ids, right=True)
    scratch = rewards.new_empty(2 * rewards.shape[0], dtype=torch.float64)
    with torch.cuda.device(rewards.device):
        C.group_advantages_cuda(C.GroupAdvantagesCudaParams(
            samples=rewards.shape[0], rewards_each=rewards.shape[1], rewards=rewards.data_ptr(), group_size=group_size,
            weights=pointer(weights), token_counts=pointer(token_counts), normalize=NORMALIZE.index(normalize),
            normalize_then_sum=int(aggregation == "normalize_then_sum"), eps=eps, correction=correction, advantages=pointer(advantages),
            zero_variance=pointer(zero), order=pointer(order), ends=pointer(ends), scratch=pointer(scratch),
        ), torch.cuda.current_stream().cuda_stream)  # fmt: skip
    return advantages, zero
