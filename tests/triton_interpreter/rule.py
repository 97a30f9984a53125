"""The rule for a case of the catalogue, under the interpreter."""

from __future__ import annotations

import torch
from thinkernel.testing.cases import Case
from thinkernel.testing.validate import DRAWS, judge, messages


def assert_within(case: Case, dtype: torch.dtype, draws: int = DRAWS) -> None:
    """Few draws, since they take the interpreter minutes."""
    wrong = messages(judge(case, "triton", dtype, draws=draws))
    assert not wrong, "\n".join(wrong)
