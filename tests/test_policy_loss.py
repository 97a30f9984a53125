"""policy_loss on the CPU kernel against oracles: TRL's own code and formulas, and the papers' in the float64 reference.

Loss, metrics and gradients (logprob, entropy, ref_logprob), every loss type with every option, per sequence and packed, on
every ISA level. Float32 results must be within 1e-6 of float64 ones where the values are of order 1.
"""

from __future__ import annotations

import math
import warnings

import pytest
import thinkernel as tk
import torch
from test_reference_grpo import TRL_TYPES, rollout_ratio_by_hand, trl_loss, trl_name
from thinkernel.ops import dispatch
from thinkernel.reference.policy_loss import LOSS_TYPES
from thinkernel.reference.policy_loss import policy_loss as reference
from thinkernel.testing import assert_bitwise
from thinkernel.testing.compare import check

pytestmark = pytest.mark.skipif(dispatch.C is None, reason="needs the C++ extension")

F32, F64 = torch.float32, torch.float64
LEAVES = ("logprob", "entropy", "ref_logprob")


def batch(seed: int, b: int = 5, s: int = 37):
    """Float32: ratios on both sides of every clip bound, holes in the mask, an empty sequence, both signs of A."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g)
    logp = -draw(b, s).abs() - 0.1
    mask = torch.rand(b, s, generator=g) < 0.8
    mask[0], mask[b - 1] = True, False
    data = dict(
        logprob=logp, old_logprob=logp + 0.4 * draw(b, s), advantages=draw(b), mask=mask,
        ref_logprob=logp + 0.3 * draw(b, s), rollout_logprob=logp + 0.5 * draw(b, s), entropy=draw(b, s).abs(),
    )  # fmt: skip
    data["advantages"][:2] = torch.tensor([1.3, -0.7])
    return data


def pack(data, lengths):
    """The first lengths[b] tokens of each row, one after the other, and cu_seqlens."""
    inside = torch.arange(data["mask"].shape[1]) < torch.tensor(lengths)[:, None]
    packed = {k: v[inside] if v.dim() == 2 else v for k, v in data.items()}
    return packed | dict(cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int())


def run(f, data, options, dtype):
    """Loss, gradients to LEAVES (zeros where none), metrics."""
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}
    leaves = {k: inputs[k].clone().requires_grad_() for k in LEAVES}
    loss, metrics = f(**(inputs | leaves), **options)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values(), strict=True)], metrics


OPTIONS = {
    "plain": {},
    "clip-higher": dict(epsilon=0.1, epsilon_high=0.28),
    "two-sided": dict(delta=1.5, epsilon_high=0.28),
    "delta-inside-the-clip": dict(delta=1.1, epsilon_high=0.28),
    "k1": dict(beta=0.1, kl="k1"),
    "k2": dict(beta=0.1, kl="k2"),
    "k3": dict(beta=0.1),
    "k3-corrected": dict(beta=0.1, kl_correction=True),
    "k1-corrected": dict(beta=0.1, kl="k1", kl_correction=True),
    "off-policy": dict(off_policy_threshold=-0.05),
    "entropy-bonus": dict(entropy_coef=0.03),
    "top-entropy": dict(top_entropy=0.4, entropy_coef=0.03),
    "global-tokens": dict(num_items_in_batch=61),
    "log-ratio-clamp": dict(log_ratio_clamp=0.3),
    "no-clamp": dict(log_ratio_clamp=None),
    "sequence-ratio": dict(importance_sampling_level="sequence"),
    "sequence-ratio-kl": dict(importance_sampling_level="sequence", beta=0.1, kl_correction=True, log_ratio_clamp=0.5),
    "token-truncate": dict(rollout_correction="token_truncate", rollout_clip=(0.7, 1.4)),
    "token-mask": dict(rollout_correction="token_mask", rollout_clip=(0.7, 1.4)),
    "sequence-truncate": dict(rollout_correction="sequence_truncate", rollout_clip=(0.01, 1.4)),
    "sequence-mask": dict(rollout_correction="sequence_mask", rollout_clip=(0.01, 1.4)),
    "everything": dict(
        delta=1.5, beta=0.1, kl_correction=True, off_policy_threshold=-0.05, entropy_coef=0.03, top_entropy=0.6,
        rollout_correction="token_mask", rollout_clip=(None, 1.4),
    ),
}  # fmt: skip


def options_of(loss_type: str, name: str) -> dict:
    """The option's arguments for a loss type, or a skip where they contradict each other."""
    o = dict(OPTIONS[name], loss_type=loss_type)
    if loss_type == "vespo" and (name.startswith("sequence")):
        pytest.skip("vespo forms its sequence weight itself: an error by name")
    if loss_type == "cispo":
        o["epsilon_high"] = 1.3
    if loss_type == "dr_grpo":
        o["max_completion_length"] = 40
    return o


@pytest.mark.parametrize("layout", ["padded", "packed", "token-advantages"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equals_the_float64_reference(loss_type: str, option: str, layout: str) -> None:
    o = options_of(loss_type, option)
    data = batch(200)
    if layout == "token-advantages":
        data["advantages"] = torch.randn(data["mask"].shape, generator=torch.Generator().manual_seed(1))
    if layout == "packed":
        data = pack(data, [37, 16, 1, 0, 23])
    with tk.use_backend("cpu"):
        loss, grads, metrics = run(tk.policy_loss, data, o, F32)
    want, want_grads, want_metrics = run(reference, data, o, F64)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6, abs=1e-6)
    for got, ref in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got.double(), ref, rtol=1e-6, atol=1e-6)
    assert metrics.keys() == want_metrics.keys()
    for name, value in metrics.items():
        assert value.item() == pytest.approx(want_metrics[name].item(), rel=2e-6, abs=1e-6), name


TRL_OPTIONS = [
    "plain", "clip-higher", "two-sided", "k3", "k3-corrected", "off-policy", "entropy-bonus", "top-entropy", "global-tokens",
    "sequence-ratio", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask", "everything",
]  # fmt: skip


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("option", TRL_OPTIONS)
@pytest.mark.parametrize("loss_type", TRL_TYPES)
def test_equals_trl(loss_type: str, option: str, layout: str) -> None:
    """TRL's GRPOTrainer._compute_loss itself, in float64, on the same numbers."""
    pytest.importorskip("trl")
    o = options_of(loss_type, option)
    o["epsilon"] = 0.2  # its stand-in's lower bound
    lengths = [37, 16, 1, 0, 23]
    data = batch(300)
    data["mask"] &= torch.arange(37) < torch.tensor(lengths)[:, None]
    wide = {k: v.double() for k, v in data.items()}
    leaves = [wide[k].requires_grad_() for k in LEAVES[:2]]
    theirs = dict(o, level=o.pop("importance_sampling_level", None)) | trl_name(loss_type)
    if o.get("rollout_correction"):
        theirs["is_ratio"] = rollout_ratio_by_hand(wide, o["rollout_correction"], *o["rollout_clip"])
    if theirs.get("num_items_in_batch"):
        theirs["num_items_in_batch"] = torch.tensor(float(theirs["num_items_in_batch"]))
    want = trl_loss(wide, **theirs)
    want_grads = [
        torch.zeros_like(x) if g is None else g
        for g, x in zip(torch.autograd.grad(want, leaves, allow_unused=True), leaves, strict=True)
    ]
    if theirs["level"] == "sequence" and loss_type not in ("gspo", "luspo"):
        o["importance_sampling_level"] = "sequence"
    with tk.use_backend("cpu"):
        loss, grads, _ = run(tk.policy_loss, pack(data, lengths) if layout == "packed" else data, o, F32)
    inside = torch.arange(37) < torch.tensor(lengths)[:, None]
    assert loss.item() == pytest.approx(want.item(), rel=1e-6, abs=1e-6)
    for got, ref in zip(grads[:2], want_grads, strict=True):
        torch.testing.assert_close(got.double(), ref[inside] if layout == "packed" else ref, rtol=1e-6, atol=1e-6)


def test_rloo_equals_trl() -> None:
    pytest.importorskip("trl")
    data = batch(310, s=7)
    data["mask"][-1, :2] = True
    wide = {k: v.double() for k, v in data.items()}
    want = trl_loss(wide | dict(logprob=wide["logprob"].requires_grad_()), loss_type="rloo", trainer="rloo")
    with tk.use_backend("cpu"):
        loss, grads, _ = run(tk.policy_loss, data, dict(loss_type="rloo"), F32)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(grads[0].double(), torch.autograd.grad(want, wide["logprob"])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", dispatch.C.isa_levels() if dispatch.C else [])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "cispo", "sapo", "vespo", "rloo"])
def test_every_isa_level(level: str, loss_type: str) -> None:
    """Within the rule, over draws enough that it is not one rounding against another."""
    former = dispatch.C.isa()
    o = options_of(loss_type, "everything")
    found, truth, base = [], [], []
    for seed in range(30):
        data = batch(320 + seed, s=61)
        want, want_grads, want_metrics = run(reference, data, o, F64)
        try:
            dispatch.C.set_isa(level)
            loss, grads, metrics = run(tk.policy_loss, data, o, F32)
        finally:
            dispatch.C.set_isa(former)
        assert loss.item() == pytest.approx(want.item(), rel=1e-6, abs=1e-6)
        for name, value in metrics.items():
            assert value.item() == pytest.approx(want_metrics[name].item(), rel=2e-6, abs=1e-6), name
        found.append(grads)
        truth.append(want_grads)
        base.append(run(reference, data, o, F32)[1])
    for name, *columns in zip(LEAVES, zip(*found), zip(*truth), zip(*base)):
        check(*(torch.stack(x) for x in columns), name=f"d{name}")


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "vespo", "sapo"])
def test_many_blocks_and_threads_give_the_same_bits(loss_type: str) -> None:
    """Sequences longer than a block of 4096 tokens, and 300 of a few; one thread or several."""
    o = options_of(loss_type, "everything")
    g = torch.Generator().manual_seed(7)
    lengths = [9001, 4096, 5, 1, 4097, *torch.randint(1, 9, (300,), generator=g).tolist()]
    n = sum(lengths)
    draw = lambda *shape: torch.randn(shape, generator=g)
    logp = -draw(n).abs()
    data = dict(
        logprob=logp, old_logprob=logp + 0.02 * draw(n), advantages=draw(len(lengths)), mask=torch.rand(n, generator=g) < 0.7,
        ref_logprob=logp + 0.2 * draw(n), rollout_logprob=logp + 0.02 * draw(n), entropy=draw(n).abs(),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
    )  # fmt: skip
    results = []
    former = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss, grads, metrics = run(tk.policy_loss, data, o, F32)
            results.append([loss, *grads, *metrics.values()])
    finally:
        torch.set_num_threads(former)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bitwise(a, b)
    want, want_grads, _ = run(reference, data, o, F64)
    base, base_grads, _ = run(reference, data, o, F32)
    assert results[0][0].item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
    for got, ref, b in zip(results[0][1:4], want_grads, base_grads, strict=True):
        check(got, ref, b)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, F32, torch.bfloat16, F64])
def test_masks_of_every_dtype(dtype: torch.dtype) -> None:
    data = batch(330)
    o = dict(loss_type="grpo")
    want, want_grads, _ = run(tk.policy_loss, data, o, F32)
    mask = data["mask"].to(dtype)
    if dtype.is_floating_point:
        mask = torch.where(mask == 0, -0.0, mask.float()).to(dtype)
    elif dtype != torch.bool:
        mask = mask * (64 if dtype == torch.uint8 else -128 if dtype == torch.int16 else 1 << 30)
    loss, metrics = tk.policy_loss(data["logprob"], data["old_logprob"], data["advantages"], mask, **o)
    assert_bitwise(loss, want)
    assert metrics["tokens"] == data["mask"].sum()


def test_strided_rows_and_expanded_masks() -> None:
    data = batch(331)
    wide = {k: torch.stack([v, v + 9], -1).flatten(-2)[..., ::2] if k in ("entropy",) else v for k, v in data.items()}
    wide["logprob"] = torch.cat([torch.full((5, 3), torch.nan), data["logprob"], torch.ones(5, 2)], 1)[:, 3:-2]
    wide["mask"] = torch.cat([data["mask"], ~data["mask"]], 1)[:, :37]
    o = options_of("gspo", "top-entropy")
    for a, b in zip(run(tk.policy_loss, data, o, F32)[:2], run(tk.policy_loss, wide, o, F32)[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    a = tk.policy_loss(data["logprob"], None, torch.ones(1).expand(5), torch.ones(1, 1, dtype=torch.bool).expand(5, 37))[0]
    assert a.item() == -1


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_positions_never_matter(loss_type: str) -> None:
    o = options_of(loss_type, "everything")
    data = batch(332)
    dirty = {k: v.clone() for k, v in data.items()}
    dirt = dict(logprob=torch.nan, old_logprob=-torch.inf, ref_logprob=torch.inf, rollout_logprob=torch.nan, entropy=torch.nan)
    for name, value in dirt.items():
        dirty[name][~data["mask"]] = value
    dirty["advantages"][-1] = torch.nan  # of a sequence without active tokens
    clean, grads, metrics = run(tk.policy_loss, data, o, F32)
    got, got_grads, got_metrics = run(tk.policy_loss, dirty, o, F32)
    for a, b in zip([clean, *grads, *metrics.values()], [got, *got_grads, *got_metrics.values()], strict=True):
        assert_bitwise(a, b)
    assert grads[0][~data["mask"]].eq(0).all()


def test_nan_stays_in_its_sequence() -> None:
    """The loss is NaN, as it must be; the gradients of the other sequences stay what they were."""
    data = batch(333)
    for loss_type in ("dapo", "gspo", "vespo"):
        _, clean, _ = run(tk.policy_loss, data, dict(loss_type=loss_type), F32)
        dirty = dict(data, logprob=data["logprob"].clone())
        dirty["logprob"][1, torch.nonzero(data["mask"][1])[0]] = torch.nan
        loss, grads, metrics = run(tk.policy_loss, dirty, dict(loss_type=loss_type), F32)
        assert loss.isnan() and metrics["ratio_max"].isnan() and metrics["ratio_min"].isnan()
        keep = [0, 2, 3, 4]
        assert_bitwise(grads[0][keep], clean[0][keep])


@pytest.mark.parametrize("b, s", [(0, 3), (2, 0), (2, 3), (1, 1)])
def test_empty_and_fully_masked(b: int, s: int) -> None:
    for loss_type in LOSS_TYPES:
        o = options_of(loss_type, "top-entropy")
        lp = torch.zeros(b, s, requires_grad=True)
        entropy = torch.ones(b, s, requires_grad=True)
        with tk.use_backend("cpu"):
            loss, metrics = tk.policy_loss(lp, lp.detach(), torch.ones(b), torch.zeros(b, s), entropy=entropy, **o)
        assert loss.item() == 0 and metrics["tokens"] == 0
        assert (metrics["ratio_min"].item(), metrics["ratio_max"].item()) == (math.inf, -math.inf)
        loss.backward()
        assert lp.grad.eq(0).all() and entropy.grad.eq(0).all()


def test_gradient_scales_and_backward_twice() -> None:
    """The kept gradient is scaled in place once; a second backward through the retained graph computes it again."""
    data = batch(334)
    _, (want, *_), _ = run(tk.policy_loss, data, {}, F32)
    lp = data["logprob"].clone().requires_grad_()
    data["logprob"] = lp
    data.pop("entropy")
    loss, _ = tk.policy_loss(**data)
    for factor in (1.0, 4.0, 0.5):
        (got,) = torch.autograd.grad(loss * factor, lp, retain_graph=True)
        assert_bitwise(got, want * factor)
    (half,) = torch.autograd.grad(loss, lp, create_graph=True)
    with pytest.raises(NotImplementedError, match="policy_loss_backward has no gradient"):
        half.sum().backward()


def test_low_precision_inputs_keep_their_dtype_in_the_gradient() -> None:
    data = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(335).items()}
    lp = data["logprob"].requires_grad_()
    loss, _ = tk.policy_loss(lp, data["old_logprob"], data["advantages"], data["mask"])
    (grad,) = torch.autograd.grad(loss, lp)
    assert loss.dtype == F32 and grad.dtype == torch.bfloat16
    want, want_grads, _ = run(reference, {k: v.float() if v.is_floating_point() else v for k, v in data.items()}, {}, F64)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(grad.double(), want_grads[0], rtol=2**-8, atol=1e-9)


def test_constants_get_no_gradient_and_no_old_is_on_policy() -> None:
    """old_logprob = logprob undetached is the on-policy loss, not a ratio whose gradient cancels."""
    data = batch(336)
    for backend in ("cpu", "reference"):
        with tk.use_backend(backend):
            lp = data["logprob"].clone().requires_grad_()
            a = data["advantages"].clone().requires_grad_()
            grads = []
            for old in (lp, lp.detach(), None):
                loss, metrics = tk.policy_loss(lp, old, a, data["mask"], loss_type="bnpo")
                grads.append(torch.autograd.grad(loss, [lp, a], allow_unused=True))
                assert metrics["ratio_max"] == 1
            assert grads[0][0].abs().max() > 0 and all(g[1] is None for g in grads)
            assert_bitwise(grads[0][0], grads[2][0])
            assert_bitwise(grads[1][0], grads[2][0])


def test_float64_takes_the_reference() -> None:
    data = {k: v.double() for k, v in batch(337).items()}
    assert tk.explain(tk.policy_loss, data["logprob"], None, data["advantages"], data["mask"]).startswith("policy_loss: reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, _ = tk.policy_loss(data["logprob"], None, data["advantages"], data["mask"])
    assert loss.dtype == F64
    with tk.use_backend("cpu"), pytest.raises(NotImplementedError, match="float64"):
        tk.policy_loss(data["logprob"], None, data["advantages"], data["mask"])


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "vespo"])
def test_compiles_in_one_graph(loss_type: str) -> None:
    torch._dynamo.reset()
    o = options_of(loss_type, "everything")
    data = batch(338)
    compiled = torch.compile(tk.policy_loss, fullgraph=True, backend="aot_eager")
    for items in (61, 77.0, torch.tensor(50)):  # a number that changes from step to step
        a = run(tk.policy_loss, data, o | dict(num_items_in_batch=items), F32)
        b = run(compiled, data, o | dict(num_items_in_batch=items), F32)
        for x, y in zip([a[0], *a[1], *a[2].values()], [b[0], *b[1], *b[2].values()], strict=True):
            assert_bitwise(x, y)


BAD = [
    ("logprob", dict(logprob=torch.zeros(2, 3, 4))),
    ("logprob", dict(logprob=torch.zeros(2, 3, dtype=torch.int32))),
    ("old_logprob", dict(old_logprob=torch.zeros(2, 4))),
    ("ref_logprob", dict(ref_logprob=[0.0])),
    ("advantages", dict(advantages=torch.zeros(3))),
    ("advantages", dict(advantages=torch.zeros(2, 1))),
    ("mask", dict(mask=torch.ones(2, 3, dtype=torch.complex64))),
    ("mask", dict(mask=None)),
    ("epsilon", dict(epsilon=-0.1)),
    ("epsilon", dict(epsilon=float("nan"))),
    ("delta", dict(delta=0.0)),
    ("beta", dict(beta=float("inf"))),
    ("log_ratio_clamp", dict(log_ratio_clamp=0.0)),
    ("tau", dict(tau=(1.0, 0.0))),
    ("max_completion_length", dict(loss_type="dr_grpo", max_completion_length=0)),
    ("num_items_in_batch", dict(num_items_in_batch=torch.ones(2))),
    ("num_items_in_batch", dict(num_items_in_batch=-5)),
    ("rollout_clip", dict(rollout_logprob=torch.zeros(2, 3), rollout_correction="token_mask", rollout_clip=(2.0, 1.0))),
    ("cu_seqlens", dict(logprob=torch.zeros(6), mask=torch.ones(6), old_logprob=None, cu_seqlens=torch.tensor([0, 4, 5]))),
    ("cu_seqlens", dict(logprob=torch.zeros(6), mask=torch.ones(6), old_logprob=None, cu_seqlens=torch.tensor([0, 9, 6]))),
    ("advantages", dict(logprob=torch.zeros(2), mask=torch.ones(2), old_logprob=None, cu_seqlens=torch.tensor([0, 2, 2]))),
]


@pytest.mark.parametrize("i", range(len(BAD)), ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(i: int) -> None:
    name, change = BAD[i]
    inputs = dict(logprob=torch.zeros(2, 3), old_logprob=torch.zeros(2, 3), advantages=torch.zeros(2), mask=torch.ones(2, 3)) | change
    with pytest.raises((ValueError, TypeError), match=rf"^{name}:"):
        tk.policy_loss(**inputs)
