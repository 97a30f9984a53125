"""What the linear_logprob and logprob benches share: a call's time, the memory a first call takes, the file of results."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from thinkernel.ops.dispatch import C

RESULTS = Path(__file__).parent / "results"


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _status_kib(key: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(key))


def high_water_rise_mib(run: Callable[[], object]) -> float:
    """How far one call lifts this process's high-water mark over what is resident before it."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making the inputs
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def write(name: str, args: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "machine": platform.processor() or platform.machine(), "isa": C.isa(), "threads": args.threads, "commit": commit,
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "repeats": args.repeats, "results": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")
