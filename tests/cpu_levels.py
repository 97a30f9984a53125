"""The fixture of tests that hold a C++ kernel to account on every ISA level: import `level` and it applies to the whole file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import thinkernel as tk
import torch
from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import poisoned_results


@pytest.fixture(autouse=True, params=C.isa_levels() if hasattr(C, "isa_levels") else [])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on every level this CPU has, on the C++ kernels, with results poisoned by NaN."""
    former, threads = C.isa(), torch.get_num_threads()
    C.set_isa(request.param)
    torch.set_num_threads(2)
    with tk.use_backend("cpu"), poisoned_results():
        yield request.param
    C.set_isa(former)
    torch.set_num_threads(threads)
