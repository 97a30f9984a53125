"""moe in C++: forward and backward against float64, and bit for bit against itself in other batches and threads.

Shapes: N tokens, H hidden, I intermediate, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from cpu_levels import level as level  # every test runs on every ISA level
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkernel.ops import moe_cpu
from thinkernel.ops.dispatch import C
from thinkernel.reference import moe as reference
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from thinkernel.testing.moe import expert_inputs, torch_moe
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "moe_forward"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "few": ({}, {}),
    "in out, weight on the input": (dict(in_out=True), dict(layout="in_out", weight_on="input")),
    "gpt-oss": (dict(in_out=True, biases=True, spread=4.0), dict(layout="in_out", activation="gpt_oss")),
    "gpt-oss, out in, input": (dict(biases=True, spread=4.0, inner=37), dict(activation="gpt_oss", limit=4.0, weight_on="input")),
    "clamped": (dict(spread=4.0, inner=33), dict(limit=3.0)),
    "geglu": (dict(biases=True), dict(activation="geglu")),
    "geglu tanh": (dict(H=67), dict(activation="geglu_tanh")),
    "relu2": (dict(columns=40, inner=40, biases=True, in_out=True), dict(activation="relu2", layout="in_out")),
    "relu2, out in": (dict(columns=43, inner=43, H=33), dict(activation="relu2", weight_on="input")),
    "odd sizes": (dict(N=77, H=131, inner=53, E=5, K=2, biases=True), {}),
    "one expert": (dict(N=50, E=1, K=1, H=64, inner=64), {}),
    "many rows an expert": (dict(N=900, E=2, K=2, H=40, inner=36, biases=True), {}),
    "more columns than a block": (dict(N=40, E=2, K=1, H=700, inner=650), {}),
    "most experts empty": (dict(N=20, E=64, K=1), {}),
    "one token": (dict(N=1, H=72, inner=40, biases=True), {}),
}  # fmt: skip


def run(
    function: Any, inputs: dict[str, Any], options: dict[str, Any], dtype: torch.dtype | None = None, rows: int | None = None
) -> dict[str, Tensor]:
    """y and the gradients of all floating inputs, for a cotangent that is the first rows of what `rows` tokens get."""
    leaves = {n: x if n == "experts" else x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for n, x in inputs.items()}
    y = function(**leaves, **options)
    dy = Draw(9, inputs["x"].dtype).normal(rows or len(y), y.shape[1])[: len(y)].to(y.dtype)
    names = [n for n in leaves if n != "experts"]
    grads = torch.autograd.grad(y, [leaves[n] for n in names], dy)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(names, grads, strict=True)}


def check_all(inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    found = run(tk.moe, inputs, options)
    ref64, base = run(reference.moe, inputs, options, torch.float64), run(torch_moe, inputs, options)
    for name, x in found.items():
        check(x, ref64[name], base[name], name=name)
    with torch.no_grad():  # packed weights, and the path of few tokens
        assert_bitwise(tk.moe(**inputs, **options), found["y"])
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtype):
    sizes, options = SHAPES[name]
    check_all(expert_inputs(Draw(1, dtype), **sizes), options)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    E = draw(1, 9)
    kind = data.draw(st.sampled_from(reference.ACTIVATIONS))
    inner, in_out = draw(20, 70), data.draw(st.booleans())
    sizes = dict(
        N=draw(40, 90), H=draw(20, 90), inner=inner, E=E, K=draw(1, E), in_out=in_out, biases=data.draw(st.booleans()),
        columns=inner if kind == "relu2" else None,
    )
    options = dict(activation=kind, layout="in_out" if in_out else "out_in", weight_on=data.draw(st.sampled_from(["output", "input"])))
    dtype = data.draw(st.sampled_from(DTYPES[1:]))  # of so few numbers the largest float32 error is a matter of luck
    check_all(expert_inputs(Draw(draw(0, 2**32), dtype), **sizes), options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gpt-oss", "gpt-oss, out in, input", "many rows an expert", "relu2, out in", "odd sizes", "clamped"])
def test_bits_by_threads_and_batch(name, dtype):
    sizes, options = SHAPES[name]
    inputs = expert_inputs(Draw(2, dtype), **sizes)
    found = run(tk.moe, inputs, options)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for n, x in run(tk.moe, inputs, options).items():
            assert_bitwise(x, found[n], f"{n}, {threads} threads")
    rows = {"x", "weights", "experts"}
    for first, count in ((0, 1), (3, 1), (5, 16), (2, 17)):
        some = {n: x[first : first + count] if n in rows else x for n, x in inputs.items()}
        with torch.no_grad():
            assert_bitwise(tk.moe(**some, **options), found["y"][first : first + count], f"tokens {first} to {first + count - 1}")
    # A token's own gradients too.
    one = {n: x[:1] if n in rows else x for n, x in inputs.items()}
    alone = run(tk.moe, one, options, rows=len(inputs["x"]))
    for n in ("y", "dx", "dweights"):
        assert_bitwise(alone[n], found[n][:1], n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_expert_takes_all(dtype):
    inputs = expert_inputs(Draw(3, dtype), N=450, K=1, H=48, inner=40)
    inputs["experts"] = torch.full((450, 1), 5, dtype=torch.int32)
    found = check_all(inputs, {})
    assert (found["dw_gate_up"][:5] == 0).all() and (found["dw_down"][6:] == 0).all()


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_other_ranks_experts(integer, weight_on):
    """A number outside [0, E) adds nothing, its weight may be anything and gets gradient 0."""
    draw = Draw(4, torch.bfloat16)
    inputs, options = expert_inputs(draw, biases=True, N=40), dict(weight_on=weight_on)
    inputs["experts"] = inputs["experts"].to(integer)
    inputs["experts"][::2, 1] = 8
    inputs["experts"][::3, 0] = -1
    inputs["experts"][7] = 2**31 - 1 if integer == torch.int32 else 2**40
    foreign = (inputs["experts"] < 0) | (inputs["experts"] >= 8)
    found = check_all(inputs, options)
    assert (found["dweights"][foreign] == 0).all() and (found["y"][7] == 0).all() and (found["dx"][7] == 0).all()
    inputs["weights"] = inputs["weights"].masked_fill(foreign, torch.nan)
    again = run(tk.moe, inputs, options)
    for n, x in again.items():
        assert_bitwise(x, found[n], n)
    everybody = inputs | dict(experts=torch.full_like(inputs["experts"], -1))
    gone = run(tk.moe, everybody, options)
    assert all((x == 0).all() for x in gone.values())


def test_the_same_expert_twice():
    inputs = expert_inputs(Draw(5), N=16, K=4, H=40)
    inputs["experts"][:] = 3
    check_all(inputs, {})


def test_nothing_there():
    for name, x in run(tk.moe, expert_inputs(Draw(6), N=0, biases=True), {}).items():
        assert x.numel() == 0 or (x == 0).all(), name


def test_three_dimensions_and_strides():
    """[B, S, H]; rows and weights with gaps between rows are read in place, a transposed weight is copied."""
    draw = Draw(7, torch.bfloat16)
    inputs = expert_inputs(draw, N=24)
    want = tk.moe(**inputs)
    shaped = inputs | {n: inputs[n].view(4, 6, -1) for n in ("x", "weights", "experts")}
    assert_bitwise(tk.moe(**shaped), want.view(4, 6, -1))
    gaps = {n: torch.nn.functional.pad(x, (0, 3))[..., : x.shape[-1]] for n, x in inputs.items() if n != "experts"}
    assert not gaps["w_down"].is_contiguous()
    assert_bitwise(tk.moe(**(inputs | gaps)), want)
    turned = {n: inputs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("w_gate_up", "w_down")}
    assert_bitwise(tk.moe(**(inputs | turned)), want)
    few = {n: x[:3] if n in ("x", "weights", "experts") else x for n, x in (inputs | gaps).items()}
    assert_bitwise(tk.moe(**few), want[:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype):
    inputs = expert_inputs(Draw(8, dtype), N=40)
    want = tk.moe(**inputs)
    inputs["x"][11] = torch.nan
    found = tk.moe(**inputs)
    assert found[11].isnan().all()
    others = torch.arange(40) != 11
    assert_bitwise(found[others], want[others])
    few = {n: x[8:14] if n in ("x", "weights", "experts") else x for n, x in inputs.items()}
    assert_bitwise(tk.moe(**few)[:3], want[8:11])


def test_packed_weights_follow_their_source():
    """Kept between calls, made anew when the weights change in place, through .data or by a new tensor; gone with their weight."""
    count = len(moe_cpu._packed)

    def use() -> None:
        inputs = expert_inputs(Draw(9, torch.bfloat16), N=40)
        w = inputs["w_gate_up"] = torch.nn.Parameter(inputs["w_gate_up"])
        with torch.no_grad():
            tk.moe(**inputs)
            assert len(moe_cpu._packed) == count + 1
            for change in (lambda: w.mul_(2), lambda: w.data.mul_(2), lambda: w.data[-1].mul_(3), lambda: inputs["w_down"].neg_()):
                change()
                plain = inputs | dict(w_gate_up=w.detach().clone().requires_grad_())
                with torch.enable_grad():
                    want = tk.moe(**plain).detach()
                assert_bitwise(tk.moe(**inputs), want)

    use()
    assert len(moe_cpu._packed) == count
    with torch.inference_mode():  # whose tensors count no versions
        inputs = expert_inputs(Draw(9, torch.bfloat16), N=40)
        tk.moe(**inputs)
        inputs["w_gate_up"][1, 3, 5] += 7
        found = tk.moe(**inputs)
    assert_bitwise(found.clone(), tk.moe(**{n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}))


def test_backward_needs_only_what_is_asked():
    inputs = expert_inputs(Draw(10), biases=True)
    for name in ("x", "w_gate_up", "w_down", "weights", "b_gate_up", "b_down"):
        want = run(tk.moe, inputs, {})[f"d{name}"]
        leaves = inputs | {name: inputs[name].detach().clone().requires_grad_()}
        y = tk.moe(**leaves)
        (g,) = torch.autograd.grad(y, leaves[name], Draw(9, y.dtype).normal(*y.shape))
        assert_bitwise(g, want, name)


WRONG = {
    "x": [lambda x: x[0], lambda x: x.int(), lambda x: x[:, 1:]],
    "w_gate_up": [lambda w: w[:, 1:], lambda w: w[0], lambda w: w[..., :-1], lambda w: w.int()],
    "w_down": [lambda w: w[1:], lambda w: w[..., :-1], lambda w: w[:, 1:]],
    "weights": [lambda w: w[1:], lambda w: w[0], lambda w: w[:, :0].T],
    "experts": [lambda e: e[:, 1:], lambda e: e.float(), lambda e: e[None]],
    "b_gate_up": [lambda b: b[:, 1:], lambda b: b[0]],
    "b_down": [lambda b: b[1:], lambda b: b[..., None]],
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_named(name):
    inputs = expert_inputs(Draw(12), biases=True)
    for spoil in WRONG[name]:
        with pytest.raises((ValueError, TypeError)) as error:
            tk.moe(**(inputs | {name: spoil(inputs[name])}))
        related = {"x": ("x", "w_gate_up", "w_down", "weights"), "weights": ("weights", "experts"), "experts": ("experts", "weights")}
        assert str(error.value).startswith(related.get(name, (name, "w_down"))), str(error.value)
    for options in (dict(activation="silu"), dict(layout="hf"), dict(weight_on="both"), dict(limit=-1.0)):
        with pytest.raises(ValueError, match=next(iter(options))):
            tk.moe(**inputs, **options)
