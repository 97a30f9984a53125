"""Sparse attention's ops on the CPU against the best PyTorch and numpy forms of them, interleaved in one run.

    python bench/sparse.py                                   # everything
    python bench/sparse.py --work topk attention --dtypes bfloat16 --repeats 31

topk: N rows of T scores, k kept; torch.topk sorted and unsorted, numpy.argpartition (one thread; it has no bfloat16). Beside
attention.py's way of interleaving: every contestant runs untimed right before its timed run. Medians; the speed-up is that over
the fastest of each kind. Results go to bench/results/sparse_cpu.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import thinkernel as tk
import torch
from attention import RESULTS, commit, cpu_name, interleave
from thinkernel.ops.dispatch import C

Runs = dict[str, Callable[[], object]]
Row = dict[str, object]
TOPK = [(128, 16_384, 2048), (4, 16_384, 2048), (1, 1_000_000, 2048)]  # rows, scores, kept


def report(work: str, shape: str, dtype: str, runs: Runs, repeats: int) -> Row:
    """Times the runs, of which the first is ours -> a row of the results, printed as a line."""
    times = interleave(runs, repeats)
    middle = {who: statistics.median(found) for who, found in times.items()}
    ours, *others = middle
    speedup = {who: round(statistics.median(b / a for a, b in zip(times[ours], times[who])), 2) for who in others}
    line = ", ".join(f"{who} {t * 1e3:.3f}" for who, t in middle.items())
    print(f"{work} {shape} {dtype}: {line} ms; " + ", ".join(f"{x}x {who}" for who, x in speedup.items()), flush=True)
    return dict(work=work, shape=shape, dtype=dtype, milliseconds={who: round(t * 1e3, 3) for who, t in middle.items()}, speedup=speedup)


def topk(dtype: torch.dtype) -> list[tuple[str, Runs]]:
    rows = []
    for N, T, k in TOPK:
        scores = torch.randn(N, T).to(dtype)
        runs: Runs = {
            "thinkernel": lambda scores=scores, k=k: tk.topk(scores, k),
            "torch.topk sorted": lambda scores=scores, k=k: torch.topk(scores, k),
            "torch.topk unsorted": lambda scores=scores, k=k: torch.topk(scores, k, sorted=False),
        }
        if dtype == torch.float32:
            array = scores.numpy()
            runs["numpy.argpartition"] = lambda array=array, T=T, k=k: np.argpartition(array, T - k, axis=-1)[:, T - k :]
        rows.append((f"{k} of {N}x{T}", runs))
    return rows


WORK: dict[str, Callable[[torch.dtype], list[tuple[str, Runs]]]] = {"topk": topk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse_cpu.json", help="results file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    record: Row = dict(
        machine=cpu_name(), isa=C.isa(), threads=args.threads, torch=torch.__version__, commit=commit(),
        date=datetime.date.today().isoformat(), repeats=args.repeats,
    )  # fmt: skip
    rows: list[Row] = []
    args.out.parent.mkdir(exist_ok=True)
    for work in args.work:
        for name in args.dtypes:
            with tk.use_backend("cpu"):
                rows += [report(work, shape, name, runs, args.repeats) for shape, runs in WORK[work](getattr(torch, name))]
            args.out.write_text(json.dumps(record | dict(rows=rows), indent=1) + "\n")  # at once: a run may be cut off
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
