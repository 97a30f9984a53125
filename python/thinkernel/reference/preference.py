"""Losses beside the policy loss: direct preference optimisation, PPO's value loss (entry module: grpo.py).

Shapes: P pairs, S tokens (chosen and rejected may differ in S); B sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm")


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Token log-probs [P, S] of the chosen and the rejected completions -> loss (scalar), metrics.

    With s = Σ_t (logprob − ref) of a completion, Δ = s_chosen − s_rejected and p the label smoothing,

    ==============  =====================================================================================
    "sigmoid"       −(1 − p)·ln σ(βΔ) − p·ln σ(−βΔ)        DPO (arXiv 2305.18290), with p > 0 conservative DPO
    "robust"        (−(1 − p)·ln σ(βΔ) + p·ln σ(−βΔ)) / (1 − 2p)                robust DPO (2403.00409)
    "hinge"         max(0, 1 − βΔ)                                                     SLiC (2305.10425)
    "ipo"           (Δ̄ − 1/(2β))², Δ̄ the difference of the token means of s           IPO (2310.12036)
    "sigmoid_norm"  −ln σ(βΔ̄)
    ==============  =====================================================================================

    mean over the pairs. The reference's log-probs are constants. What masked positions hold never matters.
    """
    s, norm = [], []
    for logprob, ref, mask in ((chosen, ref_chosen, chosen_mask), (rejected, ref_rejected, rejected_mask)):
        on = mask != 0
        wide = torch.float64 if logprob.dtype == torch.float64 else torch.float32
        score = (logprob.to(wide) - ref.detach().to(wide)).masked_fill(~on, 0).sum(-1)  # [P]
        s.append(score)
        norm.append(score / on.sum(-1).clamp(min=1))
    delta, normed = s[0] - s[1], norm[0] - norm[1]  # [P]
    p = label_smoothing
    if loss_type == "sigmoid":
        loss = -(1 - p) * F.logsigmoid(beta * delta) - p * F.logsigmoid(-beta * delta)
    elif loss_type == "robust":
        loss = (-(1 - p) * F.logsigmoid(beta * delta) + p * F.logsigmoid(-beta * delta)) / (1 - 2 * p)
    elif loss_type == "hinge":
        loss = F.relu(1 - beta * delta)
    elif loss_type == "ipo":
        loss = (normed - 1 / (2 * beta)).square()
    else:
        loss = -F.logsigmoid(beta * normed)
    n = max(loss.numel(), 1)
    metrics = {
        "accuracy": (delta > 0).to(delta.dtype).sum() / n,
        "margin": beta * delta.detach().sum() / n,
        "chosen_reward": beta * s[0].detach().sum() / n,
        "rejected_reward": beta * s[1].detach().sum() / n,
    }
    return loss.sum() / n, metrics


def ppo_value_loss(
    value: Tensor, old_value: Tensor, returns: Tensor, mask: Tensor, *, epsilon: float | None = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Values [B, S] -> loss ½·mean max((v − R)², (clip(v, v_old ± epsilon) − R)²) over the active tokens, metrics.

    PPO's clipped value loss; epsilon None: the plain squared error. old_value and returns are constants.
    """
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    on = mask != 0
    v, old, target = (x.to(wide).masked_fill(~on, 0) for x in (value, old_value.detach(), returns.detach()))
    plain = (v - target).square()
    count = on.sum().clamp(min=1)
    if epsilon is None:
        clipped, loss = torch.zeros_like(on), plain
    else:
        bounded = (old + (v - old).clamp(-epsilon, epsilon) - target).square()
        clipped, loss = bounded > plain, torch.maximum(plain, bounded)
    metrics = {"value_clip_fraction": (clipped & on).sum() / count, "value_mean": v.detach().sum() / count}
    return 0.5 * loss.sum() / count, metrics
