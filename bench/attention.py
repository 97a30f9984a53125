"""Attention on the CPU against torch's SDPA (and its forms), interleaved in one run: forward, forward + backward, decode.

    python bench/attention.py                        # every workload
    python bench/attention.py forward --lengths 2048 --dtypes bfloat16

Medians over repeats in which every contestant runs once in turn, beside a GEMM canary (what torch's own matmul makes of the
machine at that minute), the floor of the work, and the peak extra memory of one call. Results go to bench/results/.
FLOPs: forward 4·B·H·S²·D, half under a causal mask; backward 2.5 times that.
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
import torch.nn.functional as F
from memory import readers
from thinkernel.ops.dispatch import C
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
GEMM = {torch.float32: 0.37e12, torch.bfloat16: 2.4e12}  # torch's 2048³ matmul on 2 quiet cores of the reference machine
READ = 29e9  # bytes/s it reads beyond the caches, where there is no compiler to measure it with


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(
    contestants: dict[str, Callable[[], object]], repeats: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Times of each contestant, one run each in turn; `before` runs untimed ahead of every run."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(repeats):
        for name, run in contestants.items():
            before()
            times[name].append(seconds(run))
    return times


def canary(dtype: torch.dtype) -> Callable[[], object]:
    a = torch.randn(1024, 1024).to(dtype)
    return lambda: a @ a


def peak_extra_mib(run: Callable[[], object]) -> float:
    """How far one more call pushes the high-water mark of resident memory above what is resident now."""
    def status(key: str) -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

    run()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return float("nan")
    now = status("VmRSS")
    run()
    return (status("VmHWM") - now) / 1024


def heads(B: int, S: int, T: int, H: int, Hkv: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(B, n, h, D).to(dtype) for n, h in ((S, H), (T, Hkv), (T, Hkv))]


def prefill(S: int, dtype: torch.dtype, backward: bool) -> tuple[dict[str, Callable[[], object]], float]:
    """Causal, B = 1, 16/4 heads, D = 128 -> contestants, floor in seconds. SDPA gets K/V already expanded to 16 heads."""
    H, Hkv, D = 16, 4, 128
    q, k, v = heads(1, S, S, H, Hkv, D, dtype)
    wide = [x.transpose(1, 2).contiguous() for x in (q, k.repeat_interleave(H // Hkv, 2), v.repeat_interleave(H // Hkv, 2))]
    grouped = [x.transpose(1, 2) for x in (q, k, v)]
    dout = torch.randn_like(q)
    dout_wide = dout.transpose(1, 2).contiguous()

    def ours() -> object:
        return tk.attention(q, k, v, causal=True)

    def expanded() -> object:
        return F.scaled_dot_product_attention(*wide, is_causal=True)

    def gqa() -> object:
        return F.scaled_dot_product_attention(*grouped, is_causal=True, enable_gqa=True)

    flops = 2 * H * S * S * D
    if not backward:
        return {"thinkernel": ours, "sdpa": expanded, "sdpa enable_gqa": gqa}, flops / GEMM[dtype]
    for x in (q, k, v, *wide):
        x.requires_grad_()
    grouped[:] = [x.transpose(1, 2) for x in (q, k, v)]
    return {
        "thinkernel": lambda: torch.autograd.grad(ours(), (q, k, v), dout),
        "sdpa": lambda: torch.autograd.grad(expanded(), wide, dout_wide),
        "sdpa enable_gqa": lambda: torch.autograd.grad(gqa(), grouped, dout_wide),
    }, 3.5 * flops / GEMM[dtype]


def decode(T: int, dtype: torch.dtype) -> tuple[dict[str, Callable[[], object]], float]:
    """One token for each of B = 8 sequences of T keys, 32/8 heads, D = 128, beside plain loops that read as many bytes."""
    B, H, Hkv, D = 8, 32, 8, 128
    q, k, v = heads(B, 1, T, H, Hkv, D, dtype)
    seqlens = torch.full((B,), T, dtype=torch.int32)
    page = 64
    order = torch.randperm(B * T // page).int()
    pages = [x.view(B * T // page, page, Hkv, D)[order.argsort()] for x in (k, v)]
    table = order.view(B, T // page)
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    folded = [q.view(B, Hkv, H // Hkv, D), k.transpose(1, 2), v.transpose(1, 2)]
    return {
        "thinkernel": lambda: tk.attention_decode(q, k, v, seqlens=seqlens),
        "thinkernel paged": lambda: tk.attention_decode(q, *pages, seqlens=seqlens, block_table=table),
        "sdpa enable_gqa": lambda: F.scaled_dot_product_attention(*by_head, enable_gqa=True),
        "sdpa, group as rows": lambda: F.scaled_dot_product_attention(*folded),
        **readers(2 * k.numel() * k.element_size(), torch.get_num_threads()),
    }, 2 * k.numel() * k.element_size() / READ


def bandwidth(middle: dict[str, float], floor: float) -> tuple[float, dict[str, float]]:
    """Takes the read loops out of the medians: -> the floor they set in seconds, our share of their speed in percent."""
    loops = [middle.pop(who) for who in list(middle) if who.startswith("read ")]
    floor = min(loops) / 1e3 if loops else floor
    return floor, {who: round(100 * floor * 1e3 / t, 1) for who, t in middle.items() if who.startswith("thinkernel")}


def evict() -> Callable[[], object]:
    """Pushes the caches out: each decode step then reads its cache from memory."""
    junk = torch.ones(96 << 20)
    return lambda: junk.add_(1.0)


def measure(work: str, size: int, name: str, repeats: int) -> dict[str, object]:
    """One workload in one dtype: runs it, prints its line, returns its row of the results."""
    dtype = getattr(torch, name)
    contestants, floor = decode(size, dtype) if work == "decode" else prefill(size, dtype, work == "backward")
    before = evict() if work == "decode" else lambda: None
    times = interleave(contestants | {"gemm": canary(dtype)}, repeats * (4 if size <= 512 else 1), before)
    gemm = 2 * 1024**3 / statistics.median(times.pop("gemm")) / 1e9
    middle = {who: statistics.median(found) * 1e3 for who, found in times.items()}
    share: dict[str, float] = {}
    if work == "decode":
        floor, share = bandwidth(middle, floor)
    best = min(t for who, t in middle.items() if not who.startswith("thinkernel"))
    speedup = round(best / middle["thinkernel"], 2)
    line = ", ".join(f"{who} {t:.2f}" for who, t in middle.items())
    print(
        f"{work} {size} {name}: {line} ms; floor {floor * 1e3:.2f} ms; {speedup}x the best of torch; gemm {gemm:.0f} GFLOP/s",
        flush=True,
    )
    if share:
        print("  of the read bandwidth measured meanwhile: " + ", ".join(f"{who} {x} %" for who, x in share.items()), flush=True)
    return dict(
        work=work, size=size, dtype=name, milliseconds={who: round(t, 3) for who, t in middle.items()},
        fastest={who: round(min(found) * 1e3, 3) for who, found in times.items()}, floor=round(floor * 1e3, 3),
        speedup=speedup, gemm_gflops=round(gemm), **({"percent_of_read_bandwidth": share} if share else {}),
        peak_extra_mib={who: round(peak_extra_mib(run), 1) for who, run in contestants.items() if who in middle},
    )


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", default=["forward", "backward", "decode"], help="forward, backward (with the forward), decode")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_cpu.json", help="results file")
    args = parser.parse_args()
    unknown = set(args.work) - {"forward", "backward", "decode"}
    if unknown:
        parser.error(f"unknown work: {', '.join(sorted(unknown))} (takes forward, backward, decode)")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for work in args.work:
        for size in [4096] if work == "decode" else args.lengths:
            for name in args.dtypes:
                with tk.use_backend("cpu"):
                    rows.append(measure(work, size, name, args.repeats))
    record = dict(
        machine=cpu_name(), isa=C.isa(), threads=args.threads, torch=torch.__version__, commit=commit(),
        date=datetime.date.today().isoformat(), repeats=args.repeats, rows=rows,
    )
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
