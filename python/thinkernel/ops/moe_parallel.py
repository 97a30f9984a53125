"""Experts spread over a torch.distributed group: every rank has its own tokens and its own experts.

A slot (token, k) travels to the rank of its expert and its result comes back (all-to-all); there a token's results are
weighed and added up in k order, as one process does it. The weight's gradient and the experts' are computed where the
expert is, from the same numbers as in one process:

    forward   rows = x of the slots  →  expert(rows)          →  y_t = Σ_k w_k · result_k   (weight on the input: travels too)
    backward  dy of the slots, w     →  the experts' backward →  dx_t = Σ_k dx_k, dw; the expert weights' gradients stay

An expert sees its rows in the order of ranks, then tokens: that of the ranks' tokens one after the other.
Shapes: N tokens of this rank, H hidden, K experts a token, E experts in all, L here, M slots that leave, M' that arrive.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinkernel.ops import checks
from thinkernel.ops.grpo_parallel import gathered
from thinkernel.ops.moe import moe, moe_backward, moe_forward


def expert_range(n_expert: int, group: Any, rank: int | None = None) -> tuple[int, int]:
    """First and past-the-last expert of a rank (this one): stretches as even as can be, the longer ones first."""
    checks.process_group("group", group)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group) if rank is None else rank
    share, more = divmod(n_expert, ranks)
    first = rank * share + min(rank, more)
    return first, first + share + (rank < more)


def expert_parallel(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, experts: Tensor, *, n_expert: int, group: Any,
    activation: str = "swiglu", b_gate_up: Tensor | None = None, b_down: Tensor | None = None, weight_on: str = "output",
    layout: str = "out_in", limit: float | None = None,
) -> Tensor:
    """tk.moe with the experts spread over `group`: x [N, H] of this rank -> [N, H].

    w_gate_up, w_down and the biases hold experts expert_range(n_expert, group) of all n_expert; weights and experts [N, K]
    are of this rank's tokens, experts numbered 0 to n_expert − 1 (another number adds 0). Every rank of the group has to
    call it, and its backward, also with N = 0. Gradients: of x and weights those of this rank's tokens, of the experts'
    weights the sum over all ranks' tokens.
    """
    checks.process_group("group", group)
    first, end = expert_range(n_expert, group)
    checks.tensor("x", x, 2, "[N, H]")
    checks.tensor("experts", experts, 2, "[N, K]", checks.INTEGERS)
    checks.shape("weights", weights, tuple(experts.shape), "experts' shape")
    checks.size("experts", experts, 0, x.shape[0], "N of x")
    for name, w in (("w_gate_up", w_gate_up), ("w_down", w_down), ("b_gate_up", b_gate_up), ("b_down", b_down)):
        if w is not None:
            checks.size(name, w, 0, end - first, f"experts {first} to {end - 1} of {n_expert} on this rank")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_gate_up, w_down = x.to(dtype), w_gate_up.to(dtype), w_down.to(dtype)
        b_gate_up, b_down = (None if b is None else b.to(dtype) for b in (b_gate_up, b_down))
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, w_gate_up, w_down, weights, b_gate_up, b_down)]
    options = (activation, weight_on, layout, limit)
    return _ExpertParallel.apply(x, w_gate_up, w_down, weights, experts, b_gate_up, b_down, options, n_expert, group, needs)


class _Exchange:
    """Who sends which slots to whom: from experts [N, K] of every rank."""

    def __init__(self, experts: Tensor, n_expert: int, group: Any, needs: list[bool]) -> None:
        self.group, (self.n, self.k) = group, experts.shape
        flat = experts.reshape(-1).long()
        self.foreign = (flat < 0) | (flat >= n_expert)
        flat = flat.masked_fill(self.foreign, n_expert)
        counts = torch.bincount(flat, minlength=n_expert + 1)
        wants = counts.new_tensor([any(needs), needs[0], needs[3]])  # a gradient that one rank wants, all compute
        table = gathered(torch.cat([counts[:-1], wants]), group).cpu()  # [R, E + 3]
        self.backward, self.want_x, self.want_weights = (bool(w) for w in table[:, n_expert:].amax(0))
        bounds = [expert_range(n_expert, group, r) for r in range(len(table))]
        own = table[dist.get_rank(group)]
        self.sent = [int(own[first:end].sum()) for first, end in bounds]  # slots to each rank
        first, end = expert_range(n_expert, group)
        arriving = table[:, first:end]  # [R, L]
        self.received = arriving.sum(1).tolist()
        here = torch.arange(end - first).repeat(len(table)).repeat_interleave(arriving.reshape(-1))
        self.experts = here.int().to(experts.device).unsqueeze(1)  # [M', 1]
        order = flat.argsort(stable=True)  # foreign slots last
        self.order = order[: sum(self.sent)]  # [M]
        self.place = torch.full_like(flat, len(self.order))  # of a slot among those sent; the row past the last is 0
        self.place[self.order] = torch.arange(len(self.order), device=flat.device)

    def there(self, x: Tensor) -> Tensor:
        """Rows [M, ...] in the order of `order` -> the rows that arrive here, [M', ...]."""
        return self._move(x, self.sent, self.received)

    def back(self, x: Tensor) -> Tensor:
        """The way back: [M', ...] -> [M, ...]."""
        return self._move(x, self.received, self.sent)

    def _move(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = x.new_empty((sum(received), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=self.group)
        return out

    def combine(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Σ_k w_k · rows_k in k order: rows [M, H] -> [N, H], in float32."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        table = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        total = rows.new_zeros(self.n, rows.shape[1], dtype=wide)
        for k, place in enumerate(self.place.view(self.n, self.k).unbind(1)):
            part = table[place].to(wide)
            # addcmul is fused where torch is built with FMA, as in the kernels: then the bits are those of one process.
            total = total + part if weights is None else torch.addcmul(total, weights[:, k : k + 1].to(wide), part)
        return total.to(rows.dtype)


class _ExpertParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, experts: Tensor, b1: Tensor | None, b2: Tensor | None,
        options: tuple[Any, ...], n_expert: int, group: Any, needs: list[bool],
    ) -> Tensor:
        exchange = _Exchange(experts, n_expert, group, needs)
        activation, weight_on, layout, limit = options
        on_input = weight_on == "input"
        rows = exchange.there(x[exchange.order // exchange.k])  # [M', H]
        own = weights.masked_fill(exchange.foreign.view_as(weights), 0)
        scales = _scales(exchange, own) if on_input else torch.ones_like(exchange.experts, dtype=own.dtype)  # [M', 1]
        kept = rows.new_empty(0)
        if w1.shape[0] == 0:  # no experts here, so no rows either
            out = rows
        elif exchange.backward:
            tensors = (rows, w1, w2, scales, exchange.experts, b1, b2, None, None)
            out, kept = moe_forward(*tensors, activation, weight_on, layout, limit, True)
        else:
            out = moe(
                rows, w1, w2, scales, exchange.experts, activation=activation, b_gate_up=b1, b_down=b2, weight_on=weight_on,
                layout=layout, limit=limit,
            )
        y = exchange.combine(exchange.back(out), None if on_input else own)
        if exchange.backward:
            ctx.save_for_backward(rows, kept, w1, w2, own, b1, b2)
            ctx.exchange, ctx.options, ctx.needs = exchange, options, needs
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        rows, kept, w1, w2, own, b1, b2 = ctx.saved_tensors
        exchange: _Exchange = ctx.exchange
        dys = exchange.there(dy[exchange.order // exchange.k])  # [M', H]
        scales = _scales(exchange, own)
        needs = [exchange.want_x, ctx.needs[1], ctx.needs[2], exchange.want_weights, ctx.needs[4], ctx.needs[5]]
        if w1.shape[0] == 0:
            found = [rows.new_empty(0) if t is None else torch.zeros_like(t) for t in (rows, w1, w2, scales, b1, b2)]
        else:
            found = moe_backward(dys, kept, rows, w1, w2, scales, exchange.experts, b1, b2, *ctx.options, needs)
        dx = exchange.combine(exchange.back(found[0]), None) if exchange.want_x else None
        dweights = None
        if exchange.want_weights:
            moved = exchange.back(found[3]).reshape(-1)  # [M]
            dweights = torch.cat([moved, moved.new_zeros(1)])[exchange.place].view_as(own)
        mine = [g if need else None for g, need in zip((dx, *found[1:3], dweights, *found[4:]), ctx.needs, strict=True)]
        return *mine[:4], None, *mine[4:], *(None,) * 4


def _scales(exchange: _Exchange, weights: Tensor) -> Tensor:
    """The weights of the slots that arrive here, [M', 1]."""
    return exchange.there(weights.reshape(-1, 1)[exchange.order])
