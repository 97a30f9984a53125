"""linear_logprob on the CPU against PyTorch's forms of it, interleaved in one run: forward, forward + backward.

    python bench/linear_logprob.py
    python bench/linear_logprob.py --shapes 2048x1024x32768 2048x896x151936 --dtypes bfloat16 float32 --compiled

Medians over repeats in which every contestant runs once in turn, the best of --rounds of them for each contestant (the machines
at hand are slower for minutes at a time), beside a GEMM canary (torch's own 2048³ matmul at that
minute), the floor (1 or 4 GEMMs of 2NDV FLOPs at torch's quiet GEMM rate), our packed GEMM's rate (tk.linear, 2048³) and
(--memory) the extra memory of a first call, each in a child process: the rise of the high-water mark less what every form
must return, logprob and the gradients of hidden and weight. Results go to bench/results/.

Where bfloat16's time goes at 2048x1024x32768 (2 threads, ms per phase, medians over its tiles, a machine whose AMX alone takes
20 per GEMM, 25 on random bits: they cost clock): forward: logits 53, statistics 19, packing 4; backward: logits 57-61, dy 17,
its two packings 11, W's packings 9, dhidden 60-66, dweight 57-65, its rounding 5 and first touch 10. A packed product runs at
42-45 from L2 (both operands through L1: 64 lines a step at 1.5 cycles, where the tiles need 64 cycles) and 50-55 with A from L3.
Four GEMMs at 45 are 180 of some 330: the rest is exponentials, packing, A from L3 and waiting at the end of a super-block.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable

import thinkernel as tk
import torch
import torch.nn.functional as F
from record import high_water_rise_mib, milliseconds, write
from torch import Tensor
from torch.utils.checkpoint import checkpoint

GEMM = {torch.float32: 0.37e12, torch.bfloat16: 2.4e12}  # torch's 2048³ matmul on 2 quiet cores of the reference machine
Runs = dict[str, Callable[[], object]]


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Logits of the tensors' dtype, log_softmax in float32, gather."""
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, target[:, None])[:, 0]


def chunked(hidden: Tensor, weight: Tensor, target: Tensor, rows: int = 256) -> Tensor:
    """naive on `rows` rows at a time; the backward computes each chunk's logits again."""
    pairs = zip(hidden.split(rows), target.split(rows), strict=True)
    return torch.cat([checkpoint(naive, h, weight, t, use_reentrant=False) for h, t in pairs])


def contestants(args: argparse.Namespace, dtype: torch.dtype, backward: bool) -> Runs:
    generator = torch.Generator().manual_seed(0)
    N, D, V = args.shape
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * D**-0.5).to(dtype).requires_grad_()
    target = torch.randint(0, V, (N,), generator=generator)
    g = torch.randn(N, generator=generator)

    forms: dict[str, Callable[[], object]] = {
        "thinkernel": lambda: tk.linear_logprob(hidden, weight, target, entropy=False)[0],
        "thinkernel + entropy": lambda: tk.linear_logprob(hidden, weight, target),
        "thinkernel, keep_logits": lambda: tk.linear_logprob(hidden, weight, target, entropy=False, keep_logits=True)[0],
        "naive": lambda: naive(hidden, weight, target),
        "cross_entropy": lambda: -F.cross_entropy((hidden @ weight.T).float(), target, reduction="none"),
        "chunked, checkpoint": lambda: chunked(hidden, weight, target),
    }
    if hasattr(F, "linear_cross_entropy"):
        forms["F.linear_cross_entropy"] = lambda: -F.linear_cross_entropy(hidden, weight, target, reduction="none")
        if backward:  # its gradients are made in the forward, so it has the sum alone: every row weighs the same
            options = torch.nn.LinearCrossEntropyOptions()
            forms["F.linear_cross_entropy, chunked, sum"] = lambda: -F.linear_cross_entropy(
                hidden, weight, target, reduction="sum", options=options)
    if args.compiled:
        compiled = torch.compile(naive)
        forms["naive, compiled"] = lambda: compiled(hidden, weight, target)
    if args.forms:
        forms = {name: form for name, form in forms.items() if name in args.forms}

    def forward(form: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return form()

        return run

    def both(form: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            out = form()
            outs = out if isinstance(out, tuple) else (out,)
            return torch.autograd.grad(outs, (hidden, weight), [g if out.dim() else g[0] for out in outs])

        return run

    return {name: (both if backward else forward)(form) for name, form in forms.items()}


def measure(args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, object]]:
    square = [torch.randn(2048, 2048).to(dtype) for _ in range(2)]
    gauges: Runs = {"torch gemm": lambda: square[0] @ square[1].T, "packed gemm": lambda: tk.linear(*square)}
    rows: list[dict[str, object]] = []
    for work, gemms in (("forward", 1), ("forward+backward", 4)):
        runs = gauges | contestants(args, dtype, gemms == 4)
        times: dict[str, list[list[float]]] = {name: [] for name in runs}  # rounds of repeats
        for run in runs.values():
            run()
        for _ in range(args.rounds):
            for t in times.values():
                t.append([])
            for _ in range(args.repeats):
                for name, run in runs.items():
                    times[name][-1].append(milliseconds(run))
        medians = {name: min(statistics.median(t) for t in rounds) for name, rounds in times.items()}
        N, D, V = args.shape
        floor = 1e3 * gemms * 2 * N * D * V / GEMM[dtype]
        best = min(m for name, m in medians.items() if "thinkernel" not in name and name not in gauges)
        rates = {name: 2 * 2048**3 / medians.pop(name) * 1e-9 for name in gauges}
        speed = f"TFLOP/s: torch {rates['torch gemm']:.2f}, packed {rates['packed gemm']:.2f}"
        print(f"{dtype} {N}x{D}x{V} {work}: floor {floor:.0f} ms; {speed}")
        for name, median in medians.items():
            peak = peak_mib(args, dtype, gemms == 4, name) if args.memory else None
            memory = "" if peak is None else f"  +{peak:.1f} MiB beside results"
            fastest = min(map(min, times[name]))
            print(f"  {name:36} median {median:8.1f} ms  best {fastest:8.1f}  best of torch / this {best / median:5.2f}{memory}",
                  flush=True)
            rows.append({"dtype": str(dtype), "N": N, "D": D, "V": V, "work": work, "form": name, "median_ms": median,
                         "best_ms": fastest, "medians_ms": [statistics.median(t) for t in times[name]],
                         "best_torch_over_this": best / median,
                         "extra_mib_beside_results": peak,
                         "floor_ms": floor, "gemm_tflops": rates})
    return rows


def peak_mib(args: argparse.Namespace, dtype: torch.dtype, backward: bool, form: str) -> float:
    """Rise of the high-water mark during the first call, in a process of its own, less what every form returns."""
    N, D, V = args.shape
    command = [sys.executable, __file__, "--shapes", f"{N}x{D}x{V}", "--threads", str(args.threads), "--dtypes", str(dtype)[6:],
               "--peak", form, *["--compiled"] * args.compiled, *["--backward"] * backward]
    rise = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return rise - (4 * N + backward * (N * D + V * D) * dtype.itemsize) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x1024x32768"], help="rows x hidden x vocabulary")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile's form (compiling takes a minute)")
    parser.add_argument("--forms", nargs="+", help="only these (naive must be among them)")
    parser.add_argument("--memory", action="store_true", help="also the extra memory")
    parser.add_argument("--out", default="linear_logprob_cpu.json", help="file in bench/results/")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [tuple(int(x) for x in shape.split("x")) for shape in args.shapes]
    args.shape = shapes[0]
    if args.peak:
        run = contestants(args, getattr(torch, args.dtypes[0]), args.backward)[args.peak]
        small = argparse.Namespace(**(vars(args) | {"shape": (8, 32, 64)}))
        contestants(small, getattr(torch, args.dtypes[0]), args.backward)[args.peak]()  # what loads on first use
        print(high_water_rise_mib(run))
        return
    rows: list[dict[str, object]] = []
    for args.shape in shapes:
        for dtype in args.dtypes:
            rows += measure(args, getattr(torch, dtype))
    write(args.out, args, rows)


if __name__ == "__main__":
    main()
