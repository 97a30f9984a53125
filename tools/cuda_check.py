"""Compiles every CUDA source for every shipped architecture and fails on a register spill.

    python tools/cuda_check.py [--arch 80 90a] [--json FILE]

Reads what `nvcc -Xptxas -v` says of each kernel: registers, static shared memory, stack, spills. It needs nvcc, no GPU.
Exit code 0: all compile without spills; 1: a spill, a compile error, or a source in which no kernel was seen;
2: no nvcc.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90a")  # compiled to machine code; compute_80 is shipped as PTX as well


@dataclasses.dataclass
class Kernel:
    """What ptxas reports of one kernel on one architecture."""

    name: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0


ENTRY = re.compile(r"Compiling entry function '([^']+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def parse_ptxas(text: str) -> list[Kernel]:
    """The kernels in ptxas' verbose output; device functions that are not inlined count with the kernel above them.

    Raises ValueError where a kernel is announced but not described: then the output's form has changed and
    nothing may be concluded from it.
    """
    kernels: list[Kernel] = []
    described: set[int] = set()
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(entry[1], entry[2], 0, 0, 0, 0, 0))
        elif kernels and (frame := FRAME.search(line)):
            last = kernels[-1]
            last.stack_bytes += int(frame[1])
            last.spill_stores += int(frame[2])
            last.spill_loads += int(frame[3])
            described.add(len(kernels) - 1)
        elif kernels and (used := USED.search(line)):
            kernels[-1].registers = int(used[1])
            kernels[-1].shared_bytes = int(used[2] or 0)
    for index, kernel in enumerate(kernels):
        if index not in described or kernel.registers == 0:
            raise ValueError(f"ptxas said nothing of the spills or registers of {kernel.name}")
    return kernels


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def compile_source(nvcc: str, source: Path, arch: str) -> tuple[int, str]:
    """Compiles one file to machine code for one architecture: nvcc's exit status and output."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc, "-std=c++20", "-O3", f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/cuda'}",
            "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v",
            "-c", str(source), "-o", str(Path(folder) / "out.o"),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def demangle(name: str) -> str:
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    full = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(.*\)$", "", full).removeprefix("void ")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA sources and fail on a register spill.")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="architectures (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("sources", nargs="*", type=Path, help="sources (default: csrc/cuda/**/*.cu)")
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_check: no nvcc on PATH and CUDACXX is not set", file=sys.stderr)
        return 2
    sources = options.sources or sorted((ROOT / "csrc/cuda").rglob("*.cu"))
    failures: list[str] = []
    table: list[Kernel] = []
    for source in sources:
        for arch in options.arch:
            status, output = compile_source(nvcc, source, arch)
            if status != 0:
                print(output, file=sys.stderr)
                failures.append(f"{source.name} does not compile for sm_{arch}")
                continue
            kernels = parse_ptxas(output)
            if not kernels:
                failures.append(f"{source.name} for sm_{arch}: ptxas reported no kernel")
            failures += [
                f"{demangle(k.name)} spills on sm_{k.arch}: {k.spill_stores} bytes stored, {k.spill_loads} loaded"
                for k in kernels if k.spills
            ]
            table += kernels
    print(f"{'arch':>6} {'registers':>9} {'shared':>7} {'stack':>6} {'spill':>6}  kernel")
    for k in table:
        spill = k.spill_stores + k.spill_loads
        print(f"{k.arch:>6} {k.registers:>9} {k.shared_bytes:>7} {k.stack_bytes:>6} {spill:>6}  {demangle(k.name)}")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(k) for k in table], indent=1) + "\n")
    for failure in failures:
        print(f"cuda_check: {failure}", file=sys.stderr)
    print(f"cuda_check: {len(sources)} sources, {len(table)} kernels, {len(failures)} failures")
    return 1 if failures or not table else 0


if __name__ == "__main__":
    sys.exit(main())
