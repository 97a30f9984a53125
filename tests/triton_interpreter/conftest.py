"""These tests need TRITON_INTERPRET=1 before the kernels are imported: tests/test_triton_interpreter.py runs them so."""
from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Fresh random inputs for each test, the same ones on every run."""
    torch.manual_seed(sum(request.node.nodeid.encode()))
