"""Top-k on a GPU: our CUDA kernel beside torch.topk followed by the sort that ascending indices need.

    python bench/gpu_topk.py [--out DIR]      appends one JSON line a measurement to DIR/bench.jsonl

N rows · T scores a row · k kept. Medians of CUDA-event times, the L2 cache flushed before each run; GB/s counts each
score read once, so it is a rate of work done, to be held against the GPU's memory bandwidth.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import thinkernel as tk
import torch

# Indexer scores of a prefill block, of a batch of decode steps, of one long decode step; k = 2048 is DeepSeek-V3.2's.
SIZES = [
    (4096, 8192, 2048), (128, 16_384, 2048), (128, 65_536, 2048), (8, 131_072, 2048), (1, 1_000_000, 2048),
    (4096, 1024, 64),
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
FLUSH_BYTES = 256 << 20  # beyond the L2 of any GPU so far
Select = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call by CUDA events, after three calls to warm up."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for repeat in range(repeats + 3):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_mib(run: Callable[[], object]) -> float:
    """Memory that one call takes beyond what is there before it, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ours(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    with tk.use_backend("cuda"):
        return tk.topk(scores, k)


def torch_ascending(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's unsorted top-k put in order of position; which of several equal scores it keeps is not defined."""
    indices = scores.topk(k, dim=-1, sorted=False).indices.sort(-1).values
    return scores.gather(-1, indices), indices.int()


def torch_unordered(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return scores.topk(k, dim=-1, sorted=False)


KERNELS: dict[str, Select] = {
    "cuda": ours, "torch ascending": torch_ascending, "torch unordered": torch_unordered
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the CUDA top-k kernel.")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of bench.jsonl (default: out)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_topk: torch sees no CUDA device", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device="cuda").manual_seed(0)
    print(f"{'N':>6} {'T':>8} {'k':>5} {'dtype':>9} {'kernel':>16} {'ms':>8} {'GB/s':>7} {'MiB':>8}")
    with (options.out / "bench.jsonl").open("a") as file:
        for rows, length, k in SIZES:
            for dtype in DTYPES:
                scores = torch.randn(rows, length, generator=generator, device="cuda").to(dtype)
                short = str(dtype).removeprefix("torch.")
                for name, select in KERNELS.items():
                    run = functools.partial(select, scores, k)
                    ms, peak = milliseconds(run), peak_mib(run)
                    rate = scores.numel() * scores.element_size() / ms / 1e6
                    row = f"{rows:>6} {length:>8} {k:>5} {short:>9} {name:>16} {ms:>8.4f} {rate:>7.0f} {peak:>8.1f}"
                    print(row, flush=True)
                    file.write(json.dumps({
                        "op": "topk", "kernel": name, "rows": rows, "length": length, "k": k, "dtype": short,
                        "ms": round(ms, 5), "gb_per_s": round(rate, 1), "peak_mib": round(peak, 2),
                        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                        "date": time.strftime("%Y-%m-%d", time.gmtime()),
                        "commit": os.environ.get("THINKERNEL_COMMIT", "unknown"),
                    }) + "\n")  # fmt: skip
                    file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
