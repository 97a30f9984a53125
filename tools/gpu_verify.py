"""Runs the tests of CUDA kernels that are not verified on hardware yet, and records which passed.

    python tools/gpu_verify.py --out DIR           on a GPU machine: DIR/verified.json, the old records and the new
    python tools/gpu_verify.py --accept FILE       anywhere: take such a file into python/thinkernel/verified.json

Automatic dispatch takes a CUDA kernel only when it is recorded as passed. A record names the GPU, the date, the commit
and a digest of the kernel's sources; it holds for those sources alone, so a kernel that has changed is run again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERIFIED = ROOT / "python" / "thinkernel" / "verified.json"


@dataclass(frozen=True)
class Kernel:
    """source: its CUDA file; tests: the test file that must pass on a GPU, from the repository's root."""

    source: str
    tests: str


# By the name of the op that dispatch asks for. Every CUDA source belongs to at least one of them.
KERNELS = {
    "topk": Kernel("csrc/cuda/topk.cu", "tests/gpu/test_topk_gpu.py"),
    "topk_backward": Kernel("csrc/cuda/topk.cu", "tests/gpu/test_topk_gpu.py"),
    "logprob_forward": Kernel("csrc/cuda/logprob.cu", "tests/gpu/test_grpo_gpu.py"),
    "logprob_backward": Kernel("csrc/cuda/logprob.cu", "tests/gpu/test_grpo_gpu.py"),
    "policy_loss": Kernel("csrc/cuda/policy_loss.cu", "tests/gpu/test_grpo_gpu.py"),
    "group_advantages": Kernel("csrc/cuda/advantages.cu", "tests/gpu/test_grpo_gpu.py"),
    "route": Kernel("csrc/cuda/route.cu", "tests/gpu/test_route_gpu.py"),
    "route_backward": Kernel("csrc/cuda/route.cu", "tests/gpu/test_route_gpu.py"),
}


def load_verified() -> ModuleType:
    """thinkernel.ops.verified by its path: reading records must not need torch."""
    spec = importlib.util.spec_from_file_location("verified", ROOT / "python" / "thinkernel" / "ops" / "verified.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources_of(source: Path) -> list[Path]:
    """A CUDA file and every file of ours that it includes, directly or not; the host shim is no part of a GPU build."""
    found: list[Path] = []
    pending = [source.resolve()]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
            candidates = [folder / name for folder in (path.parent, ROOT / "csrc/cuda", ROOT / "csrc/include")]
            existing = [candidate.resolve() for candidate in candidates if candidate.exists()]
            if not existing:
                raise FileNotFoundError(f"{path}: includes {name}, which is in none of the include folders")
            if "host_shim" not in existing[0].parts:
                pending.append(existing[0])
    return sorted(found)


def digest(kernel: Kernel) -> str:
    """Digest of the sources a kernel is compiled from."""
    total = hashlib.sha256()
    for path in sources_of(ROOT / kernel.source):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def holds(record: dict[str, Any]) -> bool:
    """Whether a record is of a kernel that exists and of its sources as they are now."""
    kernel = KERNELS.get(record["kernel"])
    return kernel is not None and record["sources"] == digest(kernel)


def outcome(report: Path) -> dict[str, int]:
    """Counts of a JUnit report: tests, failures, errors, skipped."""
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, "0"))
    return counts


def run_tests(tests: str) -> bool:
    """Runs a test file; passed means that tests ran and none failed, erred or was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, f"--junitxml={report}"]
        environment = {**os.environ, "THINKERNEL_REQUIRE_GPU": "1"}
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if status != 0 or not report.exists():
            return False
        counts = outcome(report)
    print(f"{tests}: {counts}")
    return counts["tests"] > 0 and counts["failures"] == counts["errors"] == counts["skipped"] == 0


def current_gpu() -> tuple[str, str]:
    """The GPU's name and compute capability; raises RuntimeError where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device: nothing can be verified here")
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}"


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(sorted(records, key=lambda r: (r["kernel"], r["capability"])), indent=1) + "\n")


def verify(out: Path) -> int:
    """Runs what is unverified and writes out/verified.json after every kernel; 0 when all of them passed."""
    gpu, capability = current_gpu()
    out.mkdir(parents=True, exist_ok=True)
    records = [record for record in load_verified().read_records(VERIFIED) if holds(record)]
    write_records(out / "verified.json", records)
    outcomes: dict[str, bool] = {}  # by test file: ops of one source share it
    for name, kernel in KERNELS.items():
        if any(r["kernel"] == name and r["capability"] == capability and r["passed"] for r in records):
            print(f"{name}: verified before on {capability}")
            continue
        if kernel.tests not in outcomes:
            outcomes[kernel.tests] = run_tests(kernel.tests)
        passed = outcomes[kernel.tests]
        records = [r for r in records if (r["kernel"], r["capability"]) != (name, capability)]
        records.append({
            "kernel": name, "gpu": gpu, "capability": capability,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": os.environ.get("THINKERNEL_COMMIT", "unknown"), "sources": digest(kernel), "passed": passed,
        })  # fmt: skip
        write_records(out / "verified.json", records)
        print(f"{name}: {'passed' if passed else 'FAILED'} on {gpu}")
    return 0 if all(outcomes.values()) else 1


def accept(path: Path) -> int:
    """Takes a verified.json from a GPU machine into the package; refuses records of other sources."""
    records = load_verified().read_records(path)
    stale = [record["kernel"] for record in records if not holds(record)]
    if stale:
        print(f"gpu_verify: {path} is of other sources of {', '.join(stale)} than these; verify again", file=sys.stderr)
        return 1
    write_records(VERIFIED, records)
    print(f"gpu_verify: {len(records)} records taken into {VERIFIED}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_verify", description="Verify CUDA kernels on hardware.")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--out", type=Path, metavar="DIR", help="test unverified kernels, write DIR/verified.json")
    choice.add_argument("--accept", type=Path, metavar="FILE", help="take this verified.json into the package")
    options = parser.parse_args(arguments)
    if options.accept is not None:
        return accept(options.accept)
    try:
        return verify(options.out)
    except RuntimeError as error:
        print(f"gpu_verify: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
