"""A model's head and the policy-gradient loss as modules.

Shapes: B sequences, S tokens of each; packed: N tokens of B sequences and cu_seqlens [B + 1]; D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from thinkernel.ops.grpo import grpo_loss, linear_logprob, policy_loss
from thinkernel.ops.linear import linear

_OPTIONS = frozenset(name for name, p in inspect.signature(policy_loss).parameters.items() if p.kind is p.KEYWORD_ONLY)


class LinearLogProb(nn.Module):
    """The vocabulary projection of a model: given targets it returns their log-probability and the entropy and never
    holds a [N, V] tensor; without targets it returns logits.

    Call it inside the model's forward (FSDP2 gathers the weight and DistributedDataParallel arms its hooks there). To tie
    it to an embedding assign the parameter, `head.weight = embedding.weight`: both gradients are summed in it.

    hidden: D. vocab: V, any number; with `group` this process's share of it (targets stay numbers of the whole vocabulary).
    bias: a parameter [V], zeros at first. softcap: c of c·tanh(y / c). keep_logits, group: linear_logprob's.
    """

    def __init__(
        self, hidden: int, vocab: int, *, bias: bool = False, softcap: float | None = None, keep_logits: bool | int = False,
        group: object | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))
        self.bias = nn.Parameter(torch.zeros(vocab)) if bias else None
        self.softcap, self.group = softcap, group
        self.keep_logits: Any = keep_logits
        nn.init.normal_(self.weight, std=hidden**-0.5)

    def forward(
        self, hidden: Tensor, target: Tensor | None = None, *, temperature: float = 1.0, entropy: bool = True, ignore_index: int = -100
    ) -> Any:
        """hidden [B, S, D], target [B, S] (or packed: [N, D], [N]) -> logprob, entropy: float32, shaped as target.

        Both are of softmax(z / temperature), z the capped logits; rows whose target is ignore_index give 0, 0 and cost
        nothing. entropy=False: None in its place. Without target: z [..., V], in hidden's dtype, not divided by a
        temperature (with group: this process's columns of it)."""
        if target is not None:
            return linear_logprob(
                hidden, self.weight, target, bias=self.bias, temperature=temperature, softcap=self.softcap,
                ignore_index=ignore_index, entropy=entropy, keep_logits=self.keep_logits, group=self.group,
            )
        logits = linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def extra_repr(self) -> str:
        vocab, hidden = self.weight.shape
        options = {"bias": self.bias is not None, "softcap": self.softcap, "keep_logits": self.keep_logits}
        return f"{hidden}, {vocab}" + "".join(f", {name}={value}" for name, value in options.items() if value)


class GRPOLoss(nn.Module):
    """`tk.policy_loss` with its options held: GRPOLoss(loss_type="dapo", epsilon=0.2, epsilon_high=0.28).

    Takes log-probabilities, as a model with a LinearLogProb head returns them; `from_hidden` takes hidden states and the
    head's weight instead (tk.grpo_loss). An option given again in a call counts for that call. TypeError names an option
    that policy_loss does not have.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = _known(options)

    def forward(
        self, logprob: Tensor, old_logprob: Tensor | None, advantages: Tensor, mask: Tensor, **tensors: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """logprob, old_logprob, mask [B, S] (packed: [N], with cu_seqlens), advantages [B] or logprob's shape -> loss
        (scalar), metrics (detached scalars). old_logprob None: on-policy. tensors: what changes from call to call
        (ref_logprob, rollout_logprob, entropy, cu_seqlens, num_items_in_batch …)."""
        return policy_loss(logprob, old_logprob, advantages, mask, **self.options | _known(tensors))

    def from_hidden(
        self, hidden: Tensor, weight: Tensor, target: Tensor, old_logprob: Tensor | None, advantages: Tensor, mask: Tensor, *,
        bias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100,
        keep_logits: bool = False, group: object | None = None, **tensors: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden [B, S, D], weight [V, D], target [B, S] (packed: [N, D], [N], with cu_seqlens) and forward's -> the same.

        linear_logprob's entropy feeds the metrics, the bonus and the top-entropy mask; masked tokens cost nothing."""
        return grpo_loss(
            hidden, weight, target, old_logprob, advantages, mask, bias=bias, temperature=temperature, softcap=softcap,
            ignore_index=ignore_index, keep_logits=keep_logits, group=group, **self.options | _known(tensors),
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _known(options: dict[str, Any]) -> dict[str, Any]:
    for name in sorted(set(options) - _OPTIONS):
        raise TypeError(f"{name}: not an option of policy_loss, which takes {', '.join(sorted(_OPTIONS))}")
    return options
