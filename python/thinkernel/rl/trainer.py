"""GRPO with verifiable rewards on the reference model.

One step: draw prompts, sample a group of completions of each, verify them, turn rewards into group-relative
advantages, take one AdamW step on the policy loss. Sparse-attention models also learn their indexer (its inputs are
detached, so its loss reaches nothing else) and move their routing biases towards even load, as DeepSeek-V3.2 does.

Shapes: P prompts, G samples of each, R = P·G sequences, of which A have a non-zero advantage; S tokens.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import thinkernel as tk
from thinkernel.models import ModelOutput, Transformer
from thinkernel.nn import GRPOLoss, MixtureOfExperts
from thinkernel.rl import checkpoint
from thinkernel.rl.rewards import REWARD_WEIGHTS, is_worked, reward
from thinkernel.rl.rollout import Batch, Rollout, Sampler, derive_seed, make_batch
from thinkernel.rl.tasks.arithmetic import is_held_out, make_problem

# With experts and sparse attention 2e-4 still works, but costs ten points; 1e-3 breaks either model.
LEARNING_RATES = {"deepseek_v32": 1e-4, "qwen3": 2e-4}
BIAS_RATE = 1e-3  # DeepSeek-V3's speed of the routing bias
INDEXER_COEF = 1.0  # its gradient reaches the indexer only, so this is a ratio of learning rates


@dataclass(frozen=True)
class TrainConfig:
    """What a run depends on besides the base model."""

    preset: str = "deepseek_v32"
    seed: int = 0
    steps: int = 50
    prompts: int = 16
    group: int = 8
    learning_rate: float = 1e-4
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    max_new_tokens: int = 42
    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    replay: bool = False  # the update sends every token to the experts that it went to when it was sampled
    checkpoint_every: int = 5

    def as_dict(self) -> dict:
        return asdict(self)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant."""
    return config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, foreach=True)


def make_loss(config: TrainConfig) -> GRPOLoss:
    return GRPOLoss(
        loss_type=config.loss_type,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        max_completion_length=config.max_new_tokens,
    )


def apply_update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[ModelOutput], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    batch: Batch,
    *,
    temperature: float,
    max_grad_norm: float,
    sparse: bool = True,
) -> dict[str, float]:
    """Forward, backward, clip, step; then the routing biases. Shared with pre-training. Returns metrics."""
    output = model(
        batch.tokens,
        targets=batch.targets,
        temperature=temperature,
        lengths=batch.lengths,
        sparse=sparse,
        experts=batch.experts,
        return_losses=True,
    )
    loss, metrics = loss_of(output)
    total = loss if output.indexer_loss is None else loss + INDEXER_COEF * output.indexer_loss
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if not math.isfinite(float(grad_norm)):
        raise FloatingPointError(f"gradient norm is {float(grad_norm)}")
    optimizer.step()
    values = {"loss": float(loss.detach()), "grad_norm": float(grad_norm)}
    values |= {name: float(value) for name, value in metrics.items()}
    if output.indexer_loss is not None:
        values["indexer_loss"] = float(output.indexer_loss.detach())
    if output.expert_counts is not None:
        values["expert_load_max"] = update_routing_bias(model, output.expert_counts)
    return values


def update_routing_bias(model: Transformer, counts: torch.Tensor) -> float:
    """One loss-free balancing step of every expert layer; returns the worst layer's largest load over the mean."""
    experts = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    for module, layer_counts in zip(experts, counts, strict=True):
        if module.expert_bias is not None:
            module.update_bias(layer_counts, rate=BIAS_RATE)
    load = counts.float()
    return float((load.amax(-1) / load.mean(-1)).max())


class Trainer:
    """A run: model, optimizer, step and history; every random draw is seeded by (seed, step)."""

    def __init__(self, model: Transformer, config: TrainConfig, *, folder: Path | None = None) -> None:
        self.model, self.config, self.folder = model, config, folder
        self.optimizer = make_optimizer(model, config)
        self.loss = make_loss(config)
        self.sampler = Sampler(model, config.max_new_tokens, config.temperature, record_experts=config.replay)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.notes: dict = {}  # whatever the caller wants to find again after a resume

    def rollout(self) -> tuple[Rollout, torch.Tensor]:
        """This step's sequences and their rewards [R, 2]."""
        config = self.config
        rng = random.Random(derive_seed(config.seed, "problems", self.step))
        problems = [make_problem(rng, held_out=False) for _ in range(config.prompts)]
        assert not any(map(is_held_out, problems)), "a held-out problem among the training prompts"
        rollout = self.sampler.sample(
            [problem.prompt for problem in problems],
            samples=config.group,
            seed=derive_seed(config.seed, "samples", self.step),
        )
        repeated = [problem for problem in problems for _ in range(config.group)]
        judged = zip(repeated, rollout.texts, rollout.finished)
        return rollout, torch.tensor([reward(problem, text, finished=done) for problem, text, done in judged])

    def train_step(self) -> dict[str, float]:
        """One GRPO step; returns its metrics, which are also appended to the history."""
        config, start = self.config, time.perf_counter()
        rollout, rewards = self.rollout()
        sampled = time.perf_counter()
        advantages = tk.group_advantages(rewards, config.group, weights=torch.tensor(REWARD_WEIGHTS))  # [R]
        assert isinstance(advantages, torch.Tensor)  # a pair only where return_zero_variance is asked for
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        # Groups whose samples all earn the same teach nothing: they are left out of the forward.
        active = advantages.nonzero().flatten()  # [A]
        metrics: dict[str, float] = {}
        if len(active):
            kept = active.tolist()
            prompts, completions, logprobs = (
                [rows[i] for i in kept] for rows in (rollout.prompts, rollout.completions, rollout.logprobs)
            )
            experts = None if rollout.experts is None else [rollout.experts[i] for i in kept]
            batch = make_batch(prompts, completions, logprobs, experts)
            metrics = self.update(batch, advantages[active])
        end = time.perf_counter()
        record = {
            "step": self.step,
            "accuracy": float(rewards[:, 0].mean()),
            "format": float(rewards[:, 1].mean()),
            "worked": sum(map(is_worked, rollout.texts)) / len(rollout.texts),
            "completion_tokens": rollout.tokens / len(rollout.texts),
            "active_share": len(active) / len(advantages),
            **metrics,
            "tokens": rollout.tokens,
            "rollout_seconds": sampled - start,
            "update_seconds": end - sampled,
            "seconds": end - start,
        }
        self.history.append(record)
        self.step += 1
        return record

    def update(self, batch: Batch, advantages: torch.Tensor) -> dict[str, float]:
        """One AdamW step on these sequences; advantages [A]."""

        def loss_of(output: ModelOutput) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            assert output.logprob is not None  # targets were given
            loss, metrics = self.loss(output.logprob, batch.old_logprob, advantages, batch.mask, entropy=output.entropy)
            # Sampled with one set of kernels, scored with another: how far apart are the two?
            gap = ((output.logprob - batch.old_logprob).abs() * batch.mask).max()
            return loss, {**metrics, "logprob_gap_max": gap.detach()}

        return apply_update(
            self.model,
            self.optimizer,
            loss_of,
            batch,
            temperature=self.config.temperature,
            max_grad_norm=self.config.max_grad_norm,
        )

    # ---- checkpoints

    @property
    def checkpoint_path(self) -> Path:
        if self.folder is None:
            raise ValueError("folder: got None, takes the run's folder where checkpoints are wanted")
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        checkpoint.save(
            self.checkpoint_path,
            {
                "config": self.config.as_dict(),
                "model_config": self.model.config.to_dict(),
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "history": self.history,
                "notes": self.notes,
            },
        )

    def resume(self) -> None:
        """Takes up the checkpoint in the folder. ValueError where it belongs to a run with other settings."""
        state = checkpoint.load(self.checkpoint_path)
        for name, here, there in (
            ("settings", self.config.as_dict(), TrainConfig().as_dict() | state["config"]),  # as before there were as many
            ("model", self.model.config.to_dict(), state["model_config"]),
        ):
            other = sorted(key for key in {*here, *there} if here.get(key) != there.get(key))
            if other:
                raise ValueError(
                    f"{self.checkpoint_path}: belongs to a run with other {name} "
                    f"({', '.join(f'{key}: {there.get(key)} there, {here.get(key)} here' for key in other)})"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history, self.notes = state["step"], state["history"], state["notes"]

    def run(self, on_step: Callable[[dict[str, float]], None] = lambda record: None) -> None:
        """Steps until the last one, a checkpoint every few."""
        while self.step < self.config.steps:
            record = self.train_step()
            due = self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps
            if self.folder is not None and due:
                self.save()
            on_step(record)
