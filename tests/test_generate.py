"""Sampling: what it draws, that a row depends on itself alone, and that its log-probabilities are the model's.

Shapes: B prompts, G samples each, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from thinkernel.models import Transformer, generate, preset
from thinkernel.models.generate import filter_probabilities, sample, uniform_noise

V = 29


@pytest.fixture(scope="module", params=["gqa", "mla", "dsa"])
def model(request: pytest.FixtureRequest) -> Transformer:
    torch.manual_seed(13)
    small = dict(layers=2, hidden=32, heads=4, ff_dim=48, vocab_size=V, init_std=0.3, attention=request.param)
    if request.param == "gqa":
        return Transformer(preset("qwen3_mini", kv_heads=2, head_dim=10, **small))
    latent = dict(kv_latent=24, q_latent=20, nope_dim=12, rope_dim=8, value_dim=10, indexer_heads=4, indexer_dim=12)
    return Transformer(preset("deepseek_v32_mini", expert_dim=16, top_k=9, **latent, **small))


def prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(V, (n,)).tolist() for n in lengths]


def test_a_row_alone_is_the_row_in_a_batch(model: Transformer) -> None:
    """Prompts of different lengths, several samples, stop tokens that end rows early (so the batch is compacted)."""
    batch = prompts(4, 11, 7, 1)
    seeds = torch.tensor([5, 6, 7, 100, 101, -3, 2**62, 0, 1, 2, 3, 4])
    options = dict(max_new_tokens=24, stop_tokens=(3, 8), temperature=1.2)
    whole = generate(model, batch, samples=3, seeds=seeds, **options)
    assert whole.tokens.shape == (12, 24)
    assert len(set(whole.lengths.tolist())) > 3  # rows did end at different times
    for row in range(12):
        alone = generate(model, [batch[row // 3]], seeds=[int(seeds[row])], **options)
        assert torch.equal(alone.tokens[0], whole.tokens[row])
        assert alone.lengths[0] == whole.lengths[row] and alone.stopped[0] == whole.stopped[row]
        torch.testing.assert_close(alone.logprob[0], whole.logprob[row], rtol=1e-4, atol=1e-4)


def test_seeds_decide(model: Transformer) -> None:
    batch = prompts(6, 6)
    first = generate(model, batch, samples=4, max_new_tokens=12, seeds=40)
    again = generate(model, batch, samples=4, max_new_tokens=12, seeds=range(40, 48))
    other = generate(model, batch, samples=4, max_new_tokens=12, seeds=41)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.logprob, again.logprob)
    assert not torch.equal(first.tokens, other.tokens)
    assert torch.equal(first.tokens[1:4], other.tokens[0:3])  # sequence r has the seed s + r
    assert len({tuple(row.tolist()) for row in first.tokens[:4]}) == 4


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_are_the_models(model: Transformer, temperature: float) -> None:
    """Recomputed by one forward over prompt and completion, as a trainer does."""
    lengths = [9, 3, 14]
    batch = prompts(*lengths)
    out = generate(model, batch, samples=2, max_new_tokens=20, stop_tokens=3, temperature=temperature, seeds=9)
    for row in range(6):
        prompt, n = batch[row // 2], int(out.lengths[row])
        whole = torch.tensor([prompt + out.tokens[row, :n].tolist()])
        targets = whole[:, 1:].clone()
        targets[:, : len(prompt) - 1] = -100
        with torch.no_grad():
            logprob = model(whole[:, :-1], targets=targets, temperature=temperature).logprob[0, len(prompt) - 1 :]
        torch.testing.assert_close(out.logprob[row, :n], logprob, rtol=1e-4, atol=1e-4)
        assert not out.logprob[row, n:].any() and not out.tokens[row, n:].any()
        ended = out.tokens[row, n - 1] == 3
        assert ended == out.stopped[row] and (ended or n == 20)
        assert 3 not in out.tokens[row, : n - 1].tolist()


def test_greedy_is_the_argmax(model: Transformer) -> None:
    batch = prompts(5, 8)
    out = generate(model, batch, max_new_tokens=10, temperature=0)
    for row, prompt in enumerate(batch):
        tokens = list(prompt)
        for step in range(10):
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1]
            assert out.tokens[row, step] == logits.argmax()
            tokens.append(int(logits.argmax()))


def test_prompt_tensor_with_lengths_is_the_list(model: Transformer) -> None:
    batch = prompts(3, 7)
    padded = torch.randint(V, (2, 9))
    for row, prompt in enumerate(batch):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    a = generate(model, batch, max_new_tokens=8)
    b = generate(model, padded, lengths=torch.tensor([3, 7]), max_new_tokens=8)
    assert torch.equal(a.tokens, b.tokens)


def test_no_prompts(model: Transformer) -> None:
    out = generate(model, [], max_new_tokens=4)
    assert out.tokens.shape == (0, 4) and out.lengths.shape == (0,)


def test_progress_is_told(model: Transformer) -> None:
    calls: list[tuple[int, int]] = []
    generate(model, prompts(3), max_new_tokens=4, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


# ---- the distribution


def test_samples_follow_the_distribution() -> None:
    """Frequencies of 200,000 draws within five standard deviations of the tempered probabilities."""
    torch.manual_seed(0)
    logits, draws, temperature = 2 * torch.randn(V), 200_000, 0.8
    noise = uniform_noise(torch.arange(draws // 100), 100).flatten()
    tokens, logprob = sample(logits.expand(draws, V), noise, temperature=temperature)
    p = (logits.double() / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=V).double()
    assert ((counts - draws * p).abs() <= 5 * (draws * p * (1 - p)).sqrt() + 1).all()
    torch.testing.assert_close(logprob.double(), p.log()[tokens], rtol=1e-5, atol=1e-5)


def test_noise_is_uniform_and_uncorrelated() -> None:
    noise = uniform_noise(torch.arange(2000), 50)
    assert 0 <= noise.min() and noise.max() < 1
    n = noise.numel()
    assert abs(noise.mean() - 0.5) < 5 / (12 * n) ** 0.5
    histogram = torch.histc(noise.float(), 64, 0, 1)
    assert ((histogram - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * 126**0.5
    centred = noise - 0.5
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1]), (centred[1:, :-1], centred[:-1, 1:])):
        assert abs((a * b).mean() * 12) < 5 / a.numel() ** 0.5
    assert noise.unique().numel() > 0.9999 * n


def test_filters_keep_what_they_say() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.15, 0.3, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]])
    assert (filter_probabilities(probs, 2, None) > 0).tolist() == [[0, 1, 0, 1, 0], [1, 1, 0, 0, 0]]
    assert (filter_probabilities(probs, None, 0.71) > 0).tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert (filter_probabilities(probs, None, 0.69) > 0).tolist() == [[0, 1, 0, 1, 0], [1, 1, 1, 1, 0]]
    assert (filter_probabilities(probs, None, 1e-9) > 0).sum(-1).tolist() == [1, 1]
    # top_p counts within what top_k left: 0.4 and 0.3 of 0.7
    assert (filter_probabilities(probs, 2, 0.5) > 0).tolist()[0] == [0, 1, 0, 0, 0]
    assert filter_probabilities(probs, 5, 1.0) is probs


def test_sampling_stays_inside_the_filters() -> None:
    torch.manual_seed(1)
    logits = 3 * torch.randn(64, V)
    noise = uniform_noise(torch.arange(64), 200)
    edges = torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64)
    for step in range(200):
        u = noise[:, step] if step >= 2 else edges[step].expand(64)
        tokens, _ = sample(logits, u, top_k=5, top_p=0.8)
        rank = (logits > logits.gather(-1, tokens[:, None])).sum(-1)
        assert rank.max() < 5
        above = torch.where(logits > logits.gather(-1, tokens[:, None]), logits.double().softmax(-1), 0.0).sum(-1)
        assert above.max() < 0.8


@pytest.mark.parametrize(
    "arguments, name",
    [
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(samples=0), "samples"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=1e-46), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(seeds=[1, 2, 3]), "seeds"),
        (dict(prompts=torch.zeros(3, dtype=torch.int64)), "prompts"),
        (dict(prompts=[[1, 2], []]), "lengths"),
        (dict(lengths=torch.tensor([1])), "lengths"),
        (dict(prompts=torch.zeros(2, 3, dtype=torch.int64), lengths=torch.tensor([1, 4])), "lengths"),
        (dict(prompts=torch.zeros(2, 3, dtype=torch.int64), lengths=torch.tensor([1])), "lengths"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, name: str) -> None:
    torch.manual_seed(0)
    model = Transformer(preset("qwen3_mini", layers=1, hidden=16, heads=2, kv_heads=1, head_dim=8, ff_dim=16))
    arguments = {"prompts": [[1, 2], [3]], "max_new_tokens": 2, **arguments}
    with pytest.raises(ValueError, match=f"^{name}: "):
        generate(model, arguments.pop("prompts"), **arguments)
