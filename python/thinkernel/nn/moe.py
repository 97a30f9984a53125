"""Feed-forward modules: a gated feed-forward and a mixture of experts. docs/moe.md: which options are which model.

Shapes: N tokens, E experts, K experts a token, I intermediate size. x [..., hidden].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thinkernel.nn.activation import sigmoid, silu
from thinkernel.nn.linear import Linear
from thinkernel.ops import checks
from thinkernel.ops.linear import linear
from thinkernel.ops.moe import (
    ACTIVATIONS,
    SCORES,
    load_balancing_loss,
    moe,
    route,
    router_z_loss,
    sequence_balance_loss,
    update_expert_bias,
)
from thinkernel.ops.moe_parallel import expert_parallel, expert_range
from thinkernel.reference.moe import router_probabilities

EXPERT_TENSORS = ("w_gate_up", "w_down", "b_gate_up", "b_down")


class FeedForward(nn.Module):
    """W_down act(W_gate x, W_up x).

    activation: "swiglu", silu(gate) ∘ up (Shazeer, arXiv:2002.05202), with a limit silu(min(gate, limit)) ∘ clamp(up, ±limit)
    (DeepSeek-V4); "geglu_tanh", gelu_tanh(gate) ∘ up; "relu2", relu(up)² without a gate.
    """

    def __init__(self, hidden: int, intermediate: int, *, activation: str = "swiglu", limit: float | None = None) -> None:
        super().__init__()
        checks.one_of("activation", activation, ("swiglu", "geglu_tanh", "relu2"))
        checks.positive("limit", limit)
        self.activation, self.limit = activation, limit
        if activation != "relu2":
            self.gate_proj = Linear(hidden, intermediate, bias=False)
        self.up_proj = Linear(hidden, intermediate, bias=False)
        self.down_proj = Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if self.activation == "relu2":
            return self.down_proj(up.relu().square())
        gate = self.gate_proj(x)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.activation == "swiglu":
            return self.down_proj(silu(gate) * up)
        # gelu_tanh(g) = g·σ(2·√(2/π)·(g + 0.044715 g³)), through the one sigmoid whose rows do not see each other
        wide = gate if gate.dtype == torch.float64 else gate.float()
        inner = wide * sigmoid(1.5957691216057308 * (wide + 0.044715 * wide * wide * wide))
        return self.down_proj(inner.to(gate.dtype) * up)


class MoELosses(NamedTuple):
    """What was not asked for is None. balance: the load-balancing loss, 1 when balanced (K with balance="top_k"); z: the router
    z-loss; both differentiable through the router's logits. counts [E] int32: this rank's tokens of each expert. experts
    [..., K]: the choices in `expert_dtype`, 0 for padding."""

    balance: Tensor | None = None
    counts: Tensor | None = None
    z: Tensor | None = None
    experts: Tensor | None = None


def expert_dtype(experts: int) -> torch.dtype:
    """The smallest integer type that numbers so many experts: what recorded choices are kept in."""
    return torch.uint8 if experts <= 256 else torch.int16 if experts <= 2**15 else torch.int32


class MixtureOfExperts(nn.Module):
    """y = Σ_k w_k · Expert_{e_k}(x) + shared(x), experts and weights chosen by `tk.route`, run by `tk.moe`.

    score, n_group, topk_group, group_score, renormalize and scaling are those of `tk.route`: score="sigmoid" with
    expert_bias is DeepSeek-V3, score="softmax" is Mixtral and Qwen3, and with group_score="max" DeepSeek-V2. expert_bias
    selects and never weighs; it has no gradient, and `update_bias` moves it by the counts of a step (loss-free balancing,
    arXiv:2408.15664). router_bias is part of the logits (gpt-oss). hash_vocab: instead of the router's best, a token gets
    the experts of its row in the buffer `token_experts` [hash_vocab, K] (DeepSeek-V4's first layers).

    activation, limit, weight_on and layout are those of `tk.moe`; bias gives the experts b_gate_up and b_down. Parameters:
    router [E, hidden], w_gate_up [E, 2I, hidden], w_down [E, hidden, I], layout "in_out" turns their last two round.
    shared_experts: so many times shared_dim (default expert_dim) is the intermediate size of `shared`, a FeedForward of the
    same activation; shared_gate multiplies it by sigmoid(shared_gate(x)) (Qwen2-MoE).

    balance: "one" or "top_k" (`tk.load_balancing_loss` over the batch), or "sequence" (`tk.sequence_balance_loss`).
    group: expert parallelism over that torch.distributed group; this rank holds `expert_range` of the experts and routes its
    own tokens (docs/moe.md). load_state_dict takes whole tensors and keeps this rank's part; `shard` does so afterwards.
    """

    def __init__(
        self,
        hidden: int,
        expert_dim: int,
        experts: int,
        top_k: int,
        *,
        shared_experts: int = 0,
        shared_dim: int | None = None,
        shared_gate: bool = False,
        score: str = "softmax",
        router_bias: bool = False,
        expert_bias: bool = False,
        n_group: int = 1,
        topk_group: int = 1,
        group_score: str = "top2",
        renormalize: bool = True,
        scaling: float = 1.0,
        hash_vocab: int | None = None,
        activation: str = "swiglu",
        limit: float | None = None,
        bias: bool = False,
        weight_on: str = "output",
        layout: str = "out_in",
        balance: str = "one",
        group: Any = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k: got {top_k}, takes 1 to experts = {experts}")
        if n_group < 1 or experts % n_group:
            raise ValueError(f"n_group: got {n_group}, takes a divisor of experts = {experts}")
        checks.one_of("score", score, SCORES)
        checks.one_of("activation", activation, ACTIVATIONS)
        checks.one_of("weight_on", weight_on, ("output", "input"))
        checks.one_of("layout", layout, ("out_in", "in_out"))
        checks.one_of("balance", balance, ("one", "top_k", "sequence"))
        checks.positive("limit", limit)
        checks.process_group("group", group)
        if shared_gate and not shared_experts:
            raise ValueError("shared_gate: got True, takes shared_experts of at least 1 beside it")
        self.experts, self.top_k, self.score = experts, top_k, score
        self.n_group, self.topk_group, self.group_score = n_group, topk_group, group_score
        self.renormalize, self.scaling, self.balance = renormalize, scaling, balance
        self.activation, self.limit, self.weight_on, self.layout, self.group = activation, limit, weight_on, layout, group

        first, end = (0, experts) if group is None else expert_range(experts, group)
        columns = expert_dim if activation == "relu2" else 2 * expert_dim
        up, down = (columns, hidden), (hidden, expert_dim)
        if layout == "in_out":
            up, down = up[::-1], down[::-1]
        self.router = nn.Parameter(torch.empty(experts, hidden))
        self.router_bias = nn.Parameter(torch.empty(experts)) if router_bias else None
        self.w_gate_up = nn.Parameter(torch.empty(end - first, *up))
        self.w_down = nn.Parameter(torch.empty(end - first, *down))
        self.b_gate_up = nn.Parameter(torch.empty(end - first, columns)) if bias else None
        self.b_down = nn.Parameter(torch.empty(end - first, hidden)) if bias else None
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(experts) if expert_bias else None)
        self.token_experts: Tensor | None
        table = None if hash_vocab is None else torch.arange(hash_vocab * top_k).view(hash_vocab, top_k) % experts
        self.register_buffer("token_experts", table)
        width = shared_experts * (expert_dim if shared_dim is None else shared_dim)
        self.shared = FeedForward(hidden, width, activation=activation, limit=limit) if shared_experts else None
        self.shared_gate = Linear(hidden, 1, bias=False) if shared_gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        turned = self.layout == "in_out"
        nn.init.normal_(self.router, std=self.router.shape[-1] ** -0.5)
        for weight in (self.w_gate_up, self.w_down):
            nn.init.normal_(weight, std=weight.shape[1 if turned else 2] ** -0.5)
        for bias in (self.router_bias, self.b_gate_up, self.b_down):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        experts: Tensor | None = None,
        tokens: Tensor | None = None,
        return_losses: bool = False,
        return_experts: bool = False,
    ) -> Any:
        """x [..., hidden] -> the same shape, and MoELosses beside it where losses or experts are asked for.

        valid [...] bool leaves padding out: it is not routed, not counted, and its output is the shared experts' alone.
        experts [..., K], of any integer type, replays recorded choices with the live router's weights (padding's are not
        read). tokens [...]: the token numbers, of a module with hash_vocab. return_losses fills in balance, counts and z,
        return_experts experts."""
        flat = x.reshape(-1, x.shape[-1])  # [N, hidden]
        if valid is not None:
            checks.tensor("valid", valid, x.dim() - 1, "x's shape without hidden", (torch.bool,))
            checks.shape("valid", valid, x.shape[:-1], "x's shape without hidden")
        kept = None if valid is None else valid.reshape(-1).nonzero().squeeze(-1)
        rows = flat if kept is None else flat[kept]
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # experts are chosen from float32 logits, always
            bias = None if self.router_bias is None else self.router_bias.to(wide)
            logits = linear(rows.to(wide), self.router.to(wide), bias)  # [N, E]
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
            experts=self._given(x, kept, experts, tokens),
        )
        options: dict[str, Any] = dict(
            activation=self.activation, limit=self.limit, weight_on=self.weight_on, layout=self.layout, b_gate_up=self.b_gate_up,
            b_down=self.b_down,
        )  # fmt: skip
        weights = (self.w_gate_up, self.w_down, routing.weights, routing.experts)
        if self.group is None:
            y = moe(rows, *weights, **options)  # [N, hidden]
        else:
            y = expert_parallel(rows, *weights, n_expert=self.experts, group=self.group, **options)
        if kept is not None:
            y = torch.zeros_like(flat, dtype=y.dtype).index_copy(0, kept, y)
        y = y.view_as(x)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else sigmoid(self.shared_gate(x)) * shared)
        if not (return_losses or return_experts):
            return y
        losses = MoELosses()
        if return_losses:
            balance = self._balance(logits, routing.experts, routing.counts, x, valid)
            losses = MoELosses(balance, routing.counts, router_z_loss(logits, group=self.group))
        if return_experts:
            losses = losses._replace(experts=self._recorded(routing.experts, x, kept))
        return y, losses

    def _given(self, x: Tensor, kept: Tensor | None, experts: Tensor | None, tokens: Tensor | None) -> Tensor | None:
        """The choices that are not the router's, [N, K] int32: replayed ones, or those of the tokens' numbers."""
        if experts is None and self.token_experts is None:
            return None
        if experts is not None:
            if experts.is_floating_point() or experts.dtype == torch.bool or experts.shape != (*x.shape[:-1], self.top_k):
                wanted = [*x.shape[:-1], self.top_k]
                raise ValueError(f"experts: got {experts.dtype} {list(experts.shape)}, takes integers [..., K] = {wanted}")
            given = experts.reshape(-1, self.top_k)
            given = given if kept is None else given[kept]
            return given if given.dtype == torch.int64 else given.int()  # what int32 does not hold is refused, not cut off
        assert self.token_experts is not None
        if tokens is None or tokens.shape != x.shape[:-1]:
            got = None if tokens is None else list(tokens.shape)
            raise ValueError(f"tokens: got {got}, takes the token numbers {list(x.shape[:-1])} of a module with hash_vocab")
        checks.tensor("tokens", tokens, x.dim() - 1, "x's shape without hidden", checks.INTEGERS)
        flat = tokens.reshape(-1)
        flat = flat if kept is None else flat[kept]
        if not torch.compiler.is_compiling():
            checks.within("tokens", flat, 0, len(self.token_experts) - 1, "the vocabulary of hash_vocab")
        return self.token_experts[flat.long()].int()

    def _recorded(self, chosen: Tensor, x: Tensor, kept: Tensor | None) -> Tensor:
        chosen = chosen.to(expert_dtype(self.experts))
        if kept is not None:
            rows = x.shape[:-1].numel()
            chosen = chosen.new_zeros(rows, self.top_k).index_copy(0, kept, chosen)
        return chosen.view(*x.shape[:-1], self.top_k)

    def _balance(self, logits: Tensor, chosen: Tensor, counts: Tensor, x: Tensor, valid: Tensor | None) -> Tensor:
        probs = router_probabilities(logits, self.score)
        if self.balance != "sequence":
            return load_balancing_loss(probs, counts, normalize=self.balance, group=self.group)
        size = x.shape[-2] if x.dim() > 1 else 1
        lengths = (torch.ones(x.shape[:-1], device=x.device, dtype=torch.bool) if valid is None else valid).reshape(-1, size).sum(-1)
        return sequence_balance_loss(probs, chosen, nn.functional.pad(lengths.cumsum(0), (1, 0)), group=self.group)

    def _apply(self, fn, recurse: bool = True):
        # A selection bias moves in steps of 1e-3, which bfloat16 would swallow: only its device follows the module.
        bias = self.expert_bias
        super()._apply(fn, recurse)
        moved = self.expert_bias
        if bias is not None and moved is not None and moved.dtype in (torch.float16, torch.bfloat16):
            self.expert_bias = bias.to(device=moved.device, dtype=torch.float32)
        return self

    def update_bias(self, counts: Tensor, *, rate: float = 1e-3, group: Any = None) -> None:
        """Move every expert's selection bias by ±rate towards the mean load of all ranks of group (default: the module's)."""
        if self.expert_bias is None:
            raise ValueError("expert_bias: this module was built without one")
        update_expert_bias(self.expert_bias, counts, rate=rate, group=self.group if group is None else group)

    # ---- expert parallelism

    def shard(self, group: Any) -> MixtureOfExperts:
        """Keep this rank's experts alone: from here on the module is expert parallel over group."""
        if self.group is not None:
            raise ValueError("group: this module is expert parallel already")
        first, end = expert_range(self.experts, group)
        for name in EXPERT_TENSORS:
            whole = getattr(self, name)
            if whole is not None:
                setattr(self, name, nn.Parameter(whole.detach()[first:end].clone(), requires_grad=whole.requires_grad))
        self.group = group
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.group is not None:
            first, end = expert_range(self.experts, self.group)
            for name in EXPERT_TENSORS:
                given = state_dict.get(prefix + name)
                if given is not None and given.shape[0] == self.experts:
                    state_dict[prefix + name] = given[first:end]
        super()._load_from_state_dict(state_dict, prefix, *rest)
