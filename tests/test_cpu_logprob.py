"""logprob from given logits on every ISA level: numerics against float64, edge cases, and bits.

Shapes: N rows or [B, S], V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from cpu_levels import level  # noqa: F401
from thinkernel.ops.dispatch import C
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "logprob_forward"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESULTS = "logprob entropy dlogits".split()

Case = tuple[Tensor, Tensor, list[Tensor]]


def _case(seed: int, dtype: torch.dtype, N: int, V: int, *, ignored: float = 0.2, scale: float = 3.0) -> Case:
    draw = Draw(seed, dtype)
    logits, target = draw.normal(N, V, scale=scale), draw.integers(0, V, N, dtype=torch.int64)
    target[torch.rand(N, generator=draw.generator) < ignored] = -100
    return logits, target, [draw.normal(N, dtype=torch.float32), draw.normal(N, dtype=torch.float32)]


def _with_gradient(f: Any, logits: Tensor, g: list[Tensor]) -> list[Tensor]:
    x = logits.detach().requires_grad_()
    out = [y for y in f(x) if y is not None]
    (dx,) = torch.autograd.grad(out, x, [y.to(o.dtype) for y, o in zip(g, out, strict=False)])
    return [*(y.detach() for y in out), dx]


def _ours(case: Case, **options: Any) -> list[Tensor]:
    return _with_gradient(lambda x: tk.logprob(x, case[1], **options), case[0], case[2])


def _plain(case: Case, to: torch.dtype, temperature: float = 1.0, softcap: float | None = None) -> list[Tensor]:
    logits, target, g = case

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x if x.dtype == torch.float64 else x.float()
        log_p = torch.log_softmax((softcap * torch.tanh(y / softcap) if softcap else y) / temperature, -1)
        lp = log_p.gather(-1, target.clamp_min(0)[..., None])[..., 0]
        entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)
        return torch.where(target >= 0, lp, 0.0), torch.where(target >= 0, entropy, 0.0)

    return _with_gradient(f, logits.to(to), g)


def _check(case: Case, name: str, **options: Any) -> None:
    ours, truth, torchs = _ours(case, **options), _plain(case, torch.float64, **options), _plain(case, case[0].dtype, **options)
    for what, a, b, c in zip(RESULTS, ours, truth, torchs, strict=True):
        check(a, b, c, dtype=a.dtype, name=f"{what} {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, dict(temperature=0.7), dict(temperature=1.3, softcap=5.0)], ids=["plain", "cool", "softcap"])
@pytest.mark.parametrize("N,V", [(40, 1), (50, 31), (64, 203), (33, 2048), (40, 5003), (17, 32769)])
def test_matches_float64(dtype: torch.dtype, options: dict[str, float], N: int, V: int) -> None:
    _check(_case(N + V, dtype, N, V), f"N={N} V={V}", **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [50257, 128256, 151936])
def test_matches_float64_at_real_vocabularies(dtype: torch.dtype, V: int) -> None:
    _check(_case(V, dtype, 24, V), f"V={V}", temperature=0.9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [203, 70001])
def test_bits_follow_the_row_alone(dtype: torch.dtype, V: int) -> None:
    case = logits, target, g = _case(5, dtype, 37, V)
    whole = _ours(case, temperature=0.9)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for name, a, b in zip(RESULTS, _ours(case, temperature=0.9), whole, strict=True):
            assert_bitwise(a, b, f"{name}, {threads} threads")
    for rows in (slice(0, 1), slice(3, 30)):
        part = _ours((logits[rows], target[rows], [x[rows] for x in g]), temperature=0.9)
        for name, a, b in zip(RESULTS, part, whole, strict=True):
            assert_bitwise(a, b[rows], f"{name} {rows}")
    lp, none = tk.logprob(logits, target, temperature=0.9, entropy=False)
    assert none is None
    assert_bitwise(lp, whole[0], "logprob without entropy")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_logits_are_read_where_they_lie(dtype: torch.dtype) -> None:
    draw = Draw(3, dtype)
    wide = draw.normal(4, 9, 151)
    target = draw.integers(0, 101, 4, 8, dtype=torch.int64)
    g = [draw.normal(4, 8, dtype=torch.float32), draw.normal(4, 8, dtype=torch.float32)]
    for logits in (wide[:, :-1, 7:108], wide[:, 1:, :101], wide.transpose(0, 1)[:8, :, 50:].transpose(0, 1)):
        strided = _ours((logits, target, g))
        for name, a, b in zip(RESULTS, strided, _ours((logits.contiguous(), target, g)), strict=True):
            assert_bitwise(a, b, name)
    turned = wide[0, :8, :101].t().contiguous().t()  # not contiguous in V: copied
    a = _ours((turned, target[0], [x[0] for x in g]))
    for name, x, y in zip(RESULTS, a, _ours((wide[0, :8, :101].contiguous(), target[0], [x[0] for x in g])), strict=True):
        assert_bitwise(x, y, name)


def test_nan_and_ignored_rows() -> None:
    case = logits, target, g = _case(17, torch.float32, 30, 500)
    clean = _ours(case)
    off = target == -100
    assert off.any() and all((x[off] == 0).all() for x in clean)
    dirty = logits.clone()
    dirty[off] = float("nan")  # never read
    row = int((~off).nonzero()[3])
    dirty[row, 77] = float("nan")
    for name, a, b in zip(RESULTS, _ours((dirty, target, g)), clean, strict=True):
        assert a[row].isnan().all(), name
        a[row] = b[row]
        assert_bitwise(a, b, name)
    for x in _ours((logits, torch.full_like(target, -100), g)):
        assert (x == 0).all()


def test_empty_and_one_word() -> None:
    empty = _ours((torch.randn(0, 7), torch.zeros(0, dtype=torch.long), [torch.zeros(0)] * 2))
    assert [tuple(x.shape) for x in empty] == [(0,), (0,), (0, 7)]
    for x in _ours((torch.randn(3, 1), torch.zeros(3, dtype=torch.long), [torch.ones(3)] * 2)):
        assert (x == 0).all()


def test_masked_vocabulary_and_large_logits() -> None:
    logits, target, g = _case(13, torch.float32, 20, 9000, ignored=0.0)
    logits[:, 100:8000] = -torch.inf
    case = logits, target % 100, g
    out, truth, torchs = _ours(case), _plain(case, torch.float64), _plain(case, torch.float32)
    for name, a, b, c in zip(RESULTS[:2], out, truth, torchs, strict=False):
        check(a, b, c, name=name)
    assert (out[2][:, 100:8000] == 0).all()
    kept = torch.cat([torch.arange(100), torch.arange(8000, 9000)])
    small = logits[:, kept], target % 100, g
    check(out[2][:, kept], _plain(small, torch.float64)[2], _plain(small, torch.float32)[2], name="dlogits")
    big = (logits[:, :100] * 300, target % 100, g)
    check(_ours(big)[0], _plain(big, torch.float64)[0], _plain(big, torch.float32)[0], name="large logits")


@pytest.mark.parametrize("size", [1e5, 1e8])  # past 1e10 the double that lse is begins to show
def test_logits_far_from_zero(size: float) -> None:
    """A row's logits move together: lse's second float is then no longer small."""
    steps = Draw(8, torch.float32).integers(-3, 4, 7, 40).float() * max(1.0, size * 2**-23)
    logits = size * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0])[:, None] + steps
    logits[0] = size
    _check((logits, torch.arange(7), [torch.ones(7), torch.zeros(7)]), f"{size:g}")


def test_many_rows() -> None:
    case = _case(19, torch.float32, 70001, 5)
    _check(case, "N=70001")


def test_half_a_gradient() -> None:
    """Only the entropy's, or only the log-probability's."""
    case = logits, target, g = _case(23, torch.float32, 20, 300)
    whole = _ours(case)[2]
    parts = []
    for i in range(2):
        x = logits.detach().requires_grad_()
        parts.append(torch.autograd.grad(tk.logprob(x, target)[i], x, g[i])[0])
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [-1, 7, 8])
def test_target_out_of_range(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"^target: got {bad}, takes values in 0..6 or ignore_index -100"):
        tk.logprob(torch.zeros(3, 7), torch.tensor([0, bad, 2]))
