"""Absorbed MLA decode on the CPU against the best PyTorch form of it, interleaved in one run, caches cold.

    python bench/mla.py                                          # both shapes, bf16, float32 and the FP8 cache
    python bench/mla.py --shapes 4x16x4096 --dtypes bfloat16 --repeats 31

A shape is B x H x T: one token for each of B sequences of T cached latents (576 values, 512 of them the value), H heads.
Every call takes the next of so many caches that they exceed the last-level cache, as layer after layer of a model does.
The PyTorch forms: plain matmuls with a softmax, the same compiled, SDPA with the latents expanded to all heads as a view, with
enable_gqa, and with the heads folded into query rows (its values as cut, and as the whole latents whose result is then cut).
Medians over repeats in which every contestant runs in turn, right after an untimed run of its own on another cache. The floor is
the larger of two: bytes of the cache over the speed of a plain read loop, and 2 B H T (576 + 512) FLOPs over the faster of torch's
and our own 2048^3 matrix product, all measured in the same run. Results go to bench/results/.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import thinkernel as tk
import torch
import torch.nn.functional as F
from attention import RESULTS, commit, cpu_name, interleave
from memory import readers
from thinkernel.ops.dispatch import C
from thinkernel.reference.mla import quantize_latent
from torch import Tensor

D, L = 576, 512  # values of a cached token, of them its value
SCALE = 192**-0.5
GEMM_SIZE = 2048
Runs = dict[str, Callable[[], object]]


def matmuls(q: Tensor, kv: Tensor) -> Tensor:
    """q [B, H, D], kv [B, T, D] -> [B, H, L]"""
    return ((q @ kv.mT) * SCALE).softmax(-1) @ kv[..., :L]


compiled = torch.compile(matmuls, dynamic=False)


def folded(q: Tensor, kv: Tensor) -> Tensor:
    """The heads as query rows of one attention head."""
    return F.scaled_dot_product_attention(q[:, None], kv[:, None], kv[:, None, :, :L], scale=SCALE)


def folded_whole(q: Tensor, kv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], kv[:, None], kv[:, None], scale=SCALE)[..., :L]


def grouped(q: Tensor, kv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, None], kv[:, None], kv[:, None], scale=SCALE, enable_gqa=True)[..., :L]


def expanded(q: Tensor, kv: Tensor) -> Tensor:
    wide = kv[:, None].expand(-1, q.shape[1], -1, -1)
    return F.scaled_dot_product_attention(q[:, :, None], wide, wide, scale=SCALE)[..., :L]


def contestants(B: int, H: int, T: int, dtype: torch.dtype, cold_bytes: int, fp8: bool, slow: bool) -> tuple[Runs, int]:
    """-> runs, bytes of one cache. slow: with the forms that take many times as long."""
    q = torch.randn(B, H, D).to(dtype)
    seqlens = torch.full((B,), T, dtype=torch.int32)
    size = B * T * D * dtype.itemsize
    first = torch.randn(B, T, D).to(dtype)
    caches = [first, *(first.clone() for _ in range(-(-cold_bytes // size)))]
    turn = itertools.cycle(range(len(caches)))

    def on(run: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        return lambda: run(q, caches[next(turn)])

    def decode(q: Tensor, kv: Tensor) -> object:
        return tk.mla_decode(q[:, None], kv, seqlens=seqlens, value_dim=L, scale=SCALE)

    page = 64
    order = torch.randperm(B * T // page).int().view(B, T // page)

    def paged(q: Tensor, kv: Tensor) -> object:
        pages = kv.view(B * T // page, page, kv.shape[-1])
        return tk.mla_decode(q[:, None], pages, seqlens=seqlens, block_table=order, value_dim=L, scale=SCALE)

    runs = {"thinkernel": on(decode), "thinkernel paged": on(paged)}
    if fp8:
        quantised = quantize_latent(first[..., :L], first[..., L:])
        small = [quantised, *(quantised.clone() for _ in range(-(-cold_bytes // quantised.numel())))]
        turn8 = itertools.cycle(range(len(small)))
        runs["thinkernel fp8"] = lambda: decode(q, small[next(turn8)])
    runs |= {"matmuls": on(matmuls), "matmuls compiled": on(compiled), "sdpa, heads as rows": on(folded),
             "sdpa, heads as rows, whole": on(folded_whole)}
    if slow:
        runs |= {"sdpa enable_gqa": on(grouped), "sdpa expanded": on(expanded)}
    return runs, size


def products(dtype: torch.dtype) -> Runs:
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    return {"gemm torch": lambda: a @ b.T, "gemm thinkernel": lambda: tk.linear(a, b)}


def measure(shape: tuple[int, int, int], name: str, args: argparse.Namespace) -> dict[str, object]:
    """One shape in one dtype: runs it, prints its line, returns its row of the results."""
    B, H, T = shape
    dtype = getattr(torch, name)
    cold = args.cold << 20
    runs, size = contestants(B, H, T, dtype, cold, name == "bfloat16", not args.fast_forms)
    flops = 2 * B * H * T * (D + L)
    times = interleave(runs | products(dtype) | readers(cold, args.threads), args.repeats)
    middle = {who: statistics.median(found) for who, found in times.items()}
    bandwidth = max((cold / middle.pop(who) for who in list(middle) if who.startswith("read ")), default=29e9)
    gemm = max(2 * GEMM_SIZE**3 / middle.pop(who) for who in list(middle) if who.startswith("gemm "))
    floors = {who: max((size * 656 / D / dtype.itemsize if "fp8" in who else size) / bandwidth, flops / gemm)
              for who in middle if who.startswith("thinkernel")}
    best = min((t, who) for who, t in middle.items() if not who.startswith("thinkernel"))
    ratios = [b / a for a, b in zip(times["thinkernel"], times[best[1]])]
    row: dict[str, object] = dict(
        B=B, H=H, T=T, dtype=name, milliseconds={who: round(t * 1e3, 3) for who, t in middle.items()},
        fastest={who: round(min(times[who]) * 1e3, 3) for who in middle}, best_of_torch=best[1],
        speedup=round(best[0] / middle["thinkernel"], 2), speedup_run_by_run=round(statistics.median(ratios), 2),
        read_gb_s=round(bandwidth / 1e9, 1), gemm_gflops=round(gemm / 1e9), bound="memory" if size / bandwidth > flops / gemm else "gemm",
        floor_ms={who: round(t * 1e3, 3) for who, t in floors.items()},
        percent_of_floor={who: round(100 * t / middle[who], 1) for who, t in floors.items()},
    )
    line = ", ".join(f"{who} {t * 1e3:.2f}" for who, t in middle.items())
    print(f"B{B} H{H} T{T} {name}: {line} ms; {row['speedup']}x {best[1]}; floor {floors['thinkernel'] * 1e3:.2f} ms ({row['bound']}, "
          f"{bandwidth / 1e9:.1f} GB/s, {gemm / 1e9:.0f} GFLOP/s): {row['percent_of_floor']} %", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4x16x4096", "1x128x8192"], help="B x H x T")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cold", type=int, default=640, help="MiB of caches that the calls go round through")
    parser.add_argument("--fast-forms", action="store_true", help="without SDPA's forms that take ten times as long")
    parser.add_argument("--out", type=Path, default=RESULTS / "mla_cpu.json", help="results file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    record: dict[str, object] = dict(
        machine=cpu_name(), isa=C.isa(), threads=args.threads, torch=torch.__version__, commit=commit(),
        date=datetime.date.today().isoformat(), repeats=args.repeats, cold_mib=args.cold,
    )
    rows = []
    args.out.parent.mkdir(exist_ok=True)
    for text in args.shapes:
        B, H, T = (int(n) for n in text.split("x"))
        for name in args.dtypes:
            with tk.use_backend("cpu"), torch.no_grad():
                rows.append(measure((B, H, T), name, args))
            args.out.write_text(json.dumps(record | dict(rows=rows), indent=1) + "\n")  # at once: a run may be cut off
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
