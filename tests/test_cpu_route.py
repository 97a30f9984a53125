"""route in C++: every rule against the reference, on scores with ties and odd sizes, and bit for bit against itself.

Shapes: N tokens, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from cpu_levels import level as level  # every test runs on every ISA level
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkernel.ops.dispatch import C
from thinkernel.reference import moe as reference
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "route_forward"), reason="the C++ core is not built")

RULES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, plain": dict(renormalize=False, scaling=1.7),
    "softmax, biased": dict(bias=True),
    "deepseek-v2": dict(n_group=4, topk_group=2, group_score="max", renormalize=False, scaling=1.5),
    "deepseek-v3": dict(score="sigmoid", bias=True, n_group=4, topk_group=2, scaling=2.5),
    "sigmoid, no bias": dict(score="sigmoid", n_group=2, topk_group=1),
    "sigmoid, not renormalised": dict(score="sigmoid", renormalize=False),
    "gpt-oss": dict(score="softmax_topk", scaling=0.5),
    "gpt-oss, grouped": dict(score="softmax_topk", bias=True, n_group=4, topk_group=3),
    "llama4": dict(score="sigmoid_topk", renormalize=False),
    "sigmoid of the chosen": dict(score="sigmoid_topk", bias=True),
    "deepseek-v4": dict(score="sqrtsoftplus", bias=True, scaling=1.5),
    "sqrtsoftplus, max": dict(score="sqrtsoftplus", n_group=4, topk_group=1, group_score="max"),
}  # fmt: skip


def run(function: Any, logits: Tensor, top_k: int, rule: dict[str, Any], bias: Tensor | None, **more: Any) -> tuple[Any, Tensor]:
    """The routing and dlogits, for weights' gradients that depend on their shape alone."""
    z = logits.detach().clone().requires_grad_()
    options = rule | (dict(bias=None if bias is None else bias.to(torch.float64 if z.dtype == torch.float64 else torch.float32)))
    found = function(z, top_k, **options, **more)
    (dz,) = torch.autograd.grad(found.weights, z, Draw(5).normal(*found.weights.shape).to(found.weights.dtype))
    return found, dz


def check_rule(logits: Tensor, top_k: int, rule: dict[str, Any], seed: int = 3) -> Any:
    """Every output against the reference: experts are chosen by float32 scores there too, and random ones do not tie."""
    bias = Draw(seed).normal(logits.shape[1], scale=0.2) if rule.get("bias") else None
    found, dz = run(tk.route, logits, top_k, rule, bias)
    same = dict(experts=found.experts)
    exact, exact_dz = run(reference.route, logits.double(), top_k, rule, bias, **same)
    near, near_dz = run(reference.route, logits, top_k, rule, bias, **same)
    options = rule | dict(bias=None if bias is None else bias.double())
    chosen = reference.route(logits.double(), top_k, **options)
    moved = (found.experts != chosen.experts).any(-1)
    assert moved.float().mean() < 2e-3, f"{int(moved.sum())} of {len(moved)} rows chose otherwise"  # near ties of computed scores
    check(found.weights.detach(), exact.weights.detach(), near.weights.detach(), name="weights")
    check(dz, exact_dz, near_dz, name="dlogits")
    for name in ("counts", "order", "offsets"):
        assert torch.equal(getattr(found, name), getattr(near, name)), name
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(700, 64, 6), (300, 48, 1), (40, 384, 8)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_rules(name, sizes, dtype):
    N, E, K = sizes
    if dtype != torch.float32 and E > 64:
        E, K = 64, 4  # 16-bit logits tie from E = 384 on: test_ties
    rule = RULES[name]
    K = min(K, rule.get("topk_group", 1) * E // rule.get("n_group", 1))
    draw = Draw(1)
    ranks = torch.stack([draw.permutation(E) for _ in range(N)])  # no two equal in a row, in any dtype
    check_rule(((ranks - E / 2) * (6 / E) + draw.normal(N, 1, scale=0.1)).to(dtype), K, rule)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups = draw(1, 7)
    E = groups * draw(1, 50)
    rule = dict(
        score=data.draw(st.sampled_from(reference.SCORES)), renormalize=data.draw(st.booleans()), n_group=groups,
        topk_group=draw(1, groups), group_score=data.draw(st.sampled_from(["max", "top2"])), bias=data.draw(st.booleans()),
    )
    K = draw(1, min(32, E if groups == 1 else E // groups * rule["topk_group"]))
    check_rule(Draw(draw(0, 2**32)).normal(draw(100, 600), E), K, rule)


def test_many_experts():
    check_rule(Draw(2).normal(130, 1024), 32, dict(score="sigmoid", bias=True, n_group=8, topk_group=4))
    check_rule(Draw(2).normal(130, 896), 16, dict(score="softmax", renormalize=False))


@pytest.mark.parametrize("name", ["gpt-oss", "gpt-oss, grouped", "llama4", "sigmoid of the chosen", "softmax", "sqrtsoftplus, max"])
def test_ties_go_to_the_lower_number(name):
    """Scores from a handful of values, negative biases, minus zeros: chosen exactly as the reference chooses."""
    rule, draw = RULES[name], Draw(6)
    z = draw.integers(-2, 3, 500, 48).float() * draw.integers(0, 2, 500, 48).float() * -1.0
    bias = -draw.integers(0, 3, 48).float() - 5 if rule.get("bias") else None
    for K in (1, 5, 12):
        options = rule | dict(bias=bias)
        found, want = tk.route(z, K, **options), reference.route(z, K, **options)
        assert torch.equal(found.experts, want.experts)
        assert torch.equal(found.order, want.order) and torch.equal(found.offsets, want.offsets)


@pytest.mark.parametrize("name", RULES)
def test_replay(name):
    """Given experts, equal ones in a row too: the live weights and their gradient."""
    rule, draw = RULES[name], Draw(7)
    z, experts = draw.normal(300, 24), draw.integers(0, 24, 300, 5)
    found, dz = run(tk.route, z, 5, rule, None, experts=experts.long())
    exact, exact_dz = run(reference.route, z.double(), 5, rule, None, experts=experts)
    near, near_dz = run(reference.route, z, 5, rule, None, experts=experts)
    assert torch.equal(found.experts, experts) and torch.equal(found.order, exact.order) and torch.equal(found.counts, exact.counts)
    check(found.weights.detach(), exact.weights.detach(), near.weights.detach())
    check(dz, exact_dz, near_dz)


@pytest.mark.parametrize("name", RULES)
def test_bits_by_threads_and_batch(name):
    rule, E = RULES[name], 256
    z = Draw(8).normal(1500, E)
    bias = Draw(9).normal(E, scale=0.2) if rule.get("bias") else None
    found, dz = run(tk.route, z, 8, rule, bias)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again, dz_again = run(tk.route, z, 8, rule, bias)
        for a, b in zip((*again, dz_again), (*found, dz)):
            assert_bitwise(a.detach(), b.detach())
    for first, last in ((0, 1), (5, 6), (250, 300)):
        some = tk.route(z[first:last], 8, **(rule | dict(bias=bias)))
        assert_bitwise(some.weights, found.weights[first:last].detach())
        assert_bitwise(some.experts, found.experts[first:last])


def test_extremes():
    """Scores where softplus underflows and the sigmoid is 0 or 1, an infinite logit, NaN in one row alone."""
    z = Draw(10).normal(64, 40) * 40
    for score in reference.SCORES:
        found, dz = run(tk.route, z, 4, dict(score=score), None)
        assert found.weights.isfinite().all() and dz.isfinite().all(), score
        dirty = z.clone()
        dirty[7] = torch.nan
        again, dz_again = run(tk.route, dirty, 4, dict(score=score), None)
        assert again.weights[7].isnan().all() and dz_again[7].isnan().any(), score
        others = torch.arange(64) != 7
        assert_bitwise(again.weights[others].detach(), found.weights[others].detach())
        assert ((again.experts >= 0) & (again.experts < 40)).all()
    z[:, 3] = -torch.inf
    assert not (tk.route(z, 4).experts == 3).any()


def test_strides_and_nothing():
    z = Draw(11).normal(30, 50)
    assert_bitwise(tk.route(z[:, :24], 3).weights, tk.route(z[:, :24].contiguous(), 3).weights)
    assert_bitwise(tk.route(z.T.contiguous().T, 3).weights, tk.route(z, 3).weights)
    found = tk.route(torch.empty(0, 6, requires_grad=True), 2)
    assert found.weights.shape == (0, 2) and (found.counts == 0).all() and (found.offsets == 0).all()
    (dz,) = torch.autograd.grad(tk.route(z.requires_grad_(), 3).weights.sum(), z)
    assert dz.shape == z.shape
