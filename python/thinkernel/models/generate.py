"""Batched sampling from a decoder, one random stream per sequence.

Shapes: B prompts, G samples of each, R = B·G sequences, P prompt slots, N max_new_tokens, V vocabulary.

Token t of sequence r is drawn by inverting the cumulative distribution at a uniform number u[r, t], a hash of
(seed[r], t): no generator state is shared, so a sequence's tokens depend on its own prompt and seed alone, whatever
runs beside it and however often the batch is compacted (as far as the model's own rows are independent: tk.linear).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thinkernel.models.transformer import Transformer, stack_experts
from thinkernel.nn import expert_dtype
from thinkernel.ops import checks

COMPACT_BELOW = 0.75  # finished sequences are dropped from the batch when fewer than this share is still running


class Generation(NamedTuple):
    """tokens [R, N] int64, `pad_token` after the end; lengths [R] int64 counts the stop token; logprob [R, N] float32:
    log-probability of each token under softmax(logits / temperature), before top-k and top-p, 0 after the end;
    stopped [R] bool: ended by a stop token. Sequence b·G + g is sample g of prompt b.
    experts [R, P + N − 1, expert layers, K], where asked for: the experts that every token read (the prompt's, then the
    completion's without its last) went to, in `nn.expert_dtype`; 0 behind a sequence's end."""

    tokens: Tensor
    lengths: Tensor
    logprob: Tensor
    stopped: Tensor
    experts: Tensor | None = None


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on int64, whose products wrap as unsigned ones do."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform_noise(seeds: Tensor, steps: int) -> Tensor:
    """seeds [R] int64 -> [R, steps] float64 in [0, 1): 32 hashed bits of (seed, step)."""
    golden = -0x61C8864680B583EB  # 2^64 / φ as int64
    streams = _mix(seeds.long() + golden)[:, None]  # [R, 1]; hashed first, so that neighbouring seeds share nothing
    counters = torch.arange(1, steps + 1, device=seeds.device) * golden  # [steps]
    return ((_mix(streams + counters) >> 32) & 0xFFFFFFFF).double() / 2.0**32


def filter_probabilities(probs: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Zero what is outside the top_k most probable tokens, then what is outside the smallest set of most probable
    tokens that reaches top_p; ties go to the lower token. probs [R, V], result not normalised."""
    narrow_k = top_k is not None and top_k < probs.shape[-1]
    narrow_p = top_p is not None and top_p < 1.0
    if not (narrow_k or narrow_p):
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)  # [R, V]
    if narrow_k:
        ordered[:, top_k:] = 0
    if top_p is not None and narrow_p:
        before = ordered.cumsum(-1) - ordered  # mass of what is more probable
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probs).scatter(-1, order, ordered)


def sample(
    logits: Tensor, noise: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """logits [R, V], noise [R] in [0, 1) -> tokens [R] int64, their tempered log-probability [R] float32.

    temperature 0 takes the most probable token and reports its log-probability at temperature 1."""
    logprob = torch.log_softmax(logits.float() if temperature == 0 else logits.float() / temperature, dim=-1)  # [R, V]
    if temperature == 0:
        tokens = logprob.argmax(-1)
    else:
        kept = filter_probabilities(logprob.double().exp(), top_k, top_p)
        cumulative = kept.cumsum(-1)  # [R, V]
        # The first token whose cumulative mass exceeds u: one of mass 0 never does so first.
        tokens = torch.searchsorted(cumulative, (noise * cumulative[:, -1])[:, None], right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprob.gather(-1, tokens[:, None]).squeeze(-1)


def pad_prompts(
    prompts: Tensor | Sequence[Sequence[int]], lengths: Tensor | None, pad_token: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts as tokens [B, P] padded on the right, and their lengths [B] int64."""
    if not isinstance(prompts, Tensor):
        if lengths is not None:
            raise ValueError("lengths: belongs to a tensor of prompts; a list's own lengths are taken")
        lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
        width = int(lengths.max()) if len(prompts) else 0
        prompts = torch.tensor(
            [[*p, *[pad_token] * (width - len(p))] for p in prompts], dtype=torch.int64
        ).view(len(lengths), width)
    if prompts.ndim != 2:
        raise ValueError(f"prompts: got shape {tuple(prompts.shape)}, takes [B, P] or a list of lists of tokens")
    if lengths is None:
        lengths = torch.full(prompts.shape[:1], prompts.shape[1], dtype=torch.int64)
    if lengths.shape != prompts.shape[:1]:
        raise ValueError(f"lengths: got shape {tuple(lengths.shape)}, takes [{prompts.shape[0]}]")
    if len(lengths) and not (1 <= int(lengths.min()) and int(lengths.max()) <= prompts.shape[1]):
        raise ValueError(f"lengths: got {int(lengths.min())} to {int(lengths.max())}, takes 1 to {prompts.shape[1]}")
    return prompts.to(device), lengths.to(device=device, dtype=torch.int64)


def _check(max_new_tokens: int, samples: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, takes at least 1")
    if samples < 1:
        raise ValueError(f"samples: got {samples}, takes at least 1")
    if not (temperature == 0 or temperature >= checks.FLOAT32_TINY):
        raise ValueError(f"temperature: got {temperature}, takes 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, takes at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, takes more than 0 and at most 1")


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    lengths: Tensor | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: int | Sequence[int] | Tensor = 0,
    stop_tokens: int | Sequence[int] = (),
    pad_token: int = 0,
    return_experts: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Generation:
    """Sample `samples` continuations of every prompt.

    prompts: tokens [B, P] padded on the right with their lengths [B], or a list of lists. A prompt is read once,
    whatever its number of samples. seeds: one per sequence [B·samples], or one number s, from which sequence r gets
    the seed s + r. return_experts records every expert choice, for a training forward to replay (docs/moe.md): one byte
    (two from 257 experts on) per token, layer and choice. progress(done, total) is called after every token."""
    _check(max_new_tokens, samples, temperature, top_k, top_p)
    device = model.embedding.weight.device
    prompts, lengths = pad_prompts(prompts, lengths, pad_token, device)
    total = prompts.shape[0] * samples
    stop = torch.tensor([stop_tokens] if isinstance(stop_tokens, int) else list(stop_tokens), device=device)
    if isinstance(seeds, int):
        seeds = torch.arange(total) + seeds
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=device)  # [R]
    if seeds.shape != (total,):
        raise ValueError(f"seeds: got shape {tuple(seeds.shape)}, takes one number or [{total}]")

    out = Generation(
        tokens=torch.full((total, max_new_tokens), pad_token, dtype=torch.int64, device=device),
        lengths=torch.full((total,), max_new_tokens, dtype=torch.int64, device=device),
        logprob=torch.zeros(total, max_new_tokens, device=device),
        stopped=torch.zeros(total, dtype=torch.bool, device=device),
    )
    config = model.config
    expert_layers = sum(map(config.is_moe, range(config.layers)))
    if return_experts and expert_layers:
        size = (total, prompts.shape[1] + max_new_tokens - 1, expert_layers, config.experts_per_token)
        out = out._replace(experts=torch.zeros(size, dtype=expert_dtype(config.experts), device=device))
    if total == 0:
        return out
    noise = uniform_noise(seeds, max_new_tokens)  # [R, N]

    # The prompts, once each; the hidden state that predicts the first new token is the prompt's last.
    cache = model.new_cache(prompts.shape[0], prompts.shape[1] + max_new_tokens)
    h, losses = model.hidden_states(prompts, lengths=lengths, cache=cache, return_experts=return_experts)  # [B, P, hidden]
    if out.experts is not None:
        chosen = stack_experts(losses)  # [B, P, expert layers, K]
        assert chosen is not None
        out.experts[:, : prompts.shape[1]] = chosen.repeat_interleave(samples, dim=0)
    read = lengths.repeat_interleave(samples)  # [R] tokens of the prompt
    last = h[torch.arange(len(lengths), device=device), lengths - 1].repeat_interleave(samples, dim=0)  # [R, hidden]
    cache = cache.repeat(samples)

    # One token a step for the running sequences: rows [A] of the output, running [A] of them not yet stopped.
    rows = torch.arange(total, device=device)
    running = torch.ones(total, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        tokens, logprob = sample(
            model.head(last), noise[rows, step], temperature=temperature, top_k=top_k, top_p=top_p
        )  # [A], [A]
        out.tokens[rows, step] = torch.where(running, tokens, pad_token)
        out.logprob[rows, step] = torch.where(running, logprob, 0.0)
        if progress is not None:
            progress(step + 1, max_new_tokens)
        if len(stop):
            ended = running & torch.isin(tokens, stop)
            if ended.any():
                out.lengths[rows[ended]] = step + 1
                out.stopped[rows[ended]] = True
                running = running & ~ended
                left = int(running.sum())
                if left == 0:
                    break
                if left < COMPACT_BELOW * len(rows):
                    kept = running.nonzero().squeeze(-1)
                    rows, tokens, running, cache = rows[kept], tokens[kept], running[kept], cache.select(kept)
        if step + 1 < max_new_tokens:
            h, losses = model.hidden_states(tokens[:, None], cache=cache, return_experts=return_experts)  # [A, 1, hidden]
            if out.experts is not None:
                chosen = stack_experts(losses)  # [A, 1, expert layers, K]
                assert chosen is not None
                out.experts[rows[running], read[rows[running]] + step] = chosen[running, 0]
            last = h[:, 0]
    return out
