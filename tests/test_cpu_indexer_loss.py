"""indexer_scores and indexer_loss in C++, forward and backward: against float64, and bit for bit in other batches and threads.

Shapes: B batch, S queries, T keys, Hi index heads, Di index dim, H heads of the attention, Hkv key heads (0: latents), D head dim, K slots.
"""

from __future__ import annotations

import dataclasses

import indexer_problem
import pytest
import thinkernel as tk
import torch
from cpu_levels import level as level  # every test runs on every ISA level
from hypothesis import given, settings
from hypothesis import strategies as st
from indexer_problem import LEARNT, Sizes
from thinkernel.ops.dispatch import C
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "indexer_loss"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Problem(indexer_problem.Problem):
    backend = "cpu"


SHAPES = {
    "warm-up": Sizes(),
    "warm-up, several blocks": Sizes(B=1, S=70, T=900, Hi=16, Di=64, H=16, D=96),
    "warm-up, gqa": Sizes(Hkv=2, H=6, S=9, T=300, Hi=5),
    "warm-up, more queries than keys": Sizes(S=50, T=37),
    "warm-up, many heads": Sizes(B=1, S=5, T=290, Hi=64, Di=32, H=70, D=32),
    "warm-up, odd": Sizes(S=7, T=33, Hi=3, Di=19, H=5, D=21, scale=-0.3),
    "warm-up, chunks and splits": Sizes(B=1, S=150, T=1200, Hi=8, Di=16, H=2, D=16),
    "one head": Sizes(Hi=1, H=1, S=66, T=70),
    "sparse": Sizes(K=9),
    "sparse, several blocks": Sizes(B=1, S=9, T=900, Hi=16, Di=64, H=16, D=96, K=600),
    "sparse, gqa": Sizes(Hkv=2, H=6, S=9, T=60, Hi=5, K=20),
    "sparse, more slots than keys": Sizes(K=50),
    "sparse, many heads": Sizes(B=1, S=5, T=290, Hi=64, Di=32, H=70, D=32, K=270),
    "sparse, odd": Sizes(S=7, T=33, Hi=3, Di=19, H=5, D=21, K=13, scale=-0.3),
    "sparse, several chunks": Sizes(B=1, S=150, T=200, Hi=33, Di=16, H=17, D=16, K=70),
    "sparse, one slot": Sizes(K=1, S=5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtype):
    found = Problem(SHAPES[name], dtype).check()
    if SHAPES[name].K and SHAPES[name].S > 3:  # no slot named a key
        assert found["loss"][0, 1] == 0 and (found["dq"][0, 1] == 0).all() and (found["dw"][0, 1] == 0).all()
    if SHAPES[name].S > SHAPES[name].T:  # queries that see nothing
        assert (found["loss"][:, : SHAPES[name].S - SHAPES[name].T] == 0).all()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    Hkv = data.draw(st.sampled_from([0, 1, 2]))
    sizes = Sizes(  # of fewer numbers the largest error is a matter of luck
        B=draw(2, 3), S=draw(20, 40), T=draw(20, 90), Hi=draw(2, 20), Di=draw(9, 70), H=draw(2, 9) * max(Hkv, 1), D=draw(9, 70), Hkv=Hkv,
        K=data.draw(st.sampled_from([0, 5, 30])),
    )  # fmt: skip
    Problem(sizes, data.draw(st.sampled_from(DTYPES[1:])), seed=draw(0, 2**32)).check()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["warm-up, gqa", "warm-up, more queries than keys", "sparse", "sparse, gqa", "sparse, many heads"])
def test_with_the_attention_s_lse(name, dtype):
    """Of other keys and with sinks it would still do: p is normalised."""
    problem = Problem(SHAPES[name], dtype)
    x = problem.sizes
    lse = Draw(5).normal(x.B, x.S, x.H)
    lse[0, 0] = -torch.inf
    problem.check(target_lse=lse)


@pytest.mark.parametrize("name", ["warm-up", "sparse"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(name, reduction):
    problem = Problem(SHAPES[name], torch.float32)
    problem.dloss = torch.full_like(problem.dloss, 1.0 if reduction == "sum" else 1 / problem.dloss.numel())
    found, each = problem.run(reduction=reduction), problem.run()
    want = each["loss"].double().sum() if reduction == "sum" else each["loss"].double().mean()
    torch.testing.assert_close(found["loss"], want.float(), rtol=2e-7, atol=0)
    for n in LEARNT:
        assert_bitwise(found[f"d{n}"], each[f"d{n}"], n)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", [n for n in SHAPES if "several" in n or "splits" in n])
def test_bits_by_threads_and_batch(name, dtype):
    problem = Problem(dataclasses.replace(SHAPES[name], B=3), dtype)
    found = problem.run()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for n, x in problem.run().items():
            assert_bitwise(x, found[n], n)
    alone = Problem(dataclasses.replace(SHAPES[name], B=1), dtype)
    alone.inputs, alone.dloss = {n: x[2:] for n, x in problem.inputs.items()}, problem.dloss[2:]
    for n, x in alone.run().items():
        assert_bitwise(x, found[n][2:], n)
    # the last queries alone: a row's loss, dq and dw are its own
    alone.inputs = {n: x if n in ("k", "target_kv") else x[:, -1:] for n, x in alone.inputs.items()}
    alone.dloss = alone.dloss[:, -1:]
    few = alone.run()
    for n in ("loss", "dq", "dw"):
        assert_bitwise(few[n], found[n][2:, -1:], n)


@pytest.mark.parametrize("name", ["warm-up", "sparse"])
def test_nan_stays_with_its_query(name):
    problem = Problem(SHAPES[name], torch.float32)
    clean = problem.run()
    problem.inputs["q"][1, 5, 2] = torch.nan
    dirty = problem.run()
    assert dirty["loss"][1, 5].isnan()
    for n in ("loss", "dq", "dw"):
        dirty[n][1, 5] = clean[n][1, 5]
        assert_bitwise(dirty[n], clean[n], n)
    assert_bitwise(dirty["dk"][0], clean["dk"][0])


def test_strided_inputs_and_mixed_gradients():
    """w in float32 beside bfloat16, keys and latents cut out of wider rows."""
    problem = Problem(SHAPES["sparse, gqa"], torch.bfloat16)
    want = problem.run()
    for name in ("k", "target_kv", "q"):
        problem.inputs[name] = torch.cat((problem.inputs[name], problem.inputs[name]), -1)[..., : problem.inputs[name].shape[-1]]
    found = problem.run()
    assert found["dw"].dtype == torch.float32 and found["dq"].dtype == torch.bfloat16
    for n, x in found.items():
        assert_bitwise(x, want[n], n)


def test_nothing_there():
    for indices in (None, torch.empty(2, 3, 0, dtype=torch.int32)):
        q, k, w = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 2, 8), (2, 5, 8), (2, 3, 2)))
        loss = tk.indexer_loss(q[:, :0], k, w[:, :0], torch.ones(2, 0, 2, 4), torch.ones(2, 5, 4), scale=1.0, reduction="sum")
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (q, k, w)))
        keys = k if indices is not None else k[:, :0]
        loss = tk.indexer_loss(q, keys, w, torch.ones(2, 3, 2, 4), keys[..., :4], indices=indices, scale=1.0)
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (q, k, w)))


# ---- indexer_scores --------------------------------------------------------------------------------------------


def scores(q: Tensor, k: Tensor, w: Tensor, backend: str, causal: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    learnt = [x.to(dtype or x.dtype).detach().clone().requires_grad_() for x in (q, k, w)]
    with tk.use_backend(backend):
        out = tk.indexer_scores(*learnt, causal=causal)
        dout = Draw(9).normal(*out.shape).to(out.dtype)
        grads = torch.autograd.grad(out, learnt, dout)
    return {"scores": out.detach()} | {f"d{n}": g for n, g in zip(LEARNT, grads)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [(2, 5, 40, 4, 16), (1, 70, 700, 16, 64), (2, 33, 9, 3, 19), (1, 3, 600, 64, 128), (1, 1, 1, 1, 1)])
def test_scores(sizes, causal, dtype):
    B, S, T, Hi, Di = sizes
    draw = Draw(4, dtype)
    inputs = draw.normal(B, S, Hi, Di), draw.normal(B, T, Di), draw.normal(B, S, Hi)
    found = scores(*inputs, "cpu", causal)
    ref64, base = scores(*inputs, "reference", causal, torch.float64), scores(*inputs, "reference", causal)
    for name, x in found.items():
        check(x, ref64[name], base[name], name=name)
    torch.set_num_threads(1)
    alone = scores(*inputs, "cpu", causal)
    for name, x in found.items():
        assert_bitwise(alone[name], x, name)
    with tk.use_backend("cpu"):
        assert_bitwise(tk.indexer_scores(*(x[-1:] for x in inputs), causal=causal), found["scores"][-1:])
