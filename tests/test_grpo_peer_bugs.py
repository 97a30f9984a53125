"""Bugs that other implementations of the GRPO family shipped, one test each, named after the bug.

Each is run on the automatic backend (the C++ kernels where they are built) against plain torch written out here.
"""

from __future__ import annotations

import math

import pytest
import thinkernel as tk
import torch
import torch.nn.functional as F
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head(seed: int, n: int, d: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(seed)
    target = torch.randint(v, (n,), generator=g)
    target[-1] = v - 1  # the last column, in the block that is not full
    return torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) * 3 * d**-0.5, target


def torch_head(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """float64 log_softmax and entropy, through the [N, V] tensor."""
    log_p = F.log_softmax(hidden.double() @ weight.double().T / temperature, -1)
    return log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


# ---- the head


@pytest.mark.parametrize("v", [151_936, 50_257, 997])
def test_vocabulary_divisible_by_no_block(v: int) -> None:
    """verl #2899: wrong log-probs when V is no multiple of the kernel's block."""
    hidden, weight, target = head(1, 5, 8, v)
    got, entropy = tk.linear_logprob(hidden, weight, target)
    want, want_entropy = torch_head(hidden, weight, target)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=2e-6, atol=2e-6)


def test_more_rows_than_a_grid_dimension() -> None:
    """N >= 65536: a launch with one row per block in the grid's second dimension fails or wraps."""
    hidden, weight, target = head(2, 65_536 + 3, 4, 11)
    got, entropy = tk.linear_logprob(hidden, weight, target)
    want, want_entropy = torch_head(hidden, weight, target)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_entropy_dropped() -> None:
    """An entropy returned without a gradient makes the entropy bonus do nothing, silently."""
    hidden, weight, target = head(3, 7, 6, 29)
    grads = []
    for f in (tk.linear_logprob, torch_head):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        grads.append(torch.autograd.grad(f(*leaves, target)[1].sum(), leaves))
    for got, want in zip(*grads, strict=True):
        assert want.abs().max() > 0.1
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    logits = (hidden @ weight.T).requires_grad_()
    (grad,) = torch.autograd.grad(tk.logprob(logits, target)[1].sum(), logits)
    assert grad.abs().max() > 1e-3


def test_entropy_bonus_reaches_the_parameters() -> None:
    """The same through the whole composition: grpo_loss with a bonus differs in its gradient by exactly the bonus's."""
    hidden, weight, target = head(4, 6, 5, 13)
    old, a, mask = torch.full((2, 3), -2.0), torch.zeros(2), torch.ones(2, 3)  # A = 0: the bonus alone moves anything
    w = weight.clone().requires_grad_()
    loss, _ = tk.grpo_loss(hidden.view(2, 3, 5), w, target.view(2, 3), old, a, mask, entropy_coef=0.5)
    (got,) = torch.autograd.grad(loss, w)
    w64 = weight.clone().requires_grad_()
    (want,) = torch.autograd.grad(-0.5 * torch_head(hidden, w64, target)[1].mean(), w64)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert want.abs().max() > 1e-3


def test_entropy_left_untempered() -> None:
    """Log-probs divided by the temperature and an entropy that is not."""
    hidden, weight, target = head(5, 6, 5, 17)
    _, entropy = tk.linear_logprob(hidden, weight, target, temperature=0.6)
    torch.testing.assert_close(entropy.double(), torch_head(hidden, weight, target, 0.6)[1], rtol=2e-6, atol=2e-6)
    assert (entropy.double() - torch_head(hidden, weight, target)[1]).abs().min() > 1e-3


@pytest.mark.parametrize("bad", [-1, 17, 2**40])
def test_target_out_of_range(bad: int) -> None:
    """Read out of bounds, or answered with the log-prob of another token."""
    hidden, weight, target = head(6, 4, 5, 17)
    target[1] = bad
    for call in (lambda: tk.linear_logprob(hidden, weight, target), lambda: tk.logprob(hidden @ weight.T, target)):
        with pytest.raises(ValueError, match=f"^target: got {bad}"):
            call()


def test_impossible_token_makes_the_entropy_nan() -> None:
    """p = 0: 0 · log 0 is 0, in the gradient too."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, -300.0, 0.0]], requires_grad=True)
    lp, entropy = tk.logprob(logits, torch.tensor([1, 0]))
    (grad,) = torch.autograd.grad(lp.sum() + entropy.sum(), logits)
    assert entropy.isfinite().all() and grad.isfinite().all()


# ---- advantages


def test_zero_variance_by_rounding() -> None:
    """(r − mean) / (std + eps) is not 0 on many of 792 groups of one repeated reward: rounding over eps."""
    g = generator(7)
    bare = 0
    for size in (3, 4, 5, 6, 7, 8, 11, 12, 16, 33, 64):
        r = (torch.rand(72, 1, generator=g) * 3 - 1).expand(72, size)
        bare += int(((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).abs().amax(1).gt(0).sum())
        for normalize in ("group", "none", "batch", "rloo", "maxrl", "whiten"):
            a, zero = tk.group_advantages(r.flatten(), size, normalize=normalize, return_zero_variance=True)
            assert a.eq(0).all() and zero.all()
        # next to a group that has something to teach
        mixed = torch.cat([r.flatten(), torch.rand(size, generator=g)])
        a, zero = tk.group_advantages(mixed, size, return_zero_variance=True)
        assert a[: 72 * size].eq(0).all() and a[72 * size :].abs().min() > 0 and zero.sum() == 72 * size
    assert bare > 100


def test_zero_variance_of_summed_rewards_by_rounding() -> None:
    """Equal totals out of different parts: in float32 the order of adding shows, and eps blows the difference up."""
    if tk.backends()["cpu"] is not None:
        pytest.skip("a promise of the kernels, not of the reference in float32")
    values = torch.rand(300, 3, generator=generator(8))
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 2, 0]])
    parts = values[:, orders].reshape(-1, 3)  # groups of three samples of one total
    naive = ((parts[:, 0] + parts[:, 1]) + parts[:, 2]).view(-1, 3)
    assert (naive.amax(1) != naive.amin(1)).sum() > 30
    a, zero = tk.group_advantages(parts, 3, return_zero_variance=True)
    assert a.eq(0).all() and zero.all()


def test_small_but_real_variance_is_not_zero() -> None:
    """A threshold on the standard deviation in place of max == min throws these groups away."""
    r = torch.tensor([1.0, 1.0 + 2e-7, 1.0, 1.0])
    a, zero = tk.group_advantages(r, 4, eps=0.0, return_zero_variance=True)
    assert not zero.any() and a.abs().min() > 0.1


def test_unscorable_reward_poisons_or_shifts_its_group() -> None:
    """NaN taken as a number makes the group NaN; taken as 0 it lowers the mean and earns an advantage."""
    a = tk.group_advantages(torch.tensor([1.0, torch.nan, 3.0, 2.0]), 4, eps=0.0)
    want = (torch.tensor([1.0, 3.0, 2.0]) - 2.0) / 1.0
    torch.testing.assert_close(a[[0, 2, 3]], want)
    assert a[1] == 0
    lonely, zero = tk.group_advantages(torch.tensor([torch.nan, 5.0]), 2, return_zero_variance=True)
    assert lonely.tolist() == [0, 0] and zero.all()


def test_single_sample_groups_divide_by_zero() -> None:
    """Bessel's correction on one sample, and RLOO's n − 1 = 0."""
    for normalize in ("group", "rloo", "batch", "whiten"):
        a = tk.group_advantages(torch.tensor([1.0, 2.0, 3.0]), 1, normalize=normalize)
        assert a.tolist() == [0, 0, 0]


def test_groups_assumed_to_be_neighbours_of_one_size() -> None:
    """Group ids in any order and number, groups of 1, 2 and 3."""
    r, ids = torch.tensor([1.0, 5.0, 0.0, 3.0, 1.0, 2.0]), torch.tensor([4, 9, 4, 4, 9, -1])
    a = tk.group_advantages(r, group_ids=ids, normalize="none")
    torch.testing.assert_close(a, torch.tensor([1 - 4 / 3, 2.0, -4 / 3, 3 - 4 / 3, -2.0, 0.0]))


# ---- policy loss


def tokens(seed: int, b: int = 4, s: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = generator(seed)
    lp = -torch.rand(b, s, generator=g) - 0.1
    old = lp + 0.4 * torch.randn(b, s, generator=g)
    mask = torch.arange(s) < torch.tensor([s, 2, s - 1, 1])[:b, None]
    return lp, old, torch.tensor([1.3, -0.7, 0.5, -1.1])[:b], mask


def clipped(lp: Tensor, old: Tensor, a: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    r = (lp - old).exp()
    return -torch.minimum(r * a[:, None], r.clamp(1 - low, 1 + high) * a[:, None])


def test_normaliser_of_each_micro_batch() -> None:
    """Each micro-batch divided by its own token count weighs tokens of short micro-batches more. num_items_in_batch of the
    global batch makes accumulation exact: here the gradients of three pieces sum to the whole's."""
    lp, old, a, mask = tokens(10)
    lp.requires_grad_()
    (whole,) = torch.autograd.grad(tk.policy_loss(lp, old, a, mask)[0], lp)
    pieces = [slice(0, 1), slice(1, 3), slice(3, 4)]
    loss = sum(tk.policy_loss(lp[p], old[p], a[p], mask[p], num_items_in_batch=mask.sum())[0] for p in pieces)
    torch.testing.assert_close(torch.autograd.grad(loss, lp)[0], whole, rtol=1e-6, atol=1e-8)
    own = sum(tk.policy_loss(lp[p], old[p], a[p], mask[p])[0] / 3 for p in pieces)
    assert (torch.autograd.grad(own, lp)[0] - whole).abs().max() > 1e-2


def test_fully_masked_sequences_dropped_from_the_batch_size() -> None:
    """grpo's mean over sequences: a sequence without active tokens adds 0 and still counts in B."""
    lp, old, a, mask = tokens(11)
    mask[2] = False
    loss, _ = tk.policy_loss(lp, old, a, mask, loss_type="grpo")
    per = (clipped(lp, old, a) * mask).sum(1) / mask.sum(1).clamp(min=1)
    assert loss.item() == pytest.approx(per.sum().item() / 4, rel=1e-6)
    assert abs(loss.item() - per.sum().item() / 3) > 1e-3


def test_cispo_bound_taken_as_one_plus_epsilon() -> None:
    """CISPO's epsilon_high is the bound of the ratio itself (5.0), not 1 + it; there is no lower bound, and no default."""
    lp, old = torch.tensor([[0.0, -3.0]]), torch.tensor([[-2.0, -1.0]])  # r = e², e^-2
    a, mask = torch.tensor([1.0]), torch.ones(1, 2)
    x = lp.clone().requires_grad_()
    loss, metrics = tk.policy_loss(x, old, a, mask, loss_type="cispo", epsilon_high=5.0)
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, -torch.tensor([[5.0, math.exp(-2)]]) / 2)
    assert metrics["clip_fraction"] == 0.5
    with pytest.raises(ValueError, match="^epsilon_high"):
        tk.policy_loss(lp, old, a, mask, loss_type="cispo")


def test_cispo_weight_not_detached() -> None:
    """Its gradient is that of −w·A·logprob with w held; through w it would cancel the policy gradient's direction."""
    lp, old, a, mask = tokens(12)
    x = lp.clone().requires_grad_()
    loss, _ = tk.policy_loss(x, old, a, mask, loss_type="cispo", epsilon_high=1.2)
    w = (lp - old).exp().clamp(max=1.2)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], -w * a[:, None] * mask / mask.sum(), rtol=1e-5, atol=1e-7)


def test_delta_clip_of_the_already_clipped_ratio() -> None:
    """Two-sided clipping: −min(min(r, δ)·A, clip(r)·A), the clip of the unclamped r. δ below 1 + ε_high tells them apart."""
    lp, old = torch.tensor([[0.0, 0.0]]), -torch.tensor([[math.log(1.25), math.log(3.0)]])
    mask = torch.ones(1, 2)
    for a, want in ((-1.0, (1.25 + 1.28) / 2), (1.0, -(1.1 + 1.1) / 2)):
        loss, _ = tk.policy_loss(lp, old, torch.tensor([a]), mask, loss_type="bnpo", epsilon_high=0.28, delta=1.1)
        assert loss.item() == pytest.approx(want, rel=1e-6)


def test_negative_advantage_without_an_upper_bound() -> None:
    """A < 0 and a huge ratio: the plain clip does not bound it, delta does, and the clamp of the log-ratio keeps it finite."""
    lp, old, a, mask = torch.tensor([[-1.0]]), torch.tensor([[-500.0]]), torch.tensor([-1.0]), torch.ones(1, 1)
    plain, _ = tk.policy_loss(lp, old, a, mask)
    bounded, _ = tk.policy_loss(lp, old, a, mask, delta=3.0)
    assert plain.item() == pytest.approx(math.exp(20), rel=1e-6) and bounded.item() == 3.0
    assert tk.policy_loss(lp, old, a, mask, log_ratio_clamp=None)[0].isinf()


def test_kl_estimator_with_the_sign_of_d_swapped() -> None:
    """k3 = e^(−d) + d − 1 with d = logprob − ref; e^d − d − 1 estimates the other direction with another gradient."""
    lp, ref = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[-1.7]])
    args = (torch.zeros(1), torch.ones(1, 1))
    loss, metrics = tk.policy_loss(lp, None, *args, beta=1.0, ref_logprob=ref)
    assert metrics["kl"].item() == pytest.approx(math.exp(-0.7) + 0.7 - 1, rel=1e-6)
    assert torch.autograd.grad(loss, lp)[0].item() == pytest.approx(1 - math.exp(-0.7), rel=1e-6)


def test_kl_of_nearly_equal_policies_lost_to_cancellation() -> None:
    """e^(−d) + d − 1 in float32 is rounding noise of 6e-8 where d²/2 is 5e-9."""
    if tk.backends()["cpu"] is not None:
        pytest.skip("a promise of the kernels, not of the reference in float32")
    lp = torch.full((1, 64), -1.0)
    ref = lp - torch.full((1, 64), 2.0**-13)
    _, metrics = tk.policy_loss(lp, None, torch.zeros(1), torch.ones(1, 64), beta=1.0, ref_logprob=ref)
    d = 2.0**-13
    assert metrics["kl"].item() == pytest.approx(math.exp(-d) + d - 1, rel=2e-3)


def test_rollout_correction_multiplies_the_kl_too() -> None:
    """Order: loss × masks × rollout ratio, and then + β·KL."""
    lp, old, a, mask = tokens(13)
    ref, rollout = lp + 0.3, old - 0.5
    o = dict(loss_type="bnpo", rollout_correction="token_truncate", rollout_logprob=rollout)
    plain, _ = tk.policy_loss(lp, old, a, mask, **o)
    with_kl, metrics = tk.policy_loss(lp, old, a, mask, beta=0.2, ref_logprob=ref, **o)
    assert (with_kl - plain).item() == pytest.approx(0.2 * (math.exp(0.3) - 0.3 - 1), rel=1e-4)
    assert metrics["rollout_ratio"].item() == pytest.approx(math.exp(0.5), rel=1e-6)


def test_nan_of_an_unscored_rollout_token_drops_its_sequence() -> None:
    lp, old, a, mask = tokens(14)
    rollout = old.clone()
    rollout[1, 0] = torch.nan  # A < 0, so that the off-policy mask looks at the drift
    o = dict(rollout_correction="token_truncate", off_policy_threshold=10.0)
    torch.testing.assert_close(tk.policy_loss(lp, old, a, mask, rollout_logprob=rollout, **o)[0],
                               tk.policy_loss(lp, old, a, mask, rollout_logprob=old, **o)[0])  # fmt: skip


def test_padding_counts_in_the_entropy_quantile() -> None:
    """Zeros of masked positions among the entropies move the threshold of the top fraction."""
    lp, old, a, mask = tokens(15)
    entropy = torch.rand(4, 6, generator=generator(16)) + 0.5
    x = lp.clone().requires_grad_()
    loss, _ = tk.policy_loss(x, lp, a, mask, entropy=entropy, top_entropy=0.5)
    keep = mask & (entropy >= torch.quantile(entropy[mask], 0.5))
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], -a[:, None] * keep / mask.sum(), rtol=1e-5, atol=1e-7)


def test_quantile_of_more_than_2_to_24_entries() -> None:
    """torch.quantile refuses them; the selection here does not."""
    n = 2**24 + 9
    lp, entropy = torch.zeros(1, n), torch.rand(1, n, generator=generator(17))
    _, metrics = tk.policy_loss(lp, None, torch.ones(1), torch.ones(1, n, dtype=torch.bool), entropy=entropy, top_entropy=0.25)
    kept = -metrics["policy_loss"].item()
    assert kept == pytest.approx(0.25, abs=1e-6)


def test_nan_under_the_mask_leaks() -> None:
    """0 · NaN is NaN: masked positions must be selected away, not multiplied by 0."""
    lp, old, a, mask = tokens(18)
    dirty = lp.masked_fill(~mask, torch.nan)
    x = dirty.clone().requires_grad_()
    loss, _ = tk.policy_loss(x, old, a, mask)
    assert torch.equal(loss, tk.policy_loss(lp, old, a, mask)[0])
    assert torch.autograd.grad(loss, x)[0][~mask].eq(0).all()


def test_sapo_temperature_at_zero_advantage_and_gradient_at_one() -> None:
    """At r = 1 the gradient is −A whatever τ: the factor 4/τ undoes σ'."""
    lp = torch.full((1, 2), -1.0, requires_grad=True)
    for a in (2.0, -2.0):
        loss, _ = tk.policy_loss(lp, lp.detach(), torch.tensor([a]), torch.ones(1, 2), loss_type="sapo", tau=(1.0, 3.0))
        torch.testing.assert_close(torch.autograd.grad(loss, lp)[0], torch.full((1, 2), -a / 2))


def test_gspo_ratio_of_padding_or_of_the_sum() -> None:
    """exp of the mean over active tokens: neither over S nor the sum."""
    lp, old, a, mask = tokens(19)
    _, metrics = tk.policy_loss(lp, old, a, mask, loss_type="gspo")
    ratios = (((lp - old) * mask).sum(1) / mask.sum(1)).exp()
    assert metrics["ratio_max"].item() == pytest.approx(ratios.max().item(), rel=1e-6)
    assert metrics["ratio_min"].item() == pytest.approx(ratios.min().item(), rel=1e-6)


def test_vespo_weight_of_a_hopeless_sequence_is_nan() -> None:
    """ln w far below 0 on the negative side: φ goes to 0, not to NaN by ∞ · 0."""
    for shift in (-400.0, 400.0):
        lp = torch.full((1, 50), -1.0, requires_grad=True)
        loss, _ = tk.policy_loss(lp, lp.detach() - shift, torch.tensor([-1.0]), torch.ones(1, 50), loss_type="vespo")
        (grad,) = torch.autograd.grad(loss, lp)
        assert loss.isfinite() and grad.abs().max() < 1e-6
