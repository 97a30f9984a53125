"""The grpo reference: log-probs, advantages and policy losses against TRL's own code, plain Python and gradcheck."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkernel.reference.grpo import (
    LOSS_TYPES,
    group_advantages,
    grpo_loss,
    linear_logprob,
    logprob,
    policy_loss,
)
from torch.autograd import gradcheck

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- linear_logprob and logprob


def head(seed: int, n: int, d: int, v: int, dtype=F64):
    g = generator(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=dtype)
    return draw(n, d) * 2, draw(v, d) * d**-0.5 * 3, draw(v), torch.randint(v, (n,), generator=g)


def by_hand(y: list[float], target: int, temperature: float, softcap: float | None) -> tuple[float, float]:
    z = [(softcap * math.tanh(v / softcap) if softcap else v) / temperature for v in y]
    top = max(z)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in z))
    return z[target] - lse, lse - math.fsum(math.exp(v - lse) * v for v in z)


@pytest.mark.parametrize("v", [1, 2, 97, 257])  # no block divides these
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, None), (1.3, 2.5)])
def test_linear_logprob_by_hand(v: int, temperature: float, softcap: float | None) -> None:
    hidden, weight, bias, target = head(v, 9, 5, v)
    target[3] = -100
    got, entropy = linear_logprob(hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap)
    y = hidden @ weight.T + bias
    for i, t in enumerate(target.tolist()):
        want = (0.0, 0.0) if t == -100 else by_hand(y[i].tolist(), t, temperature, softcap)
        assert (got[i].item(), entropy[i].item()) == pytest.approx(want, rel=1e-11, abs=1e-12)
    same = logprob(y, target, temperature=temperature, softcap=softcap)
    torch.testing.assert_close(same, (got, entropy), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprob_and_entropy_equal_trl(temperature: float) -> None:
    """The entropy too is that of the tempered distribution."""
    utils = pytest.importorskip("trl.trainer.utils")
    g = generator(30)
    logits = torch.randn(3, 7, 211, generator=g, dtype=F64) * 4
    target = torch.randint(211, (3, 7), generator=g)
    got, entropy = logprob(logits, target, temperature=temperature)
    torch.testing.assert_close(
        got, utils.selective_log_softmax(logits, target, temperature=temperature), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(entropy, utils.entropy_from_logits(logits / temperature), rtol=1e-12, atol=1e-12)
    if temperature != 1:
        assert (entropy - logprob(logits, target)[1]).abs().min() > 1e-3


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("out", ["logprob", "entropy", "both"])
def test_linear_logprob_gradcheck(softcap: float | None, out: str) -> None:
    hidden, weight, bias, target = head(31, 5, 3, 7)
    target[1] = -100
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]

    def call(h, w, b):
        lp, ent = linear_logprob(h, w, target, bias=b, temperature=0.7, softcap=softcap)
        return {"logprob": lp, "entropy": ent, "both": (lp, ent)}[out]

    assert gradcheck(call, inputs)


def test_gradient_is_the_closed_form() -> None:
    """dz = g_lp·(1[target] − p) − g_H·p·(log p + H), dlogits = dz/τ·(1 − (τz/c)²)."""
    g = generator(32)
    y = (torch.randn(6, 13, generator=g, dtype=F64) * 3).requires_grad_()
    target = torch.randint(13, (6,), generator=g)
    g_lp, g_h = torch.randn(2, 6, generator=g, dtype=F64)
    lp, ent = logprob(y, target, temperature=0.8, softcap=4.0)
    (grad,) = torch.autograd.grad((lp * g_lp + ent * g_h).sum(), y)
    with torch.no_grad():
        z = 4 * torch.tanh(y / 4) / 0.8
        p = z.exp() / z.exp().sum(-1, keepdim=True)
        onehot = torch.zeros_like(p)
        onehot[torch.arange(6), target] = 1
        dz = g_lp[:, None] * (onehot - p) - g_h[:, None] * p * (p.log() + ent[:, None])
        want = dz / 0.8 * (1 - (0.8 * z / 4) ** 2)
    torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)


def test_ignored_rows_are_zero_even_on_nan() -> None:
    hidden, weight, _, target = head(33, 6, 4, 11)
    target[[0, 4]] = 7777
    hidden[0] = torch.nan
    hidden[4] = torch.inf
    hidden.requires_grad_(), weight.requires_grad_()
    lp, ent = linear_logprob(hidden, weight, target, ignore_index=7777)
    assert lp[[0, 4]].tolist() == ent[[0, 4]].tolist() == [0, 0]
    (lp + ent).sum().backward()
    assert hidden.grad[[0, 4]].abs().max() == 0
    assert weight.grad.isfinite().all() and hidden.grad[1].abs().max() > 0


def test_nan_stays_in_its_row() -> None:
    hidden, weight, _, target = head(34, 5, 4, 11)
    clean = linear_logprob(hidden, weight, target)
    hidden[2, 1] = torch.nan
    for got, want in zip(linear_logprob(hidden, weight, target), clean):
        assert got[2].isnan()
        torch.testing.assert_close(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]], rtol=1e-12, atol=0)


def test_impossible_tokens_add_no_entropy() -> None:
    """p = 0 from a logit of -inf, and p = 0 by underflow: 0·log 0 = 0, in the gradient too."""
    y = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, -2000.0, 0.0]], dtype=F64, requires_grad=True)
    lp, ent = logprob(y, torch.tensor([1, 0]))
    p = 1 / (1 + math.e)
    assert ent.tolist() == pytest.approx([-p * math.log(p) - (1 - p) * math.log(1 - p), math.log(2)], rel=1e-12)
    (grad,) = torch.autograd.grad(ent.sum() + lp.sum(), y)
    assert grad.isfinite().all() and grad[0, 2] == 0 and grad[1, 1] == 0


@pytest.mark.parametrize("bad", [-1, 11, 12345])
def test_target_out_of_range_is_refused(bad: int) -> None:
    hidden, weight, _, target = head(35, 4, 3, 11)
    target[2] = bad
    with pytest.raises(ValueError, match=f"^target: got {bad}"):
        linear_logprob(hidden, weight, target)
    with pytest.raises(ValueError, match=f"^target: got {bad}"):
        logprob(hidden @ weight.T, target)


def test_more_rows_than_a_grid_dimension_and_empty() -> None:
    hidden, weight, _, target = head(36, 65537, 2, 3)
    lp, ent = linear_logprob(hidden, weight, target)
    want = linear_logprob(hidden[-1:], weight, target[-1:])
    torch.testing.assert_close((lp[-1:], ent[-1:]), want, rtol=1e-12, atol=1e-14)
    empty, _ = linear_logprob(hidden[:0], weight.requires_grad_(), target[:0])
    assert empty.shape == (0,)
    empty.sum().backward()
    assert weight.grad.abs().max() == 0
    ignored, _ = linear_logprob(hidden[:2], weight, torch.full((2,), -100))
    assert ignored.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, bias, target = head(37, 6, 8, 19, dtype=torch.float32)
    hidden, weight, bias = (t.to(dtype).requires_grad_() for t in (hidden, weight, bias))
    got = linear_logprob(hidden.view(2, 3, 8), weight, target.view(2, 3), bias=bias)
    want = linear_logprob(hidden.double(), weight.double(), target, bias=bias.double())
    for a, b in zip(got, want):
        assert a.dtype == torch.float32 and a.shape == (2, 3)
        torch.testing.assert_close(a.flatten().double(), b, rtol=1e-5, atol=1e-5)
    sum(t.sum() for t in got).backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_entropy_off_and_vocabulary_parallel() -> None:
    hidden, weight, _, target = head(38, 4, 3, 11)
    full, none = linear_logprob(hidden, weight, target), linear_logprob(hidden, weight, target, entropy=False)
    assert none[1] is None and torch.equal(none[0], full[0])
    assert torch.equal(linear_logprob(hidden, weight, target, keep_logits=True)[0], full[0])
    with pytest.raises(NotImplementedError, match="^group"):
        linear_logprob(hidden, weight, target, group=object())


# ---- advantages: plain Python on lists as the oracle


def python_advantages(groups: list[list[float]], normalize: str, eps: float, sample_std: bool = True) -> list[float]:
    """NaN entries are unscorable. Straight from the definitions, with the standard library's statistics."""
    std = statistics.stdev if sample_std else statistics.pstdev
    everything = [r for g in groups for r in g if not math.isnan(r)]
    out = []
    for g in groups:
        seen = [r for r in g if not math.isnan(r)]
        for r in g:
            if math.isnan(r) or max(seen) == min(seen):
                out.append(0.0)
                continue
            mean = statistics.fmean(seen)
            if normalize == "group":
                out.append((r - mean) / (std(seen) + eps))
            elif normalize == "none":
                out.append(r - mean)
            elif normalize == "batch":
                out.append((r - mean) / (std(everything) + eps))
            elif normalize == "rloo":
                out.append(r - (math.fsum(seen) - r) / (len(seen) - 1))
            elif normalize == "maxrl":
                out.append((r - mean) / mean if mean else 0.0)
    return out


@given(
    seed=st.integers(0, 10**6), groups=st.integers(1, 5), size=st.integers(1, 6),
    normalize=st.sampled_from(["group", "none", "batch", "rloo", "maxrl"]), sample_std=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_advantages_by_definition(seed: int, groups: int, size: int, normalize: str, sample_std: bool) -> None:
    g = generator(seed)
    table = torch.randint(4, (groups, size), generator=g).double() / 3  # constant groups occur
    table[torch.rand(groups, size, generator=g) < 0.2] = torch.nan
    want = python_advantages(table.tolist(), normalize, 1e-4, sample_std)
    got, zero = group_advantages(table.flatten(), size, normalize=normalize, eps=1e-4, correction=int(sample_std))
    assert got.tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)
    for row, flags in zip(table.tolist(), zero.view(groups, size).tolist()):
        seen = [r for r in row if not math.isnan(r)]
        assert flags == [len(set(seen)) <= 1] * size

    # The same samples, shuffled, grouped by ids with gaps.
    shuffle = torch.randperm(groups * size, generator=g)
    ids = (torch.arange(groups).repeat_interleave(size) * 7 - 3)[shuffle]
    again, zero_again = group_advantages(
        table.flatten()[shuffle], group_ids=ids, normalize=normalize, eps=1e-4, correction=int(sample_std)
    )
    torch.testing.assert_close(again, got[shuffle], rtol=1e-9, atol=1e-12)
    assert torch.equal(zero_again, zero[shuffle])


def test_ragged_groups() -> None:
    rewards = torch.tensor([1.0, 5.0, 0.0, 3.0, 1.0, 2.0], dtype=F64)
    ids = torch.tensor([4, 9, 4, 4, 9, 1])
    got, zero = group_advantages(rewards, group_ids=ids, eps=0.0)
    want = python_advantages([[1, 0, 3], [5, 1], [2]], "group", 0.0)
    assert got.tolist() == pytest.approx([want[i] for i in (0, 3, 1, 2, 4, 5)], rel=1e-12)
    assert zero.tolist() == [False] * 5 + [True]


def test_constant_groups_give_exactly_zero() -> None:
    """792 random groups of one repeated reward. The bare formula (r − mean)/(std + eps) is not 0 on many of them."""
    g = generator(40)
    bare = 0
    for size in (3, 4, 5, 6, 7, 8, 11, 12, 16, 33, 64):
        values = torch.rand(72, 1, generator=g) * 3 - 1
        r = values.expand(72, size)
        bare += int(((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).abs().amax(1).gt(0).sum())
        r = r.flatten()
        for normalize in ("group", "none", "batch", "rloo", "maxrl", "whiten"):
            a, zero = group_advantages(r, size, normalize=normalize)
            assert a.abs().max() == 0 and zero.all()
        # Beside a group that is not constant, too, and for several rewards.
        mixed = torch.cat([r, torch.rand(size, generator=g)])
        for kw in (*({"normalize": n} for n in ("group", "batch", "whiten")), {"aggregation": "normalize_then_sum"}):
            a, zero = group_advantages(mixed, size, **kw)
            assert a[: r.numel()].abs().max() == 0 and a[r.numel() :].abs().min() > 0 and not zero[-1]
    assert bare > 100


def test_several_rewards_sum_then_normalize() -> None:
    """NaN beside other rewards counts as 0; a row of NaN alone is unscorable."""
    nan = torch.nan
    rewards = torch.tensor([[1, 2], [nan, 1], [nan, nan], [0, 0], [1, nan], [0, 5]], dtype=F64)
    got, _ = group_advantages(rewards, 3, weights=torch.tensor([2.0, 0.5]), eps=1e-4)
    want = python_advantages([[3, 0.5, nan], [0, 2, 2.5]], "group", 1e-4)
    assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_several_rewards_normalize_then_sum() -> None:
    """GDPO: the z-score of each reward in its group, weighted and summed, then z-scored over the batch."""
    g = generator(41)
    rewards = torch.randint(5, (12, 2), generator=g).double()
    rewards[2, 0] = rewards[5] = torch.nan
    rewards[8:, 1] = 2.0  # constant in the last group: 0 there, and the other reward still counts
    w = [1.0, 0.25]
    z = [python_advantages(rewards[:, j].view(3, 4).tolist(), "group", 1e-4) for j in range(2)]
    total = [w[0] * a + w[1] * b for a, b in zip(*z)]
    total[5] = math.nan
    seen = [t for t in total if not math.isnan(t)]
    mean, std = statistics.fmean(seen), statistics.stdev(seen)
    want = [0.0 if math.isnan(t) else (t - mean) / (std + 1e-4) for t in total]
    got, zero = group_advantages(rewards, 4, aggregation="normalize_then_sum", weights=torch.tensor(w), eps=1e-4)
    assert got.tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert not zero.any()


def test_whiten_is_mean_zero_and_std_one() -> None:
    r = torch.rand(24, generator=generator(42), dtype=F64)
    a, _ = group_advantages(r, 4, normalize="whiten", eps=0.0)
    assert a.mean().item() == pytest.approx(0, abs=1e-12) and a.std().item() == pytest.approx(1, rel=1e-12)
    d, _ = group_advantages(r, 4, normalize="none")
    torch.testing.assert_close(a, (d - d.mean()) / d.std())


def test_advantages_dtypes_and_errors() -> None:
    r = torch.rand(8, generator=generator(43))
    assert group_advantages(r.bfloat16(), 4)[0].dtype == torch.float32
    assert group_advantages(torch.tensor([1, 0, 1, 1]), 4)[0].dtype == torch.float32
    assert group_advantages(r[:0], 4)[0].shape == (0,)
    for kw, name in (
        (dict(group_size=3), "group_size"),
        (dict(), "group_size"),
        (dict(group_size=4, normalize="mean"), "normalize"),
        (dict(group_size=4, aggregation="max"), "aggregation"),
        (dict(group_ids=torch.zeros(3)), "group_ids"),
    ):
        with pytest.raises(ValueError, match=f"^{name}:"):
            group_advantages(r, **kw)
    with pytest.raises(ValueError, match="^token_counts"):
        group_advantages(r, 4, whiten_over="tokens")


# ---- policy loss: TRL's own loss code runs as the oracle, on a stand-in for its trainer


def batch(seed: int, b: int = 5, s: int = 7, dtype=F64):
    """Ratios on both sides of every clip bound, an empty sequence, holes in a mask, both signs of advantage."""
    g = generator(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=dtype)
    logp = -draw(b, s).abs() - 0.1
    mask = (torch.rand(b, s, generator=g) < 0.8).to(dtype)
    mask[0] = 1
    mask[b - 1] = 0
    data = dict(
        logprob=logp, old_logprob=logp + 0.4 * draw(b, s), advantages=draw(b), mask=mask,
        ref_logprob=logp + 0.3 * draw(b, s), rollout_logprob=logp + 0.5 * draw(b, s),
        entropy=draw(b, s).abs().float().to(dtype),  # TRL takes the quantile in float32
    )  # fmt: skip
    data["advantages"][:2] = torch.tensor([1.3, -0.7])
    return data


def trl_loss(data, *, trainer: str = "grpo", is_ratio=None, **options):
    """Runs TRL's _compute_loss with the given tensors in place of a model -> loss."""
    if trainer == "rloo":
        from trl.trainer.rloo_trainer import RLOOTrainer as Trainer
    else:
        from trl.trainer.grpo_trainer import GRPOTrainer as Trainer

    o = defaultdict(lambda: None, options)
    b, s = data["logprob"].shape
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda t: t, reduce=lambda t, reduction: t,
        gather_for_metrics=lambda t: t, pad_across_processes=lambda t, **_: t,
    )  # fmt: skip
    self = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (data["logprob"], data["entropy"], None),
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False,
        top_entropy_quantile=o["top_entropy"] or 1.0,
        off_policy_mask_threshold=o["off_policy_threshold"],
        importance_sampling_level=o["level"] or "token",
        beta=o["beta"] or 0.0,
        loss_type=o["loss_type"],
        epsilon_low=0.2,
        epsilon_high=o["epsilon_high"] or 0.2,
        use_vllm=is_ratio is not None,
        vllm_importance_sampling_correction=is_ratio is not None,
        max_completion_length=o["max_completion_length"],
        _entropy_bonus_enabled=bool(o["entropy_coef"]),
        use_adaptive_entropy=False,
        entropy_coef=o["entropy_coef"],
        args=SimpleNamespace(
            use_bias_correction_kl=bool(o["kl_correction"]), delta=o["delta"], steps_per_generation=1,
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        ),
    )  # fmt: skip
    for name in ("get_off_policy_mask", "get_gamma_weights"):
        setattr(self, name, getattr(Trainer, name, None))
    if trainer == "grpo":
        self.get_high_entropy_mask = lambda *a: Trainer.get_high_entropy_mask(self, *a)
    ids = torch.zeros(b, s, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids[:, :1], prompt_mask=ids[:, :1], completion_ids=ids, completion_mask=data["mask"],
        advantages=data["advantages"], old_per_token_logps=data["old_logprob"],
        ref_per_token_logps=data["ref_logprob"], sampling_per_token_logps=data["rollout_logprob"],
        old_logps=(data["old_logprob"] * data["mask"]).sum(1),
        num_items_in_batch=torch.as_tensor(o["num_items_in_batch"] or data["mask"].sum()),
    )  # fmt: skip
    if is_ratio is not None:
        inputs["importance_sampling_ratio"] = is_ratio
    return Trainer._compute_loss(self, None, inputs)


def our_loss(data, **options):
    use = {k: v for k, v in data.items() if k not in ("ref_logprob", "rollout_logprob", "entropy")}
    wants = dict(
        ref_logprob=options.get("beta"), entropy=options.get("entropy_coef") or options.get("top_entropy"),
        rollout_logprob=options.get("rollout_correction") or options.get("off_policy_threshold") is not None,
    )  # fmt: skip
    use |= {k: data[k] for k, want in wants.items() if want}
    return policy_loss(**use, **options)[0]


def assert_same_as_trl(data, ours: dict, trl: dict) -> None:
    """Loss, and gradients to log-prob and entropy."""
    pytest.importorskip("trl")
    leaves = [data[k].requires_grad_() for k in ("logprob", "entropy")]
    results = []
    for loss in (our_loss(data, **ours), trl_loss(data, **trl)):
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append((loss.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves))))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    assert results[1][1].abs().max() > 0


TRL_TYPES = {
    "grpo": {}, "bnpo": {}, "dr_grpo": dict(max_completion_length=9), "dapo": {},
    "cispo": dict(epsilon_high=1.3), "sapo": {}, "vespo": {}, "gspo": {}, "luspo": {},
}  # fmt: skip


def trl_name(loss_type: str) -> dict:
    if loss_type == "gspo":
        return dict(loss_type="grpo", level="sequence")
    if loss_type == "luspo":
        return dict(loss_type="luspo", level="sequence")
    return dict(loss_type=loss_type)


COMMON_OPTIONS = {
    "plain": {},
    "clip-higher": dict(epsilon_high=0.28),
    "two-sided": dict(delta=1.5, epsilon_high=0.28),
    "kl": dict(beta=0.1),
    "kl-corrected": dict(beta=0.1, kl_correction=True),
    "off-policy": dict(off_policy_threshold=-0.05),
    "entropy-bonus": dict(entropy_coef=0.03),
    "top-entropy": dict(top_entropy=0.4, entropy_coef=0.03),
    "global-tokens": dict(num_items_in_batch=torch.tensor(61)),
    "everything": dict(
        delta=1.5, beta=0.1, kl_correction=True, off_policy_threshold=-0.05, entropy_coef=0.03, top_entropy=0.6
    ),
}


@pytest.mark.parametrize("options", COMMON_OPTIONS)
@pytest.mark.parametrize("loss_type", TRL_TYPES)
def test_policy_loss_equals_trl(loss_type: str, options: str) -> None:
    o = COMMON_OPTIONS[options] | TRL_TYPES[loss_type]
    for seed in range(3):
        assert_same_as_trl(batch(100 + seed), dict(loss_type=loss_type) | o, trl_name(loss_type) | o)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo", "sapo", "bnpo"])
def test_per_token_advantages_equal_trl(loss_type: str) -> None:
    data = batch(110)
    data["advantages"] = torch.randn(5, 7, generator=generator(111), dtype=F64)
    assert_same_as_trl(data, dict(loss_type=loss_type), trl_name(loss_type))


def test_sequence_level_of_other_losses_equals_trl() -> None:
    for loss_type in ("dapo", "bnpo", "sapo", "cispo"):
        o = TRL_TYPES[loss_type] | dict(loss_type=loss_type)
        assert_same_as_trl(batch(112), o | dict(importance_sampling_level="sequence"), o | dict(level="sequence"))


def test_rloo_equals_trl() -> None:
    data = batch(113)
    data["mask"][-1, :2] = 1  # TRL takes the ratio 1 for an empty sequence; its constant is no gradient but a loss
    assert_same_as_trl(data, dict(loss_type="rloo"), dict(loss_type="rloo", trainer="rloo"))


def rollout_ratio_by_hand(data, mode: str, low: float | None, high: float | None) -> torch.Tensor:
    level, how = mode.split("_")
    diff = ((data["old_logprob"] - data["rollout_logprob"]) * data["mask"]).tolist()
    rows = [[math.exp(sum(row))] if level == "sequence" else [math.exp(v) for v in row] for row in diff]
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    pick = {
        "truncate": lambda r: min(max(r, low), high),
        "mask": lambda r: r if low <= r <= high else 0.0,
    }[how]
    return torch.tensor([[pick(r) for r in row] for row in rows], dtype=F64)


@pytest.mark.parametrize("clip", [(None, 1.4), (0.7, 1.4)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "vespo"])
def test_rollout_correction_equals_trl(loss_type: str, mode: str, clip) -> None:
    data, o = batch(114), TRL_TYPES[loss_type] | dict(loss_type=loss_type)
    ours = o | dict(rollout_correction=mode, rollout_clip=clip)
    if loss_type == "vespo" and mode.startswith("sequence"):
        with pytest.raises(ValueError, match="^rollout_correction"):
            our_loss(data, **ours)
        return
    assert_same_as_trl(data, ours, o | dict(is_ratio=rollout_ratio_by_hand(data, mode, *clip)))


def test_unscored_rollout_tokens_count_as_on_policy() -> None:
    data = batch(115)
    data["rollout_logprob"][0, 2] = torch.nan
    same = {**data, "rollout_logprob": data["rollout_logprob"].clone()}
    same["rollout_logprob"][0, 2] = data["old_logprob"][0, 2]
    o = dict(loss_type="grpo", rollout_correction="token_truncate", off_policy_threshold=0.1)
    assert our_loss(data, **o).isfinite() and torch.equal(our_loss(data, **o), our_loss(same, **o))


KL_FORMS = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) + d - 1}


@pytest.mark.parametrize("kl, by_hand", KL_FORMS.items(), ids=KL_FORMS)
def test_kl_forms(kl: str, by_hand) -> None:
    data = batch(116)
    plain = our_loss(data, loss_type="bnpo")
    with_kl = our_loss(data, loss_type="bnpo", beta=0.3, kl=kl)
    pairs = [(a, b) for a, b, m in zip(*(data[k].flatten().tolist() for k in ("logprob", "ref_logprob", "mask"))) if m]
    want = 0.3 * math.fsum(by_hand(a - b) for a, b in pairs) / len(pairs)
    assert (with_kl - plain).item() == pytest.approx(want, rel=1e-10)


def test_ppo_and_reinforce_by_hand() -> None:
    data = batch(117)
    tables = [data[k].tolist() for k in ("logprob", "old_logprob", "mask")]
    a = data["advantages"].tolist()
    ppo, reinforce, tokens = 0.0, 0.0, 0
    for i, (new, old, m) in enumerate(zip(*tables)):
        for x, y, on in zip(new, old, m):
            if on:
                r = math.exp(x - y)
                ppo -= min(r * a[i], min(max(r, 0.9), 1.3) * a[i])
                reinforce -= a[i] * x
                tokens += 1
    got = our_loss(data, loss_type="ppo", epsilon=0.1, epsilon_high=0.3)
    assert got.item() == pytest.approx(ppo / tokens, rel=1e-12)
    assert our_loss(data, loss_type="reinforce").item() == pytest.approx(reinforce / 5, rel=1e-12)


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t not in ("cispo", "vespo")])
def test_policy_loss_gradcheck(loss_type: str) -> None:
    """cispo and vespo hold a weight constant that finite differences move; their gradient is the next test's."""
    data = batch(118, b=3, s=4)
    data["mask"][0, 1] = 0
    names = ("logprob", "ref_logprob", "entropy")
    o = dict(
        loss_type=loss_type, beta=0.2, kl_correction=True, entropy_coef=0.1, max_completion_length=6, delta=1.7,
        rollout_correction="token_truncate", rollout_clip=(None, 1.2),
    )  # fmt: skip
    call = lambda *t: our_loss({**data, **dict(zip(names, t))}, **o)
    assert gradcheck(call, [data[n].requires_grad_() for n in names])


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_detached_weights_scale_the_gradient(loss_type: str) -> None:
    data = batch(119)
    o = TRL_TYPES[loss_type] | dict(loss_type=loss_type)
    loss = our_loss({**data, "logprob": data["logprob"].requires_grad_()}, **o)
    (grad,) = torch.autograd.grad(loss, data["logprob"])
    torch.testing.assert_close(loss.detach(), (grad * data["logprob"].detach()).sum())  # linear in logprob


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_positions_never_matter(loss_type: str) -> None:
    o = dict(
        loss_type=loss_type, beta=0.1, off_policy_threshold=0.1, entropy_coef=0.1, top_entropy=0.5,
        rollout_correction="token_truncate", max_completion_length=8, epsilon_high=2.0,
    )  # fmt: skip
    data = batch(120)
    dirty = {k: v.clone() for k, v in data.items()}
    dirt = dict(logprob=torch.nan, old_logprob=-torch.inf, ref_logprob=torch.inf, rollout_logprob=torch.nan)
    for name, value in (dirt | {"entropy": -1e30}).items():
        dirty[name][data["mask"] == 0] = value
    results = []
    for d in (data, dirty):
        loss = our_loss({**d, "logprob": d["logprob"].requires_grad_()}, **o)
        results.append((loss, *torch.autograd.grad(loss, d["logprob"])))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[1][1][data["mask"] == 0].abs().max() == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_packed_equals_padded(loss_type: str) -> None:
    data = batch(121)
    lengths = [7, 3, 0, 5, 1]
    inside = torch.arange(7) < torch.tensor(lengths)[:, None]
    data["mask"] = data["mask"] * inside
    o = dict(
        loss_type=loss_type, beta=0.1, entropy_coef=0.1, off_policy_threshold=0.0, rollout_correction="token_mask",
        max_completion_length=8, epsilon_high=2.0,
    )  # fmt: skip
    want = our_loss({**data, "logprob": data["logprob"].requires_grad_()}, **o)
    packed = {k: v if k == "advantages" else v.detach()[inside] for k, v in data.items()}
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    got = our_loss({**packed, "logprob": packed["logprob"].requires_grad_()}, cu_seqlens=cu, **o)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    (dp,), (dw,) = torch.autograd.grad(got, packed["logprob"]), torch.autograd.grad(want, data["logprob"])
    torch.testing.assert_close(dp, dw[inside], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_micro_batches_sum_to_the_batch(loss_type: str) -> None:
    """The global normaliser makes accumulation exact; each micro-batch's own count would not."""
    data, o = batch(122), TRL_TYPES[loss_type] | dict(loss_type=loss_type)
    whole = our_loss(data, **o)
    pieces = [{k: v[rows] for k, v in data.items()} for rows in (slice(0, 1), slice(1, 3), slice(3, 5))]
    parts = sum(our_loss(p, **o, num_items_in_batch=data["mask"].sum()) for p in pieces)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    assert abs(sum(our_loss(p, **o) for p in pieces).item() / 3 - whole.item()) > 1e-3


def test_on_policy_ratio_is_one() -> None:
    """old_logprob None: the loss of a first step, −mean A, and its gradient −A/tokens."""
    data = batch(123)
    lp = data["logprob"].requires_grad_()
    loss, metrics = policy_loss(lp, None, data["advantages"], data["mask"], loss_type="bnpo")
    weights = data["advantages"][:, None] * data["mask"] / data["mask"].sum()
    assert loss.item() == pytest.approx(-weights.sum().item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, lp)[0], -weights)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["approx_kl"] == 0


def test_log_ratio_clamp() -> None:
    lp = torch.tensor([[-1.0, -1.0]], dtype=F64, requires_grad=True)
    old = torch.tensor([[-900.0, -1.0]], dtype=F64)
    a, mask = torch.tensor([-1.0], dtype=F64), torch.ones(1, 2)
    for clamp, want in ((20.0, math.exp(20)), (5.0, math.exp(5)), (None, math.inf)):
        loss, _ = policy_loss(lp, old, a, mask, loss_type="bnpo", log_ratio_clamp=clamp)
        assert loss.item() == pytest.approx((want + 1) / 2, rel=1e-12)
        if clamp:
            assert torch.autograd.grad(loss, lp)[0].tolist() == [[0.0, 0.5]]
    rloo, _ = policy_loss(lp, torch.tensor([[-16.0, -16.0]], dtype=F64), a, mask, loss_type="rloo")
    assert rloo.item() == pytest.approx(math.exp(20), rel=1e-12)  # 15 + 15, clamped as a sum


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "cispo", "vespo"])
def test_policy_loss_traces_as_one_graph(loss_type: str) -> None:
    """No branch on data, no synchronisation: every option in one graph, with the eager gradient."""
    data = batch(126)
    lp = data.pop("logprob").requires_grad_()
    o = dict(
        loss_type=loss_type, epsilon_high=0.4, beta=0.1, entropy_coef=0.1, top_entropy=0.5, off_policy_threshold=0.1,
        rollout_correction="token_mask", num_items_in_batch=torch.tensor(40),
    )  # fmt: skip
    torch.compiler.reset()  # a function has a limit on recompilations
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager", dynamic=False)
    results = [f(lp, **data, **o) for f in (policy_loss, compiled)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(loss, lp)[0] for loss, _ in results]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-14)


def test_metrics() -> None:
    logp = torch.tensor([[0.0, 0.5, -0.5, 9.0]], dtype=F64) - 1
    old = torch.full_like(logp, -1.0)
    mask = torch.tensor([[True, True, True, False]])
    for sign, low, high in ((1, 0, 1 / 3), (-1, 1 / 3, 0)):
        a = torch.tensor([float(sign)])
        _, m = policy_loss(logp, old, a, mask, entropy=logp * 0 + 2, ref_logprob=old, beta=0.1)
        got = {k: v.item() for k, v in m.items()}
        assert (got["clip_low"], got["clip_high"], got["clip_fraction"]) == pytest.approx((low, high, 1 / 3))
        assert (got["ratio_min"], got["ratio_max"]) == pytest.approx((math.exp(-0.5), math.exp(0.5)))
        assert got["ratio_mean"] == pytest.approx((1 + math.exp(0.5) + math.exp(-0.5)) / 3)
        assert got["approx_kl"] == pytest.approx((math.exp(0.5) + math.exp(-0.5) - 2) / 3)
        assert got["kl"] == pytest.approx((math.exp(-0.5) + math.exp(0.5) - 2) / 3)
        assert (got["entropy"], got["tokens"]) == (2, 3)
    logp.requires_grad_()
    loss, m = policy_loss(logp, old, a, mask, entropy=logp * 2)
    assert loss.requires_grad and not any(v.requires_grad or v.dim() for v in m.values())


def test_empty_and_fully_masked_batches() -> None:
    for loss_type in LOSS_TYPES:
        o = dict(loss_type=loss_type, epsilon_high=2.0, max_completion_length=4, top_entropy=0.5, entropy_coef=0.1)
        for b, s in ((0, 3), (2, 0), (2, 3)):
            lp = torch.zeros(b, s, requires_grad=True)
            loss, _ = policy_loss(lp, lp.detach(), torch.ones(b), torch.zeros(b, s), entropy=lp.detach(), **o)
            assert loss.item() == 0
            loss.backward()
            assert lp.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_policy_loss_low_precision_is_float32(dtype: torch.dtype) -> None:
    data = {k: v.to(dtype) for k, v in batch(124).items()}
    loss = our_loss(data, loss_type="grpo", beta=0.1)
    assert loss.dtype == torch.float32
    want = our_loss({k: v.double() for k, v in data.items()}, loss_type="grpo", beta=0.1)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, name",
    [
        (dict(loss_type="grpo2"), "loss_type"),
        (dict(loss_type="cispo"), "epsilon_high"),
        (dict(loss_type="dr_grpo"), "max_completion_length"),
        (dict(beta=0.1), "ref_logprob"),
        (dict(kl="k4"), "kl"),
        (dict(importance_sampling_level="word"), "importance_sampling_level"),
        (dict(loss_type="vespo", importance_sampling_level="sequence"), "importance_sampling_level"),
        (dict(rollout_correction="token_mask"), "rollout_logprob"),
        (dict(rollout_correction="clip"), "rollout_correction"),
        (dict(entropy_coef=0.1), "entropy"),
        (dict(top_entropy=0.2), "entropy"),
        (dict(top_entropy=1.2), "top_entropy"),
    ],
)
def test_contradicting_arguments_are_named(options: dict, name: str) -> None:
    data = batch(125)
    with pytest.raises(ValueError, match=f"^{name}: got"):
        policy_loss(data["logprob"], data["old_logprob"], data["advantages"], data["mask"], **options)


# ---- the composition


@pytest.mark.parametrize("packed", [False, True])
def test_grpo_loss_equals_its_parts(packed: bool) -> None:
    g = generator(130)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=F64)
    hidden, weight, bias = (t.requires_grad_() for t in (draw(3, 5, 4), draw(11, 4), draw(11)))
    target, mask = torch.randint(11, (3, 5), generator=g), torch.ones(3, 5)
    mask[1, 2:] = mask[2, 4:] = 0
    target[2, 4] = -100
    old, ref, a = -draw(3, 5).abs(), -draw(3, 5).abs(), draw(3)
    head_options = dict(bias=bias, temperature=0.8, softcap=9.0)
    o = dict(beta=0.1, ref_logprob=ref, entropy_coef=0.05, top_entropy=0.7)

    lp, ent = linear_logprob(hidden, weight, target, **head_options)
    want, want_metrics = policy_loss(lp, old, a, mask, entropy=ent, **o)
    want_grads = torch.autograd.grad(want, [hidden, weight, bias])
    if packed:
        flat = [t.flatten(0, 1) for t in (hidden, target, old, mask)]
        o |= dict(cu_seqlens=torch.tensor([0, 5, 10, 15]), ref_logprob=ref.flatten())
        got, metrics = grpo_loss(flat[0], weight, flat[1], flat[2], a, flat[3], **head_options, **o)
    else:
        got, metrics = grpo_loss(hidden, weight, target, old, a, mask, **head_options, **o)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for x, y in zip(torch.autograd.grad(got, [hidden, weight, bias]), want_grads):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
    assert metrics.keys() == want_metrics.keys()
    assert want_grads[0][1, 2:].abs().max() == 0


def test_grpo_loss_skips_masked_tokens() -> None:
    """Neither a padding token's number nor a NaN in its hidden state is ever looked at."""
    hidden, weight, _, target = head(134, 6, 3, 5)
    mask, a = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([1.0, -0.5], dtype=F64)
    weight.requires_grad_()
    results = []
    for dirty in (False, True):
        h, t = hidden.view(2, 3, 3).clone(), target.view(2, 3).clone()
        if dirty:
            h[mask == 0], t[mask == 0] = torch.nan, 151_643
        h.requires_grad_()
        loss, metrics = grpo_loss(h, weight, t, None, a, mask)
        results.append((loss, *torch.autograd.grad(loss, [h, weight]), metrics["entropy"]))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


def test_grpo_loss_gradcheck() -> None:
    hidden, weight, bias, target = head(131, 6, 3, 5)
    old, _ = linear_logprob(hidden, weight, target, bias=bias)
    old = (old + 0.1 * torch.randn(6, generator=generator(132), dtype=F64)).view(2, 3)
    a, mask = torch.tensor([1.0, -0.5], dtype=F64), torch.tensor([[1, 1, 1], [1, 1, 0]])
    call = lambda h, w, b: grpo_loss(
        h.view(2, 3, 3), w, target.view(2, 3), old, a, mask, bias=b, temperature=0.9, beta=0.1, ref_logprob=old,
        entropy_coef=0.2,
    )[0]  # fmt: skip
    assert gradcheck(call, [t.requires_grad_() for t in (hidden, weight, bias)])


def test_gradient_step_prefers_what_was_rewarded() -> None:
    """A few steps of the whole composition raise the probability of the better samples and lower the others'."""
    hidden, weight, _, target = head(133, 12, 6, 9)
    target = target.view(4, 3)
    a, _ = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=F64), 4)
    weight.requires_grad_()
    before = old = linear_logprob(hidden.view(4, 3, 6), weight, target)[0].detach()
    for _ in range(5):
        loss, _ = grpo_loss(hidden.view(4, 3, 6), weight, target, old, a, torch.ones(4, 3), epsilon_high=0.28)
        (grad,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= 0.05 * grad
    change = (linear_logprob(hidden.view(4, 3, 6), weight, target)[0] - before).sum(-1)
    assert (change[[0, 3]].sum() > 0) and (change[[1, 2]].sum() < 0)
