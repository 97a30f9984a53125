"""The numerics rule on this machine: every case on the reference and the C++ kernels, and the comparator itself."""

from __future__ import annotations

import pytest
import torch
from thinkernel.ops import dispatch
from thinkernel.testing import assert_bitwise, check
from thinkernel.testing.cases import CASES
from thinkernel.testing.validate import evaluate, judge, messages

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU_KERNELS = ("attention", "linear", "mla")
CPU_CASES = [c for c in CASES if c.family in CPU_KERNELS or "logprob" in c.name]
# policy_loss and group_advantages compute in float32 whatever the dtype: one suffices, and the reference on the small ones
TOKEN_CASES = [c for c in CASES if "policy-loss" in c.name or "advantages" in c.name]
ALL_DTYPES = [(case, dtype) for case in CASES if case not in TOKEN_CASES for dtype in DTYPES]
ONE_DTYPE = [(case, torch.float32) for case in TOKEN_CASES if case.small]


def _assert_within(results):
    wrong = messages(results)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case, dtype", [*ALL_DTYPES, *ONE_DTYPE], ids=lambda x: str(x).removeprefix("torch."))
def test_reference_is_within_the_rule(case, dtype):
    _assert_within(list(evaluate(case, "reference", dtype)))


@pytest.mark.skipif(dispatch.C is None, reason=dispatch.C_MISSING)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_cpu_kernels_are_within_the_rule(case, dtype):
    _assert_within(list(evaluate(case, "cpu", dtype)))


@pytest.mark.skipif(dispatch.C is None, reason=dispatch.C_MISSING)
@pytest.mark.parametrize("case", TOKEN_CASES, ids=str)
def test_losses_and_advantages_are_within_the_rule(case):
    _assert_within(list(evaluate(case, "cpu", torch.float32)))


@pytest.mark.slow
@pytest.mark.skipif(dispatch.C is None, reason=dispatch.C_MISSING)
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_cpu_kernels_are_within_the_rule_for_other_numbers(case, seed):
    for dtype in DTYPES:
        _assert_within(judge(case, "cpu", dtype, seed=seed))


# ---- the comparator -----------------------------------------------------------------------------------------------


def _triple():
    ref = torch.randn(50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ref.float(), ref, ref.float()


def test_rounding_alone_passes_and_a_wrong_element_names_its_place():
    out, ref, base = _triple()
    check(out, ref, base)
    out[17, 5] += 1e-5
    with pytest.raises(AssertionError, match=r"worst at \(17, 5\)"):
        check(out, ref, base)


def test_a_big_row_does_not_hide_an_error_in_a_small_one():
    out, ref, base = _triple()
    ref[3] *= 1e6
    out, base = ref.float(), ref.float()
    out[20, 1] += 1e-4
    with pytest.raises(AssertionError, match=r"row error.*worst at \(20, 1\)"):
        check(out, ref, base)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_positions_must_match(value):
    out, ref, base = _triple()
    out[2, 3] = value
    with pytest.raises(AssertionError, match=r"first at \(2, 3\)"):
        check(out, ref, base)
    ref[2, 3] = value
    check(out, ref, base)


def test_shapes_must_match():
    out, ref, base = _triple()
    with pytest.raises(AssertionError, match="shapes differ"):
        check(out[:3], ref, base)


def test_bitwise_tells_zeros_apart():
    assert_bitwise(torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]))
    with pytest.raises(AssertionError, match="1 of 2 elements"):
        assert_bitwise(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
