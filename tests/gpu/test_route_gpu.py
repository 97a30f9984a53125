"""The CUDA kernels of route on a GPU, against the reference: this file passing is what marks them as verified.

Shapes: N tokens, E experts, K experts a token. Choices on given scores are exact; where scores are computed, rows may choose otherwise
only where two float64 scores nearly tie.
"""

from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from thinkernel.ops import moe_cuda
from thinkernel.ops.memory import poisoned_results
from thinkernel.reference import moe as reference
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

pytestmark = pytest.mark.gpu
FIELDS = ("experts", "counts", "order", "offsets")
RULES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, plain": dict(renormalize=False, scaling=1.7),
    "softmax, biased": dict(bias=True),
    "deepseek-v2": dict(n_group=8, topk_group=3, group_score="max", renormalize=False, scaling=16.0),
    "deepseek-v3": dict(score="sigmoid", bias=True, n_group=8, topk_group=4, scaling=2.5),
    "sigmoid, not renormalised": dict(score="sigmoid", renormalize=False),
    "gpt-oss": dict(score="softmax_topk"),
    "gpt-oss, grouped": dict(score="softmax_topk", bias=True, n_group=4, topk_group=3),
    "llama4": dict(score="sigmoid_topk", renormalize=False),
    "deepseek-v4": dict(score="sqrtsoftplus", bias=True, scaling=1.5),
}  # fmt: skip


def draw(N: int, E: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Logits [N, E], no two equal in a row."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(N, E, generator=generator).argsort(-1)
    return ((ranks - E / 2) * (6 / E)).to(dtype)


def run(z: Tensor, top_k: int, options: dict[str, Any], dweights: Tensor) -> tuple[Any, Tensor]:
    """The routing and dlogits of the CUDA kernels, back on the CPU."""
    leaf = z.cuda().requires_grad_()
    options = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}
    with tk.use_backend("cuda"), poisoned_results():
        found = tk.route(leaf, top_k, **options)
        (dz,) = torch.autograd.grad(found.weights, leaf, dweights.cuda())
    return reference.Routing(*(x.detach().cpu() for x in found)), dz.cpu()


def expected(z: Tensor, top_k: int, options: dict[str, Any], dweights: Tensor, experts: Tensor) -> tuple[Any, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    found = reference.route(leaf, top_k, **options | dict(experts=experts))
    (dz,) = torch.autograd.grad(found.weights, leaf, dweights.to(found.weights.dtype))
    return found, dz


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 64, 4), (700, 48, 6), (9000, 256, 8), (40_000, 256, 8), (3000, 384, 8), (500, 1024, 32)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_rules(name: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    N, E, K = sizes
    if dtype != torch.float32:
        E = min(E, 64)  # 16-bit logits tie beyond
        K = min(K, E)
    rule = dict(RULES[name])
    K = min(K, rule.get("topk_group", 1) * E // rule.get("n_group", 1))
    generator = torch.Generator().manual_seed(N)
    bias = 0.2 * torch.randn(E, generator=generator) if rule.pop("bias", False) else None
    z, dweights = draw(N, E, dtype, N + E), torch.randn(N, K, generator=generator)
    options = rule | dict(bias=bias)
    found, dz = run(z, K, options, dweights)
    again, dz_again = run(z, K, options, dweights)
    for a, b in zip((*found, dz), (*again, dz_again), strict=True):
        assert_bitwise(a, b, "second run")
    exact, exact_dz = expected(z.double(), K, options, dweights, found.experts)
    near, near_dz = expected(z, K, options, dweights, found.experts)
    chosen = reference.route(z.double(), K, **options | dict(bias=None if bias is None else bias.double())).experts
    assert (found.experts != chosen).any(-1).float().mean() < 2e-3
    check(found.weights, exact.weights.detach(), near.weights.detach(), name="weights")
    check(dz, exact_dz, near_dz, name="dlogits")
    for field in FIELDS[1:]:
        assert torch.equal(getattr(found, field), getattr(near, field)), field
    row = N // 2
    alone, dz_alone = run(z[row : row + 1], K, options, dweights[row : row + 1])
    assert_bitwise(alone.weights[0], found.weights[row], "a row alone")
    assert_bitwise(dz_alone[0], dz[row], "a row alone")


@pytest.mark.parametrize("name", ["gpt-oss", "gpt-oss, grouped", "llama4", "softmax"])
@pytest.mark.parametrize("N", [1, 500, 20_000])
def test_ties_go_to_the_lower_number(N: int, name: str) -> None:
    rule = dict(RULES[name])
    generator = torch.Generator().manual_seed(N)
    z = torch.randint(-2, 3, (N, 48), generator=generator).float() * -torch.randint(0, 2, (N, 48), generator=generator).float()
    bias = -torch.randint(0, 3, (48,), generator=generator).float() - 5 if rule.pop("bias", False) else None
    for K in (1, 5, 12):
        found, _ = run(z, K, rule | dict(bias=bias), torch.ones(N, K))
        want = reference.route(z, K, **rule | dict(bias=bias))
        for field in FIELDS:
            assert torch.equal(getattr(found, field), getattr(want, field)), field


@pytest.mark.parametrize("name", ["softmax", "softmax, plain", "gpt-oss", "sigmoid, not renormalised", "deepseek-v4"])
def test_replay(name: str) -> None:
    """Given experts, equal ones in a row too."""
    rule = {key: value for key, value in RULES[name].items() if key != "bias"}
    generator = torch.Generator().manual_seed(3)
    z, experts = torch.randn(3000, 24, generator=generator), torch.randint(0, 24, (3000, 5), generator=generator)
    dweights = torch.randn(3000, 5, generator=generator)
    found, dz = run(z, 5, rule | dict(experts=experts), dweights)
    exact, exact_dz = expected(z.double(), 5, rule, dweights, experts)
    near, near_dz = expected(z, 5, rule, dweights, experts)
    for field in FIELDS:
        assert torch.equal(getattr(found, field), getattr(near, field)), field
    check(found.weights, exact.weights.detach(), near.weights.detach())
    check(dz, exact_dz, near_dz)


def test_experts_of_other_ranks() -> None:
    generator = torch.Generator().manual_seed(4)
    E, z = 20, torch.randn(4000, 20, generator=generator).cuda()
    chosen = torch.randint(-1, E + 3, (4000, 4), generator=generator).int()
    here, bins = (chosen >= 0) & (chosen < E), torch.where((chosen >= 0) & (chosen < E), chosen, E).flatten()
    weights, _, counts, order, offsets = (x.cpu() for x in moe_cuda.route(z, chosen.cuda(), None, 4, "sigmoid", 1, 1, "top2", True, 1.0))
    assert (weights[~here] == 0).all()
    torch.testing.assert_close(weights.sum(-1)[here.any(-1)], torch.ones(int(here.any(-1).sum())))
    assert torch.equal(order, bins.argsort(stable=True).int()) and torch.equal(counts, bins.bincount(minlength=E + 1)[:E].int())
    assert int(offsets[-1]) == int(here.sum())


def test_nothing_and_strides() -> None:
    with tk.use_backend("cuda"):
        found = tk.route(torch.empty(0, 6, device="cuda"), 2)
        assert found.weights.shape == (0, 2) and (found.counts == 0).all() and (found.offsets == 0).all()
        z = torch.randn(30, 50, device="cuda")
        assert_bitwise(tk.route(z[:, :24], 3).weights, tk.route(z[:, :24].contiguous(), 3).weights)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with tk.use_backend("cuda"), torch.cuda.stream(stream):
        on_stream = tk.route(z, 3).weights
    stream.synchronize()
    with tk.use_backend("cuda"):
        assert_bitwise(on_stream, tk.route(z, 3).weights)
