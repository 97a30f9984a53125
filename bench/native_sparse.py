"""NSA and MoBA against dense causal attention, ours and PyTorch's, interleaved in one run: on the CPU; on a GPU gpu_native_sparse.py.

    python bench/native_sparse.py                                        # everything
    python bench/native_sparse.py --work nsa --lengths 8192 --repeats 5
    python bench/native_sparse.py --device cuda                          # gpu_native_sparse.py, with its own options

One sequence of H = 16 heads of one key head, D = 128, in bf16. nsa: the paper's sizes (blocks of 64, compressed 32 / 16, 16 blocks, window
512), compressed keys given, forward and forward + backward. moba: blocks of 512, 3 of them, up to 8K, then 1024 and 12. PyTorch has no
sparse form that does not store the scores, so its contestant is its dense attention. Medians of times and of ratios.
Results go to bench/results/native_sparse_cpu.json, where what other runs found of other work stays.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

import thinkernel as tk
import torch
import torch.nn.functional as F
from attention import RESULTS, commit, cpu_name
from sparse import Row, Runs, report
from thinkernel.ops.dispatch import C
from thinkernel.reference.native_sparse import compressed_length
from torch import Tensor

H, HKV, D = 16, 1, 128
LENGTHS = (8192, 16_384, 32_768)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def runs(form: str, T: int, backward: bool) -> Runs:
    Tc = compressed_length(T, 32, 16)
    q, k, v, kc, vc = (torch.randn(1, n, h, D).bfloat16() for n, h in ((T, H), (T, HKV), (T, HKV), (Tc, HKV), (Tc, HKV)))
    gates, dout = torch.rand(1, T, H, 3).bfloat16(), torch.randn(1, T, H, D).bfloat16()
    block, top_k = (512, 3) if T <= 8192 else (1024, 12)

    def whole(run: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], object]:
        def both() -> object:
            leaves = [x.detach().requires_grad_() for x in tensors]
            return torch.autograd.grad(run(*leaves), leaves, dout)

        return both if backward else lambda: run(*tensors)

    ours = {
        "nsa": whole(tk.native_sparse_attention, q, k, v, kc, vc, gates),
        "moba": whole(lambda *x: tk.block_attention(*x, block=block, top_k=top_k), q, k, v),
    }
    return {
        f"thinkernel {form}": ours[form],
        "thinkernel dense": whole(lambda *x: tk.attention(*x, causal=True), q, k, v),
        "torch dense": whole(dense, q, k, v),
    }


def main() -> None:
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    chosen, others = device.parse_known_args()
    if chosen.device == "cuda":
        import gpu_native_sparse

        sys.exit(gpu_native_sparse.main(others))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[device]
    )
    parser.add_argument("--work", nargs="+", default=["nsa", "moba"], choices=["nsa", "moba"])
    parser.add_argument("--passes", nargs="+", default=["forward", "both"], choices=["forward", "both"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "native_sparse_cpu.json", help="results file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    record: Row = dict(
        machine=cpu_name(), isa=C.isa(), threads=args.threads, torch=torch.__version__, commit=commit(),
        date=datetime.date.today().isoformat(),
    )  # fmt: skip
    args.out.parent.mkdir(exist_ok=True)
    rows: list[Row] = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for work in args.work:
        for T in args.lengths:
            for passes in args.passes:
                backward = passes == "both"
                shape = f"T{T} H{H} Hkv{HKV} D{D}" + (" forward + backward" if backward else " forward")
                with tk.use_backend("cpu"):
                    row = report(work, shape, "bfloat16", runs(work, T, backward), args.repeats)
                rows = [x for x in rows if (x["work"], x["shape"]) != (work, shape)] + [row]
                args.out.write_text(json.dumps(record | dict(rows=rows), indent=1) + "\n")  # at once: a run may be cut off
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
