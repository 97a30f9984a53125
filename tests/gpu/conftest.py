"""Tests here need a CUDA device: without one they are skipped, or fail where THINKERNEL_REQUIRE_GPU=1 (`make gpu`)."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda_device() -> torch.device:
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
        if os.environ.get("THINKERNEL_REQUIRE_GPU") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return torch.device("cuda")
