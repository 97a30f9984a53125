"""The experts and the router on a GPU beside torch's grouped_mm, transformers' experts and Liger's fused MoE, with peak memory.

    python bench/gpu_moe.py [--out DIR] [--only experts|decode|route]    one JSON line a measurement to DIR/bench.jsonl
    TRITON_INTERPRET=1 python bench/gpu_moe.py --dry-run                 tiny sizes on the CPU, every contender once, no timing

T tokens · H hidden · I inner · E experts · K experts a token, SwiGLU, weights [out, in], bfloat16; the choice is a router's among
random logits. Medians of CUDA-event times as in gpu_triton.py; 6·T·K·H·I FLOPs forward, three times that with the backward (of x, both
weights and the routing weights). decode: GB/s of the chosen experts' weights, each read once. route: DeepSeek-V3's rule.
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
from gpu_triton import Contenders, medians, peak_bytes
from moe import by_expert, eager_route, grouped, transformers_form
from torch import Tensor

QWEN3, MIXTRAL = (2048, 768, 128, 8), (4096, 14336, 8, 2)  # H, I, E, K: Qwen3-30B-A3B, Mixtral-8x7B
EXPERTS = [(T, *model) for model in (QWEN3, MIXTRAL) for T in (8192, 32768)]
DECODE = [(T, *model) for model in (QWEN3, MIXTRAL) for T in (1, 8, 64)]
ROUTE = [(40_000, 256)]
TINY: dict[str, list[Any]] = {"experts": [(9, 16, 16, 4, 2)], "decode": [(1, 16, 16, 4, 2)], "route": [(5, 256)]}


def tensors(T: int, H: int, inner: int, E: int, K: int, device: str) -> list[Tensor]:
    """x, w_gate_up, w_down, weights, experts."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    routing = tk.route(torch.randn(T, E, device=device), K)
    up = torch.randn(E, 2 * inner, H, device=device, dtype=dtype) * H**-0.5
    down = torch.randn(E, H, inner, device=device, dtype=dtype) * inner**-0.5
    return [torch.randn(T, H, device=device, dtype=dtype), up, down, routing.weights, routing.experts]


def liger(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, up, down, experts, weights.to(x.dtype))  # type: ignore[no-any-return]


def forms(given: list[Tensor]) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"thinkernel triton": tk.moe, "torch grouped_mm": grouped}
    for kind in ("grouped_mm", "eager"):
        form = transformers_form(kind, *given[1:3])
        if form is not None:
            found[f"transformers {kind}"] = form
    return found | {"torch, a product an expert": by_expert, "liger fused_moe": liger}


def expert_contenders(shape: tuple[int, ...], device: str) -> tuple[Contenders, Contenders]:
    """-> forward, forward + backward."""
    given = tensors(*shape, device)  # type: ignore[call-arg]
    leaves, dy = [x.detach().requires_grad_() for x in given[:4]], torch.randn_like(given[0])

    def forward(form: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return form(*given)

        return run

    def both(form: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form(*leaves, given[4]), leaves, dy)

    every = forms(given)
    return {who: forward(form) for who, form in every.items()}, {who: both(form) for who, form in every.items()}


def route_contenders(N: int, E: int, device: str) -> Contenders:
    logits, bias = torch.randn(N, E, device=device), torch.randn(E, device=device) * 0.1
    compiled = torch.compile(eager_route)
    return {
        "thinkernel triton": lambda: tk.route(logits, 8, score="sigmoid", bias=bias, n_group=8, topk_group=4, scaling=2.5),
        "torch": lambda: eager_route(logits, bias),
        "torch.compile": lambda: compiled(logits, bias),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder for bench.jsonl")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", choices=tuple(TINY))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, every contender once")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("gpu_moe: torch sees no CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    device = "cpu" if arguments.dry_run else "cuda"
    about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    if not arguments.dry_run:
        about |= {"gpu": torch.cuda.get_device_name(), "dtype": "bfloat16"}
        arguments.out.mkdir(parents=True, exist_ok=True)

    def record(what: str, shape: tuple[int, ...], contenders: Contenders, work: float, unit: str) -> None:
        if arguments.dry_run:
            for name, run in contenders.items():
                if "compile" not in name and "liger" not in name:
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
        return [] if arguments.only not in (None, name) else TINY[name] if arguments.dry_run else full

    with tk.use_backend("triton"):
        for shape in sizes("experts", EXPERTS):
            T, H, inner, _, K = shape
            forward, both = expert_contenders(shape, device)
            record("moe forward", shape, forward, 6.0 * T * K * H * inner, "TFLOP/s")
            record("moe forward + backward", shape, both, 18.0 * T * K * H * inner, "TFLOP/s")
            del forward, both
            torch.cuda.empty_cache()
        for shape in sizes("decode", DECODE):
            T, H, inner, E, K = shape
            touched = E * (1 - (1 - K / E) ** T)  # on average
            record("moe decode", shape, expert_contenders(shape, device)[0], 1e3 * 3 * touched * H * inner * 2, "GB/s")
        for shape in sizes("route", ROUTE):
            N, E = shape
            record("route, 4 of 8 groups, K 8", shape, route_contenders(N, E, device), 1e3 * N * E * 4, "GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
