"""Time of a GRPO training step of the demo's model, per backend, interleaved; medians.

    python bench/train_step.py --preset qwen3 --backends auto reference

A step is a rollout of prompts × group completions and one update (forward, backward, AdamW), as they are once the
policy writes its solutions out: the rollout's prompts end in the first number of the worked solution, which the base
model then goes on with, and the update's batch holds worked solutions. Every repetition runs the step once on each
backend in turn, from the same weights and with the same seeds, so that a slow minute of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import time
import warnings
from pathlib import Path

import thinkernel as tk
import torch
from thinkernel.models import Transformer
from thinkernel.rl.models import MODELS, base_path, load_base
from thinkernel.rl.report import machine
from thinkernel.rl.rollout import Batch, make_batch
from thinkernel.rl.tasks.arithmetic import make_problems, worked
from thinkernel.rl.tokenizer import BOS, EOS, encode
from thinkernel.rl.trainer import TrainConfig, Trainer


def fixed_batch(sequences: int) -> Batch:
    """Worked solutions as completions: what a trained policy samples."""
    problems = make_problems(sequences, seed=1, held_out=False)
    prompts = [[BOS, *encode(problem.prompt)] for problem in problems]
    completions = [[*encode(worked(problem)), EOS] for problem in problems]
    return make_batch(prompts, completions, [[-0.1] * len(completion) for completion in completions])


def gemm_canary() -> float:
    """GFLOP/s of a float32 1024³ matmul right now: says how busy the machine is."""
    a = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 1024**3 / (time.perf_counter() - start) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(MODELS), default="qwen3")
    parser.add_argument("--backends", nargs="+", default=["auto", "reference"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=TrainConfig.prompts)
    parser.add_argument("--group", type=int, default=TrainConfig.group)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="thinkernel: .* runs on the reference backend")

    config = TrainConfig(preset=args.preset, prompts=args.prompts, group=args.group)
    batch = fixed_batch(config.prompts * config.group)
    advantages = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(0))
    trainers: dict[str, Trainer] = {}
    weights: dict[str, torch.Tensor] = {}
    for backend in args.backends:
        torch.manual_seed(0)
        path = base_path(args.preset)
        model = load_base(path) if path.exists() else Transformer(MODELS[args.preset])
        trainers[backend] = Trainer(model, config)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    problems = make_problems(config.prompts, seed=2, held_out=False)
    openings = [problem.prompt + str(problem.start) for problem in problems]
    times: dict[str, dict[str, list[float]]] = {b: {"rollout": [], "update": [], "step": []} for b in args.backends}
    canary = []
    for repeat in range(args.repeats + 1):  # the first warms up
        canary.append(gemm_canary())
        for backend, trainer in trainers.items():
            with tk.use_backend(backend):
                start = time.perf_counter()
                tokens = trainer.sampler.sample(openings, samples=config.group, seed=repeat).tokens
                sampled = time.perf_counter()
                trainer.update(batch, advantages)
                end = time.perf_counter()
            trainer.model.load_state_dict(weights)
            if repeat:
                for name, value in (("rollout", sampled - start), ("update", end - sampled), ("step", end - start)):
                    times[backend][name].append(value)
    medians = {b: {name: statistics.median(values) for name, values in rows.items()} for b, rows in times.items()}
    parameters = sum(p.numel() for p in next(iter(trainers.values())).model.parameters())
    print(
        f"{args.preset}: {parameters:,} parameters, {config.prompts} × {config.group} sequences, update on "
        f"{tuple(batch.tokens.shape)} tokens, {tokens} sampled tokens, {args.threads} threads, medians of {args.repeats}, "
        f"GEMM canary {min(canary):.0f}–{max(canary):.0f} GFLOP/s"
    )
    for backend, row in medians.items():
        print(f"{backend:>10}: " + "  ".join(f"{name} {1e3 * value:7.0f} ms" for name, value in row.items()))
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        result = {
            "machine": machine(),
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "preset": args.preset,
            "gemm_canary_gflops": [round(min(canary)), round(max(canary))],
            "repeats": args.repeats,
            "median_seconds": medians,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
