"""The GPU bench of sparse_attention imports, and says where there is no GPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run the bench")
def test_gpu_bench_imports_and_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    monkeypatch.setattr(sys, "argv", ["gpu_sparse_attention.py"])
    assert importlib.import_module("gpu_sparse_attention").main() == 1
    assert "no CUDA device" in capsys.readouterr().err
