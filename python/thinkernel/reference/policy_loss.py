"""The policy-gradient losses of the GRPO family: the one copy of that mathematics (entry module: grpo.py).

Shapes: B sequences (samples), S completion tokens; packed N tokens of B sequences are unpacked to [B, S] first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_TYPES = (
    "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "luspo", "vespo", "ppo", "reinforce", "rloo",
)  # fmt: skip
ROLLOUT_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

# How per-token losses become one number. "sequence_mean": mean over B of the token mean. "sequence_sum": mean over B of
# the token sum. "batch_mean": sum / active tokens. "global": sum / num_items_in_batch. "fixed": sum / (B * max length).
REDUCTION = {
    "grpo": "sequence_mean", "gspo": "sequence_mean", "sapo": "sequence_mean", "rloo": "sequence_mean",
    "bnpo": "batch_mean", "ppo": "batch_mean",
    "dapo": "global", "cispo": "global", "vespo": "global",
    "luspo": "sequence_sum", "reinforce": "sequence_sum",
    "dr_grpo": "fixed",
}  # fmt: skip
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo", "ppo", "rloo")
_MIN_LOG_WEIGHT, _MAX_LOG_WEIGHT = math.log(1e-8), 20.0  # vespo's range of the sequence log weight


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    ref_logprob: Tensor | None = None,
    kl_correction: bool = False,
    importance_sampling_level: str = "token",
    rollout_logprob: Tensor | None = None,
    rollout_correction: str | None = None,
    rollout_clip: tuple[float | None, float | None] = (None, 3.0),
    off_policy_threshold: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    top_entropy: float | None = None,
    num_items_in_batch: Tensor | float | None = None,
    max_completion_length: int | None = None,
    log_ratio_clamp: float | None = 20.0,
    tau: tuple[float, float] = (1.0, 1.05),
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token log-probs [B, S] -> loss (scalar), metrics (dict of detached scalars).

    With ``r = exp(clamp(logprob − old_logprob, ±log_ratio_clamp))`` (level "sequence": r [B, 1] = exp of the token mean
    of the log ratio) and A = ``advantages`` [B] or [B, S], the token loss is

    ``l = −min(min(r, delta)·A, clip(r, 1 − epsilon, 1 + epsilon_high)·A)``, epsilon_high = epsilon unless given,

    ===========  =============================================================  =======================================
    loss_type    token loss                                                     reduction of Σ over active tokens
    ===========  =============================================================  =======================================
    "grpo"       l                                                              mean_B (Σ_S / tokens of the sequence)
    "bnpo"       l                                                              Σ / active tokens of this batch
    "dr_grpo"    l                                                              Σ / (B · max_completion_length)
    "dapo"       l                                                              Σ / num_items_in_batch
    "gspo"       l, level "sequence"                                            as grpo
    "luspo"      l, level "sequence"                                            mean_B Σ_S
    "cispo"      −sg(min(r, epsilon_high))·A·logprob, epsilon_high the raw      as dapo
                 bound and required
    "sapo"       −σ(τ(r − 1))·4/τ·A, τ = tau[0] where A > 0 else tau[1]         as grpo
    "vespo"      −sg(φ)·A·logprob, φ = exp(λ + k·ln w − λ·w) per sequence,      as dapo
                 ln w = Σ_t clamp(log r, ±20) + Σ_t ln(rollout ratio) in
                 [ln 1e-8, 20], (k, λ) = (2, 3) where A ≥ 0 else (3, 2)
    "ppo"        l                                                              as bnpo
    "reinforce"  −A·logprob                                                     mean_B Σ_S
    "rloo"       l with the whole sequence's ratio exp(Σ_t log r)               as grpo
    ===========  =============================================================  =======================================

    ``num_items_in_batch`` is the token count of the *global* batch (all micro-batches, all processes; divide it by the
    world size where gradients are averaged); left out, this batch's count is taken, right only without accumulation.
    A sequence without active tokens adds 0 and still counts in B.

    Order: token loss × off-policy mask × top-entropy mask × rollout ratio (not vespo), then + ``beta``·KL, reduction,
    − ``entropy_coef``·(mean entropy of the tokens in both masks).
    KL, d = logprob − ref_logprob: k1 = d, k2 = d²/2, k3 = e^(−d) + d − 1; ``kl_correction`` multiplies it by r,
    with gradient. ``rollout_correction``: ratio exp(old − rollout) per token or of the sequence's sum, "truncate"
    clamps it into ``rollout_clip``, "mask" zeroes it outside; a NaN rollout log-prob counts as equal to old.
    ``off_policy_threshold`` keeps a token whose A ≥ 0 or whose sequence has mean(log μ − logprob) ≤ threshold, μ the
    rollout's (or old) log-probs. ``top_entropy`` = 0.2 keeps the fifth of the active tokens with the highest entropy.
    ``old_logprob=None`` is on-policy: old = logprob, detached. Gradients flow to logprob, ref_logprob and entropy alone:
    old_logprob, rollout_logprob and advantages are constants.
    ``cu_seqlens`` [B + 1]: every per-token tensor is packed [N] (advantages [B] or [N]).
    What masked positions hold, NaN included, never matters.

    Follows TRL's GRPOTrainer for the loss types it has (ppo and reinforce aside), checked against it in the tests.
    """
    check_arguments(
        loss_type=loss_type, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta, kl=kl, beta=beta, ref_logprob=ref_logprob,
        importance_sampling_level=importance_sampling_level, rollout_logprob=rollout_logprob,
        rollout_correction=rollout_correction, rollout_clip=rollout_clip, off_policy_threshold=off_policy_threshold,
        entropy=entropy, entropy_coef=entropy_coef, top_entropy=top_entropy, num_items_in_batch=num_items_in_batch,
        max_completion_length=max_completion_length, log_ratio_clamp=log_ratio_clamp, tau=tau,
    )
    compute = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    if cu_seqlens is not None:
        unpack = _Unpack(cu_seqlens)
        advantages = unpack(advantages) if advantages.shape == logprob.shape else advantages
        mask, logprob = unpack(mask) * unpack.valid, unpack(logprob)
        old_logprob, ref_logprob, rollout_logprob, entropy = (
            None if t is None else unpack(t) for t in (old_logprob, ref_logprob, rollout_logprob, entropy)
        )
    on = mask != 0  # [B, S] bool
    active = on.to(compute)

    def clean(t: Tensor) -> Tensor:
        """In the computing dtype, 0 where masked: 0 · NaN would still be NaN."""
        return t.to(compute).masked_fill(~on, 0)

    logp = clean(logprob)  # [B, S]
    old = (logp if old_logprob is None else clean(old_logprob)).detach()
    rollout = old if rollout_logprob is None else clean(rollout_logprob)
    rollout = torch.where(rollout.isnan() & on, old, rollout).detach()
    entropy = None if entropy is None else clean(entropy)
    high = epsilon if epsilon_high is None else epsilon_high
    a = advantages.detach().to(compute)
    a = a.unsqueeze(-1) if a.dim() == 1 else a  # [B, 1] or [B, S]
    a = a.masked_fill(~(on.any(-1, keepdim=True) if a.shape != on.shape else on), 0)
    tokens = active.sum(-1, keepdim=True).clamp(min=1)  # [B, 1]

    # ---- ratio
    log_ratio = logp - old  # [B, S]
    if log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    if loss_type == "rloo":
        log_weight = log_ratio.sum(-1, keepdim=True)  # [B, 1]
        if log_ratio_clamp is not None:
            log_weight = log_weight.clamp(-log_ratio_clamp, log_ratio_clamp)
    elif importance_sampling_level == "sequence" or loss_type in ("gspo", "luspo"):
        log_weight = log_ratio.sum(-1, keepdim=True) / tokens  # [B, 1]
    else:
        log_weight = log_ratio  # [B, S]
    ratio = log_weight.exp()
    is_ratio = _rollout_ratio(old.detach() - rollout, rollout_correction, rollout_clip)  # [B, S], [B, 1] or None

    # ---- loss per token
    if loss_type in CLIPPED:
        capped = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.minimum(capped * a, ratio.clamp(1 - epsilon, 1 + high) * a)
    elif loss_type == "cispo":
        loss = -ratio.clamp(max=high).detach() * a * logp
    elif loss_type == "sapo":
        t = torch.where(a > 0, tau[0], tau[1]).to(compute)
        loss = -torch.sigmoid(t * (ratio - 1)) * 4 / t * a
    elif loss_type == "vespo":
        loss = -_vespo_weight((logp - old).detach(), a, is_ratio, on) * a * logp
    else:
        loss = -a * logp

    # ---- masks, rollout correction, KL
    metrics: dict[str, Tensor] = {}
    bonus_mask = active
    if off_policy_threshold is not None:
        drift = (rollout - logp.detach()).sum(-1, keepdim=True) / tokens  # [B, 1]
        kept = ((a >= 0) | (drift <= off_policy_threshold)).to(compute)
        loss = loss * kept
        metrics["off_policy_kept"] = _mean(kept, active)
    if top_entropy is not None and entropy is not None:
        top = top_entropy_mask(entropy.detach(), on, top_entropy).to(compute)
        loss = loss * top
        bonus_mask = active * top
    if is_ratio is not None:
        metrics["rollout_ratio"] = _mean(is_ratio, active)
        if loss_type != "vespo":
            loss = loss * is_ratio
    if beta != 0 and ref_logprob is not None:
        d = logp - clean(ref_logprob)
        divergence = {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: (-d).exp() + d - 1}[kl]()
        if kl_correction:
            divergence = divergence * ratio
        loss = loss + beta * divergence
        metrics["kl"] = _mean(divergence.detach(), active)

    # ---- reduction
    loss = _reduce(loss, active, tokens, REDUCTION[loss_type], num_items_in_batch, max_completion_length)
    metrics["policy_loss"] = loss.detach()
    if entropy_coef != 0 and entropy is not None:
        loss = loss - entropy_coef * (entropy * bonus_mask).sum() / bonus_mask.sum().clamp(min=1)
    with torch.no_grad():
        metrics |= _ratio_metrics(ratio, log_ratio, a, on, epsilon, high, loss_type)
        metrics["tokens"] = active.sum()
        if entropy is not None:
            metrics["entropy"] = _mean(entropy, active)
    return loss, metrics


class _Unpack:
    """Packed [N] -> [B, S], S the longest sequence; ``valid`` marks the places that hold a token."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        start, length = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
        step = torch.arange(int(length.max()) if length.numel() else 0, device=cu_seqlens.device)
        self.valid = step < length.unsqueeze(-1)  # [B, S]
        self.index = (start.unsqueeze(-1) + step) * self.valid

    def __call__(self, x: Tensor) -> Tensor:
        return x[self.index] if x.numel() else x.new_zeros(self.index.shape)


def check_arguments(
    *,
    loss_type: str,
    epsilon: float,
    epsilon_high: float | None,
    delta: float | None,
    kl: str,
    beta: float,
    ref_logprob: Tensor | None,
    importance_sampling_level: str,
    rollout_logprob: Tensor | None,
    rollout_correction: str | None,
    rollout_clip: tuple[float | None, float | None],
    off_policy_threshold: float | None,
    entropy: Tensor | None,
    entropy_coef: float,
    top_entropy: float | None,
    num_items_in_batch: Tensor | float | None,
    max_completion_length: int | None,
    log_ratio_clamp: float | None,
    tau: tuple[float, float],
) -> None:
    """Values out of range or that contradict each other, named."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type: got {loss_type!r}, takes one of {LOSS_TYPES}")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level: got {importance_sampling_level!r}, takes 'token' or 'sequence'")
    if kl not in ("k1", "k2", "k3"):
        raise ValueError(f"kl: got {kl!r}, takes 'k1', 'k2' or 'k3'")
    if not epsilon >= 0:
        raise ValueError(f"epsilon: got {epsilon}, takes a number of at least 0")
    if epsilon_high is not None and not epsilon_high >= 0:
        raise ValueError(f"epsilon_high: got {epsilon_high}, takes a number of at least 0")
    if delta is not None and not delta > 0:
        raise ValueError(f"delta: got {delta}, takes a positive bound of the ratio")
    for name, value in (("beta", beta), ("entropy_coef", entropy_coef)):
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name}: got {value}, takes a finite number")
    if beta != 0 and ref_logprob is None:
        raise ValueError(f"ref_logprob: got None, needed for beta = {beta}")
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError("epsilon_high: got None, cispo takes the raw upper bound of the ratio (typically 5.0)")
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError("max_completion_length: got None, needed for loss_type 'dr_grpo'")
    if max_completion_length is not None and max_completion_length < 1:
        raise ValueError(f"max_completion_length: got {max_completion_length}, takes at least 1")
    if rollout_correction is not None:
        if rollout_correction not in ROLLOUT_CORRECTIONS:
            raise ValueError(f"rollout_correction: got {rollout_correction!r}, takes one of {ROLLOUT_CORRECTIONS}")
        if rollout_logprob is None:
            raise ValueError("rollout_logprob: got None, needed for rollout_correction")
        if loss_type == "vespo" and rollout_correction.startswith("sequence"):
            raise ValueError(f"rollout_correction: got {rollout_correction!r}, vespo takes the token forms")
        low, high = (value if bound is None else bound for value, bound in zip((0.0, math.inf), rollout_clip, strict=True))
        if not 0 <= low <= high:
            raise ValueError(f"rollout_clip: got {rollout_clip}, takes (low, high) with 0 <= low <= high, None for no bound")
    if loss_type == "vespo" and importance_sampling_level == "sequence":
        raise ValueError("importance_sampling_level: got 'sequence', vespo forms its sequence weight itself")
    if off_policy_threshold is not None and math.isnan(off_policy_threshold):
        raise ValueError("off_policy_threshold: got nan, takes a number")
    if top_entropy is not None and not 0 < top_entropy <= 1:
        raise ValueError(f"top_entropy: got {top_entropy}, takes a fraction in (0, 1]")
    if entropy is None and (entropy_coef != 0 or top_entropy is not None):
        raise ValueError("entropy: got None, needed for entropy_coef and top_entropy")
    if isinstance(num_items_in_batch, (int, float)) and not 0 <= num_items_in_batch < math.inf:
        raise ValueError(f"num_items_in_batch: got {num_items_in_batch}, takes the count of the global batch's tokens")
    if log_ratio_clamp is not None and not log_ratio_clamp > 0:
        raise ValueError(f"log_ratio_clamp: got {log_ratio_clamp}, takes a positive bound or None")
    if not all(0 < value < math.inf for value in tau):
        raise ValueError(f"tau: got {tau}, takes two positive temperatures (A > 0, A <= 0)")


def _rollout_ratio(log_ratio: Tensor, correction: str | None, clip: tuple[float | None, float | None]) -> Tensor | None:
    """exp of old − rollout [B, S]: clamped (truncated importance sampling) or zeroed outside (masked)."""
    if correction is None:
        return None
    level, how = correction.split("_")
    ratio = (log_ratio.sum(-1, keepdim=True) if level == "sequence" else log_ratio).exp()
    low = -math.inf if clip[0] is None else clip[0]
    high = math.inf if clip[1] is None else clip[1]
    if how == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0)


def _vespo_weight(log_ratio: Tensor, a: Tensor, is_ratio: Tensor | None, on: Tensor) -> Tensor:
    """φ(w) = exp(λ + k·ln w − λ·w), 1 at w = 1. log_ratio [B, S], 0 where masked -> like a."""
    log_w = log_ratio.clamp(-20, 20).sum(-1, keepdim=True)  # [B, 1]
    if is_ratio is not None:
        log_is = is_ratio.log().clamp(_MIN_LOG_WEIGHT, _MAX_LOG_WEIGHT)
        log_w = log_w + log_is.masked_fill(~on, 0).sum(-1, keepdim=True)
    log_w = log_w.clamp(_MIN_LOG_WEIGHT, _MAX_LOG_WEIGHT)
    k, lam = torch.where(a >= 0, 2.0, 3.0).to(a), torch.where(a >= 0, 3.0, 2.0).to(a)
    return (lam + k * log_w - lam * log_w.exp()).exp()


def top_entropy_mask(entropy: Tensor, on: Tensor, fraction: float) -> Tensor:
    """The active tokens at or above the (1 − fraction) quantile of their entropies (linear between neighbours).

    By sorting and not torch.quantile, which refuses more than 2^24 entries; the masked ones sort behind the others.
    """
    ordered = F.pad(entropy.masked_fill(~on, math.inf).flatten(), (0, 1), value=math.inf).sort().values
    last = (on.sum() - 1).clamp(min=0)
    position = (1 - fraction) * last.double()
    low = position.long()
    step = (position - low).to(entropy.dtype)
    a, b = ordered.gather(0, torch.stack([low, torch.minimum(low + 1, last)])).unbind()
    return on & (entropy >= a + step * (b - a))


def _reduce(
    loss: Tensor,
    active: Tensor,
    tokens: Tensor,
    reduction: str,
    num_items_in_batch: Tensor | float | None,
    max_completion_length: int | None,
) -> Tensor:
    """loss [B, S] or [B, 1], active [B, S], tokens [B, 1] -> scalar."""
    per_sequence = (loss * active).sum(-1)  # [B]
    n_sequence = max(per_sequence.numel(), 1)
    if reduction == "sequence_mean":
        return (per_sequence / tokens.squeeze(-1)).sum() / n_sequence
    if reduction == "sequence_sum":
        return per_sequence.sum() / n_sequence
    if reduction == "fixed" and max_completion_length is not None:
        return per_sequence.sum() / (n_sequence * max_completion_length)
    if reduction == "global" and num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, dtype=loss.dtype, device=loss.device)
    else:
        items = active.sum()
    return per_sequence.sum() / items.clamp(min=1)


def _mean(x: Tensor, active: Tensor) -> Tensor:
    """Mean over the active tokens of x [B, S] or, one value per sequence, [B, 1]."""
    return (x * active).sum() / active.sum().clamp(min=1)


def _ratio_metrics(
    ratio: Tensor,
    log_ratio: Tensor,
    a: Tensor,
    on: Tensor,
    epsilon: float,
    high: float,
    loss_type: str,
) -> dict[str, Tensor]:
    """Clip fractions, the k3 estimate of KL(old ‖ new), and the ratio's extremes, over the active tokens.

    Without any active token the extremes are inf and -inf (padded, since amin takes no empty tensor).
    """
    active = on.to(ratio.dtype)
    ratio = ratio.expand(on.shape)
    out = {
        "approx_kl": _mean(log_ratio.exp() - 1 - log_ratio, active),
        "ratio_mean": _mean(ratio, active),
        "ratio_min": F.pad(ratio.masked_fill(~on, math.inf).flatten(), (0, 1), value=math.inf).amin(),
        "ratio_max": F.pad(ratio.masked_fill(~on, -math.inf).flatten(), (0, 1), value=-math.inf).amax(),
    }
    if loss_type in CLIPPED:
        low_clipped = ((ratio < 1 - epsilon) & (a < 0)).to(ratio.dtype)
        high_clipped = ((ratio > 1 + high) & (a > 0)).to(ratio.dtype)
        out["clip_low"] = _mean(low_clipped, active)
        out["clip_high"] = _mean(high_clipped, active)
        out["clip_fraction"] = out["clip_low"] + out["clip_high"]
    elif loss_type == "cispo":
        out["clip_high"] = _mean(((ratio > high) & (a > 0)).to(ratio.dtype), active)
        out["clip_fraction"] = out["clip_high"]
    return out
