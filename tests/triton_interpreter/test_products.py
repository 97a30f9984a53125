"""linear and linear_logprob in Triton under the interpreter: the bits that must not move, ignored rows, odd operands.

Shapes: hidden [N, D], weight [V, D], target [N]; x [M, I], weight [O, I]. Under the interpreter tiles are 32 × 32 × 32 and a
vocabulary split holds 64 columns. The rule over ordinary inputs is in test_rule.py.
"""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from thinkernel.kernels import grpo as triton_grpo
from thinkernel.kernels import linear as triton_linear
from thinkernel.reference import grpo as reference
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

DTYPES = [torch.float32, torch.float16]
NAN = float("nan")


def make(N: int, D: int, V: int, bias: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    hidden, weight = torch.randn(N, D).to(dtype), (torch.randn(V, D) * 2 / D**0.5).to(dtype)
    target = torch.randint(0, V, (N,))
    target[2::5] = -100
    return hidden, weight, target, torch.randn(V).to(dtype) if bias else None


def forward(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, **options) -> list[Tensor]:
    rows = [torch.full((len(hidden),), NAN, dtype=t) for t in (torch.float32, torch.float32, torch.float64)]
    triton_grpo.linear_logprob_forward(hidden, weight, target, bias, *rows, **options)
    return rows


def backward(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, rows: list[Tensor], g_lp: Tensor,
             g_ent: Tensor | None, **options) -> list[Tensor]:
    grads = [None if x is None else torch.full_like(x, NAN) for x in (hidden, weight, bias)]
    triton_grpo.linear_logprob_backward(hidden, weight, target, bias, rows[2], rows[1], g_lp, g_ent, *grads, **options)
    return [g for g in grads if g is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_buffer_size_is_not_in_the_bits(dtype: torch.dtype) -> None:
    hidden, weight, target, _ = make(40, 32, 170, False, dtype)
    rows, g_lp, g_ent = forward(hidden, weight, target, None), *torch.randn(2, 40)
    large, small = (backward(hidden, weight, target, None, rows, g_lp, g_ent, buffer_bytes=n) for n in (None, 1))
    assert_bitwise(large[0], small[0], "dhidden")
    assert_bitwise(large[1], small[1], "dweight")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_row_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    hidden, weight, target, _ = make(70, 40, 130, False, dtype)
    rows, g_lp = forward(hidden, weight, target, None), torch.randn(70)
    dhidden = backward(hidden, weight, target, None, rows, g_lp, None)[0]
    for i in (0, 33, 69):
        one = slice(i, i + 1)
        alone = forward(hidden[one], weight, target[one], None)
        for a, b in zip(rows, alone):
            assert_bitwise(a[one], b)
        assert_bitwise(dhidden[one], backward(hidden[one], weight, target[one], None, alone, g_lp[one], None)[0])


def test_ignored_rows_are_not_read_and_targets_outside_count_as_ignored() -> None:
    hidden, weight, target, _ = make(40, 16, 70, False, torch.float32)
    target[3], target[8] = 70, -1
    out = (target < 0) | (target >= 70)
    clean = forward(hidden, weight, target, None)
    hidden[out] = NAN
    rows = forward(hidden, weight, target, None)
    dhidden, dweight = backward(hidden, weight, target, None, rows, torch.ones(40), torch.ones(40))
    for a, b in zip(rows, clean):
        assert_bitwise(a, b)
    assert all((r[out] == 0).all() for r in rows) and (dhidden[out] == 0).all() and dweight.isfinite().all()


def test_minus_infinity_in_the_bias_removes_a_token() -> None:
    hidden, weight, target, _ = make(9, 16, 100, False, torch.float32)
    bias = torch.zeros(100)
    bias[target[0] + 1 :] = -torch.inf
    target[:] = target[0]
    rows = forward(hidden, weight, target, bias)
    want = reference.linear_logprob(hidden.double(), weight.double(), target, bias=bias.double())
    base = reference.linear_logprob(hidden, weight, target, bias=bias)
    check(rows[0], want[0], base[0], name="logprob")
    check(rows[1], want[1], base[1], name="entropy")
    assert all(g.isfinite().all() for g in backward(hidden, weight, target, bias, rows, torch.ones(9), torch.ones(9)))


def test_no_rows_and_only_ignored_rows() -> None:
    weight = torch.randn(50, 16)
    for N in (0, 3):
        hidden, target = torch.randn(N, 16), torch.full((N,), -100)
        rows = forward(hidden, weight, target, None)
        dhidden, dweight = backward(hidden, weight, target, None, rows, torch.ones(N), torch.ones(N))
        assert all((x == 0).all() for x in (*rows, dhidden, dweight))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(1, 16, 1), (37, 50, 65), (70, 33, 20), (3, 0, 5)], ids=lambda d: str(d)[6:])
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    M, K, N = shape
    x, weight, bias = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    for b in (None, bias):
        for w in (weight, weight.t().contiguous().t()):
            out = torch.full((M, N), NAN, dtype=dtype)
            triton_linear.linear(x, w, b, out)
            check(out, F.linear(x.double(), weight.double(), None if b is None else b.double()), F.linear(x, weight, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_linear_rows_do_not_see_each_other(dtype: torch.dtype) -> None:
    x, weight = torch.randn(90, 70).to(dtype), torch.randn(45, 70).to(dtype)
    out, alone = torch.full((90, 45), NAN, dtype=dtype), torch.full((1, 45), NAN, dtype=dtype)
    triton_linear.linear(x, weight, None, out)
    for i in (0, 31, 64, 89):
        triton_linear.linear(x[i : i + 1], weight, None, alone)
        assert_bitwise(out[i : i + 1], alone)


def test_covers_names_the_argument() -> None:
    h, w = torch.randn(2, 8), torch.randn(4, 8)
    assert triton_grpo.covers(h, w) is None and triton_linear.covers(h, w) is None
    assert triton_grpo.covers(h.double(), w).startswith("hidden:") and triton_linear.covers(h, w.half()).startswith("weight:")
    assert triton_grpo.covers(h, w, keep_logits=True).startswith("keep_logits:")
    assert triton_grpo.covers(h, w, group=object()).startswith("group:")
