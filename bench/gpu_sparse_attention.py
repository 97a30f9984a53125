"""Sparse attention on a GPU at DeepSeek-V3.2's shapes, beside TileLang, FlashMLA, dense cuDNN and gathering in PyTorch.

    python bench/gpu_sparse_attention.py [--out DIR]      appends one JSON line a measurement to DIR/bench.jsonl

B batch · S queries · T keys · H heads · K selected keys; latents of 512 + 64 values in bfloat16 (decode also FP8 pages of 64). Medians of
CUDA-event times as in gpu_triton.py, and the memory a call takes beside its inputs. TFLOP/s count 2·S·H·K·(576 + 512) forward and
2·S·H·K·(3·576 + 2·512) backward, whatever a contender computes. TileLang's kernels are examples of its repository, not of its package:
TILELANG_EXAMPLES names the folder with sparse_mla_fwd.py. "dense" is what the selection spares: heads of 192/128 over all T keys.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_triton import Contenders, medians
from thinkernel.kernels import mla
from thinkernel.kernels.sparse_attention import sparse_attention
from thinkernel.kernels.sparse_attention_backward import sparse_attention_backward
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

D, L, PAGE, SCALE = 576, 512, 64, 192**-0.5
PREFILL = [(4096, T, 128, 2048) for T in (8192, 16384, 32768, 65536, 131072)] + [(4096, 8192, 64, 2048), (4096, 8192, 16, 2048)]
DECODE = [(128, 2, 32768, 128, 2048), (128, 1, 32768, 16, 2048), (4, 1, 16384, 16, 2048)]  # B, S, T, H, K
DENSE_BYTES = 24 << 30  # dense heads larger than this are left out


def chosen(rows: int, T: int, K: int) -> Tensor:
    """[rows, K] int32, ascending; some hundred rows at a time, since the scores behind it are [rows, T]."""
    parts = [torch.rand(min(256, rows - r), T, device="cuda").topk(K).indices.sort(-1).values.int() for r in range(0, rows, 256)]
    return torch.cat(parts)


def peak_mib(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def tilelang(module: str) -> object:
    importlib.import_module("tilelang")
    folder = os.environ.get("TILELANG_EXAMPLES")
    if folder is None:
        raise ImportError("TILELANG_EXAMPLES does not name the folder of TileLang's DeepSeek-V3.2 examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(module)


def gathered(q: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
    """q [n, H, D], kv [T, D], indices [n, K] -> [n, H, L]"""
    rows = kv.index_select(0, indices.flatten()).view(*indices.shape, D)
    return ((q @ rows.mT) * SCALE).softmax(-1) @ rows[..., :L]


def prefill_contenders(S: int, T: int, H: int, K: int) -> tuple[Contenders, Contenders]:
    """-> forward, backward alone."""
    q, kv = torch.randn(1, S, H, D, device="cuda", dtype=torch.bfloat16), torch.randn(1, T, D, device="cuda", dtype=torch.bfloat16)
    indices = chosen(S, T, K)[None]
    out, lse = torch.empty(1, S, H, L, device="cuda", dtype=q.dtype), torch.empty(1, S, H, device="cuda")
    dout, dq, dkv = torch.randn_like(out), torch.empty_like(q), torch.empty_like(kv)
    sparse_attention(q, kv, None, indices, out, lse, scale=SCALE)
    groups = kv[:, :, None]

    def tilelang_forward() -> object:
        return tilelang("sparse_mla_fwd").sparse_mla_fwd_interface(q, groups, indices[:, :, None], sm_scale=SCALE)  # type: ignore[attr-defined]

    def tilelang_backward() -> object:
        base2 = lse * 1.4426950408889634  # its lse is a logarithm to base 2
        return tilelang("sparse_mla_bwd").sparse_mla_bwd(q, groups, out, dout, indices[:, :, None], base2, sm_scale=SCALE)  # type: ignore[attr-defined]

    def flash_mla() -> object:
        return importlib.import_module("flash_mla").flash_mla_sparse_fwd(q[0], groups[0], indices[0, :, None], SCALE)

    forward: Contenders = {
        "thinkernel": lambda: sparse_attention(q, kv, None, indices, out, lse, scale=SCALE),
        "TileLang": tilelang_forward, "FlashMLA": flash_mla,
        "gather + matmuls, 32 queries": lambda: [gathered(q[0, s : s + 32], kv[0], indices[0, s : s + 32]) for s in range(0, S, 32)],
    }  # fmt: skip
    backward: Contenders = {
        "thinkernel": lambda: sparse_attention_backward(q, kv, None, indices, out, lse, dout, dq, dkv, None, scale=SCALE),
        "TileLang": tilelang_backward,
    }
    if T * H * (192 + 128) * 2 * 2 <= DENSE_BYTES:
        heads = [torch.randn(1, H, n, d, device="cuda", dtype=q.dtype, requires_grad=True) for n, d in ((S, 192), (T, 192), (T, 128))]
        dheads, saved = torch.randn(1, H, S, 128, device="cuda", dtype=q.dtype), []

        def dense() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(*heads, scale=SCALE)

        def dense_backward() -> None:
            if not saved:
                saved.append(dense())
            torch.autograd.grad(saved[0], heads, dheads, retain_graph=True)

        forward["dense, cuDNN"], backward["dense, cuDNN"] = dense, dense_backward
    return forward, backward


def decode_contenders(B: int, S: int, T: int, H: int, K: int) -> Contenders:
    dense = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(B * T // PAGE, device="cuda").view(B, T // PAGE).int()
    pages = torch.empty_like(dense).view(-1, PAGE, D)
    pages[table.flatten().long()] = dense.view(-1, PAGE, D)
    fp8 = torch.zeros(len(pages), PAGE, mla.FP8_BYTES, device="cuda", dtype=torch.uint8)
    seqlens = torch.full((B,), T, device="cuda", dtype=torch.int32)
    for first in range(0, T, 4096):
        part = dense[:, first : first + 4096]
        mla.append_latent(fp8, part[..., :L], part[..., L:], seqlens=seqlens - (T - first - part.shape[1]), block_table=table)
    q = torch.randn(B, S, H, D, device="cuda", dtype=torch.bfloat16)
    indices = chosen(B * S, T, K).view(B, S, K)
    out, lse = torch.empty(B, S, H, L, device="cuda", dtype=q.dtype), torch.empty(B, S, H, device="cuda")
    flat = (indices.long() + torch.arange(B, device="cuda")[:, None, None] * T).flatten(0, 1)
    rows = dense.view(B * T, D)
    paged = dict(seqlens=seqlens, block_table=table, scale=SCALE)
    return {
        "thinkernel": lambda: sparse_attention(q, dense, None, indices, out, lse, seqlens=seqlens, scale=SCALE),
        "thinkernel pages": lambda: sparse_attention(q, pages, None, indices, out, lse, **paged),
        "thinkernel FP8 pages": lambda: sparse_attention(q, fp8, None, indices, out, lse, **paged),
        "gather + matmuls": lambda: gathered(q.flatten(0, 1), rows, flat),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder for bench.jsonl")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_sparse_attention: torch sees no CUDA device", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16", "date": time.strftime("%Y-%m-%d")}

    def record(what: str, shape: tuple[int, ...], contenders: Contenders, flops: float) -> None:
        for name, took in medians(contenders, arguments.rounds).items():
            line: dict[str, object] = about | {"what": what, "shape": list(shape), "by": name}
            if isinstance(took, str):
                line["failed"] = took
            else:
                line |= {"ms": round(took, 4), "TFLOP/s": round(flops / took / 1e9, 1), "extra MiB": peak_mib(contenders[name])}
            print(json.dumps(line), flush=True)
            with open(arguments.out / "bench.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        torch.cuda.empty_cache()

    for S, T, H, K in PREFILL:
        forward, backward = prefill_contenders(S, T, H, K)
        record("sparse attention forward", (S, T, H, K), forward, 2.0 * S * H * K * (D + L))
        record("sparse attention backward", (S, T, H, K), backward, 2.0 * S * H * K * (3 * D + 2 * L))
        del forward, backward
    for B, S, T, H, K in DECODE:
        record("sparse attention decode", (B, S, T, H, K), decode_contenders(B, S, T, H, K), 2.0 * B * S * H * K * (D + L))
    return 0


if __name__ == "__main__":
    sys.exit(main())
