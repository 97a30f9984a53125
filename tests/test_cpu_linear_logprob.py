"""linear_logprob on every ISA level beyond test_cpu_gemm_linear: real vocabularies, many rows, views, kept logits, main_grad,
tied weights.

Shapes: N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
import torch.nn.functional as F
from cpu_levels import level  # noqa: F401
from thinkernel.ops.dispatch import C
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "linear_logprob_forward"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESULTS = "logprob entropy dhidden dweight dbias".split()

Case = tuple[list[Tensor], Tensor, list[Tensor]]


def _case(seed: int, dtype: torch.dtype, N: int, D: int, V: int, ignored: float = 0.3) -> Case:
    """[hidden, weight, bias], target, the two gradients."""
    draw = Draw(seed, dtype)
    tensors = [draw.normal(N, D), draw.normal(V, D, scale=3 * D**-0.5), draw.normal(V)]
    target = draw.integers(0, V, N, dtype=torch.int64)
    target[torch.rand(N, generator=draw.generator) < ignored] = -100
    return tensors, target, [draw.normal(N, dtype=torch.float32) for _ in range(2)]


def _torch(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What torch does: logits of the tensors' dtype, the rest in float32 (float64: all of it)."""
    y = F.linear(hidden, weight, bias)
    log_p = (y if y.dtype == torch.float64 else y.float()).log_softmax(-1)
    lp = log_p.gather(1, target.clamp_min(0)[:, None])[:, 0]
    entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)
    return torch.where(target >= 0, lp, 0.0), torch.where(target >= 0, entropy, 0.0)


def _results(f: Any, case: Case, to: torch.dtype | None = None) -> list[Tensor]:
    leaves = [x.detach().to(to or x.dtype).requires_grad_() for x in case[0]]
    out = f(*leaves)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, [g.to(out[0].dtype) for g in case[2]])]


def _ours(case: Case, **options: Any) -> list[Tensor]:
    return _results(lambda h, w, b: tk.linear_logprob(h, w, case[1], bias=b, **options), case)


def _check(case: Case, name: str, **options: Any) -> None:
    def f(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return _torch(h, w, b, case[1])

    found = zip(RESULTS, _ours(case, **options), _results(f, case, torch.float64), _results(f, case), strict=True)
    for what, a, b, c in found:
        check(a, b, c, dtype=a.dtype, name=f"{what} {name}")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("N,D,V", [(3, 9, 50257), (70001, 5, 7), (20, 33, 1), (96, 48, 7919), (250, 1250, 701)])
def test_any_size(dtype: torch.dtype, N: int, D: int, V: int) -> None:
    _check(_case(N + V, dtype, N, D, V, ignored=0.3 if N > 3 else 0.0), f"N={N} D={D} V={V}")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("N,V", [(33, 40), (205, 901)])
def test_gradients_asked_for_alone(dtype: torch.dtype, N: int, V: int) -> None:
    """dhidden alone, dweight alone and without dbias: the bits they have together."""
    case = _case(N, dtype, N, 70, V)
    together = _ours(case)[2:]
    for wanted in ([0], [1], [2], [0, 1], [1, 2]):
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(case[0])]
        out = tk.linear_logprob(leaves[0], leaves[1], case[1], bias=leaves[2])
        for i, found in zip(wanted, torch.autograd.grad(out, [leaves[i] for i in wanted], case[2]), strict=True):
            assert_bitwise(found, together[i], f"{RESULTS[2 + i]} of {wanted}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [128256, 151936])
def test_real_vocabularies(dtype: torch.dtype, V: int) -> None:
    _check(_case(V, dtype, 37, 96, V), f"V={V}")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_views_of_hidden(dtype: torch.dtype) -> None:
    """[S, B, D] turned to [B, S, D], every other row of a wider tensor, and a hidden not contiguous in D."""
    draw = Draw(3, dtype)
    whole, weight, target = draw.normal(6, 4, 50), draw.weight(301, 40), draw.integers(0, 301, 4, 6, dtype=torch.int64)
    for hidden in (whole[..., 3:43].transpose(0, 1), whole[..., :40].transpose(0, 1).flip(1), draw.normal(4, 40, 6).transpose(1, 2)):
        for a, b in zip(tk.linear_logprob(hidden, weight, target), tk.linear_logprob(hidden.contiguous(), weight, target), strict=True):
            assert a is not None and b is not None and a.shape == (4, 6)
            assert_bitwise(a, b)
    rows = whole.flatten(0, 1)[::2, 1:41]
    a, b = (tk.linear_logprob(x, weight, target.flatten()[:12])[0] for x in (rows, rows.contiguous()))
    assert_bitwise(a, b)


# ---- kept logits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_logits(dtype: torch.dtype) -> None:
    case = _case(31, dtype, 211, 40, 1601)
    plain = _ours(case)
    block = 211 * 400 * case[0][0].element_size()
    for keep in (True, 5 * block, 2 * block + 1, block - 1):  # all; all; two blocks of five; none
        kept = _ours(case, keep_logits=keep)
        for name, a, b in zip(RESULTS, kept, plain, strict=True):
            if dtype == torch.float32 or name in ("logprob", "entropy") or keep == block - 1:
                assert_bitwise(a, b, f"{name}, keep_logits={keep}")
        if dtype != torch.float32 and keep >= 2 * block:
            assert not torch.equal(kept[2], plain[2])  # the backward did read them
    _check(case, "kept", keep_logits=True)


def test_kept_logits_are_not_recomputed() -> None:
    """The backward takes them from what was kept: with another weight in its place the probabilities stay."""
    (hidden, weight, _), target, _ = _case(7, torch.float32, 10, 8, 700, ignored=0.0)
    args = (1.0, 0.0, -100, False)
    ones = torch.ones(10)
    lp, ent, lse, kept = torch.ops.thinkernel.linear_logprob_forward(hidden, weight, target, None, *args, 2)
    assert kept.shape == (2, 10, 400)

    def dweight(weight: Tensor, kept: Tensor) -> Tensor:
        return torch.ops.thinkernel.linear_logprob_backward(
            ones, None, hidden, weight, target, None, lse, ent, kept, *args, False, True, False)[1]

    assert_bitwise(dweight(torch.full_like(weight, float("nan")), kept), dweight(weight, kept[:0]))


def test_keep_logits_takes_a_budget() -> None:
    h, w, t = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="^keep_logits: got -1, takes an integer of at least 0"):
        tk.linear_logprob(h, w, t, keep_logits=-1)
    with pytest.raises(TypeError, match="^keep_logits: got str"):
        tk.linear_logprob(h, w, t, keep_logits="all")  # type: ignore[arg-type]


# ---- the weight's gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_main_grad_takes_the_unrounded_gradient(dtype: torch.dtype) -> None:
    start = torch.randn(903, 24, generator=torch.Generator().manual_seed(1))
    alone: list[Tensor] = []
    cases = [_case(41 + i, dtype, 50 + i, 24, 903) for i in range(2)]
    weight = cases[0][0][1].requires_grad_()
    cases = [([c[0][0], weight, c[0][2]], *c[1:]) for c in cases]

    def add(case: Case) -> Tensor:
        hidden = case[0][0].detach().requires_grad_()
        out = tk.linear_logprob(hidden, weight, case[1], bias=case[0][2])
        torch.autograd.backward(out, case[2])
        assert weight.grad is None and hidden.grad is not None
        return hidden.grad

    for case in cases:
        weight.main_grad = torch.zeros_like(start)  # type: ignore[attr-defined]
        dhidden = add(case)
        alone.append(weight.main_grad)  # type: ignore[attr-defined]
        del weight.main_grad  # type: ignore[attr-defined]
        plain = _ours(case)
        assert_bitwise(dhidden, plain[2], "dhidden")
        assert_bitwise(alone[-1].to(dtype), plain[3], "dweight, rounded once")
    weight.main_grad = start.clone()  # type: ignore[attr-defined]
    for case in cases:
        add(case)
    assert_bitwise(weight.main_grad, (start + alone[0]) + alone[1], "two micro-batches")  # type: ignore[attr-defined]
    add((cases[0][0], torch.full_like(cases[0][1], -100), cases[0][2]))
    add(([cases[0][0][0][:0], *cases[0][0][1:]], cases[0][1][:0], [g[:0] for g in cases[0][2]]))
    assert_bitwise(weight.main_grad, (start + alone[0]) + alone[1], "no rows, no change")  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", [torch.zeros(9, 4), torch.zeros(4, 9).t(), torch.zeros(9, 3), torch.zeros(9, 4).bfloat16()])
def test_main_grad_of_another_kind_is_an_error(wrong: Tensor) -> None:
    weight = torch.randn(9, 4).requires_grad_()
    weight.main_grad = wrong  # type: ignore[attr-defined]
    out = tk.linear_logprob(torch.randn(2, 4), weight, torch.zeros(2, dtype=torch.long))[0]
    if wrong.shape == weight.shape and wrong.dtype == torch.float32 and wrong.is_contiguous():
        out.sum().backward()
        assert weight.grad is None and wrong.any()
    else:
        with pytest.raises(ValueError, match="^weight.main_grad: got .*, takes a contiguous float32 tensor of weight's shape"):
            out.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_tied_weights(dtype: torch.dtype) -> None:
    """One Parameter is the embedding and the head: it gets both gradients."""
    draw = Draw(51, dtype)
    tied = torch.nn.Parameter(draw.weight(301, 16))
    tokens, g = draw.integers(0, 301, 2, 7, dtype=torch.int64), draw.normal(2, 6, dtype=torch.float32)

    def loss(embedding: Tensor, head: Tensor) -> Tensor:
        hidden = F.embedding(tokens[:, :-1], embedding).tanh() * 3
        lp, ent = tk.linear_logprob(hidden, head, tokens[:, 1:])
        assert ent is not None
        return (g * (lp + 0.1 * ent)).sum()

    loss(tied, tied).backward()
    parts = [tied.detach().clone().requires_grad_() for _ in range(2)]
    loss(*parts).backward()
    assert tied.grad is not None and parts[0].grad is not None and parts[1].grad is not None
    torch.testing.assert_close(tied.grad, parts[0].grad + parts[1].grad, rtol=1e-6, atol=0)


def test_entropy_gradient_alone() -> None:
    case = _case(61, torch.float32, 30, 20, 500)
    hidden = case[0][0].requires_grad_()
    both = torch.autograd.grad(tk.linear_logprob(hidden, case[0][1], case[1]), hidden, case[2])[0]
    parts = [torch.autograd.grad(tk.linear_logprob(hidden, case[0][1], case[1])[i], hidden, case[2][i])[0] for i in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], both, rtol=1e-4, atol=1e-5)
