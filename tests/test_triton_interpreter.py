"""Runs tests/triton_interpreter in a process of its own: the interpreter must be chosen before the kernels are imported."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "triton_interpreter"


def test_kernels_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "no tests ran" not in done.stdout
