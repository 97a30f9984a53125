"""Building and running the CUDA sources on the host shim (csrc/cuda/host_shim), plain and under the sanitizers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)
RACE = 66  # ThreadSanitizer's exit code below


def compile_object(output: Path, source: Path, *flags: str) -> Path:
    command = [
        "g++", "-std=c++20", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC",
        f"-I{ROOT / 'csrc/include'}", f"-I{CUDA}", *flags, "-x", "c++", "-c", str(source), "-o", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def link(output: Path, objects: list[Path], *flags: str) -> Path:
    done = subprocess.run(
        ["g++", "-pthread", *flags, *map(str, objects), "-o", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return output


def run(program: Path, seed: int, *groups: str, removed_barrier: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}",
        "TK_TEST_REMOVE_BARRIER": str(removed_barrier),
    }
    command = [str(program), str(seed), *groups]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        # GCC 12's ThreadSanitizer cannot place its shadow where the kernel randomises addresses by more than 28 bits.
        command = ["setarch", platform.machine(), "-R", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done


def check(done: subprocess.CompletedProcess[str], *groups: str) -> None:
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    for group in groups:
        assert int(re.findall(rf"^{group}: (\d+) cases$", done.stdout, re.M)[0]) > 0, report
