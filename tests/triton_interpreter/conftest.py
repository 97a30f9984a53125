"""These tests need TRITON_INTERPRET=1 before the kernels are imported: tests/test_triton_interpreter.py runs them so."""
from __future__ import annotations

import os
import warnings

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest):
    """Fresh random inputs for each test, the same ones on every run; numpy's warnings about masked-out inf and NaN kept quiet."""
    torch.manual_seed(sum(request.node.nodeid.encode()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
