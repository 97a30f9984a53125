"""`thinkernel validate`: the numerics rule for every op, backend and dtype, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from thinkernel.ops import dispatch
from thinkernel.testing.cases import CASES, FAMILIES
from thinkernel.testing.validate import DRAWS, Result, evaluate, judge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this family (may be repeated)")
    parser.add_argument("--backend", action="append", choices=dispatch.BACKENDS, help="only this backend (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES), help="only this dtype (may be repeated)")
    parser.add_argument("--device", default="cpu", help="where the backends run: cpu or cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")


def run(args: argparse.Namespace) -> int:
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {args.device!r}, takes cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    backends = args.backend or [name for name in dispatch.BACKENDS if dispatch.unavailable(name, device) is None]
    for name in backends:
        reason = dispatch.unavailable(name, device)
        if reason is not None:
            raise ValueError(f"--backend {name}: {reason}")
    dtypes = args.dtype or list(DTYPES)
    interpreted = "triton" in backends and device.type == "cpu"
    if interpreted:
        # the interpreter multiplies the raw words of bfloat16 operands, and large shapes and many draws take minutes in it
        print("triton runs under the interpreter: float32 and float16, small shapes, few draws", flush=True)
    cases = [case for case in CASES if case.family in (args.family or FAMILIES)]
    jobs = [
        (case, backend, DTYPES[dtype])
        for backend in backends
        for case in cases
        for dtype in dtypes
        if not (interpreted and backend == "triton" and (dtype == "bfloat16" or not case.small))
    ]
    results: list[Result] = []
    for case, backend, dtype in tqdm(jobs, desc="validate", unit="case", disable=not sys.stderr.isatty()):
        if interpreted and backend == "triton":
            results += judge(case, backend, dtype, draws=DRAWS, seed=args.seed, device=args.device)
        else:
            results += evaluate(case, backend, dtype, seed=args.seed, device=args.device)
    failed = _print(results)
    if args.json:
        args.json.write_text(json.dumps([_row(r) for r in results], indent=1) + "\n")
    return 1 if failed else 0


def _row(result: Result) -> dict[str, object]:
    found = result.comparison
    row: dict[str, object] = {"backend": result.backend, "dtype": str(result.dtype).removeprefix("torch."), "family": result.case.family}
    if found is None:
        return row | {"name": result.case.name, "skipped": result.skipped}
    return row | {
        "name": found.name, "error": found.error, "torch_error": found.baseline_error, "allowed": found.allowed,
        "ratio": found.ratio, "within": not found.message,
    }


def _print(results: list[Result]) -> int:
    """The table, then what is not covered and what failed; returns the number of failures."""
    print(f"{'op':40} {'backend':10} {'dtype':9} {'error':>10} {'torch':>10} {'error/bound':>11}")
    failed: list[str] = []
    skipped: dict[str, dict[str, str]] = {}
    for result in results:
        found, dtype = result.comparison, str(result.dtype).removeprefix("torch.")
        if found is None:
            skipped.setdefault(result.backend, {})[result.case.name] = result.skipped
            continue
        mark = "" if not found.message else "  FAILED"
        print(f"{found.name:40} {result.backend:10} {dtype:9} {found.error:10.2e} {found.baseline_error:10.2e} {found.ratio:11.2f}{mark}")
        if found.message:
            failed.append(f"{result.backend} {dtype} {found.message}")
    for backend, cases in skipped.items():
        print(f"not covered by {backend} yet: {', '.join(cases)}")
    for line in failed:
        print(f"FAILED {line}")
    ran = [r for r in results if r.comparison is not None]
    print(f"{len(ran) - len(failed)} of {len(ran)} results within the rule")
    return len(failed)
