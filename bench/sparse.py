"""Sparse attention's ops on the CPU against the best PyTorch and numpy forms of them, interleaved in one run.

    python bench/sparse.py                                   # everything
    python bench/sparse.py --work topk attention --dtypes bfloat16 --repeats 31

topk: N rows of T scores, k kept; torch.topk sorted and unsorted, numpy.argpartition (one thread; it has no bfloat16). Beside
attention.py's way of interleaving: every contestant runs untimed right before its timed run. Medians of times and of ratios.
attention: S queries of H heads over K of T latents (576 values, 512 of them the value), forward and forward + backward; decode: one
query for each of B sequences. The PyTorch forms gather the latents of all queries, or of 16 at a time, and multiply, or call SDPA with
the heads as query rows. indexer: scores of Hi heads x 128 and selection; the PyTorch form in one piece, and 64 queries at a time.
loss, warm-up: the indexer's loss over named keys and over all keys, from the attention's lse, forward + backward to the indexer's q, k
and w; in PyTorch by autograd, some queries at a time (in one piece it takes gigabytes). --peaks adds how far a first call lifts a fresh
process's memory. memory: that alone, of the indexer over longer and longer caches. --crossover: sparse_crossover.py alone. On a GPU:
gpu_sparse_attention.py.
Results go to bench/results/sparse_cpu.json, where what other runs found of other work stays.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sparse_crossover
import thinkernel as tk
import torch
import torch.nn.functional as F
from attention import RESULTS, commit, cpu_name, interleave
from record import high_water_rise_mib
from thinkernel.ops.dispatch import C
from torch import Tensor

D, L, SCALE = 576, 512, 192**-0.5  # values of a latent, of them its value
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
    milliseconds = {who: round(t * 1e3, 3) for who, t in middle.items()}
    return dict(work=work, shape=shape, dtype=dtype, repeats=repeats, milliseconds=milliseconds, speedup=speedup)


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


def chosen(rows: int, T: int, k: int) -> Tensor:
    """[rows, k] ascending."""
    return torch.rand(rows, T).topk(k).indices.sort(-1).values.int()


def by_matmuls(q: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
    """q [S, H, D], kv [T, D], indices [S, K] -> [S, H, L]"""
    rows = kv.index_select(0, indices.flatten()).view(*indices.shape, D)
    return ((q @ rows.mT) * SCALE).softmax(-1) @ rows[..., :L]


def by_sdpa(q: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
    rows = kv.index_select(0, indices.flatten()).view(*indices.shape, D)
    return F.scaled_dot_product_attention(q[:, None], rows[:, None], rows[:, None], scale=SCALE)[:, 0, :, :L]


def some_at_a_time(form: Callable[[Tensor, Tensor, Tensor], Tensor], n: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, kv, i: torch.cat([form(q[s : s + n], kv, i[s : s + n]) for s in range(0, len(q), n)])


def attention(dtype: torch.dtype, backward: bool) -> list[tuple[str, Runs]]:
    S, T, K, H = 512, 16_384, 2048, 16
    q, kv, indices = torch.randn(S, H, D).to(dtype), torch.randn(T, D).to(dtype), chosen(S, T, K)
    dout = torch.randn(S, H, L).to(dtype)

    def ours(q: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
        return tk.sparse_attention(q[None], kv[None], indices[None], value_dim=L, scale=SCALE)[0]

    forms: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "thinkernel": ours, "matmuls": by_matmuls, "matmuls, 16 queries": some_at_a_time(by_matmuls, 16), "sdpa": by_sdpa,
        "sdpa, 16 queries": some_at_a_time(by_sdpa, 16),
    }  # fmt: skip
    if backward:  # the fastest of them; the others take up to twice as long, and those in one piece many gigabytes
        forms = {who: forms[who] for who in ("thinkernel", "sdpa, 16 queries")}

    def run(form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def both() -> object:
            a, b = q.detach().requires_grad_(), kv.detach().requires_grad_()
            return torch.autograd.grad(form(a, b, indices), (a, b), dout)

        return both if backward else lambda: form(q, kv, indices)

    shape = f"S{S} T{T} K{K} H{H} {D}/{L}" + (" forward + backward" if backward else " forward")
    return [(shape, {who: run(form) for who, form in forms.items()})]


def decode(dtype: torch.dtype) -> list[tuple[str, Runs]]:
    B, T, K, H = 4, 16_384, 2048, 16
    q, kv = torch.randn(B, 1, H, D).to(dtype), torch.randn(B, T, D).to(dtype)
    indices, seqlens = chosen(B, T, K)[:, None], torch.full((B,), T, dtype=torch.int32)
    flat = indices[:, 0].long() + torch.arange(B)[:, None] * T
    page = 64
    table = torch.randperm(B * T // page).int().view(B, T // page)
    pages = kv.view(B * T // page, page, D)

    def plain() -> Tensor:
        rows = kv.view(B * T, D).index_select(0, flat.flatten()).view(B, K, D)
        return ((q[:, 0] @ rows.mT) * SCALE).softmax(-1) @ rows[..., :L]

    def ours(kv: Tensor, table: Tensor | None) -> object:
        return tk.sparse_attention(q, kv, indices, value_dim=L, scale=SCALE, seqlens=seqlens, block_table=table)

    return [(f"B{B} T{T} K{K} H{H} {D}/{L}",
             {"thinkernel": lambda: ours(kv, None), "thinkernel paged": lambda: ours(pages, table), "matmuls": plain})]  # fmt: skip


def indexer(dtype: torch.dtype) -> list[tuple[str, Runs]]:
    return indexer_of(dtype, (512, 16_384, 16, 2048), (1, 16_384, 64, 2048))


def indexer_of(dtype: torch.dtype, *sizes: tuple[int, int, int, int]) -> list[tuple[str, Runs]]:
    found = []
    for S, T, Hi, k in sizes:
        q, keys, w = torch.randn(S, Hi, 128).to(dtype), torch.randn(T, 128).to(dtype), torch.randn(S, Hi)
        seen = torch.arange(T) <= torch.arange(T - S, T)[:, None]

        def plain(rows: slice, q: Tensor = q, keys: Tensor = keys, w: Tensor = w, seen: Tensor = seen, k: int = k) -> Tensor:
            z = (q[rows].flatten(0, 1) @ keys.mT).relu_().unflatten(0, q[rows].shape[:2])  # [S, Hi, T]
            scores = (w[rows, None].to(z.dtype) @ z)[:, 0].float().masked_fill_(~seen[rows], -torch.inf)
            return torch.topk(scores, k, sorted=False).indices.sort(-1).values

        runs: Runs = {
            "thinkernel": lambda q=q, keys=keys, w=w, k=k: tk.indexer_topk(q[None], keys[None], w[None], top_k=k),
            "torch": lambda plain=plain: plain(slice(None)),
        }
        if S > 64:
            runs["torch, 64 queries"] = lambda plain=plain, S=S: [plain(slice(s, s + 64)) for s in range(0, S, 64)]
        found.append((f"S{S} T{T} Hi{Hi} 128 top {k}", runs))
    return found


def divergence(scores: Tensor, target: Tensor, lse: Tensor, seen: Tensor) -> Tensor:
    """scores [n, K] of the indexer, target [n, H, K] of the attention, lse [n, H], seen [n, K] -> summed KL."""
    with torch.no_grad():
        mass = (target.float() * SCALE - lse[..., None]).exp_().sum(1).masked_fill_(~seen, 0.0)
        p = mass / mass.sum(-1, keepdim=True)
    log_probs = scores.float().masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0)
    return (torch.xlogy(p, p) - p * log_probs).sum()


def loss(dtype: torch.dtype, sparse: bool) -> list[tuple[str, Runs]]:
    S, T, K, H, Hi, Di = 512, 16_384, 2048, 16, 16, 128
    q, k, w = torch.randn(S, Hi, Di).to(dtype), torch.randn(T, Di).to(dtype), torch.randn(S, Hi) * (Hi * Di) ** -0.5
    target_q, target_kv, indices = torch.randn(S, H, D).to(dtype), torch.randn(T, D).to(dtype), chosen(S, T, K)
    seen = torch.arange(T) <= torch.arange(T - S, T)[:, None]
    indices = torch.where(seen.gather(1, indices.long()), indices, -1)
    lse = tk.sparse_attention(target_q[None], target_kv[None], indices[None], value_dim=L, scale=SCALE, return_lse=True)[1][0]

    def ours(lse: Tensor | None) -> object:
        learnt = [x[None].detach().requires_grad_() for x in (q, k, w)]
        options = dict(indices=indices[None] if sparse else None, scale=SCALE, target_lse=None if lse is None else lse[None])
        return torch.autograd.grad(tk.indexer_loss(*learnt, target_q[None], target_kv[None], **options), learnt)

    def torch_form(n: int) -> object:
        learnt = [x.detach().requires_grad_() for x in (q, k, w)]
        a, b, c = learnt
        for r in range(0, S, n):
            rows = slice(r, r + n)
            if sparse:
                named = indices[rows].clamp_min(0).flatten()
                z = (a[rows] @ b.index_select(0, named).view(-1, K, Di).mT).relu()  # [n, Hi, K]
                target, valid = target_q[rows] @ target_kv.index_select(0, named).view(-1, K, D).mT, indices[rows] >= 0
            else:
                z = (a[rows].flatten(0, 1) @ b.mT).relu().unflatten(0, (-1, Hi))  # [n, Hi, T]
                target, valid = (target_q[rows].flatten(0, 1) @ target_kv.mT).unflatten(0, (-1, H)), seen[rows]
            scores = (c[rows, None].to(z.dtype) @ z)[:, 0]
            (divergence(scores, target, lse[rows], valid) / S).backward()
        return [x.grad for x in learnt]

    shape = f"S{S} T{T} H{H} {D} Hi{Hi} {Di}" + (f" K{K}" if sparse else "")
    runs: Runs = {"thinkernel": lambda: ours(lse), "thinkernel, no lse": lambda: ours(None)}
    return [(shape, runs | {f"torch, {n} queries": lambda n=n: torch_form(n) for n in ((16, 64) if sparse else (64,))})]


LENGTHS = (4096, 8192, 16_384, 32_768, 65_536)
WORK: dict[str, Callable[[torch.dtype], list[tuple[str, Runs]]]] = {
    "topk": topk, "attention": lambda dtype: attention(dtype, False), "attention backward": lambda dtype: attention(dtype, True),
    "decode": decode, "indexer": indexer, "loss": lambda dtype: loss(dtype, True), "warm-up": lambda dtype: loss(dtype, False),
    "memory": lambda dtype: indexer_of(dtype, *((512, T, 16, 2048) for T in LENGTHS)),
}  # fmt: skip


def peak_mib(work: str, dtype: str, row: int, who: str, threads: int) -> float:
    """How far a first call lifts the high-water mark, in a process of its own."""
    command = [sys.executable, __file__, "--work", work, "--dtypes", dtype, "--threads", str(threads), "--peak-of", str(row), who]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(work: str, dtype: torch.dtype, row: int, who: str) -> None:
    """The child's part of peak_mib: small calls load the libraries, then the call itself."""
    ones = torch.ones(1, 64, 2, 64, dtype=dtype)
    torch.randn(64, 64).requires_grad_().to(dtype).matmul(ones[0, :, 0].mT).sum().backward()
    tk.indexer_topk(ones, ones[:, :, 0], ones[..., 0], top_k=4)
    run = WORK[work](dtype)[row][1][who]
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, or the call would find room in it
    print(high_water_rise_mib(run))


def memory(args: argparse.Namespace, dtype: str) -> list[Row]:
    found: list[Row] = []
    for row, T in enumerate(LENGTHS):
        peak = {who: round(peak_mib("memory", dtype, row, who, args.threads), 1) for who in ("thinkernel", "torch, 64 queries")}
        found.append(dict(work="memory", shape=f"S512 T{T} Hi16 128 top 2048", dtype=dtype, peak_mib=peak))
        print(f"memory S512 T{T} Hi16 128 top 2048 {dtype}: " + ", ".join(f"{who} {x}" for who, x in peak.items()) + " MiB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--crossover", action="store_true", help="dense against sparse attention over the length, and a figure of it")
    parser.add_argument("--peaks", action="store_true", help="measure the memory of first calls too")
    parser.add_argument("--peak-of", nargs=2, metavar=("ROW", "WHO"), help="only print the memory of WHO's first call, in MiB")
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse_cpu.json", help="results file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.peak_of:
        with tk.use_backend("cpu"):
            return print_peak(args.work[0], getattr(torch, args.dtypes[0]), int(args.peak_of[0]), args.peak_of[1])
    record: Row = dict(
        machine=cpu_name(), isa=C.isa(), threads=args.threads, torch=torch.__version__, commit=commit(),
        date=datetime.date.today().isoformat(),
    )  # fmt: skip
    if args.crossover:
        with tk.use_backend("cpu"):
            return sparse_crossover.run(record, args.repeats)
    args.out.parent.mkdir(exist_ok=True)
    found = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows: list[Row] = [row for row in found if row["work"] not in args.work or row["dtype"] not in args.dtypes]  # of other runs
    for work in args.work:
        for name in args.dtypes:
            with tk.use_backend("cpu"):
                if work == "memory":
                    rows += memory(args, name)
                else:
                    for i, (shape, runs) in enumerate(WORK[work](getattr(torch, name))):
                        rows.append(report(work, shape, name, runs, args.repeats))
                        if args.peaks:
                            rows[-1]["peak_mib"] = {who: round(peak_mib(work, name, i, who, args.threads), 1) for who in runs}
                            print("  first call lifts memory by, MiB:", rows[-1]["peak_mib"], flush=True)
            args.out.write_text(json.dumps(record | dict(rows=rows), indent=1) + "\n")  # at once: a run may be cut off
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
