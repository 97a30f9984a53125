"""linear_logprob over a group: two gloo processes against the single-process result, and the errors.

Shapes: N rows, D hidden, V words, split unevenly over the ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import thinkernel as tk
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from thinkernel.ops.dispatch import C
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "linear_logprob_forward"), reason="the C++ core is not built")
RESULTS = "logprob entropy dhidden dweight dbias".split()
N, D, V = 61, 40, 1009
OPTIONS = dict(temperature=0.8, softcap=12.0, ignore_index=3)  # a token number to be ignored, as padding is


def _inputs(dtype: torch.dtype) -> dict[str, Any]:
    draw = Draw(21, dtype)
    bias = draw.normal(V)
    bias[600:] = -torch.inf  # with the cut at 600, all words of the second rank
    target = draw.integers(0, V, N, dtype=torch.int64)
    target[::7] = 3
    return dict(
        hidden=draw.normal(N, D), weight=draw.normal(V, D, scale=3 * D**-0.5), bias=draw.normal(V), masked=bias, target=target,
        g=[draw.normal(N, dtype=torch.float32) for _ in range(2)],
    )


def _run(x: dict[str, Any], words: slice, bias: str, **more: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x["hidden"], x["weight"][words], x[bias][words])]
    target = x["target"] if bias == "bias" else x["target"] % 600
    out = tk.linear_logprob(leaves[0], leaves[1], target, bias=leaves[2], **OPTIONS, **more)
    return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, x["g"])]


def _rank(rank: int, cuts: list[int], folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(cuts) - 1)
    torch.set_num_threads(1)
    words, group = slice(cuts[rank], cuts[rank + 1]), dist.group.WORLD
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = _inputs(dtype)
        for bias in ("bias", "masked"):
            found[f"{dtype} {bias}"] = _run(x, words, bias, group=group)
        found[f"{dtype} kept"] = _run(x, words, "bias", group=group, keep_logits=True)
        weight = x["weight"][words].clone().requires_grad_()
        weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
        tk.linear_logprob(x["hidden"], weight, x["target"], group=group)[0].sum().backward()
        found[f"{dtype} main_grad"] = [weight.main_grad, weight.grad]
    x = _inputs(torch.float32)
    lp, none = tk.linear_logprob(x["hidden"], x["weight"][words], x["target"], entropy=False, group=group)
    found["no entropy"] = [lp, none]
    empty = tk.linear_logprob(x["hidden"][:0].requires_grad_(), x["weight"][words], x["target"][:0], group=group)[0]
    empty.sum().backward()
    found["empty"] = [empty.detach()]
    try:
        tk.linear_logprob(x["hidden"], x["weight"][words], x["target"] + V, group=group)
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("cuts", [[0, 600, V], [0, 1, 400, V]], ids=["two", "three"])
def test_sharded_equals_whole(cuts: list[int], tmp_path: Path) -> None:
    mp.spawn(_rank, (cuts, str(tmp_path)), nprocs=len(cuts) - 1)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(cuts) - 1)]
    for dtype in (torch.float32, torch.bfloat16):
        x = _inputs(dtype)
        x64 = {k: [y.double() for y in v] if isinstance(v, list) else v.double() if v.is_floating_point() else v for k, v in x.items()}
        for key, bias in (("bias", "bias"), ("masked", "masked"), ("kept", "bias")):
            for i in range(3):  # the same bits on every rank
                for rank in ranks[1:]:
                    assert_bitwise(rank[f"{dtype} {key}"][i], ranks[0][f"{dtype} {key}"][i], RESULTS[i])
            ours = ranks[0][f"{dtype} {key}"][:3] + [torch.cat([rank[f"{dtype} {key}"][i] for rank in ranks]) for i in (3, 4)]
            with tk.use_backend("cpu"):
                whole = _run(x, slice(None), bias)
            with tk.use_backend("reference"):
                truth, plain = _run(x64, slice(None), bias), _run(x, slice(None), bias)
            for name, a, single, b, c in zip(RESULTS, ours, whole, truth, plain, strict=True):
                logits = c if key != "kept" or dtype == torch.float32 else _rounded_logits(x)[name]
                check(a, b, logits, dtype=a.dtype, name=f"{name} {dtype} {key}")
                check(single, b, c, dtype=a.dtype, name=f"{name} {dtype} alone")
        weight = x["weight"].clone().requires_grad_()
        tk.linear_logprob(x["hidden"], weight, x["target"])[0].sum().backward()
        added = torch.cat([rank[f"{dtype} main_grad"][0] for rank in ranks]) - 1
        torch.testing.assert_close(added, weight.grad.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        assert all(rank[f"{dtype} main_grad"][1] is None for rank in ranks)
    lp, none = ranks[0]["no entropy"]
    x = _inputs(torch.float32)
    torch.testing.assert_close(lp, tk.linear_logprob(x["hidden"], x["weight"], x["target"])[0], rtol=1e-5, atol=1e-5)
    assert none is None
    assert ranks[0]["empty"][0].shape == (0,)
    assert all(rank["error"].startswith("target: got ") and f"takes values in 0..{V - 1}" in rank["error"] for rank in ranks)


def _rounded_logits(x: dict[str, Any]) -> dict[str, Tensor]:
    """What torch does: logits of the tensors' dtype."""
    leaves = [x[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    y = torch.nn.functional.linear(*leaves).float()
    log_p = (12.0 * torch.tanh(y / 12.0) / 0.8).log_softmax(-1)
    active = x["target"] != 3
    lp = torch.where(active, log_p.gather(1, x["target"][:, None])[:, 0], 0.0)
    out = [lp, torch.where(active, -(log_p.exp() * log_p).sum(-1), 0.0)]
    return dict(zip(RESULTS, [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, x["g"])], strict=True))


def test_group_must_be_a_group() -> None:
    with pytest.raises(TypeError, match="^group: got str, takes a torch.distributed group"):
        tk.linear_logprob(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long), group="model")
