"""Triton NSA and MoBA under the interpreter: the rule, the choice of blocks, the bits that must not move.

Shapes: q [B, S, H, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv]. A tile has 32 (query, head) rows and 16 keys here, a segment of a block's
list 32 rows.
"""
from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from rule import assert_within
from test_rule import DTYPES
from thinkernel.kernels import configs_sparse
from thinkernel.kernels import native_sparse as kernels
from thinkernel.kernels import native_sparse_choose as choose_kernels
from thinkernel.ops.native_sparse import block_attention_op, native_sparse_attention_op
from thinkernel.reference import native_sparse as reference
from thinkernel.testing.cases import CASES, Case
from thinkernel.testing.compare import assert_bitwise
from thinkernel.testing.inputs import Draw
from thinkernel.testing.native_sparse import SMALL, _moba_row, _nsa_row, _qkv, near_ties, nsa_inputs
from torch import Tensor

NAMES = ("q", "k", "v", "k_compressed", "v_compressed", "gates")
ORDER = ("block", "compress_block", "stride", "top_n", "window")
ODD = dict(block=6, compress_block=9, stride=3, top_n=3, window=1)  # compressed blocks longer than the blocks chosen
TINY = [
    # the first block's list has two segments; a sequence of one token
    _nsa_row("tiny", lambda draw: nsa_inputs(draw, 1, 0, 0, 2, 1, 9, 17, SMALL, (19, 1)), SMALL),
    _moba_row("tiny-moba", lambda draw: _qkv(draw, 1, 7, 40, 2, 1, 17, 9), 20, 2),  # a block of two tiles, T > S
]
MORE = [
    _nsa_row("34 heads", lambda draw: nsa_inputs(draw, 1, 9, 14, 34, 1, 16, 16, ODD), ODD),  # more heads than rows of a tile
    _nsa_row("three heads a group", lambda draw: nsa_inputs(draw, 2, 14, 14, 6, 2, 24, 16, ODD), ODD),
    _nsa_row("rows that see nothing", lambda draw: nsa_inputs(draw, 1, 20, 11, 2, 2, 16, 16, SMALL), SMALL),
    _nsa_row("head dim in two blocks", lambda draw: nsa_inputs(draw, 1, 12, 12, 2, 1, 96, 64, SMALL), SMALL),
    _moba_row("moba, rows that see nothing", lambda draw: _qkv(draw, 1, 20, 11, 2, 1, 16, 16), 3, 2),
]


def rows() -> list[Any]:
    """The standard cases take up to a minute each."""
    standard = [c for c in CASES if c.name.startswith(("sparse/nsa", "sparse/moba")) and c.small]
    slow = [*(Case("sparse", **row) for row in MORE), *(c for c in standard if c.name != "sparse/nsa-cache")]
    quick = [*(Case("sparse", **row) for row in TINY), *(c for c in standard if c.name == "sparse/nsa-cache")]
    marked = [(c, []) for c in quick] + [(c, [pytest.mark.slow]) for c in slow]
    return [pytest.param(c, dtype, id=f"{c}-{str(dtype)[6:]}", marks=marks) for c, marks in marked for dtype in DTYPES]


@pytest.mark.parametrize(("case", "dtype"), rows())
def test_within_the_rule(case: Case, dtype: torch.dtype) -> None:
    assert_within(case, dtype)


# ---- the choice ------------------------------------------------------------------------------------------------


def chosen_by_nsa(inputs: dict[str, Any], sizes: dict[str, int], backend: str = "triton") -> Tensor:
    q = inputs["q"]
    tensors = [inputs[n] for n in NAMES]
    with tk.use_backend(backend):
        return native_sparse_attention_op(
            *tensors, inputs.get("cu_seqlens"), inputs.get("seqlens"), *(sizes[n] for n in ORDER), q.shape[-1] ** -0.5)[3]


def chosen_by_moba(inputs: dict[str, Any], block: int, top_k: int, backend: str = "triton") -> Tensor:
    with tk.use_backend(backend):
        return block_attention_op(*(inputs[n] for n in NAMES[:3]), inputs.get("cu_seqlens"), block, top_k, 1.0)[2]


@pytest.mark.parametrize(("dtype", "compress"), [(torch.float32, 20), *((d, 4) for d in DTYPES)], ids=lambda x: str(x).split(".")[-1])
def test_the_choice_is_the_references(dtype: torch.dtype, compress: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 blocks of which 6 are chosen; float16 with the scores of one tile of queries at a time."""
    if dtype == torch.float16:
        monkeypatch.setattr(configs_sparse, "SCORE_BYTES", 1)
    S, T, top = 19, 200, 6
    sizes = dict(block=8, compress_block=compress, stride=2, top_n=top, window=6)
    inputs = nsa_inputs(Draw(9, dtype), 1, S, T, 4, 2, 16, 16, sizes)
    wide = {n: x.double() for n, x in inputs.items()}
    position, block = torch.arange(T - S, T), torch.arange(25)
    own = position[:, None, None] // 8
    visible = torch.arange((T - compress) // 2 + 1) * 2 + compress - 1 <= position[:, None]
    probs = reference._attend(wide["q"], wide["k_compressed"], wide["v_compressed"], visible, 0.25)[2]
    scores = reference.selection_scores(probs.sum(2), 25, 8, compress, 2).transpose(1, 2)  # [B, S, Hkv, blocks]
    found, exact = chosen_by_nsa(inputs, sizes), chosen_by_nsa(wide, sizes, "reference")
    assert near_ties(scores, (block == 0) | (block >= own - 1), found, exact).all()
    found, exact = chosen_by_moba(inputs, 8, top), chosen_by_moba(wide, 8, top, "reference")
    scores = torch.einsum("bskgd,bjkd->bskgj", wide["q"].unflatten(2, (2, 2)), reference.block_means(wide["k"], 8)).flatten(2, 3)
    assert near_ties(scores, block == own, found, exact).all()


def test_ties_go_to_the_lower_block_and_nan_comes_last() -> None:
    inputs = nsa_inputs(Draw(1), 1, 6, 80, 2, 1, 16, 16, SMALL)
    inputs["q"].zero_()
    assert chosen_by_nsa(inputs, SMALL)[0, 5].tolist() == [[0, 1, 8, 9]]
    assert chosen_by_moba(inputs, 8, 4)[0, 5].tolist() == [[0, 1, 2, 9]] * 2
    first = {n: inputs[n][:, :6] for n in NAMES[:3]}
    assert chosen_by_moba(first, 8, 4)[0, 5].tolist() == [[0, -1, -1, -1]] * 2
    inputs["k"][0, 3] = torch.nan  # the mean of block 0
    assert chosen_by_moba(inputs, 8, 4)[0, 5].tolist() == [[1, 2, 3, 9]] * 2


def test_more_blocks_than_are_looked_at_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 blocks of one key, 16 at a time: the choice goes over them several times, and finds what torch's top-k does."""
    monkeypatch.setattr(choose_kernels, "MOST", 16)
    q, k = torch.randn(1, 3, 1, 16), torch.randn(1, 50, 1, 16)
    indices = torch.full((1, 3, 1, 5), -7, dtype=torch.int32)
    kernels.choose(q, k, None, indices, T=50, block=1)
    scores = (q[0, :, 0].double() @ k[0, :, 0].double().T)
    for t, found in enumerate(indices[0, :, 0].tolist()):
        own = 47 + t
        assert found == sorted([own, *scores[t, :own].topk(4).indices.tolist()])


# ---- bits ------------------------------------------------------------------------------------------------------


def results(run: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What `run` gives, and the gradient of every input for a cotangent of its own."""
    leaves = {n: x.detach().clone().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    with tk.use_backend("triton"):
        out = run(**leaves)
        dout = torch.sin(torch.arange(out.numel()) * 0.7).view(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, [x for x in leaves.values() if x.is_floating_point()], dout)]


@pytest.mark.parametrize("form", ["nsa", "moba"])
def test_bits_do_not_depend_on_the_run_or_the_neighbours(form: str) -> None:
    """Twice the same; the second sequence alone, and behind another in a packed tensor."""
    inputs = nsa_inputs(Draw(2, torch.float16), 1, 17, 17, 2, 1, 16, 16, SMALL)
    other = nsa_inputs(Draw(3, torch.float16), 1, 5, 5, 2, 1, 16, 16, SMALL)
    names = NAMES if form == "nsa" else NAMES[:3]

    def run(**x: Tensor) -> Tensor:
        if form == "nsa":
            return tk.native_sparse_attention(**x, **SMALL)  # type: ignore[arg-type]
        return tk.block_attention(**x, block=5, top_k=2)

    packed = {n: torch.cat([other[n][0], inputs[n][0]]) for n in names}
    cu = torch.tensor([0, 5, 22], dtype=torch.int32)
    first = results(lambda **x: run(**x, cu_seqlens=cu)[5:], packed)
    again = results(lambda **x: run(**x, cu_seqlens=cu)[5:], packed)
    alone = results(run, {n: inputs[n] for n in names})
    for name, a, b, c in zip(("out", *names), first, again, alone, strict=True):
        assert_bitwise(a, b, f"{name}, again")
        assert_bitwise(a[-c.shape[1] :], c[0], f"{name}, alone")


def test_a_cache_gives_the_bits_of_prefill() -> None:
    inputs = nsa_inputs(Draw(4, torch.float16), 1, 24, 24, 4, 2, 16, 16, SMALL)
    with tk.use_backend("triton"):
        whole = tk.native_sparse_attention(**inputs, **SMALL)  # type: ignore[arg-type]
        for new in (1, 3):
            cache = {n: torch.cat([x, torch.full_like(x[:, :4], torch.nan)], 1) for n, x in inputs.items() if n[0] in "kv"}
            last = {n: inputs[n][:, -new:] for n in ("q", "gates")}
            counts = reference.compressed_length(28, 4, 2)
            for n in ("k_compressed", "v_compressed"):
                cache[n] = cache[n][:, :counts]
            out = tk.native_sparse_attention(**last, **cache, **SMALL, seqlens=torch.tensor([24]))  # type: ignore[arg-type]
            assert_bitwise(out, whole[:, -new:], f"{new} new tokens")


def test_nan_stays_in_its_row() -> None:
    inputs = nsa_inputs(Draw(4), 1, 20, 20, 2, 1, 16, 16, SMALL)

    def both() -> tuple[Tensor, Tensor]:
        with tk.use_backend("triton"):
            return tk.native_sparse_attention(**inputs, **SMALL), tk.block_attention(  # type: ignore[arg-type]
                *(inputs[n] for n in NAMES[:3]), block=8, top_k=2)

    clean = both()
    inputs["q"][0, 9, 1] = torch.nan
    for before, after in zip(clean, both(), strict=True):
        assert after[0, 9, 1].isnan().all()
        before[0, 9, 1] = torch.nan
        other = torch.arange(20) != 9
        assert_bitwise(after[0, other], before[0, other])


def test_empty_problems_and_any_strides() -> None:
    inputs = nsa_inputs(Draw(7), 1, 12, 12, 2, 1, 16, 16, SMALL)
    turned = {n: x.transpose(1, 3).contiguous().transpose(1, 3) for n, x in inputs.items()}
    with tk.use_backend("triton"):
        expected = tk.native_sparse_attention(**inputs, **SMALL)  # type: ignore[arg-type]
        assert_bitwise(tk.native_sparse_attention(**turned, **SMALL), expected)  # type: ignore[arg-type]
    for shape in ((0, 5, 5), (1, 0, 0), (1, 0, 9), (1, 5, 0)):
        empty = nsa_inputs(Draw(7), *shape, 4, 2, 16, 16, SMALL)
        found = results(lambda **x: tk.native_sparse_attention(**x, **SMALL), empty)  # type: ignore[arg-type]
        assert found[0].shape == (shape[0], shape[1], 4, 16) and all((x == 0).all() for x in found)
        found = results(lambda **x: tk.block_attention(**x, block=5, top_k=2), {n: empty[n] for n in NAMES[:3]})
        assert found[0].shape == (shape[0], shape[1], 4, 16) and all((x == 0).all() for x in found)


def test_what_is_not_covered_is_named() -> None:
    inputs = nsa_inputs(Draw(7), 1, 12, 12, 2, 1, 16, 16, SMALL)
    wide = dict(block=256, compress_block=4, stride=2, top_n=3, window=4)
    with tk.use_backend("triton"):
        with pytest.raises(NotImplementedError, match="scale: "):
            tk.native_sparse_attention(**inputs, **SMALL, scale=-1.0)  # type: ignore[arg-type]
        with pytest.raises(NotImplementedError, match="block: the score of 256 keys sums 129 compressed keys, over 128"):
            tk.native_sparse_attention(**inputs, **wide)  # type: ignore[arg-type]
        inputs["q"].requires_grad_()
        out = tk.native_sparse_attention(**inputs, **SMALL, seqlens=torch.tensor([12]))  # type: ignore[arg-type]
        with pytest.raises(NotImplementedError, match="seqlens: the Triton backward takes no cache"):
            out.sum().backward()
        assert "block_attention: triton" in tk.explain(tk.block_attention, *(inputs[n] for n in NAMES[:3]), block=4, top_k=2)
