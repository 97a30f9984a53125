"""logprob from given logits in Triton under the interpreter: long vocabularies, many rows, strides, ignored rows, special values.

Shapes: logits [N, V], target [N]. Under the interpreter a tile has at most 32 columns and a vocabulary split holds 64.
The rule over ordinary inputs through the op is in test_rule.py.
"""
from __future__ import annotations

import pytest
import torch
from thinkernel.kernels import grpo_logits as kernels
from thinkernel.reference import grpo as reference
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

DTYPES = [torch.float32, torch.float16]
NAN = float("nan")


def run(logits: Tensor, target: Tensor, g: Tensor, g_ent: Tensor | None, **options) -> list[Tensor]:
    """logprob, entropy, dlogits, every buffer poisoned before."""
    lp, ent, lse = (torch.full(target.shape, NAN, dtype=t) for t in (torch.float32, torch.float32, torch.float64))
    kernels.logprob_forward(logits, target, lp, ent, lse, **options)
    dlogits = torch.full(logits.shape, NAN, dtype=logits.dtype)
    kernels.logprob_backward(logits, target, lse, ent, g, g_ent, dlogits, **options)
    return [lp, ent, dlogits]


def truth(dtype: torch.dtype, logits: Tensor, target: Tensor, g: Tensor, g_ent: Tensor | None, **options) -> list[Tensor]:
    leaf = logits.to(dtype).requires_grad_()
    lp, ent = reference.logprob(leaf, target, **options)
    (dlogits,) = torch.autograd.grad([lp, ent], leaf, [g.to(lp.dtype), torch.zeros_like(lp) if g_ent is None else g_ent.to(lp.dtype)])
    return [lp.detach(), ent.detach(), dlogits]


def make(N: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = torch.randint(0, V, (N,))
    target[2::5] = -100
    return (3 * torch.randn(N, V)).to(dtype), target, torch.randn(N), torch.randn(N)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(4000, 50), (8000, 7), (500, 309), (3, 1)], ids=str)
def test_within_the_rule(shape: tuple[int, int], dtype: torch.dtype) -> None:
    options = dict(temperature=0.7, softcap=5.0) if shape[1] == 50 else {}
    inputs = list(make(*shape, dtype))  # many rows: the worst of a few hundred is a matter of luck, for torch and for us
    inputs[3] = None if shape[1] == 7 else inputs[3]
    found, want, base = run(*inputs, **options), *(truth(t, *inputs, **options) for t in (torch.float64, dtype))
    for name, x, ref, same in zip(("logprob", "entropy", "dlogits"), found, want, base, strict=True):
        check(x, ref, same, name=name)


def test_more_rows_than_a_grid_s_second_dimension_holds() -> None:
    logits, target, g, g_ent = make(65_700, 3, torch.float32)
    found, want, base = run(logits, target, g, g_ent), *(truth(t, logits, target, g, g_ent) for t in (torch.float64, torch.float32))
    for x, ref, same in zip(found, want, base, strict=True):
        check(x, ref, same)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_row_alone_in_a_batch_and_strided(dtype: torch.dtype) -> None:
    logits, target, g, g_ent = make(70, 201, dtype)
    batch = run(logits, target, g, g_ent)
    wide = torch.full((70, 333), NAN, dtype=dtype)
    wide[:, 5:206] = logits
    for a, b in zip(batch, run(wide[:, 5:206], target, g, g_ent), strict=True):
        assert_bitwise(a, b, "strided")
    whole = torch.randn(7, 10, 201).to(dtype)
    whole[:] = logits.unflatten(0, (7, 10))
    shifted = torch.cat([torch.full((7, 1, 201), NAN, dtype=dtype), whole], 1)[:, 1:]  # logits[:, 1:] of a model's
    for a, b in zip(batch, run(shifted, target.view(7, 10), g.view(7, 10), g_ent.view(7, 10)), strict=True):
        assert_bitwise(a, b.view(a.shape), "[B, S, V] with its own strides")
    for i in (0, 33, 69):
        one = slice(i, i + 1)
        for a, b in zip(batch, run(logits[one], target[one], g[one], g_ent[one]), strict=True):
            assert_bitwise(a[one], b, "alone")


def test_ignored_rows_are_not_read_and_targets_outside_count_as_ignored() -> None:
    logits, target, g, g_ent = make(40, 70, torch.float32)
    target[3], target[8] = 70, -1
    target[target == 4] = 5
    target[11] = 4
    out = (target < 0) | (target >= 70) | (target == 4)
    clean = run(logits, target, g, g_ent, ignore_index=4)
    logits[out], g[out], g_ent[out] = NAN, NAN, NAN
    for a, b in zip(run(logits, target, g, g_ent, ignore_index=4), clean, strict=True):
        assert_bitwise(a, b)
        assert (a[out] == 0).all() and a.isfinite().all()


def test_special_values_stay_in_their_row() -> None:
    logits, target, g, g_ent = make(6, 90, torch.float32)
    target[:] = torch.tensor([3, 3, 3, 89, 3, 3])
    clean = run(logits, target, g, g_ent)
    logits[1, 40:] = -torch.inf  # removed tokens
    logits[2, 70] = NAN
    logits[3, :64] = -torch.inf  # a whole split of them
    found, want, base = run(logits, target, g, g_ent), *(truth(t, logits, target, g, g_ent) for t in (torch.float64, torch.float32))
    for a, b, ref, same in zip(found, clean, want, base, strict=True):
        for untouched in (0, 4, 5):
            assert_bitwise(a[untouched], b[untouched])
        assert a[2].isnan().all() if a.dim() == 1 else a[2].isnan().any()
        finite = [0, 1, 3, 4, 5]
        check(a[finite], ref[finite], same[finite])


def test_empty() -> None:
    assert all(x.numel() == 0 for x in run(torch.empty(0, 7), torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0)))


def test_covers_names_the_argument() -> None:
    assert kernels.covers(torch.empty(2, 3)) is None
    assert kernels.covers(torch.empty(2, 3, dtype=torch.float64)).startswith("logits:")
    assert "stride" in kernels.covers(torch.empty(3, 2).t())
