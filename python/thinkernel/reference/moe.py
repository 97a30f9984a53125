"""Mixture of experts in plain torch: routing, the expert feed-forward, and the losses that balance it.

Shapes: N tokens, H hidden, I intermediate, E experts, K experts per token (top_k), B sequences,
G groups of experts, M slots = the (token, k) pairs whose expert lives here, at most N*K.

This file is the specification: every backend is compared with it. float16 and bfloat16 are computed in
float32 and rounded once at the end, float64 stays float64. Everything is differentiable where the mathematics
is: routing weights, tokens and expert weights have gradients; a selection and a selection bias have none.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SCORES = ("softmax", "softmax_topk", "sigmoid", "sigmoid_topk", "sqrtsoftplus")
ACTIVATIONS = ("swiglu", "gpt_oss", "geglu", "geglu_tanh", "relu2")


class Routing(NamedTuple):
    """Where every token goes. A slot is a (token, k) pair, number ``token * K + k``."""

    weights: Tensor  # [N, K] float32 (float64 for float64 logits), differentiable
    experts: Tensor  # [N, K] int32, best first
    counts: Tensor  # [E] int32, slots per expert
    order: Tensor  # [N * K] int32, the slots sorted by expert, stable: within an expert in token order
    offsets: Tensor  # [E + 1] int32, expert e owns order[offsets[e] : offsets[e + 1]]


def _compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last dimension, best first; ties go to the lower index.

    torch.topk leaves ties open, a stable sort does not.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _sqrt_softplus(z: Tensor) -> Tensor:
    """sqrt(softplus(z)) = sqrt(log(1 + e^z)), which tends to e^(z/2) on the left.

    The quotient sigmoid(z) / (2 sqrt(softplus(z))) of its derivative is 0/0 once softplus underflows (z < -104 in
    float32), so the limit takes over where it is exact to the last bit: its relative error is e^z / 4.
    """
    cut = -35.0 if z.dtype == torch.float64 else -15.0
    inner = z.clamp(min=cut)
    return torch.where(z < cut, (z.clamp(max=cut) / 2).exp(), torch.logaddexp(inner, torch.zeros_like(inner)).sqrt())


def router_scores(logits: Tensor, score: str) -> Tensor:
    """s of route's table, [N, E]: what weighs. float32, or float64 for float64 logits."""
    z = _compute(logits)
    if score == "softmax":
        return z.softmax(-1)
    if score == "softmax_topk":
        return z
    return _sqrt_softplus(z) if score == "sqrtsoftplus" else z.sigmoid()


def router_probabilities(logits: Tensor, score: str) -> Tensor:
    """What a balance loss averages: softmax(z), or s / Σ_E s where s is no softmax. [N, E], rows sum to 1."""
    if score.startswith("softmax"):
        return _compute(logits).softmax(-1)
    s = router_scores(logits, score)
    return s / s.sum(-1, keepdim=True)


def _keep_groups(choice: Tensor, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """-inf on every expert outside the token's topk_group best groups.

    -inf and never 0: a negative bias would put the kept experts below a 0.
    """
    grouped = choice.unflatten(-1, (n_group, -1))  # [N, G, E/G]
    if group_score == "max":
        best = grouped.amax(-1)  # [N, G]
    elif group_score == "top2":
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    else:
        raise ValueError(f"group_score: got {group_score!r}, takes 'top2' or 'max'")
    dropped = torch.ones_like(best, dtype=torch.bool).scatter(-1, _top(best, topk_group), False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)  # [N, E]


def _sort_by_expert(experts: Tensor, n_expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """counts [E], order [N*K], offsets [E+1] of the slots, all int32."""
    flat = experts.reshape(-1).long()
    counts = torch.bincount(flat, minlength=n_expert)[:n_expert]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return counts.int(), flat.argsort(stable=True).int(), offsets.int()


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2",
    renormalize: bool = True,
    scaling: float = 1.0,
    experts: Tensor | None = None,
) -> Routing:
    """Choose ``top_k`` experts per token and weigh them. logits [N, E] -> :class:`Routing`.

    ``select`` picks, ``s`` weighs; a ``bias`` [E] is added to ``select`` alone and gets no gradient:

    ================  ==================  =============================  ==========================================
    ``score``         select              s                              rule of
    ================  ==================  =============================  ==========================================
    "softmax"         softmax(z) + bias   softmax(z)                     Mixtral, Qwen3, DeepSeek-V2, ERNIE 4.5
    "softmax_topk"    z + bias            softmax over the selected z    gpt-oss
    "sigmoid"         sigmoid(z) + bias   sigmoid(z)                     DeepSeek-V3, Kimi K2, GLM, MiniMax
    "sigmoid_topk"    z + bias            sigmoid(z)                     Llama 4 (top_k 1, renormalize=False)
    "sqrtsoftplus"    s + bias            sqrt(softplus(z))              DeepSeek-V4
    ================  ==================  =============================  ==========================================

    With ``n_group`` > 1 only the ``topk_group`` best groups of E/n_group neighbouring experts stay in the choice; a
    group scores its best expert ("max", DeepSeek-V2) or the sum of its two best ("top2", DeepSeek-V3), on select.
    ``renormalize`` divides by the selected sum (plus 1e-20 for sigmoid and sqrtsoftplus); for softmax that is
    computed as the softmax over the selected logits, the same number without the underflow. ``scaling`` comes last.
    Ties go to the lower index. ``experts`` [N, K] replays a given choice with the live weights.
    """
    if score not in SCORES:
        raise ValueError(f"score: got {score!r}, takes one of {SCORES}")
    n_expert = logits.shape[-1]
    z = _compute(logits)  # [N, E]
    s = router_scores(logits, score)  # [N, E]

    if experts is None:
        with torch.no_grad():
            choice = z if score.endswith("_topk") else s
            if bias is not None:
                choice = choice + bias.to(choice.dtype)
            if n_group > 1:
                if top_k > topk_group * (n_expert // n_group):
                    raise ValueError(
                        f"top_k: got {top_k}, takes at most topk_group * E / n_group = "
                        f"{topk_group * (n_expert // n_group)}"
                    )
                choice = _keep_groups(choice, n_group, topk_group, group_score)
            index = _top(choice, top_k)  # [N, K]
    else:
        index = experts.long()

    if score == "softmax_topk" or (score == "softmax" and renormalize):
        weights = z.gather(-1, index).softmax(-1)  # [N, K]
    else:
        weights = s.gather(-1, index)
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    counts, order, offsets = _sort_by_expert(index, n_expert)
    return Routing(weights * scaling, index.int(), counts, order, offsets)


def activate(z: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """The pre-activation [M, 2I] = [gate | up] (relu2: [M, I]) -> [M, I].

    swiglu      silu(gate) * up; with a limit silu(min(gate, limit)) * clamp(up, -limit, limit)   (DeepSeek-V4: 10)
    gpt_oss     columns interleaved gate, up: g = min(gate, limit), u = clamp(up, ±limit), limit 7 unless given;
                (u + 1) * g * sigmoid(1.702 g)
    geglu       gelu(gate) * up, geglu_tanh with the tanh approximation
    relu2       relu(z)², no gate
    A clamped entry gets gradient 0.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, takes one of {ACTIVATIONS}")
    if activation == "relu2":
        return z.relu().square()
    if activation == "gpt_oss":
        gate, up = z[..., 0::2], z[..., 1::2]
        limit = 7.0 if limit is None else limit
    else:
        gate, up = z.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "gpt_oss":
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    if activation == "swiglu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "geglu_tanh" else "none") * up


def moe(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    experts: Tensor,
    *,
    activation: str = "swiglu",
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    weight_on: str = "output",
    layout: str = "out_in",
    limit: float | None = None,
) -> Tensor:
    """Every token through its experts: ``y_t = Σ_k w_tk · expert_{e_tk}(x_t)``, summed in k order.

    ``expert_e(x) = act(x·W1_e + b1_e)·W2_e + b2_e``. x [N, H] or [B, S, H]; weights, experts [N, K] (or [B, S, K]);
    layout "out_in": w_gate_up [E, 2I, H], w_down [E, H, I]; "in_out": [E, H, 2I], [E, I, H]; b_gate_up [E, 2I],
    b_down [E, H]; relu2 has I columns for 2I. ``weight_on="input"`` (Llama 4) is ``Σ_k expert(w_tk · x_t)``.
    An expert number outside [0, E) belongs to another rank: it adds 0 and its weight gets gradient 0.
    """
    if weight_on not in ("output", "input"):
        raise ValueError(f"weight_on: got {weight_on!r}, takes 'output' or 'input'")
    if layout not in ("out_in", "in_out"):
        raise ValueError(f"layout: got {layout!r}, takes 'out_in' or 'in_out'")
    n_expert, top_k, hidden = w_gate_up.shape[0], experts.shape[-1], x.shape[-1]
    tokens = _compute(x).reshape(-1, hidden)  # [N, H]
    n_slot = tokens.shape[0] * top_k
    flat = experts.reshape(-1).long()  # [N*K]
    foreign = (flat < 0) | (flat >= n_expert)
    slot_weights = _compute(weights).to(tokens.dtype).reshape(-1, 1).masked_fill(foreign.unsqueeze(1), 0)  # [N*K, 1]

    counts, order, _ = _sort_by_expert(flat.masked_fill(foreign, n_expert), n_expert)  # the foreign slots sort last
    sizes = counts.tolist()
    order = order[: sum(sizes)].long()  # [M]
    inputs = _rows(tokens, order // top_k)  # [M, H]
    if weight_on == "input":
        inputs = inputs * slot_weights[order]

    # One slice per expert. unbind, not w[e]: the gradient of n_expert separate indexings would be n_expert full-size
    # tensors.
    w1 = w_gate_up.to(tokens.dtype).unbind(0)
    w2 = w_down.to(tokens.dtype).unbind(0)
    b1 = (None,) * n_expert if b_gate_up is None else b_gate_up.to(tokens.dtype).unbind(0)
    b2 = (None,) * n_expert if b_down is None else b_down.to(tokens.dtype).unbind(0)
    outputs = []
    for e, rows in enumerate(inputs.split(sizes)):
        up, down = (w1[e], w2[e]) if layout == "out_in" else (w1[e].T, w2[e].T)
        outputs.append(F.linear(activate(F.linear(rows, up, b1[e]), activation, limit), down, b2[e]))

    # Back to slots; a foreign slot reads the zero row behind the last one.
    outputs.append(tokens.new_zeros(1, hidden))
    place = torch.full((n_slot,), order.numel(), device=x.device)
    place[order] = torch.arange(order.numel(), device=x.device)
    slots = _rows(torch.cat(outputs), place)  # [N*K, H]
    if weight_on == "output":
        slots = slots * slot_weights
    y = slots.new_zeros(tokens.shape)
    for part in slots.unflatten(0, (-1, top_k)).unbind(1):
        y = y + part
    return y.reshape(x.shape).to(x.dtype)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index], with a backward that adds the rows of a repeated index in index order."""
    return F.embedding(index, table)


def _over_group(x: Tensor, group: Any) -> Tensor:
    """x summed over the process group in rank order, the same bits on every rank; the gradient is this rank's own."""
    if group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return reduce(torch.add, parts) + (x - x.detach())


def load_balancing_loss(probs: Tensor, counts: Tensor, *, normalize: str = "one", group: Any = None) -> Tensor:
    """``E / (K·T²) · Σ_e count_e · Σ_t p_te``: 1 when balanced (Megatron). probs [T, E], counts [E] of K·T slots.

    ``normalize="top_k"`` leaves the 1/K out: K when balanced (transformers, Switch Transformer for K = 1).
    The gradient goes through probs alone. With a ``group``, T, count and Σ p are those of all its ranks' tokens; every
    rank gets the same loss, and the part of its gradient that is its own probs': added over the ranks they are the whole.
    """
    if normalize not in ("one", "top_k"):
        raise ValueError(f"normalize: got {normalize!r}, takes 'one' or 'top_k'")
    p = _compute(probs)
    n_token, n_expert = p.shape
    if group is not None:
        sums = torch.cat([p.sum(0).double(), counts.double(), counts.new_full((1,), n_token, dtype=torch.float64)])
        total, load, tokens = _over_group(sums, group).split((n_expert, n_expert, 1))
        slots = tokens if normalize == "top_k" else load.sum().clamp(min=1)
        return (n_expert * (load.detach() / slots.clamp(min=1) * total / tokens.clamp(min=1)).sum()).to(p.dtype)
    if n_token == 0:
        return p.sum()
    share = counts.to(p.dtype) / (counts.sum().clamp(min=1) if normalize == "one" else n_token)  # [E]
    return n_expert * (share * p.mean(0)).sum()


def _mean(total: Tensor, number: int, group: Any) -> Tensor:
    """total / number, both summed over the group; 0 of nothing."""
    if group is None:
        return total / max(number, 1)
    both = _over_group(torch.stack([total.double(), total.new_tensor(number, dtype=torch.float64)]), group)
    return (both[0] / both[1].detach().clamp(min=1)).to(total.dtype)


def router_z_loss(logits: Tensor, *, group: Any = None) -> Tensor:
    """``mean_t logsumexp_e(z_te)²`` (ST-MoE). logits [T, E]; with a group the mean over all its ranks' tokens."""
    z = _compute(logits)
    return _mean(z.logsumexp(-1).square().sum(), z.shape[0], group)


def sequence_balance_loss(scores: Tensor, experts: Tensor, cu_seqlens: Tensor, *, group: Any = None) -> Tensor:
    """DeepSeek-V3's balance loss: load_balancing_loss within each sequence, its mean over the B sequences.

    scores [N, E] (sigmoid or softmax, before selection) become ``p = s / Σ_E s``; experts [N, K], cu_seqlens [B + 1].
    An empty sequence counts as 0. Balanced = 1; multiply by alpha (1e-4 in DeepSeek-V3). The gradient goes through
    scores alone; with a group the mean is over all its ranks' sequences.
    """
    s = _compute(scores)
    n_expert = s.shape[-1]
    p = s / s.sum(-1, keepdim=True)  # [N, E]
    total = p[:0].sum()  # 0, and differentiable without a sequence too
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:]):
        counts = torch.bincount(experts[start:end].reshape(-1).long(), minlength=n_expert)
        total = total + load_balancing_loss(p[start:end], counts)
    return _mean(total, len(bounds) - 1, group)


@torch.no_grad()
def update_expert_bias(bias: Tensor, counts: Tensor, *, rate: float = 1e-3, group: Any = None) -> None:
    """``bias += rate · sign(mean(counts) − counts)``, in place; counts are summed over ``group`` first.

    Auxiliary-loss-free balancing (DeepSeek-V3). bias [E], counts [E].
    """
    load = counts.to(torch.float64)
    if group is not None:
        dist.all_reduce(load, group=group)
    bias.add_((load.mean() - load).sign().to(bias.dtype), alpha=rate)
