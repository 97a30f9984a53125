"""Time of a decode step of the miniature DeepSeek model (MLA) on the C++ kernels beside the same model on the reference backend.

    python bench/mla_step.py [--preset deepseek_v3_mini] [--sequences 1 16] [--cached 384] [--json FILE]

A step is one new token for each of B sequences that hold `cached` tokens each, logits included, without gradients. Each round runs the
step once on each backend in turn, from the same cache, so that a slow minute of the machine hits all of them; medians of the rounds,
and the median of the rounds' own ratios. The attention's share alone (all layers' MultiHeadLatentAttention) stands beside the step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import thinkernel as tk
import torch
from thinkernel.models import Transformer, preset
from thinkernel.models.cache import Cache
from thinkernel.rl.report import machine


def steps(model: Transformer, sequences: int, cached: int) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """-> one step of the whole model, and of its attention modules alone; both leave the cache as it was."""
    capacity = cached + 1
    cache = model.new_cache(sequences, capacity)
    model(torch.randint(model.config.vocab_size, (sequences, cached)), cache=cache)
    tokens = torch.randint(model.config.vocab_size, (sequences, 1))
    h = torch.randn(sequences, 1, model.config.hidden).to(model.embedding.weight.dtype)

    def whole() -> torch.Tensor:
        here = Cache(cache.layers, cache.lengths, extent=cached)  # the same place each time
        return model(tokens, cache=here).logits

    def attention() -> torch.Tensor:
        rope, x = model.rope(torch.full((sequences, 1), cached)), h
        place = Cache(cache.layers, cache.lengths, extent=cached).begin(1)
        for block, layer in zip(model.blocks, cache.layers, strict=True):
            x = block.attention(block.attention_norm(x), rope, cache=layer, step=place)
        return x

    return whole, attention


def interleaved(run: Callable[[], torch.Tensor], backends: list[str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round on each backend."""
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for repeat in range(rounds + 3):  # the first three warm up
        for backend in backends:
            with tk.use_backend(backend):
                start = time.perf_counter()
                run()
                took = time.perf_counter() - start
            if repeat >= 3:
                times[backend].append(1e3 * took)
    return times


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="deepseek_v3_mini")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--cached", type=int, default=384)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="thinkernel: .* runs on the reference backend")
    rows = []
    for dtype in args.dtype:
        torch.manual_seed(0)
        model = Transformer(preset(args.preset)).eval().to(getattr(torch, dtype))
        for sequences in args.sequences:
            whole, attention = steps(model, sequences, args.cached)
            for what, run in (("step", whole), ("attention", attention)):
                times = interleaved(run, ["auto", "reference"], args.rounds)
                medians = {backend: statistics.median(values) for backend, values in times.items()}
                ratio = statistics.median(r / a for a, r in zip(times["auto"], times["reference"], strict=True))
                rows.append({"what": what, "dtype": dtype, "sequences": sequences, "cached": args.cached, "ms": medians, "ratio": ratio})
                print(
                    f"{what:>9} {dtype:>8}  {sequences:>3} sequences of {args.cached} tokens: "
                    f"cpu {medians['auto']:7.2f} ms, reference {medians['reference']:7.2f} ms, {ratio:.2f} times",
                    flush=True,
                )
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        about = {"machine": machine(), "date": datetime.date.today().isoformat(), "commit": commit, "preset": args.preset}
        args.json.write_text(json.dumps(about | {"threads": args.threads, "rounds": args.rounds, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
