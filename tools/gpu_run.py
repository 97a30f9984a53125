"""Everything a GPU machine is for, in one offline command (`make gpu`): build, tests, verify, bench.

    python tools/gpu_run.py [--out DIR] [--stage NAME ...] [--again] [--list]

Each stage has a time limit of its own; a failed stage is recorded and the next one goes on. After every stage the
results are in DIR (default: $OUT, or out/): gpu_run.json (state and outcome), one log per stage, tests.xml,
verified.json, bench.jsonl. Run again, it repeats only stages that have not passed on these sources; `--stage` runs the
named ones whatever the state, `--again` all. Exit code 0: every stage asked for has passed; 1: one has not; 2: a bad
argument.

Only Python's standard library is used here, so that the runner works where the build does not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("csrc", "kernels", "python", "tests", "bench", "tools")
SOURCE_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".txt")
GRACE_S = 5.0  # between asking a stage to end and killing it


@dataclass(frozen=True)
class Stage:
    """commands(out) are run in order under one time limit; needs() names what is missing on this machine."""

    name: str
    limit_s: float
    commands: Callable[[Path], list[list[str]]]
    needs: Callable[[], list[str]] = list
    stop_at_failure: bool = True
    environment: dict[str, str] = field(default_factory=dict)


def build_needs() -> list[str]:
    """What the build lacks here, each with what it is for."""
    missing = [
        f"{name} ({purpose})"
        for name, purpose in (("nvcc", "the CUDA compiler"), ("cmake", "the build"), ("ninja", "the build"))
        if shutil.which(name, path=search_path()) is None
    ]
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        missing.append("a C++ compiler")
    missing += [f"the Python package {name}" for name in ("setuptools", "pybind11") if not has_module(name)]
    return missing


def test_needs() -> list[str]:
    return [f"the Python package {name}" for name in ("torch", "einops", "pytest") if not has_module(name)]


def bench_needs() -> list[str]:
    missing = [f"the Python package {name}" for name in ("torch", "einops") if not has_module(name)]
    return missing if bench_scripts() else [*missing, "a bench/gpu_*.py script"]


def bench_scripts() -> list[Path]:
    return sorted((ROOT / "bench").glob("gpu_*.py"))


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def search_path() -> str:
    """PATH with this interpreter's own folder first: cmake and ninja installed as Python packages lie there."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def pytest_command() -> list[str]:
    """pytest, in four processes where xdist is there: compiling Triton kernels keeps a CPU core busy, not the GPU."""
    processes = ["-n", "4"] if has_module("xdist") else []
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *processes]


# 570 s together: one run fits into ten minutes, and a run that is cut off resumes.
STAGES = (
    Stage(
        "build", 150, lambda out: [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]], build_needs,
        environment={"THINKERNEL_CUDA": "1"},
    ),
    Stage("tests", 210, lambda out: [[*pytest_command(), "tests/gpu", f"--junitxml={out / 'tests.xml'}"]], test_needs),
    Stage("verify", 120, lambda out: [[sys.executable, "tools/gpu_verify.py", "--out", str(out)]], test_needs),
    Stage(
        "bench", 90, lambda out: [[sys.executable, str(script), "--out", str(out)] for script in bench_scripts()],
        bench_needs, stop_at_failure=False,
    ),
)  # fmt: skip


# ---- state


def source_digest() -> str:
    """A digest of what the results depend on; a stage passed on other sources counts as not run."""
    digest = hashlib.sha256()
    for folder in SOURCE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit the sources are from: $THINKERNEL_COMMIT, else git's, else "unknown" (a copy without its history)."""
    if named := os.environ.get("THINKERNEL_COMMIT"):
        return named
    with contextlib.suppress(OSError):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        if git.returncode == 0:
            changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
            return git.stdout.strip() + ("-changed" if changed.stdout.strip() else "")
    return "unknown"


def gpu_name() -> str:
    """What nvidia-smi says of the GPUs and driver, or why it says nothing."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return done.stdout.strip() if done.returncode == 0 else f"unknown: {(done.stdout + done.stderr).strip()}"


def load_state(path: Path, sources: str) -> dict[str, Any]:
    """The recorded state where it is of these sources, else an empty one."""
    if path.exists():
        try:
            state = json.loads(path.read_text())
        except json.JSONDecodeError:
            state = {}
        if isinstance(state, dict) and state.get("sources") == sources:
            return state
    return {"sources": sources, "stages": {}}


def save_state(path: Path, state: dict[str, Any]) -> None:
    # Written beside and moved over, so that a kill leaves the former state or the new one.
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(state, indent=1) + "\n")
    beside.replace(path)


# ---- running


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and everything it started: asks first, kills after GRACE_S."""
    for signal_number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
    process.wait()


def run_command(command: Sequence[str], log: Path, limit_s: float, environment: dict[str, str]) -> int | None:
    """Runs one command, its output to the log and to stdout as it comes: the exit status, None past the limit."""
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

        def copy() -> None:
            assert process.stdout is not None
            while chunk := process.stdout.read1(65536):  # type: ignore[attr-defined]
                file.write(chunk)
                file.flush()
                sys.stdout.write(chunk.decode(errors="replace"))
                sys.stdout.flush()

        copier = threading.Thread(target=copy, daemon=True)
        copier.start()
        try:
            status: int | None = process.wait(max(limit_s, 0.0))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_group(process)
            copier.join(GRACE_S)
        return status


def run_stage(stage: Stage, out: Path) -> dict[str, Any]:
    """Runs one stage: its record, {status, seconds, commands: [{command, status}], note}."""
    log = out / f"{stage.name}.log"
    log.write_text("")
    started = time.monotonic()
    record: dict[str, Any] = {"status": "passed", "commands": [], "note": ""}
    if missing := stage.needs():
        record.update(status="failed", note=f"this machine lacks {'; '.join(missing)}", seconds=0.0)
        log.write_text(record["note"] + "\n")
        return record
    environment = {
        **os.environ,
        "PATH": search_path(),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "THINKERNEL_COMMIT": commit(),
        "THINKERNEL_REQUIRE_GPU": "1",
        **stage.environment,
    }
    commands = stage.commands(out)
    for command in commands:
        status = run_command(command, log, stage.limit_s - (time.monotonic() - started), environment)
        record["commands"].append({"command": " ".join(command), "status": status})
        if status is None:
            record.update(status="timed_out", note=f"past its limit of {stage.limit_s:g} s: {' '.join(command)}")
            break
        if status != 0:
            record.update(status="failed", note=f"exit status {status}: {' '.join(command)}")
            if stage.stop_at_failure:
                break
    if not commands:
        record.update(status="failed", note="there was nothing to run")
    record["seconds"] = round(time.monotonic() - started, 1)
    return record


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM inside counts as Ctrl-C, so that a killed run ends its stage and records it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def run(stages: Sequence[Stage], out: Path, *, named: Sequence[str] = (), again: bool = False) -> int:
    """Runs the stages that are due (see the top of this file) and returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu_run.json"
    state = load_state(path, source_digest())
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    state.update(commit=commit(), gpu=gpu_name(), python=sys.version.split()[0], date=now)
    wanted = [stage for stage in stages if not named or stage.name in named]
    for stage in wanted:
        if not named and not again and state["stages"].get(stage.name, {}).get("status") == "passed":
            print(f"== {stage.name}: passed before, not run again", flush=True)
            continue
        print(f"== {stage.name} (limit {stage.limit_s:g} s)", flush=True)
        state["stages"][stage.name] = {"status": "running"}
        save_state(path, state)
        started = time.monotonic()
        try:
            record = run_stage(stage, out)
        except KeyboardInterrupt:
            seconds = round(time.monotonic() - started, 1)
            state["stages"][stage.name] = {"status": "interrupted", "seconds": seconds}
            save_state(path, state)
            print(f"== {stage.name}: interrupted", flush=True)
            return 1
        state["stages"][stage.name] = record
        save_state(path, state)
        print(f"== {stage.name}: {record['status']} in {record['seconds']} s. {record['note']}", flush=True)
    outcomes = {stage.name: state["stages"].get(stage.name, {}).get("status", "not run") for stage in wanted}
    print("gpu_run: " + ", ".join(f"{name} {status}" for name, status in outcomes.items()) + f"; results in {out}")
    return 0 if all(status == "passed" for status in outcomes.values()) else 1


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    parser = argparse.ArgumentParser(prog="gpu_run", description="Build, test, verify, bench on a GPU machine.")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results (default: $OUT, or out/)")
    names = [stage.name for stage in stages]
    parser.add_argument("--stage", action="append", choices=names, default=[], help="run this stage alone; repeatable")
    parser.add_argument("--again", action="store_true", help="run stages that have passed before, too")
    parser.add_argument("--list", action="store_true", help="print the stages and their limits")
    options = parser.parse_args(arguments)
    if options.list:
        for stage in stages:
            print(f"{stage.name:8} {stage.limit_s:g} s")
        return 0
    out = options.out or Path(os.environ.get("OUT") or ROOT / "out")
    with termination_as_interrupt():
        return run(stages, out.resolve(), named=options.stage, again=options.again)


if __name__ == "__main__":
    sys.exit(main())
