"""A model's head and the policy-gradient loss as modules.

Shapes: B batch, S tokens, V vocabulary. hidden [B, S, hidden] (or [N, hidden]), target [B, S] (or [N]).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thinkernel.ops.grpo import linear_logprob, policy_loss
from thinkernel.ops.linear import linear


class LinearLogProb(nn.Module):
    """The vocabulary projection of a model, called inside its forward: given targets it returns their log-probability
    and the entropy and never holds a [N, V] tensor; without targets it returns logits."""

    def __init__(self, hidden: int, vocab: int, *, bias: bool = False, softcap: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))
        self.bias = nn.Parameter(torch.zeros(vocab)) if bias else None
        self.softcap = softcap
        nn.init.normal_(self.weight, std=hidden**-0.5)

    def forward(
        self,
        hidden: Tensor,
        target: Tensor | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = True,
        ignore_index: int = -100,
    ) -> Any:
        """With target: (logprob, entropy or None), float32, shaped as target. Without: logits [..., V], not divided by
        a temperature."""
        if target is not None:
            return linear_logprob(
                hidden,
                self.weight,
                target,
                bias=self.bias,
                temperature=temperature,
                softcap=self.softcap,
                ignore_index=ignore_index,
                entropy=entropy,
            )
        logits = linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class GRPOLoss(nn.Module):
    """`tk.policy_loss` with its options held: GRPOLoss(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self, logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor, **tensors: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """logprob, old_logprob, mask [B, S], advantages [B] or [B, S] -> loss, metrics. tensors: what else changes
        from call to call (ref_logprob, rollout_logprob, entropy, num_items_in_batch …)."""
        return policy_loss(logprob, old_logprob, advantages, mask, **self.options, **tensors)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
