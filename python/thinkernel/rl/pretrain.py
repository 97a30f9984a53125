"""Makes the base model: next-token training on generated solutions, most of them worked, then mostly direct guesses.

The last stretch leaves the model in the state that reinforcement learning is known to unlock: it can solve a
problem step by step, but nearly always blurts out a number that is nearly always wrong.

    stage    steps         worked solutions   attention of a sparse model
    dense    first 30 %    85 %               dense, while the indexer learns to imitate it (the warm-up of V3.2)
    sparse   next 55 %     85 %               the indexer's top-k
    habit    last 15 %     12 %               the indexer's top-k
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from thinkernel.models import ModelOutput, Transformer, save
from thinkernel.rl import tokenizer
from thinkernel.rl.checkpoint import write_json
from thinkernel.rl.models import MODELS
from thinkernel.rl.rollout import Batch, derive_seed, make_batch
from thinkernel.rl.tasks.arithmetic import WORD_SHARE, guess, is_held_out, make_problem, worked
from thinkernel.rl.trainer import apply_update


@dataclass(frozen=True)
class PretrainConfig:
    steps: int = 800
    batch: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 40
    weight_decay: float = 0.1
    dense_share: float = 0.30
    habit_share: float = 0.15
    worked_before: float = 0.85
    worked_habit: float = 0.12
    right_guesses: float = 0.08
    seed: int = 0


def worked_share(config: PretrainConfig, step: int) -> float:
    return config.worked_habit if step >= config.steps * (1 - config.habit_share) else config.worked_before


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * (0.05 + 0.95 * cosine)


def corpus_batch(config: PretrainConfig, step: int) -> Batch:
    """The documents of one step: prompts on the training side, each with a worked solution or a guess. A batch holds
    either expressions or word problems: together, their different lengths would make a third of it padding."""
    rng = random.Random(derive_seed("corpus", config.seed, step))
    words = float(rng.random() < WORD_SHARE)
    prompts, completions = [], []
    for _ in range(config.batch):
        problem = make_problem(rng, held_out=False, word_share=words)
        assert not is_held_out(problem), "a held-out problem in the corpus"
        if rng.random() < worked_share(config, step):
            text = worked(problem)
        else:
            text = guess(problem, rng, right_share=config.right_guesses)
        prompts.append([tokenizer.BOS, *tokenizer.encode(problem.prompt)])
        completions.append([*tokenizer.encode(text), tokenizer.EOS])
    return make_batch(prompts, completions)


def pretrain(preset: str, config: PretrainConfig, *, show_progress: bool = True) -> Transformer:
    """A base model of this preset, from nothing. Deterministic given the config."""
    torch.manual_seed(config.seed)
    model = Transformer(MODELS[preset])
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        foreach=True,
    )
    bar = tqdm(range(config.steps), desc="pre-training", unit="step", disable=not show_progress)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        batch = corpus_batch(config, step)

        def loss_of(output: ModelOutput, mask: Tensor = batch.mask) -> tuple[Tensor, dict[str, Tensor]]:
            assert output.logprob is not None  # targets were given
            return -(output.logprob * mask).sum() / mask.sum(), {}

        metrics = apply_update(
            model,
            optimizer,
            loss_of,
            batch,
            temperature=1.0,
            max_grad_norm=1.0,
            sparse=step >= config.steps * config.dense_share,
        )
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
    return model


def save_base(model: Transformer, path: Path, facts: dict) -> None:
    """Weights in float16 (half the size; a load widens them again) and a note of how they were made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halved = Transformer(model.config).half()
    halved.load_state_dict(model.state_dict())
    save(halved, path, metadata={"facts": json.dumps(facts)})
    write_json(path.with_suffix(".json"), facts)
