"""linear_logprob with the vocabulary sharded over a torch.distributed group.

Each rank runs the kernels on its own words; what is merged, in rank order and in float64, is three numbers a token:

    lse = log Σ_r e^lse_r,  w_r = e^(lse_r − lse)
    logprob = logprob_r + lse_r − lse of the rank r that has the target,  entropy = Σ_r w_r (entropy_r + lse − lse_r)

The backward is the kernels' own with the whole lse and entropy; dhidden = Σ_r dhidden_r, in rank order and float32.
Shapes: N rows (tokens), D hidden, V words of this rank, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinkernel.ops import checks
from thinkernel.ops.grpo import _cpu_backward, _cpu_forward, gradient_buffer, linear_logprob_forward
from thinkernel.ops.logprob import check_target

_IGNORED, _ELSEWHERE = -100, -1  # local targets: a row without work; a row whose target is another rank's word


def vocabulary_parallel(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float, softcap: float,
    ignore_index: int, entropy: bool, keep: int, group: Any,
) -> tuple[Tensor, Tensor]:
    """hidden [N, D], weight [V, D], target [N] of global token numbers -> logprob, entropy [N], the same on every rank."""
    checks.process_group("group", group)
    choice = linear_logprob_forward.choose((hidden, weight, target, bias, temperature, softcap, ignore_index, entropy, keep))
    if choice.backend != "cpu":
        raise NotImplementedError(f"linear_logprob: group is not implemented on backend {choice.backend!r}, only on 'cpu'")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    lp, ent = _VocabularyParallel.apply(hidden, weight, target, bias, temperature, softcap, ignore_index, entropy, keep, group)
    return lp, ent


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float, softcap: float,
        ignore_index: int, entropy: bool, keep: int, group: Any,
    ) -> tuple[Tensor, Tensor]:
        sizes = gathered(torch.tensor([weight.shape[0]], device=weight.device), group).flatten()  # [R]
        ends = sizes.cumsum(0)
        check_target("target", target, ignore_index, int(ends[-1]))
        ignored, first = target == ignore_index, int(ends[dist.get_rank(group)]) - weight.shape[0]
        here = (target >= first) & (target < first + weight.shape[0])
        local = torch.where(here, target - first, _ELSEWHERE).masked_fill(ignored, _IGNORED)

        options = (temperature, softcap, _IGNORED, entropy)
        lp, ent, lse, kept = _cpu_forward(hidden, weight, local, bias, *options, keep)
        lps, ents, lses = gathered(torch.stack([lp.double(), ent.double(), lse]), group).unbind(1)  # [R, N] each
        lse = torch.logsumexp(lses, 0)
        w = (lses - lse).exp()
        ent = torch.zeros_like(lse)
        for r in range(len(sizes)):
            ent += torch.where(w[r] == 0, 0.0, w[r] * (ents[r] + lse - lses[r]))  # words that are all masked have no entropy
        owner = torch.bucketize(target, ends, right=True).clamp(0, len(sizes) - 1)[None]  # [1, N]
        lp = lps.gather(0, owner)[0] + (lses.gather(0, owner)[0] - lse)
        lp, ent = (x.float().masked_fill(ignored, 0.0) for x in (lp, ent))

        ctx.save_for_backward(hidden, weight, local, bias, lse, ent, kept)
        ctx.options, ctx.group = options, group
        ctx.set_materialize_grads(False)
        return lp, ent if entropy else ent.zero_()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, local, bias, lse, ent, kept = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        if dlogprob is None and dentropy is None:
            return (None,) * 10
        dlogprob = torch.zeros_like(ent) if dlogprob is None else dlogprob
        main_grad = gradient_buffer(weight) if need_weight else None
        dh, dw, db = _cpu_backward(
            dlogprob, dentropy, hidden, weight, local, bias, lse, ent, kept, *ctx.options, need_hidden, need_weight, need_bias,
            main_grad, float_hidden=True,
        )
        dh = summed_in_rank_order(dh, ctx.group).to(hidden.dtype) if need_hidden else None
        return dh, dw if need_weight and main_grad is None else None, None, db if need_bias else None, *(None,) * 6


def gathered(x: Tensor, group: Any) -> Tensor:
    """x of every rank: [R, *x.shape]."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def summed_in_rank_order(x: Tensor, group: Any) -> Tensor:
    """Σ_r x_r [N, D], the same bits on every rank: each rank adds up one stretch of rows."""
    ranks, (N, D) = dist.get_world_size(group), x.shape
    rows = (N + ranks - 1) // ranks
    padded = torch.nn.functional.pad(x, (0, 0, 0, rows * ranks - N))  # [R · rows, D]
    mine = torch.empty_like(padded)
    dist.all_to_all_single(mine, padded, group=group)
    total = mine[:rows].clone()
    for r in range(1, ranks):
        total += mine[r * rows : (r + 1) * rows]
    return gathered(total, group).view(-1, D)[:N]
