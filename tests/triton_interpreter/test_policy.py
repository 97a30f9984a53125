"""policy_loss and group_advantages in Triton under the interpreter: every loss type and option against the float64 reference.

Shapes: B sequences of S tokens (packed: N), R samples. Under the interpreter a block is 16 tokens, and 4 samples of a group.
"""
from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from thinkernel.ops.memory import poisoned_results
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

NAN = float("nan")
LENGTHS = [37, 0, 16, 5, 30]
GRADIENTS = ("logprob", "entropy", "ref_logprob")

# One of every loss type, and of every option on a loss type where it does most.
OPTIONS: list[dict[str, Any]] = [
    dict(loss_type="grpo"),
    dict(loss_type="grpo", delta=1.1, beta=0.2, kl="k1"),
    dict(loss_type="bnpo", beta=0.1, kl="k2", kl_correction=True, log_ratio_clamp=0.15),
    dict(loss_type="dr_grpo", max_completion_length=40, importance_sampling_level="sequence", beta=0.1, kl_correction=True),
    dict(loss_type="dapo", epsilon_high=0.28, num_items_in_batch=200, entropy_coef=0.01),
    dict(loss_type="dapo", top_entropy=0.3, entropy_coef=0.02, rollout_correction="token_truncate", rollout_clip=(0.8, 1.2)),
    dict(loss_type="gspo", rollout_correction="sequence_truncate", rollout_clip=(None, 1.5)),
    dict(loss_type="gspo", off_policy_threshold=0.02, log_ratio_clamp=None),
    dict(loss_type="cispo", epsilon_high=1.1, rollout_correction="token_mask", rollout_clip=(0.9, 1.3), beta=0.1, kl_correction=True),
    dict(loss_type="sapo", tau=(1.2, 1.5)),
    dict(loss_type="luspo", rollout_correction="sequence_mask", rollout_clip=(0.5, 1.4)),
    dict(loss_type="vespo"),
    dict(loss_type="vespo", rollout_correction="token_truncate", rollout_clip=(0.7, 1.3)),
    dict(loss_type="vespo", rollout_correction="token_mask", rollout_clip=(0.5, 1.5)),
    dict(loss_type="ppo", off_policy_threshold=-0.01),
    dict(loss_type="reinforce", entropy_coef=0.1),
    dict(loss_type="rloo", log_ratio_clamp=0.5),
]


def draw(packed: bool, per_token: bool, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(LENGTHS),) if packed else (len(LENGTHS), max(LENGTHS))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    mask = torch.rand(shape, generator=generator) < 0.8
    if packed:
        inputs = {"cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int()}
    else:
        mask &= torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        inputs = {}
    logprob = -normal(*shape).abs()
    inputs |= dict(
        logprob=logprob, old_logprob=logprob + 0.2 * normal(*shape), ref_logprob=logprob + 0.3 * normal(*shape),
        rollout_logprob=logprob + 0.3 * normal(*shape), entropy=normal(*shape).abs(), mask=mask,
        advantages=normal(*shape) if per_token else normal(len(LENGTHS)),
    )
    inputs["rollout_logprob"][mask.nonzero(as_tuple=True)[0][0]] = NAN
    for name in ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "entropy"):
        inputs[name][~mask] = NAN  # never to matter
    return inputs


def evaluate(inputs: dict[str, Tensor], dtype: torch.dtype, backend: str, options: dict[str, Any]) -> dict[str, Tensor]:
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    for name in GRADIENTS:
        inputs[name] = inputs[name].clone().requires_grad_()
    with tk.use_backend(backend), poisoned_results():
        loss, metrics = tk.policy_loss(**inputs, **options)
        grads = torch.autograd.grad(2 * loss, [inputs[name] for name in GRADIENTS], allow_unused=True)
    found = {"loss": loss.detach().reshape(1), **{f"metric {k}": v.reshape(1) for k, v in metrics.items()}}
    return found | {f"d{name}": g for name, g in zip(GRADIENTS, grads, strict=True) if g is not None}


def within(options: dict[str, Any], forms: list[tuple[bool, bool, int]]) -> None:
    """The rule over draws of these forms (packed, advantages per token, seed), each kind of result of all of them as one row."""
    rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for form in forms:
        inputs = draw(*form)
        found = evaluate(inputs, torch.float32, "triton", options)
        want, base = (evaluate(inputs, dtype, "reference", options) for dtype in (torch.float64, torch.float32))
        assert found.keys() == want.keys()
        for name, x in found.items():
            rows.setdefault(name, []).append((x.flatten(), want[name].flatten().double(), base[name].flatten()))
    for name, parts in rows.items():
        x, ref, same = (torch.cat(p) for p in zip(*parts, strict=True))
        if name.startswith("d"):
            check(x, ref, same, name=name)
        else:  # a handful of sums: torch may have hit each of them exactly
            bound = 2 * (same - ref).abs().max() + 2 * torch.finfo(torch.float32).eps * ref.abs().max()
            assert (x - ref).abs().max() <= bound, f"{name}: {x.tolist()} against {ref.tolist()}"


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=lambda i: str(OPTIONS[i]))
def test_options(number: int) -> None:
    packed, per_token = number % 2 == 0, number % 4 > 1
    within(OPTIONS[number], [(packed, per_token, number), (not packed, not per_token, number + 100)])


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_in_every_form(options: dict[str, Any]) -> None:
    within(options, [(packed, per_token, seed) for packed in (False, True) for per_token in (False, True) for seed in range(3)])


def test_a_sequence_alone_padded_further_and_packed() -> None:
    """The gradients of a sequence whose reduction is its own: the same bits whatever is around it."""
    inputs = draw(False, False, 9)
    options = dict(loss_type="gspo", off_policy_threshold=0.1, rollout_correction="sequence_truncate")
    wide = {k: torch.cat([x, torch.zeros(len(x), 13, dtype=x.dtype)], 1) if x.dim() == 2 else x for k, x in inputs.items()}
    packed = {k: torch.cat([x[b, :n] for b, n in enumerate(LENGTHS)]) if x.dim() == 2 else x for k, x in inputs.items()}
    packed["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0)
    batch, wider, dense = (evaluate(x, torch.float32, "triton", options) for x in (inputs, wide, packed))
    assert_bitwise(batch["dlogprob"], wider["dlogprob"][:, : max(LENGTHS)], "padded further")
    assert_bitwise(batch["loss"], wider["loss"], "loss, padded further")
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    for b, n in enumerate(LENGTHS):
        assert_bitwise(batch["dlogprob"][b, :n], dense["dlogprob"][starts[b] : starts[b] + n], "packed")


def test_strides_and_mask_dtypes_move_no_bit() -> None:
    inputs = draw(False, True, 3)
    options = dict(loss_type="dapo", beta=0.1, entropy_coef=0.1)
    plain = evaluate(inputs, torch.float32, "triton", options)
    wide = {k: torch.full((len(x), 60), NAN if x.is_floating_point() else 1).to(x.dtype) for k, x in inputs.items()}
    for k, x in inputs.items():
        wide[k][:, 3 : 3 + x.shape[1]] = x
    sliced = {k: x[:, 3 : 3 + max(LENGTHS)] for k, x in wide.items()}
    assert not sliced["old_logprob"].is_contiguous()
    for mask in (sliced["mask"], sliced["mask"].float() * -1, sliced["mask"].long() * 256, sliced["mask"].double().t().contiguous().t()):
        other = evaluate({**sliced, "mask": mask}, torch.float32, "triton", options)
        for name, x in plain.items():
            assert_bitwise(x, other[name], name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "grpo"])
def test_nothing_active_and_nothing_at_all(loss_type: str, packed: bool) -> None:
    for B, S in ((2, 9), (0, 5), (3, 0)):
        shape = (B * S,) if packed else (B, S)
        x = torch.full(shape, NAN).requires_grad_()
        mask = torch.zeros(shape)
        more = {"cu_seqlens": torch.arange(B + 1) * S} if packed else {}
        with tk.use_backend("triton"), poisoned_results():
            loss, metrics = tk.policy_loss(x, None, torch.ones(B), mask, loss_type=loss_type, **more)
            (dx,) = torch.autograd.grad(loss, x)
        assert loss == 0 and (dx == 0).all() and metrics["tokens"] == 0
        assert metrics["ratio_min"] == torch.inf and metrics["ratio_max"] == -torch.inf


def test_a_nan_shows_in_the_loss_and_moves_no_other_token() -> None:
    inputs = draw(False, False, 5)
    b, t = (int(i[20]) for i in inputs["mask"].nonzero(as_tuple=True))
    clean = evaluate(inputs, torch.float32, "triton", dict(loss_type="dapo"))
    inputs["old_logprob"][b, t] = NAN
    found = evaluate(inputs, torch.float32, "triton", dict(loss_type="dapo"))
    assert found["loss"].isnan() and found["metric ratio_min"].isnan() and found["metric ratio_max"].isnan()
    here = torch.zeros_like(inputs["mask"])
    here[b, t] = True
    assert_bitwise(found["dlogprob"][~here], clean["dlogprob"][~here])


def test_num_items_in_batch_may_be_a_tensor() -> None:
    inputs = draw(False, False, 6)
    number, tensor = (evaluate(inputs, torch.float32, "triton", dict(num_items_in_batch=n)) for n in (123, torch.tensor(123)))
    for name, x in number.items():
        assert_bitwise(x, tensor[name], name)


# ---- advantages

RULES: list[dict[str, Any]] = [dict(normalize=rule) for rule in ("group", "none", "batch", "rloo", "maxrl", "whiten")]
RULES += [dict(correction=0, eps=1e-4), dict(aggregation="normalize_then_sum")]


@pytest.mark.parametrize("groups", ["size", "ids"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_advantages(rule: dict[str, Any], groups: str) -> None:
    torch.manual_seed(4)
    R, tokens = 49, rule.get("normalize") == "whiten" or ("aggregation" in rule and groups == "ids")
    for n in (1, 3):
        rewards = torch.randn(R, n) + (2 if rule.get("normalize") == "maxrl" else 0)
        rewards[7:14], rewards[21:28, 0], rewards[30], rewards[36:42] = 0.1, NAN, NAN, NAN  # constant, and unscorable in three ways
        more: dict[str, Any] = {"weights": torch.rand(n) + 0.5} if n > 1 else {}
        if tokens:
            more |= dict(whiten_over="tokens", token_counts=torch.randint(1, 50, (R,)))
        if groups == "size":
            more["group_size"] = 7
        else:
            more["group_ids"] = torch.cat([torch.arange(R) // 7 * 10, torch.randint(0, 8, (R,)) * -10])[torch.randperm(2 * R)[:R]]
        found = {}
        runs = (("out", "triton", torch.float32), ("ref", "reference", torch.float64), ("base", "reference", torch.float32))
        for name, backend, dtype in runs:
            given = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in more.items()}
            with tk.use_backend(backend), poisoned_results():
                found[name] = tk.group_advantages(rewards.to(dtype), return_zero_variance=True, **given, **rule)
        check(found["out"][0], found["ref"][0], found["base"][0], name=f"{n} rewards")
        assert torch.equal(found["out"][1], found["base"][1])
        assert (found["out"][0][found["out"][1]] == 0).all()


def test_advantages_of_nothing_and_of_one_long_group() -> None:
    with tk.use_backend("triton"):
        assert tk.group_advantages(torch.empty(0), 4).shape == (0,)
        rewards = torch.randn(131)
        a = tk.group_advantages(rewards, 131)
    check(a, tk.group_advantages(rewards.double(), 131), tk.group_advantages(rewards, 131))
