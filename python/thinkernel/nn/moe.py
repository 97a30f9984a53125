"""Feed-forward modules: SwiGLU and a mixture of SwiGLU experts.

Shapes: N tokens, E experts, K experts a token, I intermediate size. x [..., hidden].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from thinkernel.nn.activation import silu
from thinkernel.nn.linear import Linear
from thinkernel.ops.linear import linear
from thinkernel.ops.moe import load_balancing_loss, moe, route, update_expert_bias

SCORES = ("softmax", "softmax_topk", "sigmoid", "sigmoid_topk")


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv:2002.05202): W_down (silu(W_gate x) ∘ W_up x)."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias=False)
        self.up_proj = Linear(hidden, intermediate, bias=False)
        self.down_proj = Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class MoELosses(NamedTuple):
    """balance: the differentiable load-balancing loss, 1 when balanced; counts [E] int32: tokens of each expert."""

    balance: Tensor
    counts: Tensor


class MixtureOfExperts(nn.Module):
    """y = Σ_k w_k · Expert_{e_k}(x) + shared(x), experts and weights chosen by `tk.route`.

    score, n_group, topk_group, group_score, renormalize and scaling are those of `tk.route`: score="sigmoid" with
    expert_bias is DeepSeek-V3, score="softmax" is Mixtral and Qwen3, and with group_score="max" DeepSeek-V2. The bias
    selects and never weighs; it has no gradient, and `update_bias` moves it by the counts of a step (loss-free balancing,
    arXiv:2408.15664).
    """

    def __init__(
        self,
        hidden: int,
        expert_dim: int,
        experts: int,
        top_k: int,
        *,
        shared_experts: int = 0,
        score: str = "softmax",
        expert_bias: bool = False,
        n_group: int = 1,
        topk_group: int = 1,
        group_score: str = "top2",
        renormalize: bool = True,
        scaling: float = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k: got {top_k}, takes 1 to experts = {experts}")
        if n_group < 1 or experts % n_group:
            raise ValueError(f"n_group: got {n_group}, takes a divisor of experts = {experts}")
        if score not in SCORES:
            raise ValueError(f"score: got {score!r}, takes one of {', '.join(SCORES)}")
        self.experts, self.top_k, self.score = experts, top_k, score
        self.n_group, self.topk_group, self.group_score = n_group, topk_group, group_score
        self.renormalize, self.scaling = renormalize, scaling
        self.router = nn.Parameter(torch.empty(experts, hidden))
        self.w_gate_up = nn.Parameter(torch.empty(experts, 2 * expert_dim, hidden))
        self.w_down = nn.Parameter(torch.empty(experts, hidden, expert_dim))
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(experts) if expert_bias else None)
        self.shared = FeedForward(hidden, shared_experts * expert_dim) if shared_experts else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.router, self.w_gate_up, self.w_down):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(
        self, x: Tensor, *, valid: Tensor | None = None, return_losses: bool = False
    ) -> Tensor | tuple[Tensor, MoELosses]:
        """x [..., hidden] -> the same shape. valid [...] bool leaves padding out: it is not routed, not counted, and
        its output is the shared experts' alone."""
        flat = x.reshape(-1, x.shape[-1])  # [N, hidden]
        kept = None if valid is None else valid.reshape(-1).nonzero().squeeze(-1)
        tokens = flat if kept is None else flat[kept]
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # experts are chosen from float32 logits, always
            logits = linear(tokens.to(wide), self.router.to(wide))  # [N, E]
        routing = route(
            logits,
            self.top_k,
            score=self.score,
            bias=self.expert_bias,
            n_group=self.n_group,
            topk_group=self.topk_group,
            group_score=self.group_score,
            renormalize=self.renormalize,
            scaling=self.scaling,
        )
        y = moe(tokens, self.w_gate_up, self.w_down, routing.weights, routing.experts)  # [N, hidden]
        if kept is not None:
            y = torch.zeros_like(flat).index_copy(0, kept, y)
        y = y.view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        if not return_losses:
            return y
        return y, MoELosses(load_balancing_loss(self._probabilities(logits), routing.counts), routing.counts)

    def _probabilities(self, logits: Tensor) -> Tensor:
        """What the balancing loss averages, [N, E], rows summing to one."""
        if self.score.startswith("softmax"):
            return logits.softmax(dim=-1)
        scores = logits.sigmoid()
        return scores / scores.sum(dim=-1, keepdim=True)

    def _apply(self, fn, recurse: bool = True):
        # A selection bias moves in steps of 1e-3, which bfloat16 would swallow: only its device follows the module.
        bias = self.expert_bias
        super()._apply(fn, recurse)
        moved = self.expert_bias
        if bias is not None and moved is not None and moved.dtype in (torch.float16, torch.bfloat16):
            self.expert_bias = bias.to(device=moved.device, dtype=torch.float32)
        return self

    def update_bias(self, counts: Tensor, *, rate: float = 1e-3) -> None:
        """Move every expert's selection bias by ±rate towards the mean load."""
        if self.expert_bias is None:
            raise ValueError("expert_bias: this module was built without one")
        update_expert_bias(self.expert_bias, counts, rate=rate)
