"""Every case that `thinkernel validate` knows, on the GPU backends: against float64 on the CPU by the DESIGN rule."""

from __future__ import annotations

import pytest
import torch
from thinkernel.testing.cases import CASES, Case
from thinkernel.testing.validate import evaluate


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, backend: str, dtype: torch.dtype) -> None:
    results = list(evaluate(case, backend, dtype, device="cuda"))
    ran = [result.comparison for result in results if result.comparison is not None]
    if not ran:
        pytest.skip(results[0].skipped)
    wrong = [comparison.message for comparison in ran if comparison.message]
    assert not wrong, "\n".join(wrong)
