"""group_advantages: the C++ kernel against the float64 reference, and both against TRL's formulas."""

from __future__ import annotations

import pytest
import thinkernel as tk
import torch
from thinkernel.ops import dispatch
from thinkernel.reference.advantages import NORMALIZE
from thinkernel.reference.advantages import group_advantages as reference
from thinkernel.testing.compare import check

pytestmark = pytest.mark.skipif(dispatch.C is None, reason="needs the C++ extension")


def rewards_of(seed: int, *shape: int) -> torch.Tensor:
    """Constant groups, unscorable samples and few distinct values all occur."""
    g = torch.Generator().manual_seed(seed)
    r = torch.randint(4, shape, generator=g) / 3 + (torch.randn(shape, generator=g) if seed % 2 else 0)
    r[torch.rand(shape, generator=g) < 0.15] = torch.nan
    r[8:12] = 0.7
    return r


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("kind", ["neighbours", "ids"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_equals_the_float64_reference(normalize: str, kind: str, correction: int) -> None:
    found, truth, base = [], [], []
    for seed in range(20):
        r = rewards_of(seed, 48)
        ids = torch.randint(-4, 5, (48,), generator=torch.Generator().manual_seed(seed)) * 7
        groups = dict(group_size=4) if kind == "neighbours" else dict(group_ids=ids)
        o = groups | dict(normalize=normalize, eps=1e-4, correction=correction)
        with tk.use_backend("cpu"):
            a, zero = tk.group_advantages(r, **o, return_zero_variance=True)
        want, want_zero = reference(r.double(), **o)
        torch.testing.assert_close(a.double(), want, rtol=2e-6, atol=1e-6)
        assert torch.equal(zero, want_zero) and a[zero].eq(0).all()
        found.append(a), truth.append(want), base.append(reference(r, **o)[0])
    check(torch.cat(found), torch.cat(truth), torch.cat(base))


@pytest.mark.parametrize("whiten_over", ["samples", "tokens"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_several_rewards(aggregation: str, whiten_over: str) -> None:
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        r, counts = rewards_of(seed, 24, 3), torch.randint(0, 900, (24,), generator=g)
        o = dict(
            aggregation=aggregation, whiten_over=whiten_over, weights=torch.tensor([1.0, 0.25, -2.0]), normalize="whiten",
            token_counts=counts if whiten_over == "tokens" else None,
        )
        with tk.use_backend("cpu"):
            a, zero = tk.group_advantages(r, 4, **o, return_zero_variance=True)
        want, want_zero = reference(r.double(), 4, **o)
        torch.testing.assert_close(a.double(), want, rtol=2e-5, atol=2e-6)
        assert torch.equal(zero, want_zero)


def trl_advantages(r: torch.Tensor, groups: int, weights: torch.Tensor, scale: str, aggregation: str) -> torch.Tensor:
    """The formulas of TRL 1.16's GRPOTrainer (which has them inside its generation step), with TRL's own nanstd."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    none = r.isnan().all(1)
    if aggregation == "sum_then_normalize":
        total = (r * weights).nansum(1)
        total[none] = torch.nan
        table = total.view(-1, groups)
        a = table - table.nanmean(1, keepdim=True)
        if scale == "group":
            a = a / (nanstd(table, dim=1)[:, None] + 1e-4)
        elif scale == "batch":
            a = a / (nanstd(total) + 1e-4)
        a = a.flatten()
    else:
        table = r.view(-1, groups, r.shape[1])
        z = (table - table.nanmean(1, keepdim=True)) / (nanstd(table, dim=1, keepdim=True) + 1e-4)
        total = (z.view(-1, r.shape[1]) * weights).nansum(1)
        total[none] = torch.nan
        a = (total - total.nanmean()) / (nanstd(total) + 1e-4)
    return a.nan_to_num(nan=0.0)


@pytest.mark.parametrize("scale", ["group", "none", "batch", "gdpo"])
def test_equals_trl(scale: str) -> None:
    """Float64 formulas, float32 kernel; no constant groups, where TRL keeps rounding noise and we give 0."""
    aggregation = "normalize_then_sum" if scale == "gdpo" else "sum_then_normalize"
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        r = torch.randn(32, 2, generator=g)
        r[3], r[9, 0] = torch.nan, torch.nan
        w = torch.tensor([1.0, 0.5])
        want = trl_advantages(r.double(), 8, w.double(), scale, aggregation)
        o = dict(normalize="group" if scale == "gdpo" else scale, aggregation=aggregation, weights=w, eps=1e-4)
        with tk.use_backend("cpu"):
            a = tk.group_advantages(r, 8, **o)
        torch.testing.assert_close(a.double(), want, rtol=1e-6, atol=1e-6)


def test_whiten_over_tokens_is_a_mean_over_tokens() -> None:
    """Each sample repeated once per token, whitened over tokens (verl), equals its counts as weights."""
    g = torch.Generator().manual_seed(3)
    r, counts = torch.randn(12, generator=g), torch.randint(1, 30, (12,), generator=g)
    d = tk.group_advantages(r, 4, normalize="none").double().repeat_interleave(counts)
    want = ((d - d.mean()) / (d.std() + 1e-6))[counts.cumsum(0) - 1]
    for backend in ("cpu", "reference"):
        with tk.use_backend(backend):
            a = tk.group_advantages(r, 4, normalize="whiten", whiten_over="tokens", token_counts=counts)
        torch.testing.assert_close(a.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spread", [1, -257, 2**53 - 12345])
def test_many_groups_and_empty(spread: int) -> None:
    g = torch.Generator().manual_seed(4)
    r, ids = torch.randn(5000, generator=g), (torch.randint(0, 700, (5000,), generator=g) - 350) * spread
    want, _ = reference(r.double(), group_ids=ids)
    torch.testing.assert_close(tk.group_advantages(r, group_ids=ids).double(), want, rtol=2e-6, atol=1e-6)
    assert tk.group_advantages(r[:0], 4).shape == (0,)
    assert tk.group_advantages(torch.tensor([1, 0, 1, 1]), 4).dtype == torch.float32
    assert not tk.group_advantages(r[:8].requires_grad_(), 4).requires_grad


BAD = [
    ("rewards", dict(rewards=torch.zeros(2, 3, 4), group_size=2)),
    ("group_size", dict(group_size=3)),
    ("group_size", dict(group_size=0)),
    ("group_size", dict()),
    ("group_size", dict(group_size=4, group_ids=torch.zeros(8, dtype=torch.long))),
    ("group_ids", dict(group_ids=torch.zeros(3, dtype=torch.long))),
    ("group_ids", dict(group_ids=torch.zeros(8))),
    ("normalize", dict(group_size=4, normalize="mean")),
    ("aggregation", dict(group_size=4, aggregation="max")),
    ("whiten_over", dict(group_size=4, whiten_over="words")),
    ("token_counts", dict(group_size=4, whiten_over="tokens")),
    ("token_counts", dict(group_size=4, token_counts=torch.ones(8))),
    ("token_counts", dict(group_size=4, whiten_over="tokens", token_counts=-torch.ones(8))),
    ("weights", dict(group_size=4, weights=torch.ones(2))),
    ("eps", dict(group_size=4, eps=-1.0)),
    ("correction", dict(group_size=4, correction=-1)),
]


@pytest.mark.parametrize("i", range(len(BAD)), ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(i: int) -> None:
    name, arguments = BAD[i]
    with pytest.raises((ValueError, TypeError), match=f"^{name}:"):
        tk.group_advantages(**({"rewards": torch.zeros(8)} | arguments))
