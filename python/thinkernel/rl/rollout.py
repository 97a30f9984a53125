"""Rollouts: sampled completions of prompts, and the tensors a training forward needs to score them again.

Shapes: R sequences (prompts × samples, the samples of one prompt side by side), S tokens, padded on the right.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from thinkernel.models import Transformer, generate
from thinkernel.rl import tokenizer

IGNORED = -100


def derive_seed(*parts: int | str) -> int:
    """A 48-bit seed from whatever names a draw, so that no draw depends on those before it."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class Rollout:
    """Per sequence: prompt and completion tokens, the log-probability each sampled token was drawn with, the
    completion as text, and whether the model ended it itself. experts, where recorded: the experts that its tokens but
    the last went to, [S, expert layers, K] of `nn.expert_dtype`. tokens counts sampled tokens."""

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: list[list[float]]
    texts: list[str]
    finished: list[bool]
    seconds: float
    experts: list[Tensor] | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))


class Batch(NamedTuple):
    """What a training forward reads: at position t the model sees tokens[:, t] and predicts targets[:, t].

    tokens, targets [R, S] int64 (targets are IGNORED outside completions), lengths [R], mask [R, S] and
    old_logprob [R, S] float32 (0 outside completions). experts [R, S, expert layers, K]: recorded choices to replay."""

    tokens: Tensor
    targets: Tensor
    lengths: Tensor
    mask: Tensor
    old_logprob: Tensor
    experts: Tensor | None = None


@dataclass(frozen=True)
class Sampler:
    """Samples completions in batches of at most `rows` sequences. record_experts: keeps the expert choices, for replay.
    show_progress: a bar over the decoding steps."""

    model: Transformer
    max_new_tokens: int
    temperature: float = 1.0
    rows: int = 1024
    record_experts: bool = False
    show_progress: bool = False

    def sample(self, prompts: Sequence[str], *, samples: int = 1, seed: int, label: str = "rollout") -> Rollout:
        """`samples` completions of every prompt. A sequence's tokens depend on its prompt, the seed and its place."""
        encoded = [[tokenizer.BOS, *tokenizer.encode(prompt)] for prompt in prompts]
        per_batch = max(1, self.rows // samples)
        batches = [encoded[i : i + per_batch] for i in range(0, len(encoded), per_batch)]
        completions: list[list[int]] = []
        logprobs: list[list[float]] = []
        finished: list[bool] = []
        experts: list[Tensor] = []
        start = time.perf_counter()
        with tqdm(
            total=len(batches) * self.max_new_tokens,
            desc=label,
            unit="token",
            disable=not self.show_progress,
            leave=False,
        ) as bar:
            for number, batch in enumerate(batches):

                def advance(done: int, _total: int, before: int = number * self.max_new_tokens) -> None:
                    bar.update(before + done - bar.n)

                out = generate(
                    self.model,
                    batch,
                    max_new_tokens=self.max_new_tokens,
                    samples=samples,
                    temperature=self.temperature,
                    seeds=seed + number * per_batch * samples,
                    stop_tokens=tokenizer.EOS,
                    pad_token=tokenizer.PAD,
                    return_experts=self.record_experts,
                    progress=advance,
                )
                for row, length in enumerate(out.lengths.tolist()):
                    completions.append(out.tokens[row, :length].tolist())
                    logprobs.append(out.logprob[row, :length].tolist())
                finished += out.stopped.tolist()
                if out.experts is not None:
                    sizes = [len(batch[row // samples]) + length - 1 for row, length in enumerate(out.lengths.tolist())]
                    experts += [out.experts[row, :size].clone() for row, size in enumerate(sizes)]
        return Rollout(
            prompts=[prompt for prompt in encoded for _ in range(samples)],
            completions=completions,
            logprobs=logprobs,
            texts=[tokenizer.decode(completion) for completion in completions],
            finished=finished,
            seconds=time.perf_counter() - start,
            experts=experts or None,
        )


def make_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]] | None = None,
    experts: Sequence[Tensor] | None = None,
) -> Batch:
    """Sequences as right-padded tensors."""
    lengths = torch.tensor([len(p) + len(c) - 1 for p, c in zip(prompts, completions)], dtype=torch.int64)  # [R]
    shape = (len(lengths), int(lengths.max()) if len(lengths) else 0)
    tokens = torch.full(shape, tokenizer.PAD, dtype=torch.int64)  # [R, S]
    targets = torch.full(shape, IGNORED, dtype=torch.int64)
    old_logprob = torch.zeros(shape)
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        sequence = [*prompt, *completion]
        first, last = len(prompt) - 1, len(sequence) - 1
        tokens[row, :last] = torch.tensor(sequence[:-1])
        targets[row, first:last] = torch.tensor(list(completion))
        if logprobs is not None:
            old_logprob[row, first:last] = torch.tensor(logprobs[row])
    replayed = torch.nn.utils.rnn.pad_sequence(list(experts), batch_first=True) if experts else None
    return Batch(tokens, targets, lengths, (targets != IGNORED).float(), old_logprob, replayed)
