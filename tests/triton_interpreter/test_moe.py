"""The experts in Triton under the interpreter: forward and backward by the rule, and the bits that must not move.

Shapes: N tokens, H hidden, I inner, E experts, K experts a token. Under the interpreter every tile is 32 × 32 × 32.
"""
from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from rule import assert_within
from thinkernel.kernels import configs_moe
from thinkernel.reference import moe as reference
from thinkernel.testing.cases import CASES, Case
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from thinkernel.testing.moe import expert_inputs, torch_moe
from torch import Tensor

FLOAT, HALF = torch.float32, torch.float16
ROWS = ("x", "weights", "experts")

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "swiglu": (dict(H=45, inner=37), {}),
    "in out, weight on the input": (dict(in_out=True, inner=40), dict(layout="in_out", weight_on="input")),
    "gpt-oss": (dict(in_out=True, biases=True, spread=4.0, H=33), dict(layout="in_out", activation="gpt_oss")),
    "gpt-oss, out in, input": (dict(biases=True, spread=4.0, inner=37), dict(activation="gpt_oss", limit=4.0, weight_on="input")),
    "clamped": (dict(spread=4.0), dict(limit=3.0)),
    "geglu": (dict(biases=True, in_out=True), dict(activation="geglu", layout="in_out")),
    "geglu tanh": (dict(), dict(activation="geglu_tanh", weight_on="input")),
    "relu2": (dict(columns=35, inner=35, biases=True, in_out=True), dict(activation="relu2", layout="in_out")),
    "relu2, out in": (dict(columns=19, inner=19), dict(activation="relu2", weight_on="input")),
    "most experts empty": (dict(N=9, E=16, K=1, H=16, inner=8), {}),
    "one expert, several tiles": (dict(N=75, E=1, K=1), {}),
}  # fmt: skip

RARE = ("geglu tanh", "relu2, out in", "most experts empty", "clamped")


@pytest.fixture(autouse=True)
def _on_triton():
    with tk.use_backend("triton"):
        yield


def inputs_of(name: str, dtype: torch.dtype = FLOAT, seed: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    sizes, options = SHAPES[name]
    return expert_inputs(Draw(seed, dtype), **(dict(N=40, H=20, inner=24, E=3, K=2) | sizes)), options


def run(function: Any, inputs: dict[str, Any], options: dict[str, Any], dtype: torch.dtype | None = None, rows: int | None = None,
        needed: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """y and the gradients of the floating inputs (or of those needed), for a cotangent that is the first rows of `rows` tokens'."""
    names = [n for n in inputs if n != "experts" and (needed is None or n in needed)]
    leaves = {n: x if n == "experts" else x.detach().to(dtype or x.dtype, copy=True).requires_grad_(n in names) for n, x in inputs.items()}
    y = function(**leaves, **options)
    dy = Draw(9, inputs["x"].dtype).normal(rows or len(y), y.shape[1])[: len(y)].to(y.dtype)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(names, torch.autograd.grad(y, [leaves[n] for n in names], dy), strict=True)}


def check_all(inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    found = run(tk.moe, inputs, options)
    ref64, base = run(reference.moe, inputs, options, torch.float64), run(torch_moe, inputs, options)
    for name, x in found.items():
        check(x, ref64[name], base[name], name=name)
    return found


@pytest.mark.parametrize(("name", "dtype"), [
    *(pytest.param(n, FLOAT, marks=pytest.mark.slow if n in RARE else []) for n in SHAPES), ("swiglu", HALF), ("gpt-oss", HALF),
], ids=str)  # fmt: skip
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    check_all(*inputs_of(name, dtype))


@pytest.mark.parametrize("name", ["swiglu", "gpt-oss, out in, input"])
def test_bits_again_and_of_a_token_alone(name: str) -> None:
    inputs, options = inputs_of(name, HALF)
    found = run(tk.moe, inputs, options)
    for n, x in run(tk.moe, inputs, options).items():
        assert_bitwise(x, found[n], n)
    alone = run(tk.moe, {n: x[:1] if n in ROWS else x for n, x in inputs.items()}, options, rows=40)
    for n in ("y", "dx", "dweights"):
        assert_bitwise(alone[n], found[n][:1], n)
    some = {n: x[17:36] if n in ROWS else x for n, x in inputs.items()}
    assert_bitwise(tk.moe(**some, **options), found["y"][17:36])


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_columns_at_a_time_are_not_in_the_bits(weight_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options = expert_inputs(Draw(3), N=9, H=140, inner=16, E=2, K=2, biases=True), dict(weight_on=weight_on)
    want = run(tk.moe, inputs, options)
    monkeypatch.setattr(configs_moe, "SLOTS_BYTES", 1)  # 64 columns at a time
    for n, x in run(tk.moe, inputs, options).items():
        assert_bitwise(x, want[n], n)


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_other_ranks_experts(weight_on: str) -> None:
    """A number outside [0, E) adds nothing, its weight may be anything and gets gradient 0."""
    inputs, options = expert_inputs(Draw(4, HALF), N=21, E=3, K=2, biases=True), dict(weight_on=weight_on)
    inputs["experts"] = inputs["experts"].long()
    inputs["experts"][::2, 1] = 3
    inputs["experts"][::3, 0] = -1
    inputs["experts"][7] = 2**40
    foreign = (inputs["experts"] < 0) | (inputs["experts"] >= 3)
    found = check_all(inputs, options)
    assert (found["dweights"][foreign] == 0).all() and (found["y"][7] == 0).all() and (found["dx"][7] == 0).all()
    inputs["weights"] = inputs["weights"].masked_fill(foreign, torch.nan)
    for n, x in run(tk.moe, inputs, options).items():
        assert_bitwise(x, found[n], n)
    gone = run(tk.moe, inputs | dict(experts=torch.full_like(inputs["experts"], -1)), options)
    assert all((x == 0).all() for x in gone.values())


def test_one_expert_takes_all_twice_and_none() -> None:
    inputs = expert_inputs(Draw(5), N=20, E=3, K=2)
    inputs["experts"][:] = 1
    found = check_all(inputs, {})
    assert (found["dw_gate_up"][[0, 2]] == 0).all() and (found["dw_down"][[0, 2]] == 0).all()
    for name, x in run(tk.moe, expert_inputs(Draw(6), N=0, E=2, K=1, biases=True), {}).items():
        assert x.numel() == 0 or (x == 0).all(), name


def test_nan_stays_in_its_row() -> None:
    inputs, options = inputs_of("clamped")
    want = run(tk.moe, inputs, options)
    inputs["x"][11] = torch.nan
    found = run(tk.moe, inputs, options)
    others = torch.arange(40) != 11
    assert found["y"][11].isnan().all() and found["dx"][11].isnan().all()
    assert_bitwise(found["y"][others], want["y"][others])
    assert_bitwise(found["dx"][others], want["dx"][others])


def test_only_what_is_asked_strides_and_no_kept_pre_activations() -> None:
    inputs, options = inputs_of("gpt-oss", HALF)
    want = run(tk.moe, inputs, options)
    for needed in (("x", "b_gate_up"), ("weights",)):
        for n, x in run(tk.moe, inputs, options, needed=needed).items():
            assert_bitwise(x, want[n], n)
    gaps = {n: torch.nn.functional.pad(x, (0, 3))[..., : x.shape[-1]] for n, x in inputs.items() if n != "experts"}
    assert_bitwise(tk.moe(**(inputs | gaps), **options), want["y"])
    turned = {n: inputs[n].transpose(-1, -2).contiguous().transpose(-1, -2) for n in ("x", "w_gate_up", "w_down")}
    assert_bitwise(tk.moe(**(inputs | turned), **options), want["y"])
    tensors = [inputs.get(n) for n in ("x", "w_gate_up", "w_down", "weights", "experts", "b_gate_up", "b_down")]
    dy = Draw(9, HALF).normal(*want["y"].shape)
    rest = ("gpt_oss", "output", "in_out", None, [True] * 6)
    found = torch.ops.thinkernel.moe_backward(dy, dy.new_empty(0, 48), *tensors, *rest)
    for n, x in zip(("dx", "dw_gate_up", "dw_down", "dweights", "db_gate_up", "db_down"), found, strict=True):
        assert_bitwise(x, want[n], n)


def test_what_is_not_covered_is_named() -> None:
    inputs, _ = inputs_of("swiglu")
    for change, name in (
        (dict(x=inputs["x"].double()), "x"), (dict(w_down=inputs["w_down"].half()), "w_down"),
        (dict(weights=inputs["weights"].double()), "weights"),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=f": {name}: "):
            tk.moe(**(inputs | change))
    assert "moe_forward: triton" in tk.explain(tk.moe, **inputs)


def moe_cases() -> list[Any]:
    """What `thinkernel validate` runs. The experts' are those of above at other sizes, a minute and a half in all; the router's rules
    are in test_moe_route.py too."""
    cases = [c for c in CASES if c.family == "moe" and c.name.startswith(("moe/route", "moe/experts"))]
    quick = {("moe/route-deepseek-v3", FLOAT), ("moe/route-softmax-plain", HALF)}
    every = [(c, d) for c in cases for d in (FLOAT, HALF)]
    return [pytest.param(c, d, id=f"{c}-{str(d)[6:]}", marks=[] if (c.name, d) in quick else pytest.mark.slow) for c, d in every]


@pytest.mark.parametrize(("case", "dtype"), moe_cases())
def test_within_the_rule(case: Case, dtype: torch.dtype) -> None:
    assert_within(case, dtype, 6 if dtype == FLOAT else 3)
