"""grpo on a GPU: linear_logprob, logprob and policy_loss beside Liger-Kernel, TRL's formulas and PyTorch, with peak memory.

    python bench/gpu_grpo.py [--out DIR] [--only linear_logprob|logprob|policy_loss]    one JSON line a measurement to DIR/bench.jsonl
    TRITON_INTERPRET=1 python bench/gpu_grpo.py --dry-run                               tiny sizes on the CPU, no timing: does it run?

N tokens · D hidden · V vocabulary · B sequences of S tokens. Medians of CUDA-event times over interleaved rounds with the L2
flushed before each (bench/gpu_triton.py). Work: 2NDV FLOPs a product, four of them forward + backward; logprob reads N·V once,
and with backward reads it again and writes it once; policy_loss as milliseconds alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import thinkernel as tk
import torch
import torch.nn.functional as F
from gpu_triton import Contenders, medians, peak_bytes
from torch import Tensor

HEADS = [(8192, 4096, 128256), (8192, 4096, 151936)]  # N, D, V
LOGITS = [(8192, 128256), (8192, 151936), (8192, 50257)]  # N, V
TOKENS = [(64, 4096), (512, 8192)]  # B, S
TINY: dict[str, list[Any]] = {"linear_logprob": [(9, 16, 70)], "logprob": [(9, 70)], "policy_loss": [(3, 20)]}


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The [N, V] logits, as TRL takes log-probs and entropies from a model."""
    return eager_logprob(F.linear(hidden, weight), target)


def eager_logprob(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Chunks of rows, each recomputed in its backward."""
    run = torch.utils.checkpoint.checkpoint
    parts = [run(naive, h, weight, t, use_reentrant=False) for h, t in zip(hidden.split(rows), target.split(rows), strict=True)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def with_backward(run: Callable[..., Any], leaves: list[Tensor], *args: Any, grads: list[Tensor]) -> Callable[[], object]:
    def both() -> object:
        outputs = run(*leaves, *args)
        return torch.autograd.grad(outputs, leaves, grads)

    return both


def linear_logprob_contenders(N: int, D: int, V: int, device: str, backends: list[str]) -> tuple[Contenders, Contenders]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype).requires_grad_()
    target, grads = torch.randint(0, V, (N,), device=device), list(torch.randn(2, N, device=device))

    def ours(backend: str) -> Callable[..., Any]:
        def run(h: Tensor, w: Tensor, t: Tensor) -> Any:
            with tk.use_backend(backend):
                return tk.linear_logprob(h, w, t)

        return run

    runs: dict[str, Callable[..., Any]] = {f"thinkernel {b}": ours(b) for b in backends if b != "cuda"}
    runs |= {"torch": naive, "torch, chunks recomputed": chunked, "torch.compile": torch.compile(naive)}
    forward: Contenders = {}
    for name, run in runs.items():
        def plain(run: Callable[..., Any] = run) -> object:
            with torch.no_grad():
                return run(hidden, weight, target)

        forward[name] = plain
    both: Contenders = {name: with_backward(run, [hidden, weight], target, grads=grads) for name, run in runs.items()}

    def liger() -> object:  # mean loss alone, no entropy and no log-probs: the nearest it has for the head
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return torch.autograd.grad(LigerFusedLinearCrossEntropyLoss()(weight, hidden, target), [hidden, weight])

    def liger_grpo() -> object:  # head and loss in one
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        shape = (8, N // 8)
        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(
            hidden.view(*shape, D), weight, target.view(shape), torch.ones(shape, device=device), torch.ones(8, device=device))
        return torch.autograd.grad(loss[0], [hidden, weight])

    both["liger fused linear cross entropy (no entropy)"], both["liger fused linear grpo (with its loss)"] = liger, liger_grpo
    return forward, both


def logprob_contenders(N: int, V: int, device: str, backends: list[str]) -> tuple[Contenders, Contenders]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    logits = (3 * torch.randn(N, V, device=device)).to(dtype).requires_grad_()
    target, grads = torch.randint(0, V, (N,), device=device), list(torch.randn(2, N, device=device))

    def ours(backend: str) -> Callable[..., Any]:
        def run(x: Tensor, t: Tensor) -> Any:
            with tk.use_backend(backend):
                return tk.logprob(x, t)

        return run

    runs: dict[str, Callable[..., Any]] = {f"thinkernel {b}": ours(b) for b in backends}
    runs |= {"torch": eager_logprob, "torch.compile": torch.compile(eager_logprob)}
    forward: Contenders = {}
    for name, run in runs.items():
        def plain(run: Callable[..., Any] = run) -> object:
            with torch.no_grad():
                return run(logits, target)

        forward[name] = plain
    return forward, {name: with_backward(run, [logits], target, grads=grads) for name, run in runs.items()}


def trl_dapo(lp: Tensor, old: Tensor, ref: Tensor, a: Tensor, mask: Tensor, items: float) -> Tensor:
    """The dapo loss with β = 0.04 by TRL's formulas, in eager PyTorch."""
    ratio = torch.exp(lp - old)
    loss = -torch.min(ratio * a[:, None], ratio.clamp(0.8, 1.28) * a[:, None])
    d = ref - lp
    loss = loss + 0.04 * (torch.exp(d) - d - 1)
    return (loss * mask).sum() / items


def policy_loss_contenders(B: int, S: int, device: str, backends: list[str]) -> Contenders:
    lp = (-torch.rand(B, S, device=device)).requires_grad_()
    old, ref = (lp.detach() + 0.1 * torch.randn(B, S, device=device) for _ in range(2))
    a, mask = torch.randn(B, device=device), torch.rand(B, S, device=device) < 0.9
    items = float(B * S)

    def ours(backend: str, **options: Any) -> Callable[[], object]:
        def run() -> object:
            with tk.use_backend(backend):
                loss, _ = tk.policy_loss(lp, old, a, mask, ref_logprob=ref, beta=0.04, epsilon_high=0.28, **options)
                return torch.autograd.grad(loss, lp)

        return run

    def torch_run(fn: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(fn(lp, old, ref, a, mask, items), lp)

    found: Contenders = {f"thinkernel {b}, dapo": ours(b, num_items_in_batch=items) for b in backends}
    found |= {f"thinkernel {b}, gspo": ours(b, loss_type="gspo") for b in backends}
    return found | {"TRL's formulas, dapo": torch_run(trl_dapo), "TRL's formulas, dapo, torch.compile": torch_run(torch.compile(trl_dapo))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder for bench.jsonl")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=tuple(TINY))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, every contender once")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("gpu_grpo: torch sees no CUDA device", file=sys.stderr)
        return 1
    device = "cpu" if arguments.dry_run else "cuda"
    backends = ["triton"] if arguments.dry_run else ["triton"] + ([] if tk.backends()["cuda"] else ["cuda"])
    about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    if not arguments.dry_run:
        about |= {"gpu": torch.cuda.get_device_name()}
        arguments.out.mkdir(parents=True, exist_ok=True)

    def record(what: str, shape: tuple[int, ...], contenders: Contenders, work: float, unit: str) -> None:
        if arguments.dry_run:
            for name, run in contenders.items():
                if "compile" in name or "liger" in name:
                    continue
                run()
                print(f"{what} {shape}: {name} runs")
            return
        for name, took in medians(contenders, arguments.rounds).items():
            line = about | {"what": what, "shape": list(shape), "by": name}
            if isinstance(took, str):
                line["failed"] = took
            else:
                line |= {"ms": round(took, 4), unit: round(work / took / 1e9, 1), "extra_MiB": round(peak_bytes(contenders[name]) / 2**20)}
            print(json.dumps(line), flush=True)
            with open(arguments.out / "bench.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def sizes(name: str, full: list[Any]) -> list[Any]:
        if arguments.only not in (None, name):
            return []
        return TINY[name] if arguments.dry_run else full

    for N, D, V in sizes("linear_logprob", HEADS):
        forward, both = linear_logprob_contenders(N, D, V, device, backends)
        record("linear_logprob forward", (N, D, V), forward, 2.0 * N * D * V, "TFLOP/s")
        record("linear_logprob forward + backward", (N, D, V), both, 8.0 * N * D * V, "TFLOP/s")
        del forward, both
        torch.cuda.empty_cache()
    for N, V in sizes("logprob", LOGITS):
        forward, both = logprob_contenders(N, V, device, backends)
        record("logprob forward", (N, V), forward, 2e3 * N * V, "GB/s")
        record("logprob forward + backward", (N, V), both, 6e3 * N * V, "GB/s")
        del forward, both
        torch.cuda.empty_cache()
    for B, S in sizes("policy_loss", TOKENS):
        record("policy_loss forward + backward", (B, S), policy_loss_contenders(B, S, device, backends), 17e3 * B * S, "GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
