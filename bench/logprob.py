"""logprob from given logits on the CPU against PyTorch's forms of it, interleaved in one run: forward, forward + backward.

    python bench/logprob.py
    python bench/logprob.py --shapes 2048x32768 1024x151936 --dtypes bfloat16 float32 --compiled

Medians over repeats in which every contestant runs once in turn, beside the floor: bytes over this minute's read bandwidth
(bench/memory.py; forward one read, forward + backward two reads and one write, counted as a read). "extra": the rise of the
high-water mark during a first call in a process of its own; outputs and the logits' gradient count. Results go to bench/results/.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable

import thinkernel as tk
import torch
from memory import readers
from record import high_water_rise_mib, milliseconds, write
from torch import Tensor

Runs = dict[str, Callable[[], object]]


def log_softmax_gather(logits: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, target[:, None])[:, 0]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")


def gather_logsumexp(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(-1, target[:, None])[:, 0].float() - torch.logsumexp(logits.float(), -1)


def entropy_too(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def contestants(N: int, V: int, dtype: torch.dtype, backward: bool, compiled: bool) -> Runs:
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(N, V, dtype=dtype)
    for row in logits:
        row.copy_(2 * torch.randn(V, generator=generator))
    logits.requires_grad_()
    target = torch.randint(0, V, (N,), generator=generator)
    g = torch.randn(N, generator=generator)
    forms: dict[str, Callable[[Tensor, Tensor], object]] = {
        "thinkernel": lambda x, t: tk.logprob(x, t, entropy=False)[0],
        "thinkernel + entropy": lambda x, t: tk.logprob(x, t),
        "log_softmax, gather": log_softmax_gather,
        "cross_entropy": cross_entropy,
        "gather - logsumexp": gather_logsumexp,
        "torch + entropy": entropy_too,
    }
    if compiled:
        for name, form in list(forms.items())[2:]:
            forms[f"{name}, compiled"] = torch.compile(form, dynamic=False)

    def forward(form: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return form(logits, target)

        return run

    def both(form: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        def run() -> object:
            out = form(logits, target)
            outs = out if isinstance(out, tuple) else (out,)
            return torch.autograd.grad(outs, logits, [g] * len(outs))

        return run

    return {name: (both if backward else forward)(form) for name, form in forms.items()}


def measure(args: argparse.Namespace, N: int, V: int, dtype: torch.dtype) -> list[dict[str, object]]:
    bandwidth = readers(256 << 20, args.threads)
    rows: list[dict[str, object]] = []
    for work, passes in (("forward", 1), ("forward+backward", 3)):
        forms = contestants(N, V, dtype, passes == 3, args.compiled)
        runs = bandwidth | forms
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for repeat in range(args.repeats):  # from another one each time: who comes before leaves memory in its state
            names = list(runs)
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                times[name].append(milliseconds(runs[name]))
        medians = {name: statistics.median(t) for name, t in times.items()}
        rate = max((256 << 20) / medians.pop(name) * 1e-6 for name in bandwidth) if bandwidth else float("nan")  # GB/s
        floor = passes * N * V * dtype.itemsize / rate * 1e-6
        plain = min(m for name, m in medians.items() if "thinkernel" not in name and "entropy" not in name.replace("cross_entropy", ""))
        whole = min(m for name, m in medians.items() if name.startswith("torch + entropy"))
        print(f"{str(dtype)[6:]} {N}x{V} {work}: floor {floor:.1f} ms (reads {rate:.1f} GB/s)")
        for name, median in medians.items():
            peak = peak_mib(args, N, V, dtype, passes == 3, name) if args.memory else None
            best = whole if "+ entropy" in name else plain
            memory = "" if peak is None else f"  +{peak:.0f} MiB"
            print(f"  {name:30} median {median:8.1f} ms  best {min(times[name]):8.1f}  {median / floor:5.2f}x floor"
                  f"  best of torch / this {best / median:5.2f}{memory}", flush=True)
            rows.append({"dtype": str(dtype), "N": N, "V": V, "work": work, "form": name, "median_ms": median,
                         "best_ms": min(times[name]), "floor_ms": floor, "read_gb_per_s": rate, "best_torch_over_this": best / median,
                         "extra_peak_mib": peak})
    return rows


def peak_mib(args: argparse.Namespace, N: int, V: int, dtype: torch.dtype, backward: bool, form: str) -> float:
    command = [sys.executable, __file__, "--shapes", f"{N}x{V}", "--threads", str(args.threads), "--dtypes", str(dtype)[6:],
               "--peak", form, *["--compiled"] * args.compiled, *["--backward"] * backward]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x32768", "512x151936"], help="rows x vocabulary")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile's forms")
    parser.add_argument("--memory", action="store_true", help="also the extra memory of each form")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [tuple(int(x) for x in shape.split("x")) for shape in args.shapes]
    if args.peak:
        dtype = getattr(torch, args.dtypes[0])
        contestants(8, 64, dtype, args.backward, args.compiled)[args.peak]()  # what loads on first use
        run = contestants(*shapes[0], dtype, args.backward, args.compiled)[args.peak]
        print(high_water_rise_mib(run))
        return
    rows = [row for dtype in args.dtypes for N, V in shapes for row in measure(args, N, V, getattr(torch, dtype))]
    write("logprob_cpu.json", args, rows)


if __name__ == "__main__":
    main()
