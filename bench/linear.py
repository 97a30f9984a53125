"""tk.linear on the CPU against F.linear, interleaved in one run: forward and the three gradients, from one row to thousands.

    python bench/linear.py
    python bench/linear.py --dtypes bfloat16 --rows 1 16 2048

Medians over repeats in which every contestant runs once in turn. Rates in GFLOP/s; for few rows, where reading the weight
is the work, in GB/s of weight. F.linear's bits depend on the batch, ours do not: the price of that is the ratio printed.
Results go to bench/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import thinkernel as tk
import torch
import torch.nn.functional as F
from thinkernel.ops.dispatch import C

RESULTS = Path(__file__).parent / "results"


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def measure(dtype: torch.dtype, N: int, width: int, repeats: int) -> list[dict[str, object]]:
    x = torch.randn(N, width).to(dtype).requires_grad_()
    w = (torch.randn(width, width) * width**-0.5).to(dtype).requires_grad_()
    dy = torch.randn(N, width).to(dtype)
    rows: list[dict[str, object]] = []
    for work, gemms in (("forward", 1), ("forward+backward", 3)):
        def run(f: Callable[..., torch.Tensor], gemms: int = gemms) -> object:
            if gemms == 3:
                return torch.autograd.grad(f(x, w), (x, w), dy)
            with torch.no_grad():
                return f(x, w)

        forms = {"thinkernel": tk.linear, "torch": F.linear}
        times: dict[str, list[float]] = {name: [] for name in forms}
        for f in forms.values():
            run(f)
        for _ in range(repeats):
            for name, f in forms.items():
                times[name].append(milliseconds(lambda f=f: run(f)))
        medians = {name: statistics.median(t) for name, t in times.items()}
        for name, median in medians.items():
            gflops, gbs = gemms * 2e-6 * N * width * width / median, gemms * 1e-6 * w.numel() * w.element_size() / median
            print(f"{str(dtype)[6:]:9} N={N:<5} {work:17} {name:11} {median:8.3f} ms  {gflops:7.0f} GFLOP/s  {gbs:5.1f} GB/s"
                  f"  {medians['torch'] / median:5.2f}x torch", flush=True)
            rows.append({"dtype": str(dtype), "rows": N, "width": width, "work": work, "form": name, "median_ms": median,
                         "best_ms": min(times[name])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 2048])
    parser.add_argument("--width", type=int, default=2048, help="inputs and outputs")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = [row for dtype in args.dtypes for N in args.rows
               for row in measure(getattr(torch, dtype), N, args.width, args.repeats)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": platform.processor() or platform.machine(), "isa": C.isa(), "threads": args.threads, "commit": commit,
              "date": datetime.date.today().isoformat(), "torch": torch.__version__, "results": results}
    path = RESULTS / "linear_cpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
