"""Top-k, the indexer with its selection, and the indexer's loss on a GPU (Triton), beside what PyTorch has.

    python bench/gpu_indexer.py [--out DIR] [--work topk …]      appends one JSON line a measurement to DIR/bench.jsonl

B batch · S queries · T keys · Hi index heads of 128 · K kept · H heads of the attention that the loss follows (latents of 576). bfloat16.
Medians of CUDA-event times as in gpu_triton.py. TFLOP/s: 2·S·T·Hi·128 a product of the indexer (one in selection), causal halves not
counted; GB/s of top-k: each score read once.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

import thinkernel as tk
import torch
from gpu_triton import Contenders, medians
from torch import Tensor

DI, D, SCALE, K = 128, 576, 192**-0.5, 2048
TOPK = [(4096, 8192), (128, 65_536), (8, 131_072), (1, 1_000_000)]  # rows, scores
SELECT = [(4096, T, Hi) for T in (8192, 16_384, 32_768, 131_072) for Hi in (64, 32)]  # S, T, Hi
DECODE = [(B, T) for B in (1, 32, 128) for T in (16_384, 65_536)]  # B, T
LOSS = [(1024, 8192), (1024, 32_768)]  # S, T
PEER_BYTES = 24 << 30  # a peer whose scores take more than this is left out by name
make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)


def plain_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """q [n, Hi, 128], k [T, 128], w [n, Hi] -> [n, T]"""
    z = (q.flatten(0, 1) @ k.mT).relu_().unflatten(0, q.shape[:2])
    return (w.to(z.dtype)[:, None] @ z)[:, 0].float()


def plain_select(q: Tensor, k: Tensor, w: Tensor, rows: int) -> Tensor:
    """`rows` queries at a time; unordered indices, sorted."""
    S, T = len(q), len(k)
    found = []
    for s in range(0, S, rows):
        scores = plain_scores(q[s : s + rows], k, w[s : s + rows])
        seen = torch.arange(T, device="cuda") <= torch.arange(T - S + s, T - S + s + len(scores), device="cuda")[:, None]
        found.append(scores.masked_fill_(~seen, -torch.inf).topk(min(K, T), sorted=False).indices.sort(-1).values)
    return torch.cat(found)


def topk_contenders(N: int, T: int) -> Contenders:
    scores = torch.randn(N, T, device="cuda")
    return {
        "thinkernel": lambda: tk.topk(scores, K),
        "torch.topk": lambda: torch.topk(scores, K, sorted=False),
        "torch.topk, ascending": lambda: torch.topk(scores, K, sorted=False).indices.sort(-1).values,
    }


def select_contenders(S: int, T: int, Hi: int) -> Contenders:
    q, k, w = make(S, Hi, DI), make(T, DI), torch.randn(S, Hi, device="cuda")
    rows = max(PEER_BYTES // (8 * Hi * T), 1)
    return {
        "thinkernel": lambda: tk.indexer_topk(q[None], k[None], w[None], top_k=K),
        f"torch, {min(rows, S)} queries": lambda: plain_select(q, k, w, rows),
    }


def decode_contenders(B: int, T: int) -> Contenders:
    q, k, w = make(B, 1, 64, DI), make(B, T, DI), torch.randn(B, 1, 64, device="cuda")
    table, seqlens = torch.randperm(B * T // 64, device="cuda").view(B, -1).int(), torch.full((B,), T, device="cuda", dtype=torch.int32)
    pages, fp8, scale = k.view(-1, 64, DI), k.to(torch.float8_e4m3fn).view(-1, 64, DI), torch.ones(B * T // 64, 64, device="cuda")

    def plain() -> Tensor:
        z = torch.bmm(q[:, 0], k.mT).relu_()  # [B, 64, T]
        return torch.bmm(w.to(z.dtype), z)[:, 0].float().topk(K, sorted=False).indices.sort(-1).values

    return {
        "thinkernel": lambda: tk.indexer_topk(q, k, w, top_k=K, seqlens=seqlens),
        "thinkernel pages": lambda: tk.indexer_topk(q, pages, w, top_k=K, seqlens=seqlens, block_table=table),
        "thinkernel FP8 pages": lambda: tk.indexer_topk(q, fp8, w, top_k=K, seqlens=seqlens, block_table=table, k_scale=scale),
        "torch": plain,
    }


def loss_contenders(S: int, T: int, sparse: bool) -> Contenders:
    """Forward and backward to the indexer's q, k and w, with the attention's lse and without it."""
    learnt = [x.requires_grad_() for x in (make(1, S, 64, DI), make(1, T, DI), torch.randn(1, S, 64, device="cuda") * 0.01)]
    target = make(1, S, 128, D), make(1, T, D)
    lse = 6 + torch.randn(1, S, 128, device="cuda")
    indices = torch.rand(1, S, T - S, device="cuda").topk(K).indices.sort(-1).values.int() if sparse else None

    def run(lse: Tensor | None, backend: str) -> object:
        with tk.use_backend(backend):
            return torch.autograd.grad(tk.indexer_loss(*learnt, *target, indices=indices, scale=SCALE, target_lse=lse), learnt)

    found: Contenders = {"thinkernel": lambda: run(lse, "triton"), "thinkernel without lse": lambda: run(None, "triton")}
    if 4 * S * T * 64 * 3 <= PEER_BYTES and not sparse:
        found["reference"] = lambda: run(lse, "reference")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder for bench.jsonl")
    parser.add_argument("--rounds", type=int, default=7)
    works = ["topk", "select", "decode", "loss", "warm-up"]
    parser.add_argument("--work", nargs="+", default=works, choices=works)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_indexer: torch sees no CUDA device", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16", "date": time.strftime("%Y-%m-%d")}

    def record(what: str, shape: tuple[int, ...], contenders: Contenders, flops: float = 0.0, nbytes: float = 0.0) -> None:
        with tk.use_backend("triton"):
            times = medians(contenders, arguments.rounds)
        for name, took in times.items():
            line = about | {"what": what, "shape": list(shape), "by": name}
            if isinstance(took, str):
                line["failed"] = took
            else:
                line |= {"ms": round(took, 4)} | ({"TFLOP/s": round(flops / took / 1e9, 1)} if flops else {})
                line |= {"GB/s": round(nbytes / took / 1e6, 1)} if nbytes else {}
            print(json.dumps(line), flush=True)
            with open(arguments.out / "bench.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        torch.cuda.empty_cache()

    if "topk" in arguments.work:
        for N, T in TOPK:
            record("topk", (N, T), topk_contenders(N, T), nbytes=4.0 * N * T)
    if "select" in arguments.work:
        for S, T, Hi in SELECT:
            record("indexer_topk", (S, T, Hi), select_contenders(S, T, Hi), flops=2.0 * S * T * Hi * DI)
    if "decode" in arguments.work:
        for B, T in DECODE:
            record("indexer_topk decode", (B, T), decode_contenders(B, T), nbytes=2.0 * B * T * DI)
    for work, sparse in (("loss", True), ("warm-up", False)):
        if work in arguments.work:
            for S, T in LOSS:
                record(f"indexer {work}", (S, T), loss_contenders(S, T, sparse))
    return 0


if __name__ == "__main__":
    sys.exit(main())
