"""What linear_logprob saves in the demo's training step: head alone and whole update, against the head in plain PyTorch.

    python bench/head_step.py --preset qwen3 --json bench/results/head_step_qwen3.json

The update is bench/train_step.py's: worked solutions of prompts × group sequences, forward, backward, AdamW, everything but
the head on the usual backend. Heads, timed inside the update (forward, and backward from the gradient of the log-probs to
that of the hidden states and the weight):
    linear_logprob  the model's own
    pytorch         logits of every position, log_softmax, gather, entropy; autograd
    reference       our reference: the same in plain PyTorch, only for the rows that have a target
Interleaved, medians. --vocab V gives the model a larger
vocabulary (random rows): the demo's own has 48 tokens, which is far from where such a kernel pays most.
Shapes: B sequences, S tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import time
import types
import warnings
from dataclasses import replace
from pathlib import Path

import thinkernel as tk
import torch
import torch.nn.functional as F
from thinkernel.models import Transformer
from thinkernel.nn import LinearLogProb
from thinkernel.rl.models import MODELS, base_path, load_base
from thinkernel.rl.report import machine
from thinkernel.rl.trainer import TrainConfig, Trainer
from torch import Tensor
from train_step import fixed_batch, gemm_canary

HEADS = ("linear_logprob", "pytorch", "reference")


def pytorch_head(
    self: LinearLogProb, hidden: Tensor, target: Tensor, *, temperature: float = 1.0, entropy: bool = True, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The textbook form: hidden [B, S, D], target [B, S] -> logprob, entropy [B, S], 0 where there is no target."""
    log_p = F.linear(hidden, self.weight).float().div(temperature).log_softmax(-1)  # [B, S, V]
    on = target != ignore_index
    lp = log_p.gather(-1, target.masked_fill(~on, 0).unsqueeze(-1)).squeeze(-1)
    return lp * on, -(log_p.exp() * log_p).sum(-1) * on


def reference_head(self: LinearLogProb, hidden: Tensor, target: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    with tk.use_backend("reference"):
        return LinearLogProb.forward(self, hidden, target, **options)


def build(args: argparse.Namespace) -> Transformer:
    if args.vocab is None:
        return load_base(base_path(args.preset))
    torch.manual_seed(0)
    return Transformer(replace(MODELS[args.preset], vocab_size=args.vocab))


class HeadClock:
    """Times a head inside somebody else's forward and backward."""

    def __init__(self, head: LinearLogProb) -> None:
        self.inner, head.forward = head.forward, self.forward

    def forward(self, hidden: Tensor, target: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        lp, ent = self.inner(hidden, target, **options)
        self.forward_seconds = time.perf_counter() - start
        lp.register_hook(lambda grad: setattr(self, "begun", time.perf_counter()))
        hidden.register_hook(lambda grad: setattr(self, "ended", time.perf_counter()))
        return lp, ent

    def seconds(self) -> float:
        """Of the last update, forward and backward."""
        return self.forward_seconds + self.ended - self.begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(MODELS), default="qwen3")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="thinkernel: .* runs on the reference backend")

    config = TrainConfig(preset=args.preset)
    batch = fixed_batch(config.prompts * config.group)
    advantages = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(0))
    trainers, clocks = {}, {}
    for name in args.heads:
        model = build(args)
        if name != "linear_logprob":
            model.head.forward = types.MethodType(pytorch_head if name == "pytorch" else reference_head, model.head)
        trainers[name] = Trainer(model, config)
        clocks[name] = HeadClock(model.head)
    weights = {k: v.clone() for k, v in model.state_dict().items()}

    times: dict[str, dict[str, list[float]]] = {name: {"head": [], "update": []} for name in args.heads}
    canary = []
    for repeat in range(args.repeats + 1):  # the first warms up
        canary.append(gemm_canary())
        turn = repeat % len(args.heads)  # who follows the canary is slower
        for name in args.heads[turn:] + args.heads[:turn]:
            trainer = trainers[name]
            start = time.perf_counter()
            trainer.update(batch, advantages)
            end = time.perf_counter()
            if repeat:
                times[name]["head"].append(clocks[name].seconds())
                times[name]["update"].append(end - start)
            trainer.model.load_state_dict(weights)
    medians = {name: {row: statistics.median(values) for row, values in rows.items()} for name, rows in times.items()}
    tokens, (vocabulary, hidden) = int((batch.targets != -100).sum()), model.head.weight.shape
    print(
        f"{args.preset}: {tuple(batch.tokens.shape)} tokens, {tokens} with a target, D = {hidden}, V = {vocabulary}, "
        f"{args.threads} threads, medians of {args.repeats}, GEMM canary {min(canary):.0f}–{max(canary):.0f} GFLOP/s"
    )
    for name, row in medians.items():
        ratios = "  ".join(f"{key} ×{row[key] / medians[args.heads[0]][key]:.2f}" for key in row)
        print(f"{name:>15}: head {1e3 * row['head']:8.2f} ms  update {1e3 * row['update']:8.1f} ms   {ratios}")
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        result = {
            "machine": machine(), "date": datetime.date.today().isoformat(), "commit": commit, "preset": args.preset,
            "tokens": list(batch.tokens.shape), "tokens_with_target": tokens, "hidden": hidden, "vocab": vocabulary,
            "gemm_canary_gflops": [round(min(canary)), round(max(canary))], "repeats": args.repeats, "median_seconds": medians,
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
