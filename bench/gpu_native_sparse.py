"""NSA and MoBA on a GPU against dense causal attention, and against flash-linear-attention's NSA where that is installed.

    python bench/gpu_native_sparse.py [--out DIR]      appends one JSON line a measurement to DIR/bench.jsonl
    python bench/native_sparse.py --device cuda        the same

One sequence of T tokens, H = 64 heads of 4 key heads, D = 128, bfloat16. nsa: the paper's sizes (blocks of 64, compressed 32 / 16, 16
blocks, window 512), compressed keys given; moba: blocks of 512, 3 of them, at 8K, else 4096 and 12. Random inputs: neighbouring queries
share no more blocks than chance gives them, the worst case for a kernel whose tiles fetch a block once for several queries. fla's form has
no compressed keys of its own: it gets the blocks that ours chose, and does the chosen and the window branch alone. Medians of CUDA-event
times as in gpu_triton.py; peak MiB is what one call takes beyond its inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import thinkernel as tk
import torch
import torch.nn.functional as F
from gpu_topk import peak_mib
from gpu_triton import Contenders, medians
from thinkernel.kernels import native_sparse
from thinkernel.ops.native_sparse import native_sparse_attention_op
from thinkernel.reference.native_sparse import compressed_length
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

H, HKV, D = 64, 4, 128
LENGTHS = (8192, 65_536)
SIZES = 64, 32, 16, 16, 512  # block, compressed block, stride, blocks, window


def dense(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, *unused: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return run


def fla(indices: Tensor) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, gates: Tensor) -> Tensor:
        from fla.ops.nsa.parallel import parallel_nsa

        return parallel_nsa(
            q=q, k=k, v=v, g_slc=gates[..., 1].contiguous(), g_swa=gates[..., 2].contiguous(), block_indices=indices, block_counts=16,
            block_size=64, window_size=512)  # fmt: skip

    return run


def contenders(T: int, backward: bool) -> Contenders:
    """Forward, or forward + backward."""
    Tc = compressed_length(T, 32, 16)
    shapes = ((T, H, D), (T, HKV, D), (T, HKV, D), (Tc, HKV, D), (Tc, HKV, D), (T, H, 3))
    tensors = [torch.randn(1, *shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    tensors[5].sigmoid_()
    dout, (block, top_k) = torch.randn_like(tensors[0]), (512, 3) if T <= 8192 else (4096, 12)
    indices = native_sparse_attention_op(*tensors, None, None, *SIZES, D**-0.5)[3].clamp_min(0).long()  # fla reads no -1

    def whole(run: Callable[..., Tensor], count: int = 6) -> Callable[[], object]:
        def both() -> object:
            leaves = [x.detach().requires_grad_() for x in tensors[:count]]
            return torch.autograd.grad(run(*leaves), leaves, dout, allow_unused=True)

        return both if backward else lambda: run(*tensors[:count])

    return {
        "thinkernel nsa": whole(tk.native_sparse_attention),
        "thinkernel moba": whole(lambda *x: tk.block_attention(*x, block=block, top_k=top_k), 3),
        "thinkernel dense": whole(lambda *x: tk.attention(*x, causal=True), 3),
        "cudnn dense": whole(dense(SDPBackend.CUDNN_ATTENTION), 3),
        "flash dense": whole(dense(SDPBackend.FLASH_ATTENTION), 3),
        "fla chosen + window": whole(fla(indices)),
    }


def parts(T: int) -> Contenders:
    """The forward's kernels by themselves."""
    Tc = compressed_length(T, 32, 16)
    q, k, kc = (torch.randn(1, n, h, D, device="cuda", dtype=torch.bfloat16) for n, h in ((T, H), (T, HKV), (Tc, HKV)))
    lse, out = torch.full((1, T, H), 8.0, device="cuda"), torch.empty_like(q)
    indices = torch.empty(1, T, HKV, 16, device="cuda", dtype=torch.int32)
    near = torch.arange(T, device="cuda", dtype=torch.int32)[None, :, None, None] // 64
    shared = (near - torch.arange(15, -1, -1, device="cuda", dtype=torch.int32)).clamp_min(-1).expand(1, T, HKV, 16).contiguous()

    def choose() -> None:
        native_sparse.choose(q, kc, lse, indices, T=T, block=64, compress_block=32, stride=16, scale=D**-0.5)

    choose()
    return {
        "choice": choose,
        "chosen blocks, random": lambda: native_sparse.block_attention(q, k, k, indices, out, lse.clone(), block=64, scale=D**-0.5),
        "chosen blocks, shared by neighbours": lambda: native_sparse.block_attention(
            q, k, k, shared, out, lse.clone(), block=64, scale=D**-0.5),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder for bench.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_native_sparse: torch sees no CUDA device", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16", "date": time.strftime("%Y-%m-%d")}
    for T in arguments.lengths:
        for what in ("forward", "forward + backward", "parts"):
            runs = parts(T) if what == "parts" else contenders(T, what != "forward")
            for name, took in medians(runs, arguments.rounds).items():
                line = about | {"what": f"native_sparse {what}", "shape": [T, H, HKV, D], "by": name}
                line |= {"failed": took} if isinstance(took, str) else {"ms": round(took, 3), "peak_mib": round(peak_mib(runs[name]), 1)}
                print(json.dumps(line), flush=True)
                with open(arguments.out / "bench.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
            del runs
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
