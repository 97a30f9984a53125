"""Experts over a process group, and the balance losses: gloo processes against one process.

Float32 and one process's arithmetic: the same bits. Shapes: N tokens of all ranks, H hidden, I intermediate, E experts.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import thinkernel as tk
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.utils.checkpoint
from thinkernel import nn
from thinkernel.models import ModelConfig, Transformer
from thinkernel.ops.dispatch import C
from thinkernel.ops.moe_parallel import expert_parallel, expert_range
from thinkernel.reference import moe as reference
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from thinkernel.testing.moe import expert_inputs, torch_moe
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "moe_forward"), reason="the C++ core is not built")
ROWS = ("x", "weights", "experts")
EXPERT = ("w_gate_up", "w_down", "b_gate_up", "b_down")

# what one process computes: sizes of expert_inputs, tk.moe's options, and where the tokens of rank 1 begin
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "uneven experts": (dict(N=61, E=7, biases=True), {}, 20),
    "gpt-oss": (dict(N=40, in_out=True, biases=True, spread=4.0), dict(layout="in_out", activation="gpt_oss"), 25),
    "llama 4": (dict(N=40, K=1, in_out=True), dict(layout="in_out", weight_on="input"), 15),
    "weight on the input": (dict(N=40, E=5), dict(weight_on="input", limit=1.0), 15),
    "no tokens on a rank": (dict(N=30, E=5), {}, 30),
    "no tokens on the first": (dict(N=30, E=5), {}, 0),
    "no experts on a rank": (dict(N=30, E=1, K=1, biases=True), {}, 13),
    "no tokens at all": (dict(N=0, E=4), {}, 0),
    "one expert takes all": (dict(N=50, E=4, K=1), {}, 13),
    "nobody's": (dict(N=40, E=5), {}, 21),
    "many": (dict(N=1100, E=3, K=2, H=36), {}, 300),
}  # fmt: skip


def inputs_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = expert_inputs(Draw(31, dtype), **CASES[name][0])
    if name == "one expert takes all":
        inputs["experts"][:] = 3
    if name == "nobody's":
        inputs["experts"][::3, 1] = -1
        inputs["experts"][7] = 99
    return inputs


def run(function: Any, inputs: dict[str, Tensor], options: dict[str, Any], dy: Tensor, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """y and gradients; without a gradient to what is named in skip."""
    leaves = {n: x if n == "experts" else x.detach().clone().requires_grad_(n not in skip) for n, x in inputs.items()}
    y = function(**leaves, **options)
    names = [n for n, x in leaves.items() if x.requires_grad]
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(names, torch.autograd.grad(y, [leaves[n] for n in names], dy.to(y.dtype)))}


def own_part(inputs: dict[str, Tensor], cut: int, rank: int, n_expert: int) -> dict[str, Tensor]:
    rows = slice(0, cut) if rank == 0 else slice(cut, None)
    first, end = expert_range(n_expert, dist.group.WORLD)
    return {n: t[rows] if n in ROWS else t[first:end] for n, t in inputs.items()}


def _experts(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (_, options, cut) in CASES.items():
            inputs = inputs_of(name, dtype)
            n_expert = len(inputs["w_down"])
            own = own_part(inputs, cut, rank, n_expert)
            dy = Draw(9).normal(*inputs["x"].shape)[slice(0, cut) if rank == 0 else slice(cut, None)]
            more = options | dict(n_expert=n_expert, group=dist.group.WORLD)
            found[f"{name} {dtype}"] = run(expert_parallel, own, more, dy)
            with torch.no_grad():
                assert_bitwise(expert_parallel(**own, **more), found[f"{name} {dtype}"]["y"], "without a gradient")
            if name == "uneven experts":  # each rank wants other gradients: x's on rank 1 alone
                skip = ("x", "weights") if rank == 0 else ("w_down",)
                for n, t in run(expert_parallel, own, more, dy, skip).items():
                    assert_bitwise(t, found[f"{name} {dtype}"][n], n)
    return found


def _module(rank: int, folder: str) -> dict[str, Any]:
    """A whole module made expert parallel, and one built so that loads the whole one's weights."""
    group, whole = dist.group.WORLD, whole_module()
    torch.save(whole.state_dict(), f"{folder}/whole{rank}.pt")
    module = nn.MixtureOfExperts(12, 16, 7, 3, group=group, **MODULE)
    module.load_state_dict(whole.state_dict())
    whole.shard(group)
    for name, t in whole.state_dict().items():
        assert_bitwise(t, module.state_dict()[name], name)
    assert module.w_down.shape[0] == (4 if rank == 0 else 3)
    x, dy = module_inputs()
    rows = slice(0, 17) if rank == 0 else slice(17, None)
    x = x[rows].requires_grad_()
    y, losses = module(x, return_losses=True, return_experts=True)
    replayed = module(x, experts=losses.experts)
    assert_bitwise(replayed, y, "replay")
    grads = torch.autograd.grad([y, losses.balance, losses.z], [x, *module.parameters()], [dy[rows], torch.ones(()), torch.ones(())])
    twice = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)  # its forward and collectives again in the backward
    plain = torch.autograd.grad(module(x), [x, *module.parameters()], dy[rows])
    for a, b in zip(torch.autograd.grad(twice, [x, *module.parameters()], dy[rows]), plain, strict=True):
        assert_bitwise(a, b, "checkpointed")
    with torch.autocast("cpu", torch.bfloat16):
        cast = module(x)
    cast.float().backward(dy[rows])
    torch.testing.assert_close(cast.float(), y, rtol=0.1, atol=0.1)
    module.update_bias(losses.counts, rate=0.5)
    names = ["x", *dict(module.named_parameters())]
    plain = {"y": y.detach(), "balance": losses.balance.detach(), "z": losses.z.detach(), "bias": module.expert_bias}
    return plain | dict(zip(names, grads))


def tiny_decoder() -> Transformer:
    torch.manual_seed(4)
    shape = dict(vocab_size=40, layers=2, hidden=16, heads=2, ff_dim=24, experts=5, experts_per_token=2, expert_dim=12, init_std=0.3)
    return Transformer(ModelConfig(**shape))


def decoder_step(model: Transformer, rows: slice) -> dict[str, Tensor]:
    """A training forward on some rows of a batch, the loss a sum over tokens."""
    tokens = Draw(7).integers(0, 40, 6, 10, dtype=torch.int64)[rows]
    out = model(tokens[:, :-1], targets=tokens[:, 1:], lengths=torch.tensor([9, 4, 9, 9, 7, 2])[rows], return_losses=True)
    out.logprob.square().sum().backward()
    return {"logprob": out.logprob.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _decoder(rank: int) -> dict[str, Tensor]:
    model = tiny_decoder()
    for block in model.blocks:
        block.feed_forward.shard(dist.group.WORLD)
    return decoder_step(model, slice(0, 4) if rank == 0 else slice(4, None))


MODULE: dict[str, Any] = dict(score="sigmoid", expert_bias=True, shared_experts=1, bias=True, scaling=1.5)


def whole_module() -> nn.MixtureOfExperts:
    torch.manual_seed(3)
    module = nn.MixtureOfExperts(12, 16, 7, 3, **MODULE)
    with torch.no_grad():
        for t in (module.b_gate_up, module.b_down, module.expert_bias):
            t.normal_(std=0.3)
    return module


def module_inputs() -> tuple[Tensor, Tensor]:
    return Draw(5).normal(50, 12), Draw(6).normal(50, 12)


LOSSES: dict[str, Any] = {
    "one": lambda x, **more: tk.load_balancing_loss(x["probs"], x["counts"], **more),
    "top_k": lambda x, **more: tk.load_balancing_loss(x["probs"], x["counts"], normalize="top_k", **more),
    "z": lambda x, **more: tk.router_z_loss(x["probs"], **more),
    "sequence": lambda x, **more: tk.sequence_balance_loss(x["probs"], x["experts"], x["cu_seqlens"], **more),
}


def loss_inputs(rows: slice, bounds: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    logits = Draw(12).normal(53, 6).to(dtype)[rows]
    routing = reference.route(logits, 2)
    return dict(
        probs=logits.softmax(-1).requires_grad_(), experts=routing.experts, counts=routing.counts,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
    )  # fmt: skip


def _losses(rank: int, cut: int) -> dict[str, Any]:
    inner = [0, 9, 9] if cut else [0]  # sequences end at 9, 9 (empty), 20 and 53
    rows, bounds = (slice(0, cut), [*inner, cut] if cut else [0]) if rank == 0 else (slice(cut, None), [0, 53 - cut])
    found = {}
    for name, loss in LOSSES.items():
        x = loss_inputs(rows, bounds)
        value = loss(x, group=dist.group.WORLD)
        found[name] = value.detach(), torch.autograd.grad(value, x["probs"])[0]
    x = loss_inputs(rows, bounds)
    bias = torch.zeros(6)
    tk.update_expert_bias(bias, x["counts"], rate=0.25, group=dist.group.WORLD)
    return found | {"bias": bias}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    found = {"experts": _experts(rank), "module": _module(rank, folder), "decoder": _decoder(rank)}
    found |= {"losses": _losses(rank, 20), "none": _losses(rank, 0)}
    errors = []
    for change in (dict(w_down=torch.zeros(7, 8, 4)), dict(group="model"), dict(experts=torch.zeros(3, 2))):
        arguments: dict[str, Any] = dict(
            x=torch.zeros(3, 8), w_gate_up=torch.zeros(2, 8, 8), w_down=torch.zeros(2, 8, 4), weights=torch.zeros(3, 2),
            experts=torch.zeros(3, 2, dtype=torch.int32), n_expert=4, group=dist.group.WORLD,
        )  # fmt: skip
        with pytest.raises((ValueError, TypeError)) as error:
            expert_parallel(**(arguments | change))
        errors.append(str(error.value))
    torch.save(found | {"errors": errors}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_experts_equal_one_process(name: str, dtype: torch.dtype, ranks: list[dict[str, Any]]) -> None:
    inputs, options = inputs_of(name, dtype), CASES[name][1]
    parts = [rank["experts"][f"{name} {dtype}"] for rank in ranks]
    both = {n: torch.cat([part[n] for part in parts]) for n in parts[0]}
    dy = Draw(9).normal(*inputs["x"].shape)
    wide = {n: x if n == "experts" else x.double() for n, x in inputs.items()}
    whole, ref64, base = run(tk.moe, inputs, options, dy), run(reference.moe, wide, options, dy), run(torch_moe, inputs, options, dy)
    # 16-bit results travel rounded; a weight on the input scales dx before it travels, not while it is summed.
    same = set(whole) if dtype == torch.float32 else {f"d{n}" for n in (*EXPERT, "weights")}
    if options.get("weight_on") == "input" and inputs["experts"].shape[1] > 1:
        same = same - {"dx"}
    for n, x in both.items():
        if n in same:
            assert_bitwise(x, whole[n], n)
        check(x, ref64[n], base[n], name=n)


def test_module_equals_one_process(ranks: list[dict[str, Any]]) -> None:
    parts, module = [rank["module"] for rank in ranks], whole_module()
    x, dy = module_inputs()
    x.requires_grad_()
    y, losses = module(x, return_losses=True)
    grads = torch.autograd.grad([y, losses.balance, losses.z], [x, *module.parameters()], [dy, torch.ones(()), torch.ones(())])
    whole = dict(zip(["x", *dict(module.named_parameters())], grads))
    assert_bitwise(torch.cat([part["y"] for part in parts]), y.detach(), "y")
    for n, g in whole.items():
        if n in EXPERT:  # complete where the expert is
            assert_bitwise(torch.cat([part[n] for part in parts]), g, n)
        else:  # each rank has its own tokens' part
            found = torch.cat([part[n] for part in parts]) if n == "x" else parts[0][n] + parts[1][n]
            torch.testing.assert_close(found, g, rtol=1e-5, atol=1e-5)
    module.update_bias(losses.counts, rate=0.5)
    for part in parts:
        assert_bitwise(part["bias"], module.expert_bias, "bias")
        for n, value in (("balance", losses.balance), ("z", losses.z)):
            assert_bitwise(part[n], parts[0][n], n)
            torch.testing.assert_close(part[n], value.detach(), rtol=1e-6, atol=0)


def test_decoder_equals_one_process(ranks: list[dict[str, Any]]) -> None:
    parts = [rank["decoder"] for rank in ranks]
    for n, want in decoder_step(tiny_decoder(), slice(None)).items():
        if n == "logprob" or n.endswith(("w_gate_up", "w_down")):
            assert_bitwise(torch.cat([part[n] for part in parts]), want, n)
        else:  # the gradient of what every rank has a copy of is added up by whoever trains
            torch.testing.assert_close(parts[0][n] + parts[1][n], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut, key", [(20, "losses"), (0, "none")])
def test_losses_over_a_group(cut: int, key: str, ranks: list[dict[str, Any]]) -> None:
    """Each rank has the loss of all tokens and its own part of the gradient; tokens and sequences are split unevenly."""
    bounds = [0, 9, 9, 20, 53] if cut else [0, 53]
    for name, loss in LOSSES.items():
        x, near = loss_inputs(slice(None), bounds, torch.float64), loss_inputs(slice(None), bounds)
        value, base = loss(x), loss(near)
        (dp,), (dp_base,) = torch.autograd.grad(value, x["probs"]), torch.autograd.grad(base, near["probs"])
        assert dp.any()
        for rank in ranks:
            assert_bitwise(rank[key][name][0], ranks[0][key][name][0], name)
            torch.testing.assert_close(rank[key][name][0].double(), value.detach(), rtol=3e-7, atol=0)
        check(torch.cat([rank[key][name][1] for rank in ranks]), dp, dp_base, name=name)
    bias = torch.zeros(6)
    tk.update_expert_bias(bias, loss_inputs(slice(None), bounds)["counts"], rate=0.25)
    assert bias.any()
    for rank in ranks:
        assert_bitwise(rank[key]["bias"], bias, "bias")


def test_errors_name_the_argument(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert [error.partition(":")[0] for error in rank["errors"]] == ["w_down", "group", "experts"]


def test_group_must_be_a_group() -> None:
    for call in (
        lambda: tk.load_balancing_loss(torch.ones(2, 4), torch.ones(4), group="data"),
        lambda: tk.router_z_loss(torch.ones(2, 4), group="data"),
        lambda: tk.update_expert_bias(torch.ones(4), torch.ones(4), group="data"),
        lambda: nn.MixtureOfExperts(8, 4, 4, 2, group="data"),
        lambda: nn.MixtureOfExperts(8, 4, 4, 2).shard("data"),
    ):
        with pytest.raises(TypeError, match="^group: got str, takes a torch.distributed group"):
            call()
