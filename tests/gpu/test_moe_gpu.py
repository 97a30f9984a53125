"""The Triton router and experts on a real GPU, at real sizes: numerics by the rule, and bits that must not move.

Shapes: N tokens, H hidden, I inner, E experts, K experts a token. What `thinkernel validate` runs is in test_validate_gpu.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from thinkernel.reference import moe as reference
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from thinkernel.testing.moe import expert_inputs, torch_moe
from torch import Tensor

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RULES: dict[str, dict[str, Any]] = {
    "qwen3": dict(E=128, top_k=8),
    "deepseek-v3": dict(E=256, top_k=8, score="sigmoid", biased=True, n_group=8, topk_group=4, scaling=2.5),
    "kimi-k2": dict(E=384, top_k=8, score="sigmoid", biased=True, scaling=2.827),
    "deepseek-v2": dict(E=160, top_k=6, n_group=8, topk_group=3, group_score="max", renormalize=False),
    "gpt-oss": dict(E=128, top_k=4, score="softmax_topk"),
    "1024 experts": dict(E=1024, top_k=32, score="sqrtsoftplus"),
}  # fmt: skip
EXPERTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "swiglu": (dict(H=512, inner=384, E=16, K=4), {}),
    "gpt-oss": (dict(H=360, inner=200, E=8, K=4, in_out=True, biases=True), dict(layout="in_out", activation="gpt_oss")),
    "llama4": (dict(H=256, inner=320, E=8, K=1, in_out=True), dict(layout="in_out", weight_on="input")),
    "geglu": (dict(H=129, inner=77, E=5, K=2, biases=True), dict(activation="geglu")),
    "relu2": (dict(H=256, inner=256, columns=256, E=8, K=2), dict(activation="relu2")),
}  # fmt: skip
ROWS = ("x", "weights", "experts")


@pytest.mark.parametrize("N", [1, 4099])
@pytest.mark.parametrize("name", RULES)
def test_route(name: str, N: int) -> None:
    rule = dict(RULES[name])
    E, K, biased = rule.pop("E"), rule.pop("top_k"), rule.pop("biased", False)
    torch.manual_seed(N)
    z, d = torch.randn(N, E, device="cuda").requires_grad_(), torch.randn(N, K, device="cuda")
    bias = torch.randn(E, device="cuda") * 0.1 if biased else None
    with tk.use_backend("triton"):
        found = tk.route(z, K, bias=bias, **rule)
        (dz,) = torch.autograd.grad(found.weights, z, d)
        again = tk.route(z, K, bias=bias, **rule)
        alone = tk.route(z[:1], K, bias=bias, **rule)
    for a, b in zip(again, found, strict=True):
        assert_bitwise(a.detach(), b.detach())
    assert_bitwise(alone.weights.detach(), found.weights[:1].detach())
    replayed: dict[str, Any] = rule | dict(experts=found.experts.cpu())
    wants = []
    for dtype in (torch.float64, torch.float32):
        leaf = z.detach().cpu().to(dtype).requires_grad_()
        want = reference.route(leaf, K, bias=None if bias is None else bias.cpu().to(dtype), **replayed)
        wants.append((want, torch.autograd.grad(want.weights, leaf, d.cpu().to(dtype))[0]))
    check(found.weights.detach(), wants[0][0].weights.detach(), wants[1][0].weights.detach(), name="weights")
    check(dz, wants[0][1], wants[1][1], name="dlogits")
    for field in ("counts", "order", "offsets"):
        assert torch.equal(getattr(found, field).cpu(), getattr(wants[0][0], field)), field
    wide = reference.route(z.detach().cpu().double(), K, bias=None if bias is None else bias.cpu().double(), **rule)
    assert (found.experts.cpu() != wide.experts).any(-1).float().mean() < 2e-3  # near ties of computed scores


def run(
    function: Any, inputs: dict[str, Any], options: dict[str, Any], dtype: torch.dtype | None = None, rows: int = 0
) -> dict[str, Tensor]:
    """y and the gradients of the floating inputs, for a cotangent that is the first rows of `rows` tokens'."""
    names = [n for n in inputs if n != "experts"]
    leaves = {n: x if n == "experts" else x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for n, x in inputs.items()}
    y = function(**leaves, **options)
    dy = Draw(9, inputs["x"].dtype).normal(rows or len(y), y.shape[1])[: len(y)].to(y)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(names, torch.autograd.grad(y, [leaves[n] for n in names], dy), strict=True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, dtype: torch.dtype) -> None:
    """By the rule against float64; again, alone and in a small batch (tiles for few rows): the same bits."""
    sizes, options = EXPERTS[name]
    inputs = expert_inputs(Draw(1, dtype), N=1500, **sizes)
    on_gpu = {n: x.cuda() for n, x in inputs.items()}
    with tk.use_backend("triton"):
        found = run(tk.moe, on_gpu, options)
        again = run(tk.moe, on_gpu, options)
        few = {count: run(tk.moe, {n: x[:count] if n in ROWS else x for n, x in on_gpu.items()}, options, 1500) for count in (1, 40)}
    wide, base = run(reference.moe, inputs, options, torch.float64), run(torch_moe, inputs, options)
    for n, x in found.items():
        check(x.cpu(), wide[n], base[n], name=n)
        assert_bitwise(again[n], x, f"{n}, again")
    for count, some in few.items():
        for n in ("y", "dx", "dweights"):
            assert_bitwise(some[n], found[n][:count], f"{n}, {count} tokens")
