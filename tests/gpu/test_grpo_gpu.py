"""The grpo kernels on a GPU, Triton and CUDA, against the float64 reference: this file passing marks the CUDA ones as verified.

Shapes: logits [N, V], B sequences of S tokens (packed: N tokens), R samples.
"""

from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from thinkernel.ops.memory import poisoned_results
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

pytestmark = pytest.mark.gpu
BACKENDS = ["cuda", "triton"]
NAN = float("nan")


def logprob(backend: str, device: str, logits: Tensor, target: Tensor, g: Tensor, h: Tensor, **options: Any) -> list[Tensor]:
    """logprob, entropy, dlogits, back on the CPU."""
    leaf = logits.to(device).requires_grad_()
    with tk.use_backend(backend), poisoned_results():
        rows = tk.logprob(leaf, target.to(device), **options)
        grads = torch.autograd.grad(rows, leaf, [x.to(device, rows[0].dtype) for x in (g, h)])
    return [x.detach().cpu() for x in (*rows, *grads)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40, 151936), (17, 50257), (300, 32003), (70_000, 5), (4000, 50)], ids=str)
@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, softcap=20.0)], ids=str)
def test_logprob(options: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(sum(shape))
    logits, target = (3 * torch.randn(shape)).to(dtype), torch.randint(0, shape[1], shape[:1])
    target[::7] = -100
    g, h = torch.randn(2, shape[0])
    want = logprob("reference", "cpu", logits.double(), target, g, h, **options)
    base = logprob("reference", "cpu", logits, target, g, h, **options)
    first, second = (logprob(backend, "cuda", logits, target, g, h, **options) for _ in range(2))
    one = slice(5, 6)
    alone = logprob(backend, "cuda", logits[one], target[one], g[one], h[one], **options)
    for name, x, again, row, ref, same in zip(("logprob", "entropy", "dlogits"), first, second, alone, want, base, strict=True):
        check(x, ref, same, name=name)
        assert_bitwise(x, again, f"{name}, second run")
        assert_bitwise(x[one], row, f"{name}, a row alone")


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprob_of_more_than_2_to_the_31_logits(backend: str) -> None:
    N, V = 36_000, 65_536
    logits = torch.zeros(N, V, dtype=torch.bfloat16, device="cuda").requires_grad_()
    with torch.no_grad():
        logits[-1] = torch.randn(V, device="cuda")
    target = torch.full((N,), 7, device="cuda")
    with tk.use_backend(backend):
        lp, ent = tk.logprob(logits, target)
        (d,) = torch.autograd.grad(lp.sum(), logits)
    row = logits[-1:].detach().double().cpu().log_softmax(-1)
    assert abs(lp[-1].item() - row[0, 7].item()) < 1e-5 and abs(lp[0].item() + torch.tensor(65536.0).log().item()) < 1e-5
    assert abs(d[-1, 7].item() - (1 - row[0, 7].exp().item())) < 1e-2 and (ent > 0).all()


def draw(packed: bool, per_token: bool, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3000, 0, 1024, 17, 2049, 700])
    shape = (int(lengths.sum()),) if packed else (len(lengths), int(lengths.max()))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    mask = torch.rand(shape, generator=generator) < 0.8
    logprob = -normal(*shape).abs()
    inputs = dict(
        logprob=logprob, old_logprob=logprob + 0.2 * normal(*shape), ref_logprob=logprob + 0.3 * normal(*shape),
        rollout_logprob=logprob + 0.02 * normal(*shape), entropy=normal(*shape).abs(), mask=mask,
        advantages=normal(*shape) if per_token else normal(len(lengths)),
    )  # fmt: skip
    if packed:
        inputs["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    else:
        mask &= torch.arange(shape[1]) < lengths[:, None]
    for name in ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "entropy"):
        inputs[name][~mask] = NAN
    return inputs


def loss(backend: str, device: str, dtype: torch.dtype, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    inputs = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in ("logprob", "entropy", "ref_logprob")]
    with tk.use_backend(backend), poisoned_results():
        value, metrics = tk.policy_loss(**inputs, **options)
        grads = torch.autograd.grad(2 * value, leaves, allow_unused=True)
    found = {"loss": value.detach(), **{f"metric {k}": v for k, v in metrics.items()}}
    return {name: x.cpu() for name, x in (found | {f"d{i}": g for i, g in enumerate(grads) if g is not None}).items()}


OPTIONS: list[dict[str, Any]] = [
    dict(loss_type="grpo", delta=1.1, beta=0.2, kl="k1"),
    dict(loss_type="bnpo", beta=0.1, kl="k2", kl_correction=True, log_ratio_clamp=0.15),
    dict(loss_type="dr_grpo", max_completion_length=4000, importance_sampling_level="sequence", beta=0.1, kl_correction=True),
    dict(loss_type="dapo", epsilon_high=0.28, num_items_in_batch=20_000, entropy_coef=0.01),
    dict(loss_type="dapo", top_entropy=0.3, entropy_coef=0.02, rollout_correction="token_truncate", rollout_clip=(0.8, 1.2)),
    dict(loss_type="gspo", rollout_correction="sequence_truncate", rollout_clip=(None, 1.5), off_policy_threshold=0.02),
    dict(loss_type="cispo", epsilon_high=1.1, rollout_correction="token_mask", rollout_clip=(0.9, 1.3)),
    dict(loss_type="sapo", tau=(1.2, 1.5)),
    dict(loss_type="luspo", rollout_correction="sequence_mask", rollout_clip=(0.5, 1.4)),
    dict(loss_type="vespo"),
    dict(loss_type="reinforce", entropy_coef=0.1),
    dict(loss_type="rloo", log_ratio_clamp=0.5),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_policy_loss(options: dict[str, Any], packed: bool, backend: str) -> None:
    inputs = draw(packed, not packed, len(options))
    want, base = (loss("reference", "cpu", dtype, inputs, options) for dtype in (torch.float64, torch.float32))
    first, second = (loss(backend, "cuda", torch.float32, inputs, options) for _ in range(2))
    assert first.keys() == want.keys()
    for name, x in first.items():
        assert_bitwise(x, second[name], f"{name}, second run")
        if x.dim():
            check(x.flatten(), want[name].flatten(), base[name].flatten(), name=name)
        else:
            bound = 2 * (base[name] - want[name]).abs() + 4 * torch.finfo(torch.float32).eps * want[name].abs().clamp(min=0.1)
            assert (x - want[name]).abs() <= bound, f"{name}: {x.item()} against {want[name].item()}"


RULES: list[dict[str, Any]] = [dict(normalize=rule) for rule in ("group", "none", "batch", "rloo", "maxrl", "whiten")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [*RULES, dict(correction=0), dict(aggregation="normalize_then_sum")], ids=str)
def test_advantages(rule: dict[str, Any], backend: str) -> None:
    torch.manual_seed(4)
    R = 4096
    rewards = torch.randn(R, 3) + 2
    rewards[8:16], rewards[24:32, 0], rewards[33], rewards[40:47] = 0.1, NAN, NAN, NAN
    for more in (dict(group_size=8), dict(group_ids=torch.randint(-99, 99, (R,)))):
        found = {}
        reference = ("cpu", "reference")
        runs = (("out", "cuda", backend, torch.float32), ("ref", *reference, torch.float64), ("base", *reference, torch.float32))
        for name, device, kind, dtype in runs:
            given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in more.items()}
            with tk.use_backend(kind), poisoned_results():
                a, zero = tk.group_advantages(rewards.to(device, dtype), return_zero_variance=True, **given, **rule)
            found[name] = (a.cpu(), zero.cpu())
        check(found["out"][0], found["ref"][0], found["base"][0])
        assert torch.equal(found["out"][1], found["ref"][1]) and (found["out"][0][found["out"][1]] == 0).all()
