"""The packed GEMM through linear and linear_logprob on every ISA level: numerics against float64, and bits.

Shapes: N rows, I in, O out, D hidden, V vocabulary.
"""

from __future__ import annotations

import pytest
import thinkernel as tk
import torch
import torch.nn.functional as F
from cpu_levels import level  # noqa: F401
from thinkernel.ops.dispatch import C
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "linear_forward"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ---- linear ----------------------------------------------------------------------------------------------------


def _linear_case(seed: int, dtype: torch.dtype, N: int, I: int, O: int, bias: bool) -> tuple[list[Tensor], Tensor]:  # noqa: E741
    draw = Draw(seed, dtype)
    tensors = [draw.normal(N, I), draw.weight(O, I)] + ([draw.normal(O)] if bias else [])
    return tensors, draw.normal(N, O)


def _with_gradients(f, tensors: list[Tensor], dys: list[Tensor]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """f's results, then the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = f(*leaves)
    results = list(results) if isinstance(results, tuple) else [results]
    return [x.detach() for x in results] + list(torch.autograd.grad(results, leaves, dys))


def _check_linear(seed: int, dtype: torch.dtype, N: int, I: int, O: int, bias: bool) -> None:  # noqa: E741
    tensors, dy = _linear_case(seed, dtype, N, I, O, bias)
    ours = _with_gradients(tk.linear, tensors, [dy])
    truth = _with_gradients(F.linear, [x.double() for x in tensors], [dy.double()])
    torchs = _with_gradients(F.linear, tensors, [dy])
    for name, a, b, c in zip(("y", "dx", "dweight", "dbias"), ours, truth, torchs, strict=False):
        check(a, b, c, dtype=dtype, name=f"{name} N={N} I={I} O={O}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_matches_float64_at_odd_sizes(dtype: torch.dtype) -> None:
    sizes = torch.Generator().manual_seed(7)
    for seed in range(8):
        N, I, O = (int(x) for x in torch.randint(1, 71, (3,), generator=sizes))  # noqa: E741
        _check_linear(seed, dtype, N, I, O, bias=seed % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,I,O", [(1, 1031, 257), (211, 521, 97), (389, 64, 1025)])
def test_linear_matches_float64_across_blocks(dtype: torch.dtype, N: int, I: int, O: int) -> None:  # noqa: E741
    _check_linear(N, dtype, N, I, O, bias=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_bits_follow_the_row_alone(dtype: torch.dtype) -> None:
    (x, w, b), dy = _linear_case(3, dtype, 403, 523, 271, bias=True)
    whole = _with_gradients(tk.linear, [x, w, b], [dy])
    for threads in (1, 4):
        torch.set_num_threads(threads)
        for name, again, first in zip("y dx dw db".split(), _with_gradients(tk.linear, [x, w, b], [dy]), whole, strict=True):
            assert_bitwise(again, first, f"{name}, {threads} threads")
    for rows in (slice(0, 1), slice(402, 403), slice(190, 207), slice(1, 400)):
        part = _with_gradients(tk.linear, [x[rows], w, b], [dy[rows]])
        assert_bitwise(part[0], whole[0][rows], f"y {rows}")
        assert_bitwise(part[1], whole[1][rows], f"dx {rows}")
    for columns in (slice(5, 6), slice(100, 271)):
        assert_bitwise(tk.linear(x, w[columns], b[columns]), whole[0][:, columns], f"y of weight rows {columns}")


def test_linear_empty_sizes() -> None:
    assert tk.linear(torch.randn(0, 5), torch.randn(3, 5)).shape == (0, 3)
    assert tk.linear(torch.randn(4, 5), torch.randn(0, 5)).shape == (4, 0)
    b = torch.randn(3)
    assert_bitwise(tk.linear(torch.randn(4, 0), torch.randn(3, 0), b), b.expand(4, 3).contiguous(), "no inputs")
    _, dx, dw = _with_gradients(tk.linear, [torch.randn(0, 5), torch.randn(3, 5)], [torch.randn(0, 3)])
    assert dx.shape == (0, 5) and torch.equal(dw, torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_strided_rows_and_nan(dtype: torch.dtype) -> None:
    draw = Draw(11, dtype)
    wide, w = draw.normal(37, 50), draw.weight(40, 45)
    x = wide[::2, 3:48]
    clean = tk.linear(x, w)
    assert_bitwise(clean, tk.linear(x.contiguous(), w), "strided rows")
    wide[8, 20] = float("nan")
    y = tk.linear(x, w)
    assert y[4].isnan().all()
    y[4] = clean[4]
    assert_bitwise(y, clean, "NaN stays in its row")


# ---- linear_logprob --------------------------------------------------------------------------------------------


def _head_case(seed: int, dtype: torch.dtype, N: int, D: int, V: int, *, ignored: float = 0.3, scale: float = 3.0):  # type: ignore[no-untyped-def]
    """Peaked distributions: logits of standard deviation `scale`."""
    draw = Draw(seed, dtype)
    hidden, weight, bias = draw.normal(N, D), draw.normal(V, D, scale=scale * D**-0.5), draw.normal(V)
    target = draw.integers(0, V, N, dtype=torch.int64)
    target[torch.rand(N, generator=draw.generator) < ignored] = -100
    g = [draw.normal(N, dtype=torch.float32), draw.normal(N, dtype=torch.float32)]
    return hidden, weight, bias, target, g


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, temperature: float, softcap: float | None):  # type: ignore[no-untyped-def]
    """What torch does in the tensors' dtype: logits of that dtype, then log_softmax in float32 (float64: all of it)."""
    y = F.linear(hidden, weight, bias)
    y = y if y.dtype == torch.float64 else y.float()
    z = (softcap * torch.tanh(y / softcap) if softcap else y) / temperature
    logp = torch.log_softmax(z, -1)  # [N, V]
    active = target != -100
    lp = logp.gather(1, target.clamp_min(0)[:, None])[:, 0]
    terms = torch.where(logp > -torch.inf, logp.exp() * logp, 0.0)
    return torch.where(active, lp, 0.0), torch.where(active, -terms.sum(-1), 0.0)


def _ours(case, temperature: float = 1.0, softcap: float | None = None) -> list[Tensor]:  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, g = case
    return _with_gradients(
        lambda h, w, b: tk.linear_logprob(h, w, target, bias=b, temperature=temperature, softcap=softcap),
        [hidden, weight, bias], g,
    )


RESULTS = "logprob entropy dhidden dweight dbias".split()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N,D,V,temperature,softcap",
    [(1, 1, 1, 1.0, None), (5, 31, 67, 0.7, None), (33, 64, 384, 1.0, 10.0), (61, 127, 1009, 1.3, 5.0), (197, 48, 1543, 1.0, None)],
)
def test_linear_logprob_matches_float64(
    dtype: torch.dtype, N: int, D: int, V: int, temperature: float, softcap: float | None
) -> None:
    case = _head_case(N + V, dtype, N, D, V)
    hidden, weight, bias, target, g = case

    def run(to: torch.dtype) -> list[Tensor]:
        return _with_gradients(
            lambda h, w, b: _plain(h, w, b, target, temperature, softcap), [x.to(to) for x in (hidden, weight, bias)],
            g if to != torch.float64 else [x.double() for x in g],
        )

    for name, a, b, c in zip(RESULTS, _ours(case, temperature, softcap), run(torch.float64), run(dtype), strict=True):
        check(a, b, c, dtype=a.dtype, name=f"{name} N={N} D={D} V={V}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_logprob_bits_follow_the_row_alone(dtype: torch.dtype) -> None:
    case = _head_case(5, dtype, 401, 70, 1601)
    hidden, weight, bias, target, g = case
    whole = _ours(case, 0.9, 20.0)
    for threads in (1, 4):
        torch.set_num_threads(threads)
        for name, again, first in zip(RESULTS, _ours(case, 0.9, 20.0), whole, strict=True):
            assert_bitwise(again, first, f"{name}, {threads} threads")
    alone = int((target[200:] != -100).nonzero()[0]) + 200
    for rows in (slice(alone, alone + 1), slice(190, 395), slice(1, 400)):
        part = _ours((hidden[rows], weight, bias, target[rows], [x[rows] for x in g]), 0.9, 20.0)
        for i in range(3):
            assert_bitwise(part[i], whole[i][rows], f"{RESULTS[i]} {rows}")
    lp, none = tk.linear_logprob(hidden, weight, target, bias=bias, temperature=0.9, softcap=20.0, entropy=False)
    assert none is None
    assert_bitwise(lp, whole[0], "logprob without entropy")


def test_linear_logprob_ignored_rows_cost_nothing_and_give_zero() -> None:
    hidden, weight, bias, target, g = _head_case(9, torch.float32, 50, 16, 100, ignored=0.5)
    off = target == -100
    hidden[off] = float("nan")  # never read
    lp, ent, dh, dw, db = _ours((hidden, weight, bias, target, g))
    for x in (lp, ent, dh):
        assert not x.isnan().any() and (x[off] == 0).all()
    kept = _ours((hidden[~off], weight, bias, target[~off], [x[~off] for x in g]))
    assert_bitwise(dw, kept[3], "dweight of the active rows")
    assert_bitwise(db, kept[4], "dbias of the active rows")
    nothing = _ours((hidden, weight, bias, torch.full_like(target, -100), g))
    assert all((x == 0).all() for x in nothing)
    empty = _ours((hidden[:0], weight, bias, target[:0], [x[:0] for x in g]))
    assert empty[0].shape == (0,) and (empty[3] == 0).all() and (empty[4] == 0).all()


def test_linear_logprob_infinite_and_large_logits() -> None:
    hidden, weight, bias, target, g = _head_case(13, torch.float32, 40, 24, 900, ignored=0.0)
    bias[100:700] = -torch.inf  # more than a whole block is forbidden
    target = target % 100
    out = _ours((hidden, weight, bias, target, g))
    allowed = torch.cat([torch.arange(100), torch.arange(700, 900)])
    kept = [x[allowed] if x.shape[0] == 900 else x for x in out]
    truth, torchs = (
        _with_gradients(
            lambda h, w, b: _plain(h, w, b, target, 1.0, None), [x.to(to) for x in (hidden, weight[allowed], bias[allowed])],
            [x.to(to) for x in g],
        )
        for to in (torch.float64, torch.float32)
    )
    for name, a, b, c in zip(RESULTS, kept, truth, torchs, strict=True):
        check(a, b, c, dtype=torch.float32, name=name)  # forbidden words change nothing but the places of the rest
    assert (out[3][100:700] == 0).all() and (out[4][100:700] == 0).all()
    lp, ent = tk.linear_logprob(hidden * 300, weight, target % 24)  # logits of a thousand
    truth, ent64 = _plain(hidden.double() * 300, weight.double(), torch.zeros(900).double(), target % 24, 1.0, None)
    plain = _plain(hidden * 300, weight, torch.zeros(900), target % 24, 1.0, None)
    check(lp, truth, plain[0], dtype=torch.float32, name="large logits")
    assert ent.isfinite().all() and (ent - ent64).abs().max() < 1e-3


def test_linear_logprob_nan_stays_in_its_row() -> None:
    case = _head_case(17, torch.float32, 30, 20, 500, ignored=0.0)
    clean = _ours(case)
    hidden = case[0].clone()
    hidden[7, 3] = float("nan")
    dirty = _ours((hidden, *case[1:]))
    for i in range(3):
        assert dirty[i][7].isnan().all()
        dirty[i][7] = clean[i][7]
        assert_bitwise(dirty[i], clean[i], RESULTS[i])
