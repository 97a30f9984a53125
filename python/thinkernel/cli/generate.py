"""`thinkernel generate`: samples from a finished (or checkpointed) run, or from a shipped base model."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Samples completions from a model that `thinkernel demo` trained. Prompts are expressions such as ((7+5)*3-4), "
        "or word problems such as: Ann has 12 pens. She finds 17. She sells 4. She loses 8. How many?"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", dest="folder", metavar="DIR", type=Path, help="a run's folder")
    source.add_argument("--base", choices=("deepseek_v32", "qwen3"), help="a shipped base model, before training")
    parser.add_argument("--prompt", action="append", required=True, help="what to solve; may be given several times")
    parser.add_argument("--samples", type=_positive, default=4, help="completions of each prompt (default 4)")
    parser.add_argument("--temperature", type=_temperature, default=1.0, help="0 takes the likeliest token (default 1)")
    parser.add_argument("--max-new-tokens", type=_positive, default=42, help="(default 42)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, takes at least 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"got {text}, takes 0 to 10")
    return value


def run(args: argparse.Namespace) -> int:
    from thinkernel.rl.models import load_run_or_base
    from thinkernel.rl.rewards import majority_vote, parse_answer
    from thinkernel.rl.rollout import Sampler, derive_seed

    warnings.filterwarnings("ignore", message="thinkernel: .* runs on the reference backend", category=RuntimeWarning)
    try:
        model = load_run_or_base(args.folder, args.base)
        sampler = Sampler(model, args.max_new_tokens, args.temperature, show_progress=sys.stderr.isatty())
        rollout = sampler.sample(
            [prompt.strip() + "\n" for prompt in args.prompt],
            samples=args.samples,
            seed=derive_seed("generate", args.seed),
            label="sampling",
        )
    except ValueError as error:
        print(f"thinkernel generate: {error}", file=sys.stderr)
        return 2
    for index, prompt in enumerate(args.prompt):
        print(prompt.strip())
        rows = range(index * args.samples, (index + 1) * args.samples)
        for row in rows:
            print("  " + rollout.texts[row] + ("" if rollout.finished[row] else " …"))
        if args.samples > 1:
            answers = [parse_answer(rollout.texts[row], finished=rollout.finished[row]) for row in rows]
            print(f"  majority of {args.samples}: {majority_vote(answers)}")
    return 0
