"""Attention on the CPU against the best PyTorch form of each piece of work, interleaved in one run.

    python bench/attention.py                                            # all of it, several minutes
    python bench/attention.py forward --lengths 2048 --dtypes bfloat16
    python bench/attention.py window --lengths 4096 --out /tmp/window.json

What is measured, B = 1 and D = 128 but for decode:
    forward, backward   causal, 16/4 heads (backward: forward and backward together)
    window, window-backward   the same with a window of 128 keys, with the time per token
    decode              one token for each of B = 8 sequences of 4096 keys, 32/8 heads, caches cold
The PyTorch forms: SDPA on K/V expanded to all heads beforehand, SDPA with enable_gqa, SDPA with a group's heads folded into
query rows under a mask, compiled flex_attention (no backward on the CPU), plain matmuls with a softmax; those that need an
[S, T] array are left out where it would take seconds.
Medians over repeats in which every contestant runs in turn (short ones right after an untimed run of their own), beside a
GEMM canary (what torch's own matmul makes of the machine at that minute), the floor of the work, and the extra memory of a
first call in a process of its own, also as multiples of q's size: ours is O(S·D), out (and the three gradients) plus packed
operands and some MiB a thread. Results go to bench/results/.
FLOPs: forward 4·B·H·S²·D, half under a causal mask; backward 2.5 times that.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import thinkernel as tk
import torch
import torch.nn.functional as F
from memory import readers, readers_of
from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import zeros_cache
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

RESULTS = Path(__file__).parent / "results"
GEMM = {torch.float32: 0.37e12, torch.bfloat16: 2.4e12}  # torch's 2048³ matmul on 2 quiet cores of the reference machine
READ = 29e9  # bytes/s it reads beyond the caches, where there is no compiler to measure it with


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(
    contestants: dict[str, Callable[[], object]], repeats: int, before: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Times of each contestant, one run each in turn; `before` runs untimed ahead of every run. Without it a short run comes
    right after an untimed one of its own: else the neighbour decides (SDPA's forms warm code and caches for each other)."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    warm = {name for name, run in contestants.items() if before is None and seconds(run) < 0.1}
    for _ in range(repeats):
        for name, run in contestants.items():
            if before is not None:
                before()
            elif name in warm:
                run()
            times[name].append(seconds(run))
    return times


def canary(dtype: torch.dtype) -> Callable[[], object]:
    a = torch.randn(1024, 1024).to(dtype)
    return lambda: a @ a


def peak_extra_mib(work: str, size: int, name: str, who: str, threads: int) -> float:
    """How far the first call of a fresh process pushes its resident memory, in a child: later calls reuse what it kept."""
    command = [sys.executable, __file__, work, "--lengths", str(size), "--dtypes", name, "--threads", str(threads), "--peak-of", who]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(work: str, size: int, dtype: torch.dtype, who: str) -> None:
    """The child's part of peak_extra_mib: a short call loads the libraries, then the call itself."""
    def status(key: str) -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

    contestants(work, 64, dtype)[0][who]()
    run = contestants(work, size, dtype)[0][who]
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, or the call would find room in it
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    now = status("VmRSS")
    run()
    print((status("VmHWM") - now) / 1024)


def heads(B: int, S: int, T: int, H: int, Hkv: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(B, n, h, D).to(dtype) for n, h in ((S, H), (T, Hkv), (T, Hkv))]


HEADS, KV_HEADS, HEAD_DIM, WINDOW = 16, 4, 128, 128
# the longest sequence at which the forms with an [S, T] array are run: (plain matmuls, masks)
SQUARE = {"forward": (2048, 4096), "backward": (2048, 2048), "window": (2048, 8192), "window-backward": (2048, 4096)}


@functools.cache
def flex() -> Callable[..., Tensor]:
    """flex_attention compiled once for each shape, as users call it."""
    return torch.compile(flex_attention, dynamic=False)


def plain(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """[B, H, S, D]: matmul, mask, softmax, matmul."""
    scores = (q @ k.mT).mul_(q.shape[-1] ** -0.5) if not q.requires_grad else (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def prefill(S: int, dtype: torch.dtype, backward: bool, window: int = 0) -> tuple[dict[str, Callable[[], object]], float]:
    """-> contestants, floor in seconds. Causal; window > 0: only the last `window` keys of each query."""
    H, Hkv, D, G = HEADS, KV_HEADS, HEAD_DIM, HEADS // KV_HEADS
    q, k, v = heads(1, S, S, H, Hkv, D, dtype)
    wide = [x.transpose(1, 2).contiguous() for x in (q, k.repeat_interleave(G, 2), v.repeat_interleave(G, 2))]
    dout = torch.randn_like(q)
    dout_wide = dout.transpose(1, 2).contiguous()
    leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    wide = [x.requires_grad_(backward) for x in wide]
    by_head = [x.transpose(1, 2) for x in leaves]
    matmuls, masks = SQUARE[("window" if window else "forward") if not backward else ("window-backward" if window else "backward")]

    def call(run: Callable[[], Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> Callable[[], object]:
        return (lambda: torch.autograd.grad(run(), inputs, gradient)) if backward else run

    options = {"window": (window - 1, 0)} if window else {}
    found = {"thinkernel": call(lambda: tk.attention(*leaves, causal=True, **options), leaves, dout)}
    p, j = torch.arange(S)[:, None], torch.arange(S)
    if not window:
        found["sdpa"] = call(lambda: F.scaled_dot_product_attention(*wide, is_causal=True), wide, dout_wide)
        found["sdpa enable_gqa"] = call(
            lambda: F.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True), leaves, dout_wide
        )
    if window and S <= masks:
        visible = (j <= p) & (j > p - window)  # [S, S]
        found["sdpa, mask"] = call(lambda: F.scaled_dot_product_attention(*wide, attn_mask=visible), wide, dout_wide)
    if S <= min(masks, 4096):
        tall = (((j <= p) & (j > p - window)) if window else j <= p).repeat(G, 1)  # [G·S, S]
        folded = [wide[0].detach().view(1, Hkv, G * S, D).requires_grad_(backward), *(x.transpose(1, 2) for x in leaves[1:])]
        grad_folded = dout_wide.view(1, Hkv, G * S, D)
        found["sdpa, group as rows"] = call(
            lambda: F.scaled_dot_product_attention(*folded, attn_mask=tall), [folded[0], *leaves[1:]], grad_folded
        )
    if S <= matmuls:
        hidden = ~((j <= p) & (j > p - window)) if window else j > p
        found["plain matmuls"] = call(lambda: plain(*wide, hidden), wide, dout_wide)
    if not backward:
        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (j > i - window) if window else j <= i

        mask = create_block_mask(rule, None, None, S, S, device="cpu")
        found["flex_attention compiled"] = lambda: flex()(*by_head, block_mask=mask, enable_gqa=True)
    pairs = S * min(S, window) if window else S * S / 2  # of queries and keys
    return found, 4 * H * D * pairs * (3.5 if backward else 1) / GEMM[dtype]


def decode(T: int, dtype: torch.dtype) -> tuple[dict[str, Callable[[], object]], float]:
    """One token for each of B = 8 sequences of T keys, 32/8 heads, D = 128, beside plain loops that read as many bytes."""
    B, H, Hkv, D = 8, 32, 8, 128
    q, k, v = heads(B, 1, T, H, Hkv, D, dtype)
    seqlens = torch.full((B,), T, dtype=torch.int32)
    page = 64
    order = torch.randperm(B * T // page).int()
    pages = [x.view(B * T // page, page, Hkv, D)[order.argsort()] for x in (k, v)]
    table = order.view(B, T // page)
    large = [zeros_cache(tuple(x.shape), dtype, "cpu").copy_(x) for x in (k, v)]  # as the modules' caches lie: on huge pages
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    folded = [q.view(B, Hkv, H // Hkv, D), k.transpose(1, 2), v.transpose(1, 2)]
    return {
        "thinkernel": lambda: tk.attention_decode(q, k, v, seqlens=seqlens),
        "thinkernel, huge pages": lambda: tk.attention_decode(q, *large, seqlens=seqlens),
        "thinkernel paged": lambda: tk.attention_decode(q, *pages, seqlens=seqlens, block_table=table),
        "sdpa enable_gqa": lambda: F.scaled_dot_product_attention(*by_head, enable_gqa=True),
        "sdpa, group as rows": lambda: F.scaled_dot_product_attention(*folded),
        **readers(2 * k.numel() * k.element_size(), torch.get_num_threads()),
        **readers_of([k, v], torch.get_num_threads()),
    }, 2 * k.numel() * k.element_size() / READ


def contestants(work: str, size: int, dtype: torch.dtype) -> tuple[dict[str, Callable[[], object]], float]:
    if work == "decode":
        return decode(size, dtype)
    return prefill(size, dtype, "backward" in work, WINDOW if "window" in work else 0)


def bandwidth(middle: dict[str, float], floor: float) -> tuple[float, dict[str, float]]:
    """Takes the read loops out of the medians: -> the floor the fastest sets in seconds, our share of its speed in percent."""
    loops = {who: middle.pop(who) for who in list(middle) if who.startswith("read ")}
    floor = min(loops.values()) / 1e3 if loops else floor
    share = {who: round(100 * floor * 1e3 / t, 1) for who, t in middle.items() if who.startswith("thinkernel")}
    in_place = [t for who, t in loops.items() if who.startswith("read in place")]
    if in_place:
        share["thinkernel, of a loop over the same tensors"] = round(100 * min(in_place) / middle["thinkernel"], 1)
    return floor, share


def evict() -> Callable[[], object]:
    """Pushes the caches out: each decode step then reads its cache from memory."""
    junk = torch.ones(96 << 20)
    return lambda: junk.add_(1.0)


def measure(work: str, size: int, name: str, repeats: int) -> dict[str, object]:
    """One workload in one dtype: runs it, prints its line, returns its row of the results."""
    dtype = getattr(torch, name)
    runs, floor = contestants(work, size, dtype)
    before = evict() if work == "decode" else None
    repeats = 4 * repeats if size <= 512 else repeats if size < 8192 else max(3, repeats // 3)
    times = interleave(runs | {"gemm": canary(dtype)}, repeats, before)
    gemm = 2 * 1024**3 / statistics.median(times.pop("gemm")) / 1e9
    middle = {who: statistics.median(found) * 1e3 for who, found in times.items()}
    share: dict[str, float] = {}
    if work == "decode":
        floor, share = bandwidth(middle, floor)
    peers = [t for who, t in middle.items() if not who.startswith("thinkernel")]
    speedup = round(min(peers) / middle["thinkernel"], 2) if peers else None
    line = ", ".join(f"{who} {t:.2f}" for who, t in middle.items())
    kinds = ("thinkernel", "sdpa", "sdpa, mask")
    extra = {who: round(peak_extra_mib(work, size, name, who, torch.get_num_threads()), 1) for who in kinds if who in middle}
    row: dict[str, object] = dict(
        work=work, size=size, dtype=name, milliseconds={who: round(t, 3) for who, t in middle.items()},
        fastest={who: round(min(found) * 1e3, 3) for who, found in times.items()}, floor=round(floor * 1e3, 3),
        speedup=speedup, gemm_gflops=round(gemm), peak_extra_mib=extra,
    )
    if work != "decode":
        row["q_mib"] = q_mib = round(size * HEADS * HEAD_DIM * dtype.itemsize / 2**20, 1)
        row["peak_extra_in_q"] = {who: round(mib / q_mib, 1) for who, mib in extra.items()}
        row["us_per_token"] = round(middle["thinkernel"] * 1e3 / size, 2)
        line += f" ms ({row['us_per_token']} us a token); extra {extra['thinkernel']} MiB, {row['peak_extra_in_q']['thinkernel']} times q"
    else:
        line += f" ms; extra {extra['thinkernel']} MiB"
        if share:
            row["percent_of_read_bandwidth"] = share
            line += "; of the read bandwidth meanwhile: " + ", ".join(f"{who} {x} %" for who, x in share.items())
    versus = f"{speedup}x the best of torch" if peers else "no form of torch"
    print(f"{work} {size} {name}: {line}; floor {floor * 1e3:.2f} ms; {versus}; gemm {gemm:.0f} GFLOP/s", flush=True)
    return row


LENGTHS = {"forward": [512, 2048, 8192], "backward": [512, 2048, 8192], "window": [2048, 4096, 8192, 16384],
           "window-backward": [2048, 4096, 8192, 16384], "decode": [4096]}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", default=list(LENGTHS), help=f"{', '.join(LENGTHS)}; backward is with the forward")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: forward and backward 512 2048 8192, window 2048 … 16384")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", metavar="WHO", help="only print the extra memory of WHO's first call, in MiB")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_cpu.json", help="results file")
    args = parser.parse_args()
    unknown = set(args.work) - set(LENGTHS)
    if unknown:
        parser.error(f"unknown work: {', '.join(sorted(unknown))} (takes {', '.join(LENGTHS)})")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # every shape is compiled anew
    if args.peak_of:
        with tk.use_backend("cpu"):
            return print_peak(args.work[0], args.lengths[0], getattr(torch, args.dtypes[0]), args.peak_of)
    record: dict[str, object] = dict(
        machine=cpu_name(), isa=C.isa(), threads=args.threads, torch=torch.__version__, commit=commit(),
        date=datetime.date.today().isoformat(), repeats=args.repeats,
    )
    rows = []
    args.out.parent.mkdir(exist_ok=True)
    for work in args.work:
        for size in LENGTHS[work] if work == "decode" or not args.lengths else args.lengths:
            for name in args.dtypes:
                with tk.use_backend("cpu"):
                    rows.append(measure(work, size, name, args.repeats))
                args.out.write_text(json.dumps(record | dict(rows=rows), indent=1) + "\n")  # at once: a run may be cut off
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
