"""`thinkernel demo`: reinforcement learning with verifiable rewards, end to end on the reference model."""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from pathlib import Path

DEFAULT_RUNS = Path("runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains a small base model with GRPO on arithmetic problems whose answers a program verifies, and reports "
        "held-out accuracy before and after. The same command resumes an interrupted run."
    )
    parser.add_argument(
        "--preset",
        choices=("deepseek_v32", "qwen3"),
        default="deepseek_v32",
        help="miniature DeepSeek-V3.2 (latent + sparse attention, experts) or Qwen3 (GQA)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the problems drawn and of every sample (default 0)")
    parser.add_argument("--steps", type=_positive, default=50, help="GRPO steps (default 50)")
    parser.add_argument("--prompts", type=_positive, help="prompts a step")
    parser.add_argument("--group", type=_group, help="samples of each prompt, at least 2")
    parser.add_argument("--learning-rate", type=_rate, help="of AdamW")
    parser.add_argument("--eval-problems", type=_positive, default=200, help="held-out problems (default 200)")
    parser.add_argument(
        "--eval-samples",
        type=int,
        choices=(1, 4, 16),
        default=16,
        help="samples of each: majority votes go up to this (default 16)",
    )
    parser.add_argument("--out", type=Path, help="the run's folder (default runs/PRESET-seedSEED)")
    parser.add_argument("--fresh", action="store_true", help="discard what the run's folder holds instead of resuming")
    parser.add_argument("--from-scratch", action="store_true", help="pre-train the base model instead of taking the shipped one")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, takes at least 1")
    return value


def _group(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"got {text}, takes at least 2 (advantages compare the samples of a group)")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, takes a number between 0 and 1")
    return value


def run(args: argparse.Namespace) -> int:
    import torch

    from thinkernel.rl.demo import DemoSettings, run_demo
    from thinkernel.rl.trainer import LEARNING_RATES, TrainConfig

    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = {"prompts": args.prompts, "group": args.group, "learning_rate": args.learning_rate or LEARNING_RATES[args.preset]}
    config = TrainConfig(preset=args.preset, seed=args.seed, steps=args.steps, **{name: v for name, v in chosen.items() if v is not None})
    folder = args.out or DEFAULT_RUNS / f"{args.preset}-seed{args.seed}"
    if args.fresh and folder.exists():
        if not (folder / "run.json").exists() and any(folder.iterdir()):
            print(f"thinkernel demo: --fresh: {folder} holds files but no run; delete it yourself", file=sys.stderr)
            return 2
        shutil.rmtree(folder)
    settings = DemoSettings(config, folder, args.eval_problems, args.eval_samples, args.from_scratch)
    # Which ops run on the reference is printed by the demo and written into its report; once is enough.
    warnings.filterwarnings("ignore", message="thinkernel: .* runs on the reference backend", category=RuntimeWarning)
    try:
        run_demo(settings)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on from the last checkpoint in {folder}", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"thinkernel demo: {error}", file=sys.stderr)
        return 2
    return 0
