"""NSA's and MoBA's C++ kernels on every ISA level: the rule, the choice of blocks, bits that depend on a row alone."""

from __future__ import annotations

import pytest
import thinkernel as tk
import torch
from cpu_levels import level  # noqa: F401
from thinkernel.ops.native_sparse import block_attention_op, native_sparse_attention_op
from thinkernel.reference import native_sparse as reference
from thinkernel.testing import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from thinkernel.testing.native_sparse import REAL, SMALL, near_ties, nsa_inputs, torch_moba, torch_nsa
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q", "k", "v", "k_compressed", "v_compressed", "gates")


def grads(run, inputs: dict[str, Tensor], seed: int = 3) -> list[Tensor]:
    """The result, and the gradient of every floating input for a random cotangent."""
    leaves = {n: x.detach().clone().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    out = run(**leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    wanted = [x for x in leaves.values() if x.is_floating_point()]
    return [out.detach(), *torch.autograd.grad(out, wanted, dout)]


def within_the_rule(run, baseline, inputs: dict[str, Tensor], exact) -> None:
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    found, base = grads(run, inputs), grads(baseline, inputs)
    with tk.use_backend("reference"):
        truth = grads(exact, wide)
    for name, a, b, c in zip(("out", *inputs), found, truth, base, strict=False):
        if a.numel():
            check(a, b, c, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, sizes",
    [
        ((1, 300, 300, 6, 2, 40, 56), dict(block=32, compress_block=16, stride=8, top_n=4, window=50)),  # three heads a group
        ((2, 70, 210, 4, 4, 64, 32), REAL),  # one head a group, more keys than queries
        ((1, 90, 90, 34, 2, 16, 16), dict(block=12, compress_block=6, stride=3, top_n=3, window=1)),  # 17 heads a group
        ((2, 33, 20, 4, 2, 16, 16), SMALL),  # the first queries see nothing
    ],
)
def test_nsa_within_the_rule(dtype, shape, sizes):
    inputs = nsa_inputs(Draw(5, dtype), *shape, sizes)
    within_the_rule(
        lambda **x: tk.native_sparse_attention(**x, **sizes), lambda **x: torch_nsa(**x, sizes=sizes), inputs,
        lambda **x: tk.native_sparse_attention(**x, **sizes),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, block, top_k",
    [
        ((1, 230, 230, 6, 2, 40, 56), 24, 3),
        ((1, 160, 900, 4, 4, 32, 32), 600, 2),  # a block of two splits, more keys than queries
        ((2, 37, 37, 4, 1, 16, 16), 5, 4),
    ],
)
def test_moba_within_the_rule(dtype, shape, block, top_k):
    found = nsa_inputs(Draw(6, dtype), *shape, SMALL)
    inputs = {n: found[n] for n in ("q", "k", "v")}

    def run(**x: Tensor) -> Tensor:
        return tk.block_attention(**x, block=block, top_k=top_k)

    within_the_rule(run, lambda **x: torch_moba(**x, block=block, top_k=top_k), inputs, run)


def chosen_by_nsa(inputs: dict, sizes: dict) -> Tensor:
    args = [inputs[n] for n in NAMES]
    order = ("block", "compress_block", "stride", "top_n", "window")
    return native_sparse_attention_op(*args, inputs.get("cu_seqlens"), None, *(sizes[n] for n in order), args[0].shape[-1] ** -0.5)[3]


@pytest.mark.parametrize("compress_block", [4, 20])  # the last compressed block a query sees reaches back past its own blocks, or not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_choice_is_the_references(dtype, compress_block):
    """Blocks may differ only where their float64 scores lie within 16 float32 ulps of the largest."""
    sizes = dict(block=8, compress_block=compress_block, stride=2, top_n=6, window=6)
    inputs = nsa_inputs(Draw(9, dtype), 2, 400, 400, 8, 2, 32, 32, sizes)
    wide = {n: x.double() for n, x in inputs.items()}
    position, block = torch.arange(400), torch.arange(50)
    own = position[:, None, None] // 8
    found = chosen_by_nsa(inputs, sizes)
    with tk.use_backend("reference"):
        exact = chosen_by_nsa(wide, sizes)
    visible = torch.arange((400 - compress_block) // 2 + 1) * 2 + compress_block - 1 <= position[:, None]
    probs = reference._attend(wide["q"], wide["k_compressed"], wide["v_compressed"], visible, 32**-0.5)[2]
    scores = reference.selection_scores(probs.sum(2), 50, 8, compress_block, 2).transpose(1, 2)  # [B, S, Hkv, blocks]
    assert near_ties(scores, (block == 0) | (block >= own - 1), found, exact).all()
    found = block_attention_op(*(inputs[n] for n in ("q", "k", "v")), None, 8, 5, 1.0)[2]
    with tk.use_backend("reference"):
        exact = block_attention_op(*(wide[n] for n in ("q", "k", "v")), None, 8, 5, 1.0)[2]
    scores = torch.einsum("bskgd,bjkd->bskgj", wide["q"].unflatten(2, (2, 4)), reference.block_means(wide["k"], 8)).flatten(2, 3)
    assert near_ties(scores, block == own, found, exact).all()


def test_ties_go_to_the_lower_block():
    inputs = nsa_inputs(Draw(1), 1, 80, 80, 4, 2, 16, 16, SMALL)
    inputs["q"].zero_()
    assert chosen_by_nsa(inputs, SMALL)[0, 79].tolist() == [[0, 1, 8, 9]] * 2
    blocks = block_attention_op(inputs["q"], inputs["k"], inputs["v"], None, 8, 4, 1.0)[2]
    assert blocks[0, 79].tolist() == [[0, 1, 2, 9]] * 4 and blocks[0, 3, 0].tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_neighbours(dtype):
    sizes = dict(block=16, compress_block=8, stride=4, top_n=4, window=20)
    inputs = nsa_inputs(Draw(2, dtype), 2, 260, 260, 4, 2, 32, 32, sizes)

    def nsa(**x: Tensor) -> Tensor:
        return tk.native_sparse_attention(**x, **sizes)

    def moba(q: Tensor, k: Tensor, v: Tensor, **unused: Tensor) -> Tensor:
        return tk.block_attention(q, k, v, block=16, top_k=3) + 0 * sum(x.sum() for x in unused.values())

    for name, run in (("nsa", nsa), ("moba", moba)):
        two = grads(run, inputs)
        torch.set_num_threads(1)
        one = grads(run, inputs)
        torch.set_num_threads(2)
        for a, b in zip(one, two, strict=True):
            assert_bitwise(a, b, f"{name} threads")
        alone = {n: x[1:] for n, x in inputs.items()}
        assert_bitwise(run(**alone)[0], two[0][1], f"{name} batch")
        packed = {n: x[1] for n, x in inputs.items()}
        other = nsa_inputs(Draw(8, dtype), 1, 33, 33, 4, 2, 32, 32, sizes)
        packed = {n: torch.cat([other[n][0], x]) for n, x in packed.items()}
        cu = torch.tensor([0, 33, 293], dtype=torch.int32)
        if name == "nsa":
            out = tk.native_sparse_attention(**packed, **sizes, cu_seqlens=cu)
        else:
            out = tk.block_attention(packed["q"], packed["k"], packed["v"], block=16, top_k=3, cu_seqlens=cu)
        assert_bitwise(out[33:], two[0][1], f"{name} packed")


def test_nan_stays_in_its_row():
    inputs = nsa_inputs(Draw(4), 1, 60, 60, 4, 2, 16, 16, SMALL)
    clean = tk.native_sparse_attention(**inputs, **SMALL)
    moba = tk.block_attention(inputs["q"], inputs["k"], inputs["v"], block=8, top_k=3)
    inputs["q"][0, 20, 1] = torch.nan
    out = tk.native_sparse_attention(**inputs, **SMALL)
    rows = torch.arange(60) != 20
    assert out[0, 20, 1].isnan().all()
    assert_bitwise(out[0, rows], clean[0, rows])
    assert_bitwise(tk.block_attention(inputs["q"], inputs["k"], inputs["v"], block=8, top_k=3)[0, rows], moba[0, rows])


def test_any_strides_and_empty_problems():
    inputs = nsa_inputs(Draw(7), 2, 40, 40, 4, 2, 16, 16, SMALL)
    expected = tk.native_sparse_attention(**inputs, **SMALL)
    turned = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items()}
    assert_bitwise(tk.native_sparse_attention(**turned, **SMALL), expected)
    for shape in ((0, 5, 5), (1, 0, 0), (1, 0, 9)):
        empty = nsa_inputs(Draw(7), *shape, 4, 2, 16, 16, SMALL)
        found = grads(lambda **x: tk.native_sparse_attention(**x, **SMALL), empty)
        assert found[0].shape == (shape[0], shape[1], 4, 16)
        assert all((x == 0).all() for x in found)
    none = nsa_inputs(Draw(7), 1, 0, 0, 4, 2, 16, 16, SMALL)
    out = tk.native_sparse_attention(*(none[n][0] for n in NAMES), **SMALL, cu_seqlens=torch.zeros(3, dtype=torch.int32))
    assert out.shape == (0, 4, 16)


def test_compressed_keys_of_any_strides():
    """Over a cache too, where the values of a key need not be neighbours."""
    draw = Draw(4, torch.float32)
    q, (k, v), (kc, vc) = draw.normal(1, 1, 4, 16), (draw.normal(1, 40, 4, 16) for _ in "kv"), (draw.normal(1, 19, 4, 16) for _ in "kv")
    gates, options = draw.normal(1, 1, 4, 3), dict(block=4, compress_block=4, stride=2, top_n=3, window=5, seqlens=torch.tensor([40]))
    apart = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (kc, vc)]
    found = tk.native_sparse_attention(q, k, v, *apart, gates, **options)
    assert_bitwise(found, tk.native_sparse_attention(q, k, v, kc, vc, gates, **options))


def test_blocks_far_longer_than_the_sequence():
    """As one block, in memory that goes by the sequence."""
    sizes = dict(block=16, compress_block=4, stride=2, top_n=3, window=3)
    inputs, huge = nsa_inputs(Draw(8, torch.float32), 1, 9, 9, 4, 2, 16, 16, sizes), dict(block=2**28)
    wanted = grads(lambda **x: tk.native_sparse_attention(**x, **sizes), inputs)
    for a, b in zip(grads(lambda **x: tk.native_sparse_attention(**x, **sizes | huge), inputs), wanted, strict=True):
        assert_bitwise(a, b)
    qkv = {n: inputs[n] for n in ("q", "k", "v")}
    wanted = grads(lambda **x: tk.block_attention(**x, block=9, top_k=1), qkv)
    for a, b in zip(grads(lambda **x: tk.block_attention(**x, block=2**28, top_k=1), qkv), wanted, strict=True):
        assert_bitwise(a, b)
    none = inputs | {n: inputs[n][:, :0] for n in ("k_compressed", "v_compressed")}
    wanted = tk.native_sparse_attention(**none, **sizes | dict(compress_block=10))
    assert_bitwise(tk.native_sparse_attention(**none, **sizes | dict(compress_block=2**28)), wanted)
