"""dpo_loss and ppo_value_loss against the formulas of TRL's DPOTrainer and verl's value loss, in plain Python, and gradcheck."""

from __future__ import annotations

import math

import pytest
import thinkernel as tk
import torch
from torch.autograd import gradcheck

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:thinkernel:RuntimeWarning")


def pairs(seed: int, p: int = 4, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    chosen, rejected = (-torch.rand(p, s, generator=g, dtype=dtype) * 3 for s in (6, 9))
    refs = [x + 0.5 * torch.randn(x.shape, generator=g, dtype=dtype) for x in (chosen, rejected)]
    masks = [torch.rand(x.shape, generator=g) < 0.8 for x in (chosen, rejected)]
    return chosen, rejected, *refs, *masks


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def by_hand(data, loss_type: str, beta: float, p: float) -> float:
    """TRL 1.16's DPOTrainer: summed log-ratios over the completion, per token for ipo and sigmoid_norm, mean over pairs."""
    chosen, rejected, ref_c, ref_r, mask_c, mask_r = (x.tolist() for x in data)
    losses = []
    for c, r, rc, rr, mc, mr in zip(chosen, rejected, ref_c, ref_r, mask_c, mask_r, strict=True):
        good = math.fsum(a - b for a, b, m in zip(c, rc, mc, strict=True) if m)
        bad = math.fsum(a - b for a, b, m in zip(r, rr, mr, strict=True) if m)
        delta = good - bad
        mean_delta = good / max(sum(mc), 1) - bad / max(sum(mr), 1)
        losses.append({
            "sigmoid": lambda d=delta: -(1 - p) * log_sigmoid(beta * d) - p * log_sigmoid(-beta * d),
            "robust": lambda d=delta: (-(1 - p) * log_sigmoid(beta * d) + p * log_sigmoid(-beta * d)) / (1 - 2 * p),
            "hinge": lambda d=delta: max(0.0, 1 - beta * d),
            "ipo": lambda d=mean_delta: (d - 1 / (2 * beta)) ** 2,
            "sigmoid_norm": lambda d=mean_delta: -log_sigmoid(beta * d),
        }[loss_type]())  # fmt: skip
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("loss_type, smoothing", [
    ("sigmoid", 0.0), ("sigmoid", 0.1), ("robust", 0.0), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0), ("sigmoid_norm", 0.0),
])  # fmt: skip
def test_dpo_equals_the_formula(loss_type: str, smoothing: float) -> None:
    for seed in range(3):
        data = pairs(seed)
        options = dict(loss_type=loss_type, beta=0.3, label_smoothing=smoothing)
        loss, metrics = tk.dpo_loss(*data, **options)
        want = by_hand(data, loss_type, 0.3, smoothing)
        assert loss.item() == pytest.approx(want, rel=1e-12)
        single = [x.float() if x.is_floating_point() else x for x in data]
        assert tk.dpo_loss(*single, **options)[0].item() == pytest.approx(want, rel=1e-6, abs=1e-6)
        leaves = [x.clone().requires_grad_() for x in data[:2]]
        assert gradcheck(lambda c, r, rest=data[2:], o=options: tk.dpo_loss(c, r, *rest, **o)[0], leaves)
        assert metrics["margin"].item() == pytest.approx((metrics["chosen_reward"] - metrics["rejected_reward"]).item())


def test_dpo_masked_positions_never_matter_and_first_step() -> None:
    chosen, rejected, ref_c, ref_r, mask_c, mask_r = pairs(5)
    clean = tk.dpo_loss(chosen, rejected, ref_c, ref_r, mask_c, mask_r)[0]
    dirty = tk.dpo_loss(chosen.masked_fill(~mask_c, torch.nan), rejected, ref_c, ref_r.masked_fill(~mask_r, torch.inf), mask_c, mask_r)[0]
    assert torch.equal(clean, dirty)
    loss, metrics = tk.dpo_loss(chosen, rejected, chosen, rejected, mask_c, mask_r)
    assert loss.item() == pytest.approx(math.log(2)) and metrics["accuracy"] == 0
    assert tk.dpo_loss(*(x[:0] for x in (chosen, rejected, ref_c, ref_r, mask_c, mask_r)))[0] == 0


@pytest.mark.parametrize("epsilon", [0.2, None])
def test_value_loss_equals_the_formula(epsilon: float | None) -> None:
    g = torch.Generator().manual_seed(1)
    value, old, target = torch.randn(3, 4, 5, generator=g, dtype=F64)
    mask = torch.rand(4, 5, generator=g) < 0.7
    total, clips, count = 0.0, 0, 0
    for v, o, r, m in zip(*(x.flatten().tolist() for x in (value, old, target, mask)), strict=True):
        if m:
            plain, clipped = (v - r) ** 2, (min(max(v, o - epsilon), o + epsilon) - r) ** 2 if epsilon else -1.0
            total += max(plain, clipped) / 2
            clips += clipped > plain
            count += 1
    loss, metrics = tk.ppo_value_loss(value, old, target, mask, epsilon=epsilon)
    assert loss.item() == pytest.approx(total / count, rel=1e-12)
    assert metrics["value_clip_fraction"].item() == pytest.approx(clips / count)
    assert gradcheck(lambda v: tk.ppo_value_loss(v, old, target, mask, epsilon=epsilon)[0], value.requires_grad_())


@pytest.mark.parametrize("name, change", [
    ("chosen", dict(chosen=torch.zeros(3))), ("rejected", dict(rejected=torch.zeros(5, 4))),
    ("ref_chosen", dict(ref_chosen=torch.zeros(2, 4))),
    ("rejected_mask", dict(rejected_mask=torch.ones(2, 3))), ("loss_type", dict(loss_type="dpo")), ("beta", dict(beta=0.0)),
    ("label_smoothing", dict(label_smoothing=0.5)), ("label_smoothing", dict(label_smoothing=0.1, loss_type="hinge")),
])  # fmt: skip
def test_bad_input_names_the_argument(name: str, change: dict) -> None:
    good = dict(chosen=torch.zeros(2, 3), rejected=torch.zeros(2, 4), ref_chosen=torch.zeros(2, 3), ref_rejected=torch.zeros(2, 4),
                chosen_mask=torch.ones(2, 3), rejected_mask=torch.ones(2, 4))  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=f"^{name}:"):
        tk.dpo_loss(**(good | change))
    with pytest.raises(ValueError, match="^returns:"):
        tk.ppo_value_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, 2), torch.ones(2, 3))
