"""The mla benches import and run: on a machine without a GPU, what can be run there."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run the bench")
def test_gpu_bench_imports_and_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_mla.py"])
    assert importlib.import_module("gpu_mla").main() == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_decode_step_is_timed_on_both_backends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    threads = str(torch.get_num_threads())
    arguments = ["--sequences", "2", "--cached", "5", "--dtype", "float32", "--rounds", "1", "--threads", threads, "--json", str(found)]
    monkeypatch.setattr(sys, "argv", ["mla_step.py", *arguments])
    importlib.import_module("mla_step").main()
    results = json.loads(found.read_text())["results"]
    assert [row["what"] for row in results] == ["step", "attention"]
    assert all(row["ms"]["auto"] > 0 and row["ms"]["reference"] > 0 for row in results)


def test_a_step_leaves_the_cache_as_it_was() -> None:
    bench = importlib.import_module("mla_step")
    from thinkernel.models import Transformer, preset

    torch.manual_seed(0)
    with torch.no_grad():
        whole, attention = bench.steps(Transformer(preset("deepseek_v3_mini", layers=2)), 2, 7)
        first = whole()
        attention()
        assert torch.equal(whole(), first)
