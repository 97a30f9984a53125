"""The Triton attention and linear_logprob kernels on a GPU, beside what PyTorch and its neighbours have.

    python bench/gpu_triton.py [--out DIR]      appends one JSON line a measurement to DIR/bench.jsonl

B batch · S queries = keys · H query heads · Hkv key heads · D head dim · N tokens · V vocabulary. Medians of CUDA-event times
over interleaved rounds (each round runs every contender once, the L2 flushed before each); FLOPs as in the field: forward
4·B·H·S²·D (half if causal), backward 2.5 times that; 2NDV a product, four of them forward + backward.
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
from unittest import mock

import torch
import torch.nn.functional as F
from thinkernel.kernels import attention, configs, grpo
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

ATTENTION = [  # B, S, H, Hkv, D, Dv, causal
    (1, 4096, 64, 8, 128, 128, True),
    (1, 8192, 64, 8, 128, 128, True),
    (1, 16384, 64, 8, 128, 128, True),
    (1, 16384, 64, 8, 128, 128, False),
    (2, 8192, 64, 8, 64, 64, True),
    (1, 8192, 128, 128, 192, 128, True),
    (1, 8192, 16, 2, 256, 256, True),
]
LOGPROB = [(8192, 4096, 131072), (4096, 4096, 131072)]  # N, D, V
PACKED = [(16384, 8, 64, 8, 128), (16384, 64, 64, 8, 128)]  # N tokens in that many equal sequences, H, Hkv, D
PREFIX = [(64, 8192, 512, 32, 8, 128)]  # B, keys of the prefix, own keys, H, Hkv, D
DECODE = [(32, 4096, 32, 8, 128), (1, 32768, 32, 8, 128)]  # B, T, H, Hkv, D
FLUSH_BYTES = 256 << 20
Contenders = dict[str, Callable[[], object]]


def medians(contenders: Contenders, rounds: int) -> dict[str, float | str]:
    """Milliseconds of each contender, or why it did not run."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, run in contenders.items():
        try:
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            times[name] = []
        except (RuntimeError, ImportError, NotImplementedError, ValueError) as error:
            failed[name] = str(error).splitlines()[0][:200] or type(error).__name__
    for _ in range(rounds):
        for name in times:
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            contenders[name]()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()} | failed


def attention_contenders(B: int, S: int, H: int, Hkv: int, D: int, Dv: int, causal: bool) -> tuple[Contenders, Contenders]:
    """-> forward, backward alone (its forward ran before)."""
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q, k, v, dout = make(B, S, H, D), make(B, S, Hkv, D), make(B, S, Hkv, Dv), make(B, S, H, Dv)
    out, lse = make(B, S, H, Dv), torch.empty(B, S, H, device="cuda")
    grads = [torch.empty_like(x) for x in (q, k, v)]
    attention.attention_forward(q, k, v, out, lse, causal=causal)
    forward: Contenders = {"thinkernel": lambda: attention.attention_forward(q, k, v, out, lse, causal=causal)}
    backward: Contenders = {"thinkernel": lambda: attention.attention_backward(q, k, v, out, lse, dout, *grads, causal=causal)}

    def with_descriptors() -> None:
        with mock.patch.dict(configs.DESCRIPTORS, dict.fromkeys(configs.DESCRIPTORS, True)):
            attention.attention_forward(q, k, v, out, lse, causal=causal)

    forward["thinkernel, tensor descriptors"] = with_descriptors
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]

    def add(name: str, run: Callable[[], Tensor]) -> None:
        saved: list[Tensor] = []

        def run_backward() -> None:
            if not saved:
                saved.append(run())
            torch.autograd.grad(saved[0], leaves, dout.transpose(1, 2), retain_graph=True)

        forward[name], backward[name] = run, run_backward

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=H != Hkv)

    add("sdpa cudnn", functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION))
    add("sdpa flash", functools.partial(sdpa, SDPBackend.FLASH_ATTENTION))
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device="cuda") if causal else None
    compiled = torch.compile(flex_attention)
    add("flex_attention", lambda: compiled(*leaves, block_mask=mask, enable_gqa=H != Hkv))
    return forward, backward


def decode_contenders(B: int, T: int, H: int, Hkv: int, D: int) -> Contenders:
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q, k, v, out, lse = make(B, 1, H, D), make(B, T, Hkv, D), make(B, T, Hkv, D), make(B, 1, H, D), torch.empty(B, 1, H, device="cuda")
    seqlens = torch.full((B,), T, dtype=torch.int32, device="cuda")
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    return {
        "thinkernel": lambda: attention.attention_decode(q, k, v, out, lse, seqlens=seqlens),
        "sdpa": lambda: F.scaled_dot_product_attention(*heads, enable_gqa=True),
    }


def packed_contenders(N: int, sequences: int, H: int, Hkv: int, D: int) -> tuple[Contenders, Contenders]:
    """-> forward, backward alone: packed sequences beside the same ones as a batch."""
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q, k, v, dout = make(N, H, D), make(N, Hkv, D), make(N, Hkv, D), make(N, H, D)
    cu = torch.arange(0, N + 1, N // sequences, dtype=torch.int32, device="cuda")
    forward: Contenders = {}
    backward: Contenders = {}

    def add(name: str, fold: Callable[[Tensor], Tensor], **options: Tensor) -> None:
        x = [fold(t) for t in (q, k, v)]
        out, lse = torch.empty_like(x[0]), torch.empty(x[0].shape[:-1], device="cuda")
        grads, dy = [torch.empty_like(t) for t in x], fold(dout)
        attention.attention_forward(*x, out, lse, causal=True, **options)
        forward[name] = lambda: attention.attention_forward(*x, out, lse, causal=True, **options)
        backward[name] = lambda: attention.attention_backward(*x, out, lse, dy, *grads, causal=True, **options)

    add("thinkernel packed", lambda x: x, cu_seqlens_q=cu)
    add("thinkernel batch", lambda x: x.unflatten(0, (sequences, N // sequences)))
    return forward, backward


def prefix_contenders(B: int, shared: int, own: int, H: int, Hkv: int, D: int) -> Contenders:
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q, k, v, out, lse = make(B, 1, H, D), make(B, own, Hkv, D), make(B, own, Hkv, D), make(B, 1, H, D), torch.empty(B, 1, H, device="cuda")
    prefix = (make(shared, Hkv, D), make(shared, Hkv, D), shared, None)
    joined = [torch.cat([p.expand(B, -1, -1, -1), x], 1) for p, x in zip(prefix[:2], (k, v), strict=True)]
    seqlens = torch.full((B,), own, dtype=torch.int32, device="cuda")
    return {
        "thinkernel shared": lambda: attention.attention_decode(q, k, v, out, lse, seqlens=seqlens, prefix=prefix),
        "thinkernel joined": lambda: attention.attention_decode(q, *joined, out, lse, seqlens=seqlens + shared),
    }


def logprob_contenders(N: int, D: int, V: int) -> tuple[Contenders, Contenders]:
    """-> forward, forward + backward."""
    hidden, weight = torch.randn(N, D, device="cuda", dtype=torch.bfloat16), torch.randn(V, D, device="cuda", dtype=torch.bfloat16) / D**0.5
    target, g = torch.randint(0, V, (N,), device="cuda"), torch.randn(N, device="cuda")
    lp, entropy = torch.empty(2, N, device="cuda")
    lse = torch.empty(N, device="cuda", dtype=torch.float64)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]

    def ours() -> None:
        grpo.linear_logprob_forward(hidden, weight, target, None, lp, entropy, lse)

    def ours_both() -> None:
        ours()
        grpo.linear_logprob_backward(hidden, weight, target, None, lse, entropy, g, g, dhidden, dweight, None)

    def naive(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (h @ w.t()).float().log_softmax(-1)
        return log_p.gather(1, t[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    compiled = torch.compile(naive)
    forward: Contenders = {
        "thinkernel": ours,
        "torch": lambda: naive(hidden, weight, target),
        "torch.compile": lambda: compiled(hidden, weight, target),
    }
    both: Contenders = {
        "thinkernel": ours_both,
        "torch": lambda: torch.autograd.grad(naive(*leaves, target), leaves, [g, g]),
        "torch.compile": lambda: torch.autograd.grad(compiled(*leaves, target), leaves, [g, g]),
    }

    def liger() -> None:  # mean loss only, no entropy: the nearest thing it has
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        torch.autograd.grad(LigerFusedLinearCrossEntropyLoss()(leaves[1], leaves[0], target), leaves)

    both["liger fused linear cross entropy (no entropy)"] = liger
    return forward, both


def peak_bytes(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder for bench.jsonl")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("attention", "packed", "decode", "linear_logprob"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_triton: torch sees no CUDA device", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16", "date": time.strftime("%Y-%m-%d")}

    def record(what: str, shape: tuple, contenders: Contenders, work: float, unit: str, memory: bool = False) -> None:
        for name, took in medians(contenders, arguments.rounds).items():
            line = about | {"what": what, "shape": list(shape), "by": name}
            if isinstance(took, str):
                line["failed"] = took
            else:
                line |= {"ms": round(took, 4), unit: round(work / took / 1e9, 1)}
                if memory:
                    line["extra_MiB"] = round(peak_bytes(contenders[name]) / 2**20)
            print(json.dumps(line), flush=True)
            with open(arguments.out / "bench.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    if arguments.only in (None, "attention"):
        for shape in ATTENTION:
            B, S, H, _, D, Dv, causal = shape
            work = 2 * B * H * S * S * (D + Dv) * (0.5 if causal else 1.0)
            forward, backward = attention_contenders(*shape)
            record("attention forward", shape, forward, work, "TFLOP/s")
            record("attention backward", shape, backward, 2.5 * work, "TFLOP/s")
            del forward, backward
            torch.cuda.empty_cache()
    if arguments.only in (None, "packed"):
        for shape in PACKED:
            N, sequences, H, _, D = shape
            work = 2.0 * H * N * N / sequences * D
            forward, backward = packed_contenders(*shape)
            record("packed attention forward", shape, forward, work, "TFLOP/s")
            record("packed attention backward", shape, backward, 2.5 * work, "TFLOP/s")
            del forward, backward
            torch.cuda.empty_cache()
    if arguments.only in (None, "decode"):
        for shape in DECODE:
            B, T, _, Hkv, D = shape
            record("attention decode", shape, decode_contenders(*shape), 4e3 * B * T * Hkv * D, "GB/s")
        for shape in PREFIX:
            B, shared, own, _, Hkv, D = shape
            record("attention decode, shared prefix", shape, prefix_contenders(*shape), 4e3 * (B * own + shared) * Hkv * D, "GB/s")
    if arguments.only in (None, "linear_logprob"):
        for shape in LOGPROB:
            N, D, V = shape
            forward, both = logprob_contenders(*shape)
            record("linear_logprob forward", shape, forward, 2.0 * N * D * V, "TFLOP/s", memory=True)
            record("linear_logprob forward + backward", shape, both, 8.0 * N * D * V, "TFLOP/s", memory=True)
            del forward, both
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
