"""Absorbed MLA decode on a GPU, beside what PyTorch has; append and gather of the latent cache.

    python bench/gpu_mla.py [--out DIR]      appends one JSON line a measurement to DIR/bench.jsonl

B batch · T cached tokens · H heads · Sq new tokens; latents of 512 + 64 values in bfloat16 (1152 bytes a token) or FP8 (656), in
pages of 64. Medians of CUDA-event times as in gpu_triton.py. GB/s count each cached byte once, whatever a contender reads; TFLOP/s
2·B·Sq·H·T·(576 + 512), as in the field.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_triton import Contenders, medians
from thinkernel.kernels import mla
from torch import Tensor

LATENT, ROPE, PAGE, SCALE = 512, 64, 64, 192**-0.5
SHAPES = [(128, T, H, Sq) for T in (4096, 8192, 16384, 32768) for H in (16, 128) for Sq in (1, 2)]  # B, T, H, Sq
PEER_BYTES = 24 << 30  # a peer whose scores or expanded heads take more than this is left out by name


def caches(B: int, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents [B, T, 576], the same as pages and their table, and FP8 pages."""
    dense = torch.randn(B, T, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    order = torch.randperm(B * T // PAGE, device="cuda")
    table = order.view(B, T // PAGE).int()
    pages = torch.empty_like(dense).view(-1, PAGE, LATENT + ROPE)
    pages[order] = dense.view(-1, PAGE, LATENT + ROPE)
    fp8 = torch.zeros(len(pages), PAGE, mla.FP8_BYTES, device="cuda", dtype=torch.uint8)
    full = torch.full((B,), T, device="cuda", dtype=torch.int32)
    for first in range(0, T, 4096):  # quantised by the kernel under test
        part = dense[:, first : first + 4096]
        mla.append_latent(fp8, part[..., :LATENT], part[..., LATENT:], seqlens=full - (T - first - part.shape[1]), block_table=table)
    return dense, pages, table, fp8


def decode_contenders(B: int, T: int, H: int, Sq: int) -> Contenders:
    dense, pages, table, fp8 = caches(B, T)
    q = torch.randn(B, Sq, H, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    seqlens = torch.full((B,), T, device="cuda", dtype=torch.int32)
    out, lse = torch.empty(B, Sq, H, LATENT, device="cuda", dtype=torch.bfloat16), torch.empty(B, Sq, H, device="cuda")
    mask = torch.ones(Sq, T, device="cuda", dtype=torch.bool).tril(T - Sq)

    def matmuls() -> Tensor:
        """All heads and tokens of a sequence as the rows of one product with its latents."""
        scores = torch.baddbmm(torch.zeros(1, device="cuda", dtype=q.dtype), q.flatten(1, 2), dense.mT, beta=0, alpha=SCALE)
        weights = scores.unflatten(1, (Sq, H)).masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        return torch.bmm(weights.flatten(1, 2), dense[..., :LATENT])

    def sdpa() -> Tensor:
        heads = dense[:, None]  # [B, 1, T, 576]
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), heads, heads[..., :LATENT], attn_mask=mask, scale=SCALE, enable_gqa=True)
        return attended.transpose(1, 2)

    contenders: Contenders = {
        "thinkernel": lambda: mla.mla_decode(q, dense, out, lse, seqlens=seqlens, scale=SCALE),
        "thinkernel pages": lambda: mla.mla_decode(q, pages, out, lse, seqlens=seqlens, block_table=table, scale=SCALE),
        "thinkernel FP8 pages": lambda: mla.mla_decode(q, fp8, out, lse, seqlens=seqlens, block_table=table, scale=SCALE),
    }
    if 4 * B * Sq * H * T * 2 <= PEER_BYTES:
        contenders |= {"torch matmuls": matmuls, "torch matmuls, compiled": torch.compile(matmuls), "sdpa": sdpa}
    return contenders


def cache_contenders(B: int, T: int) -> tuple[Contenders, Contenders]:
    """-> append of one token a sequence, gather of all."""
    dense, pages, table, fp8 = caches(B, T)
    latent, rope = (torch.randn(B, 1, n, device="cuda", dtype=torch.bfloat16) for n in (LATENT, ROPE))
    seqlens, out = torch.full((B,), T, device="cuda", dtype=torch.int32), torch.empty_like(dense)
    rows = torch.arange(B, device="cuda")
    append: Contenders = {
        "thinkernel pages": lambda: mla.append_latent(pages, latent, rope, seqlens=seqlens, block_table=table),
        "thinkernel FP8 pages": lambda: mla.append_latent(fp8, latent, rope, seqlens=seqlens, block_table=table),
        "torch": lambda: pages.index_put_((table[rows, -1].long(), torch.full_like(rows, PAGE - 1)), torch.cat([latent, rope], -1)[:, 0]),
    }
    gather: Contenders = {
        "thinkernel pages": lambda: mla.gather_latent(pages, out, seqlens=seqlens, block_table=table),
        "thinkernel FP8 pages": lambda: mla.gather_latent(fp8, out, seqlens=seqlens, block_table=table),
        "torch": lambda: pages[table.long()],
    }
    return append, gather


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder for bench.jsonl")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=None, help="another batch than 128")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_mla: torch sees no CUDA device", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16", "date": time.strftime("%Y-%m-%d")}

    def record(what: str, shape: tuple, contenders: Contenders, tokens: int, flops: float) -> None:
        for name, took in medians(contenders, arguments.rounds).items():
            line = about | {"what": what, "shape": list(shape), "by": name}
            if isinstance(took, str):
                line["failed"] = took
            else:
                line |= {"ms": round(took, 4), "GB/s": round(tokens * (656 if "FP8" in name else 1152) / took / 1e6, 1)}
                if flops:
                    line["TFLOP/s"] = round(flops / took / 1e9, 1)
            print(json.dumps(line), flush=True)
            with open(arguments.out / "bench.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    for B, T, H, Sq in SHAPES:
        B = arguments.batch or B
        contenders = decode_contenders(B, T, H, Sq)
        record("mla decode", (B, T, H, Sq), contenders, B * T, 2.0 * B * Sq * H * T * (2 * LATENT + ROPE))
        del contenders
        torch.cuda.empty_cache()
    B, T = arguments.batch or 128, 4096
    append, gather = cache_contenders(B, T)
    record("append_latent", (B, T), append, B, 0)
    record("gather_latent", (B, T), gather, B * T, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
