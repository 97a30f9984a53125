"""`thinkernel bench`: runs the microbenchmarks of a source checkout (bench/), one script a family."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[3] / "bench"


def scripts() -> dict[str, Path]:
    """The benches of this checkout that need no GPU, by name."""
    return {path.stem: path for path in sorted(BENCH.glob("*.py")) if not path.stem.startswith(("_", "gpu_"))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="*", help=f"which: {', '.join(scripts()) or 'none found'} (default: all)")
    parser.add_argument("--list", action="store_true", help="list the benches and stop")


def run(args: argparse.Namespace) -> int:
    known = scripts()
    if not known:
        raise ValueError("the benches live in a source checkout (bench/); this installation has none")
    for name in args.name:
        if name not in known:
            raise ValueError(f"no bench named {name!r}; there are {', '.join(known)}")
    if args.list:
        print("\n".join(known))
        return 0
    codes = []
    for name in args.name or known:
        print(f"== {name}", flush=True)
        codes.append(subprocess.run([sys.executable, str(known[name])], check=False).returncode)
    return max(codes)
