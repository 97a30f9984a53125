"""route in Triton under the interpreter: every rule on scores with ties and odd sizes, replay, the sort, the bits.

Shapes: N tokens, E experts, K experts a token. Under the interpreter a program of the sort has 128 slots, one of route 4096 logits.
"""
from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from thinkernel.kernels import moe_route as kernels
from thinkernel.reference import moe as reference
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

HALF = torch.float16
RULES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, plain": dict(renormalize=False, scaling=1.7),
    "softmax, biased": dict(bias=True),
    "deepseek-v2": dict(n_group=6, topk_group=2, group_score="max", renormalize=False, scaling=1.5),
    "deepseek-v3": dict(score="sigmoid", bias=True, n_group=6, topk_group=3, scaling=2.5),
    "sigmoid, groups of one": dict(score="sigmoid", n_group=42, topk_group=9),
    "sigmoid, not renormalised": dict(score="sigmoid", renormalize=False),
    "gpt-oss": dict(score="softmax_topk", scaling=0.5),
    "gpt-oss, grouped": dict(score="softmax_topk", bias=True, n_group=3, topk_group=2),
    "llama4": dict(score="sigmoid_topk", renormalize=False),
    "sigmoid of the chosen": dict(score="sigmoid_topk", bias=True),
    "deepseek-v4": dict(score="sqrtsoftplus", bias=True, scaling=1.5),
    "sqrtsoftplus, max": dict(score="sqrtsoftplus", n_group=2, topk_group=1, group_score="max"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _on_triton():
    with tk.use_backend("triton"):
        yield


def run(function: Any, logits: Tensor, top_k: int, rule: dict[str, Any], bias: Tensor | None = None, **more: Any) -> tuple[Any, Tensor]:
    """The routing and dlogits, for weights' gradients that are the first of the same 100 rows."""
    z = logits.detach().clone().requires_grad_()
    options = rule | dict(bias=None if bias is None else bias.to(torch.promote_types(z.dtype, torch.float32)))
    found = function(z, top_k, **options, **more)
    cotangent = torch.randn(100, top_k, generator=torch.Generator().manual_seed(5))[: len(z)].to(found.weights.dtype)
    return found, torch.autograd.grad(found.weights, z, cotangent)[0]


def check_rule(logits: Tensor, top_k: int, rule: dict[str, Any], bias: Tensor | None, **more: Any) -> Any:
    found, dz = run(tk.route, logits, top_k, rule, bias, **more)
    replayed = dict(experts=found.experts)
    exact, exact_dz = run(reference.route, logits.double(), top_k, rule, bias, **replayed)
    near, near_dz = run(reference.route, logits, top_k, rule, bias, **replayed)
    check(found.weights.detach(), exact.weights.detach(), near.weights.detach(), name="weights")
    check(dz, exact_dz, near_dz, name="dlogits")
    for name in ("counts", "order", "offsets"):
        assert torch.equal(getattr(found, name), getattr(near, name)), name
    return found


@pytest.mark.parametrize(("name", "dtype"), [*((n, torch.float32) for n in RULES), ("softmax, plain", HALF), ("deepseek-v3", HALF)])
def test_rules(name: str, dtype: torch.dtype) -> None:
    """The rule, the float64 choice but for near ties, and replay of numbers that repeat."""
    rule, N, E, K = RULES[name], 90, 42, 7
    z, bias = torch.randn(N, E).to(dtype), torch.randn(E) * 0.2 if RULES[name].get("bias") else None
    found = check_rule(z, K, rule, bias)
    wide = rule | dict(bias=None if bias is None else bias.double())
    assert (found.experts != reference.route(z.double(), K, **wide).experts).any(-1).sum() <= 1
    check_rule(z, K, rule, bias, experts=torch.randint(0, E, (N, K)))


@pytest.mark.parametrize("name", RULES)
def test_ties_go_to_the_lower_number(name: str) -> None:
    """Scores from a handful of values, negative biases, minus zeros: chosen exactly as the reference chooses."""
    rule = RULES[name]
    z = torch.randint(-2, 3, (20, 42)).float() * torch.randint(0, 2, (20, 42)) * -1.0
    bias = -torch.randint(0, 3, (42,)).float() - 5 if rule.get("bias") else None
    for K in (1, 6):
        found, want = (f(z, K, **(rule | dict(bias=bias))) for f in (tk.route, reference.route))
        assert torch.equal(found.experts, want.experts)


@pytest.mark.parametrize(("E", "K", "rule"), [
    (1024, 32, dict(score="sigmoid", bias=True)), (1000, 8, dict(score="sigmoid", n_group=8, topk_group=4)),
    (896, 16, dict(n_group=7, topk_group=2)), (1, 1, {}),
], ids=str)  # fmt: skip
def test_many_experts_and_one(E: int, K: int, rule: dict[str, Any]) -> None:
    check_rule(torch.randn(5, E), K, rule, torch.randn(E) * 0.1 if rule.get("bias") else None)


def test_bits_alone_and_again() -> None:
    for rule in (RULES["deepseek-v3"], RULES["softmax, plain"]):
        z, bias = torch.randn(70, 42), torch.randn(42) * 0.2
        found, dz = run(tk.route, z, 6, rule, bias)
        again, dz_again = run(tk.route, z, 6, rule, bias)
        for a, b in zip((*again, dz_again), (*found, dz), strict=True):
            assert_bitwise(a.detach(), b.detach())
        alone, dz_alone = run(tk.route, z[:1], 6, rule, bias)
        for a, b in zip((alone.weights, alone.experts, dz_alone), (found.weights, found.experts, dz), strict=True):
            assert_bitwise(a.detach(), b[:1].detach())
        some = tk.route(z[66:70], 6, **(rule | dict(bias=bias)))
        assert_bitwise(some.weights, found.weights[66:70].detach())


def test_other_ranks_experts() -> None:
    """Given numbers outside [0, E): weight and gradient 0, no share in the others' sum, last in order, in no count."""
    E, N, K = 6, 20, 3
    z, experts = torch.randn(N, E), torch.randint(0, E, (N, K), dtype=torch.int32)
    foreign = torch.rand(N, K) < 0.3
    experts = experts.masked_fill(foreign, 9)
    experts[4] = -1
    foreign[4] = True
    weights, counts, order, offsets = torch.empty(N, K), *(torch.empty(n, dtype=torch.int32) for n in (E, N * K, E + 1))
    dz = torch.empty_like(z)
    for score in reference.SCORES:
        kernels.route_forward(z, None, experts, weights, counts, order, offsets, score=score, replay=True)
        kernels.route_backward(z, experts, torch.ones(N, K), dz, score=score, renormalize=True, scaling=1.0)
        assert (weights[foreign] == 0).all() and weights.isfinite().all() and dz.isfinite().all()
        assert (weights.sum(1)[~foreign.all(1)] - 1).abs().max() < 1e-5 and (dz[4] == 0).all()
    flat = experts.flatten().long().masked_fill(foreign.flatten(), E)
    assert torch.equal(counts.long(), torch.bincount(flat, minlength=E)[:E]) and torch.equal(order.long(), flat.argsort(stable=True))
    assert offsets[-1] == counts.sum() == (~foreign).sum()


def test_extremes() -> None:
    """Scores where softplus underflows and the sigmoid is 0 or 1, an infinite logit, NaN in one row alone; no tokens; any strides."""
    z = torch.randn(16, 40) * 40
    for score in reference.SCORES:
        found, dz = run(tk.route, z, 4, dict(score=score))
        assert found.weights.isfinite().all() and dz.isfinite().all(), score
        dirty = z.clone()
        dirty[7] = torch.nan
        again, dz_again = run(tk.route, dirty, 4, dict(score=score))
        assert again.weights[7].isnan().all() and dz_again[7].isnan().any(), score
        others = torch.arange(16) != 7
        assert_bitwise(again.weights[others].detach(), found.weights[others].detach())
        assert ((again.experts >= 0) & (again.experts < 40)).all()
    z[:, 3] = -torch.inf
    assert not (tk.route(z, 4).experts == 3).any()
    assert_bitwise(tk.route(z.T.contiguous().T, 3).weights, tk.route(z, 3).weights)
    empty, dz = run(tk.route, torch.empty(0, 6), 2, {})
    assert empty.weights.shape == (0, 2) and (empty.counts == 0).all() and (empty.offsets == 0).all() and dz.shape == (0, 6)
    with pytest.raises(NotImplementedError, match="logits"):
        tk.route(z.double(), 4)
