"""Runs tests/triton_interpreter in processes of their own: the interpreter must be chosen before the kernels are imported."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "triton_interpreter"


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_under_the_interpreter(marked: str) -> None:
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-x", "-n", "2", "-m", marked, "--no-header", "-p", "no:cacheprovider"]
    command += ["-W", "ignore::DeprecationWarning:triton"]  # Triton 3.6 indexes with numpy arrays of one element
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-2000:]
