"""From dense to sparse attention, as DeepSeek-V3.2 was trained: dense training, the indexer's warm-up, sparse training.

    stage     attention   what learns     from
    dense     dense       the main model  the language loss
    warm-up   dense       the indexer     KL(p ‖ softmax(I)) over all visible keys; everything else is frozen
    sparse    top-k       everything      the main model from the language loss, the indexer from the KL over its chosen keys
    control   dense       the main model  the language loss, for as many steps on the same batches as the sparse stage

`python -m thinkernel.rl.sparse_recipe` runs it on recall over a distance (tasks/recall.py) with the DeepSeek-V3.2 miniature, prints
what docs/sparse_recipe.md explains, and writes it with --json. B sequences, S tokens, T keys, H heads, K top-k.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from thinkernel.models import ModelConfig, Transformer, preset
from thinkernel.models.transformer import Block
from thinkernel.nn import SparseLatentAttention
from thinkernel.nn.sparse import Indexer
from thinkernel.ops.dispatch import C
from thinkernel.ops.sparse import indexer_topk
from thinkernel.rl.checkpoint import write_json
from thinkernel.rl.rollout import derive_seed
from thinkernel.rl.tasks import recall
from thinkernel.rl.tasks.recall import RecallBatch
from thinkernel.rl.trainer import update_routing_bias


@dataclass(frozen=True)
class RecipeConfig:
    """Steps of `batch · length` tokens each; the dense stage begins with `short_steps` of as many, in short sequences."""

    length: int = 512
    top_k: int = 32
    facts: int = 12  # of a sequence
    layers: int = 3
    batch: int = 4
    short_length: int = 64
    short_steps: int = 300
    dense_steps: int = 120
    warm_up_steps: int = 80
    sparse_steps: int = 120
    learning_rate: float = 2e-3  # of the dense stage, after `ramp` steps; it ends at a tenth, with which the next stages go on
    indexer_learning_rate: float = 2e-3
    ramp: int = 50
    weight_decay: float = 0.05
    held_out: int = 16  # sequences that losses are measured on
    seed: int = 0

    @property
    def final_rate(self) -> float:
        return self.learning_rate / 10


def model_config(config: RecipeConfig) -> ModelConfig:
    return preset(
        "deepseek_v32_mini", vocab_size=recall.VOCAB_SIZE, layers=config.layers, top_k=config.top_k, max_positions=config.length
    )


def sparse_layers(model: Transformer) -> Iterator[tuple[SparseLatentAttention, Indexer]]:
    """The layers with an indexer of their own."""
    for block in model.blocks:
        attention = cast(Block, block).attention
        if isinstance(attention, SparseLatentAttention) and attention.indexer is not None:
            yield attention, attention.indexer


def split_parameters(model: Transformer) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The main model's, and the indexers'."""
    indexer = [p for _, of_layer in sparse_layers(model) for p in of_layer.parameters()]
    known = set(map(id, indexer))
    return [p for p in model.parameters() if id(p) not in known], indexer


def language_loss(model: Transformer, batch: RecallBatch, *, sparse: bool, losses: bool) -> tuple[Tensor, Any]:
    """Mean over the scored positions, and the model's output."""
    output = model(batch.tokens, targets=batch.targets, entropy=False, sparse=sparse, return_losses=losses)
    assert output.logprob is not None  # targets were given
    return -output.logprob.sum() / (batch.targets >= 0).sum(), output


# ---- what is measured


@dataclass(frozen=True)
class Selection:
    """How well a layer's indexer finds what its attention looks at, means over the queries that have more than K keys.

    recall: the share of the K keys of most attention (summed over heads, over all keys) that the indexer chooses;
    mass: the share of that attention on the chosen keys; best: the largest mass that K keys can have."""

    recall: float
    mass: float
    best: float


@torch.no_grad()
def attention_probabilities(attention: SparseLatentAttention, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """p [B, S, T]: dense attention's probabilities, a mean over the heads. The plain formula, with all of it in memory."""
    q_nope, q_rope, _ = attention._queries(x, rope)
    kv = torch.cat(attention._latents(x, rope), dim=-1)  # [B, T, C + R]
    scores = torch.einsum("bshd,btd->bsht", attention._absorb(q_nope, q_rope), kv) * attention.scale
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)  # [S, T]
    return scores.masked_fill(future[:, None], -math.inf).softmax(-1).mean(2)


@torch.no_grad()
def selection_of(attention: SparseLatentAttention, x: Tensor, rope: tuple[Tensor, Tensor]) -> Selection:
    """x [B, S, hidden]: what the attention module reads (behind its norm)."""
    p, K = attention_probabilities(attention, x, rope), attention.top_k
    q, k, w = cast(Indexer, attention.indexer)(x, cast(Tensor, attention._queries(x, rope)[2]), rope)
    chosen = indexer_topk(q, k, w, top_k=K)[:, K:].long()  # [B, S - K, K], no slot of them empty
    p = p[:, K:]
    largest, true = p.topk(K, dim=-1)
    is_true = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, true, True)
    mean = lambda values: float(values.double().sum(-1).mean() if values.is_floating_point() else values.double().mean())  # noqa: E731
    return Selection(mean(is_true.gather(-1, chosen)), mean(p.gather(-1, chosen)), mean(largest))


@torch.no_grad()
def selections(model: Transformer, tokens: Tensor, *, sparse: bool) -> list[Selection]:
    """Of every sparse layer, on the hidden states of a model that runs with or without sparse attention."""
    found: list[Selection] = []

    def measure(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(selection_of(cast(SparseLatentAttention, module), args[0], args[1]))

    hooks = [attention.register_forward_pre_hook(measure, with_kwargs=True) for attention, _ in sparse_layers(model)]
    try:
        model.hidden_states(tokens, sparse=sparse)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def held_out_loss(model: Transformer, config: RecipeConfig, *, sparse: bool) -> tuple[float, float]:
    """Loss and accuracy of the scored positions of sequences that no stage trains on."""
    total, right, count = 0.0, 0, 0
    for batch in held_out(config):
        scored = batch.targets >= 0
        logits = model(batch.tokens, sparse=sparse).logits[scored]
        total += float(nn.functional.cross_entropy(logits, batch.targets[scored], reduction="sum"))
        right += int((logits.argmax(-1) == batch.targets[scored]).sum())
        count += int(scored.sum())
    return total / count, right / count


def held_out(config: RecipeConfig) -> Iterator[RecallBatch]:
    for i in range(0, config.held_out, config.batch):
        yield recall.make_batch(config.batch, config.length, config.facts, derive_seed("recall held out", config.seed, i))


def report(model: Transformer, config: RecipeConfig, stage: str, *, sparse: bool) -> dict[str, Any]:
    """One line of the record: held-out loss with and without sparse attention, and the layers' selections."""
    batch = next(held_out(config))
    dense, sparse_loss = (held_out_loss(model, config, sparse=s) for s in (False, True))
    layers = selections(model, batch.tokens, sparse=sparse)
    mean = {name: sum(getattr(s, name) for s in layers) / len(layers) for name in ("recall", "mass", "best")}
    row = {
        "stage": stage,
        "dense_loss": dense[0],
        "dense_accuracy": dense[1],
        "sparse_loss": sparse_loss[0],
        "sparse_accuracy": sparse_loss[1],
        **mean,
        "layers": [dataclasses.asdict(s) for s in layers],
    }
    print(
        f"{stage}\n  held-out loss (accuracy): dense {dense[0]:.4f} ({dense[1]:.1%}), sparse {sparse_loss[0]:.4f} ({sparse_loss[1]:.1%})\n"
        f"  true top keys found {mean['recall']:.1%}, attention on the chosen {mean['mass']:.1%} of at most {mean['best']:.1%}",
        flush=True,
    )
    return row


# ---- the stages


def make_optimizer(parameters: list[nn.Parameter], rate: float, weight_decay: float) -> torch.optim.Optimizer:
    decayed, others = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), foreach=True)


def take_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Clips and steps. Main model and indexer have optimizers of their own: a norm over both would tie one to the other."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def dense_batch(config: RecipeConfig, step: int) -> RecallBatch:
    seed = derive_seed("recall dense", config.seed, step)
    if step >= config.short_steps:
        return recall.make_batch(config.batch, config.length, config.facts, seed)
    sequences = max(1, config.batch * config.length // config.short_length)
    return recall.make_batch(sequences, config.short_length, min(config.facts, config.short_length // 2), seed)


def train_dense(model: Transformer, config: RecipeConfig) -> None:
    """The indexer is left as it was made."""
    main, _ = split_parameters(model)
    optimizer = make_optimizer(main, config.learning_rate, config.weight_decay)
    steps = config.short_steps + config.dense_steps
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        rate = min(1.0, (step + 1) / config.ramp) * (config.final_rate + (config.learning_rate - config.final_rate) * cosine)
        loss, output = language_loss(model, dense_batch(config, step), sparse=False, losses=False)
        loss.backward()
        take_step(optimizer, rate)
        if step % 50 == 49:
            print(f"  dense step {step + 1}: loss {float(loss.detach()):.4f}", flush=True)


def later_batch(config: RecipeConfig, stage: str, step: int) -> RecallBatch:
    return recall.make_batch(config.batch, config.length, config.facts, derive_seed("recall", stage, config.seed, step))


def train_indexer(model: Transformer, config: RecipeConfig) -> None:
    """The warm-up: dense attention, and only the indexer learns."""
    main, indexer = split_parameters(model)
    optimizer = make_optimizer(indexer, config.indexer_learning_rate, 0.0)
    for p in main:
        p.requires_grad_(False)
    try:
        for step in range(config.warm_up_steps):
            tokens = later_batch(config, "warm-up", step).tokens
            loss = model(tokens, targets=tokens, entropy=False, sparse=False, return_losses=True).indexer_loss
            loss.backward()
            take_step(optimizer, min(1.0, (step + 1) / 10) * config.indexer_learning_rate)
            if step % 50 == 49:
                print(f"  warm-up step {step + 1}: indexer loss {float(loss.detach()):.4f}", flush=True)
    finally:
        for p in main:
            p.requires_grad_(True)


def train_on(model: Transformer, config: RecipeConfig, *, sparse: bool) -> None:
    """The sparse stage, or with sparse=False its dense control: the same batches, the indexer left alone."""
    main, indexer = split_parameters(model)
    optimizer = make_optimizer(main, config.final_rate, config.weight_decay)
    of_indexer = make_optimizer(indexer, config.indexer_learning_rate / 4, 0.0) if sparse else None
    for step in range(config.sparse_steps):
        loss, output = language_loss(model, later_batch(config, "sparse", step), sparse=sparse, losses=True)
        (loss + output.indexer_loss if sparse else loss).backward()
        take_step(optimizer, config.final_rate)
        if of_indexer is not None:
            take_step(of_indexer, config.indexer_learning_rate / 4)
        if output.expert_counts is not None:
            update_routing_bias(model, output.expert_counts)
        if step % 50 == 49:
            print(f"  {'sparse' if sparse else 'control'} step {step + 1}: loss {float(loss.detach()):.4f}", flush=True)


def run_recipe(config: RecipeConfig) -> dict[str, Any]:
    """All stages; returns their record. Deterministic given the config."""
    torch.manual_seed(config.seed)
    start = time.perf_counter()
    model = Transformer(model_config(config))
    rows = [report(model, config, "at the start", sparse=False)]
    train_dense(model, config)
    rows.append(report(model, config, "after dense training", sparse=False))
    train_indexer(model, config)
    rows.append(report(model, config, "after the indexer's warm-up", sparse=False))
    control = copy.deepcopy(model)
    train_on(model, config, sparse=True)
    rows.append(report(model, config, "after sparse training", sparse=True))
    train_on(control, config, sparse=False)
    rows.append(report(control, config, "control: dense throughout", sparse=False))
    return {"config": dataclasses.asdict(config), "seconds": round(time.perf_counter() - start), "stages": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m thinkernel.rl.sparse_recipe", description=__doc__.split("\n")[0])
    for field in dataclasses.fields(RecipeConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the record is written")
    values = vars(parser.parse_args(argv))
    path, threads = values.pop("json"), values.pop("threads")
    torch.set_num_threads(threads)
    machine = {"machine": platform.processor() or platform.machine(), "isa": None if C is None else C.isa(), "threads": threads}
    versions = {"torch": torch.__version__, "date": datetime.date.today().isoformat()}
    record = {**machine, **versions, **run_recipe(RecipeConfig(**values))}
    if path is not None:
        write_json(path, record)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
