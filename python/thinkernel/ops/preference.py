"""dpo_loss and ppo_value_loss: checks, then plain torch under autograd. Formulas: reference/preference.py.

Shapes: P pairs, B sequences, S tokens.
"""

from __future__ import annotations

from torch import Tensor

from thinkernel.ops import checks
from thinkernel.ops.library import plain
from thinkernel.ops.policy_loss import MASKS
from thinkernel.reference import preference as reference


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
    """Direct preference optimisation on token log-probs -> loss (scalar), metrics (accuracy, margin, rewards).

    chosen, ref_chosen, chosen_mask: [P, S] of the preferred completions (linear_logprob's or logprob's log-probs);
    rejected, ref_rejected, rejected_mask: [P, S'] of the others. loss_type: sigmoid (DPO; label_smoothing makes it the
    conservative one), robust, hinge, ipo, sigmoid_norm; the formulas are in reference/preference.py. Differentiable in
    chosen and rejected; the reference's log-probs are constants. Raises ValueError or TypeError naming the argument.
    """
    for side, logprob, ref, mask in (("chosen", chosen, ref_chosen, chosen_mask), ("rejected", rejected, ref_rejected, rejected_mask)):
        checks.tensor(side, logprob, 2, "[P, S]")
        checks.size(side, logprob, 0, chosen.shape[0], "P of chosen")
        checks.tensor(f"ref_{side}", ref, 2, f"{side}'s shape")
        checks.shape(f"ref_{side}", ref, logprob.shape, f"{side}'s shape")
        checks.tensor(f"{side}_mask", mask, 2, f"{side}'s shape", MASKS)
        checks.shape(f"{side}_mask", mask, logprob.shape, f"{side}'s shape")
    checks.same_device("chosen", chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected,
                       chosen_mask=chosen_mask, rejected_mask=rejected_mask)  # fmt: skip
    checks.one_of("loss_type", loss_type, reference.DPO_LOSS_TYPES)
    checks.positive("beta", beta, none_is_fine=False)
    if not 0 <= checks.number("label_smoothing", label_smoothing) < 0.5:
        raise ValueError(f"label_smoothing: got {label_smoothing}, takes a probability in [0, 0.5)")
    if label_smoothing and loss_type not in ("sigmoid", "robust"):
        raise ValueError(f"label_smoothing: got {label_smoothing}, loss_type {loss_type!r} takes none")
    plain("dpo_loss", chosen)
    return reference.dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, loss_type=loss_type, beta=beta,
        label_smoothing=label_smoothing,
    )


def ppo_value_loss(
    value: Tensor, old_value: Tensor, returns: Tensor, mask: Tensor, *, epsilon: float | None = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped value loss -> loss (scalar), metrics: ½·mean max((v − R)², (clip(v, v_old ± epsilon) − R)²).

    value, old_value, returns, mask: [B, S] (or [N]); the mean is over active tokens. epsilon None: the plain squared
    error. Differentiable in value. Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("value", value, (1, 2), "[B, S] or [N]")
    for name, x, dtypes in (("old_value", old_value, checks.FLOATS), ("returns", returns, checks.FLOATS), ("mask", mask, MASKS)):
        checks.tensor(name, x, value.dim(), "value's shape", dtypes)
        checks.shape(name, x, value.shape, "value's shape")
    checks.same_device("value", value, old_value=old_value, returns=returns, mask=mask)
    checks.positive("epsilon", epsilon)
    plain("ppo_value_loss", value)
    return reference.ppo_value_loss(value, old_value, returns, mask, epsilon=epsilon)
