"""linear_logprob on the CPU against PyTorch's forms of it, interleaved in one run: forward, forward + backward.

    python bench/linear_logprob.py
    python bench/linear_logprob.py --rows 2048 --hidden 1024 --vocab 32768 --dtypes bfloat16 float32 --compiled

Medians over repeats in which every contestant runs once in turn, beside a GEMM canary (torch's own 2048³ matmul at that
minute), the floor (1 or 4 GEMMs of 2NDV FLOPs at torch's quiet GEMM rate), our packed GEMM's rate (tk.linear, 2048³) and the
peak extra memory of one call, each in a child process. Results go to bench/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import thinkernel as tk
import torch
from thinkernel.ops.dispatch import C
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
GEMM = {torch.float32: 0.37e12, torch.bfloat16: 2.4e12}  # torch's 2048³ matmul on 2 quiet cores of the reference machine
Runs = dict[str, Callable[[], object]]


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Logits of the tensors' dtype, log_softmax in float32, gather."""
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, target[:, None])[:, 0]


def contestants(args: argparse.Namespace, dtype: torch.dtype, backward: bool) -> Runs:
    generator = torch.Generator().manual_seed(0)
    N, D, V = args.rows, args.hidden, args.vocab
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * D**-0.5).to(dtype).requires_grad_()
    target = torch.randint(0, V, (N,), generator=generator)
    g = torch.randn(N, generator=generator)

    def ours() -> Tensor:
        return tk.linear_logprob(hidden, weight, target, entropy=False)[0]

    def ours_entropy() -> tuple[Tensor, ...]:
        return tk.linear_logprob(hidden, weight, target)

    forms: dict[str, Callable[[], object]] = {
        "thinkernel": ours, "thinkernel + entropy": ours_entropy, "torch": lambda: naive(hidden, weight, target)
    }
    if args.compiled:
        compiled = torch.compile(naive)
        forms["torch compiled"] = lambda: compiled(hidden, weight, target)

    def forward(form: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return form()

        return run

    def both(form: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            out = form()
            outs = out if isinstance(out, tuple) else (out,)
            return torch.autograd.grad(outs, (hidden, weight), [g] * len(outs))

        return run

    return {name: (both if backward else forward)(form) for name, form in forms.items()}


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def measure(args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, object]]:
    square = [torch.randn(2048, 2048).to(dtype) for _ in range(2)]
    gauges: Runs = {"torch gemm": lambda: square[0] @ square[1].T, "packed gemm": lambda: tk.linear(*square)}
    rows: list[dict[str, object]] = []
    for work, gemms in (("forward", 1), ("forward+backward", 4)):
        runs = gauges | contestants(args, dtype, gemms == 4)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for _ in range(args.repeats):
            for name, run in runs.items():
                times[name].append(milliseconds(run))
        medians = {name: statistics.median(t) for name, t in times.items()}
        floor = 1e3 * gemms * 2 * args.rows * args.hidden * args.vocab / GEMM[dtype]
        rates = {name: 2 * 2048**3 / medians.pop(name) * 1e-9 for name in gauges}
        print(f"{dtype} {work}: floor {floor:.0f} ms; torch gemm {rates['torch gemm']:.2f} TFLOP/s, packed {rates['packed gemm']:.2f}")
        for name, median in medians.items():
            peak = peak_mib(args, dtype, gemms == 4, name)
            ratio = medians["torch"] / median
            print(f"  {name:22} median {median:8.1f} ms  best {min(times[name]):8.1f}  {ratio:5.2f}x torch  +{peak:.0f} MiB", flush=True)
            rows.append({"dtype": str(dtype), "work": work, "form": name, "median_ms": median, "best_ms": min(times[name]),
                         "extra_peak_mib": peak, "floor_ms": floor, "gemm_tflops": rates})
    return rows


def high_water_kib(key: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(key))


def peak_mib(args: argparse.Namespace, dtype: torch.dtype, backward: bool, form: str) -> float:
    """Rise of the high-water mark during the first call, in a process of its own; outputs and gradients count."""
    command = [sys.executable, __file__, "--rows", str(args.rows), "--hidden", str(args.hidden), "--vocab", str(args.vocab),
               "--threads", str(args.threads), "--dtypes", str(dtype)[6:], "--peak", form]
    command += ["--compiled"] * args.compiled + ["--backward"] * backward
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile's form (compiling takes a minute)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        run = contestants(args, getattr(torch, args.dtypes[0]), args.backward)[args.peak]
        small = argparse.Namespace(**(vars(args) | {"rows": 8, "hidden": 32, "vocab": 64}))
        contestants(small, getattr(torch, args.dtypes[0]), args.backward)[args.peak]()  # what loads on first use
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making the inputs
        before = high_water_kib("VmRSS")
        run()
        print((high_water_kib("VmHWM") - before) / 1024)
        return
    rows = [row for dtype in args.dtypes for row in measure(args, getattr(torch, dtype))]
    RESULTS.mkdir(exist_ok=True)
    record = {
        "machine": platform.processor() or platform.machine(), "isa": C.isa(), "threads": args.threads, "commit": commit(),
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "rows": args.rows, "hidden": args.hidden,
        "vocab": args.vocab, "repeats": args.repeats, "results": rows,
    }
    path = RESULTS / "linear_logprob_cpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
