"""Packed sequences in the Triton kernels under the interpreter: each sequence as if it were alone, bit for bit, and the rule.

Shapes: q [N, H, D], k [Nk, Hkv, D], v [Nk, Hkv, Dv], cu_seqlens [B + 1]; a tile has 64 rows and 32 keys, a split 64 keys.
"""
from __future__ import annotations

import pytest
import thinkernel as tk
import torch
from rule import assert_within
from test_rule import DTYPES, eager
from thinkernel.kernels import attention as kernels
from thinkernel.kernels.attention_tiles import tiles
from thinkernel.testing.cases import Case, Inputs
from thinkernel.testing.compare import assert_bitwise
from thinkernel.testing.inputs import Draw
from torch import Tensor

NAN = float("nan")
NAMES = ("out", "lse", "dq", "dk", "dv")


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def attend(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, sinks: Tensor | None, **options) -> list[Tensor]:
    """out, lse, dq, dk, dv, every buffer poisoned before."""
    out, lse = torch.full((*q.shape[:-1], v.shape[-1]), NAN, dtype=q.dtype), torch.full(q.shape[:-1], NAN)
    kernels.attention_forward(q, k, v, out, lse, sinks=sinks, **options)
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    dsinks = None if sinks is None else torch.full_like(sinks, NAN)
    kernels.attention_backward(q, k, v, out, lse, dout, *grads, dlse=dlse, sinks=sinks, dsinks=dsinks, **options)
    return [out, lse, *grads]


LENGTHS = {  # queries, keys
    "one length for both": ([0, 66, 1, 0, 5], None),
    "more and fewer keys": ([3, 70, 0], [70, 33, 20]),
    "no keys, no queries": ([0, 4, 7, 0], [3, 0, 70, 0]),
    "nothing": ([0, 0], None),
}
OPTIONS = {
    "causal": dict(causal=True),
    "full": dict(causal=False),
    "window, chunk, softcap, sinks": dict(causal=True, window=(20, -1), chunk=50, softcap=3.0, sinks=True),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_sequence_packed_and_alone(dtype: torch.dtype, lengths: tuple[list[int], list[int] | None], options: dict) -> None:
    options = dict(options)
    sinks = torch.randn(2) if options.pop("sinks", False) else None
    cu_q, cu_k = offsets(lengths[0]), offsets(lengths[1] or lengths[0])
    N, Nk = int(cu_q[-1]), int(cu_k[-1])
    q, k, v, dout = (torch.randn(n, h, d).to(dtype) for n, h, d in ((N, 2, 16), (Nk, 1, 16), (Nk, 1, 24), (N, 2, 24)))
    dlse = torch.randn(N, 2)
    packed = attend(q, k, v, dout, dlse, sinks, cu_seqlens_q=cu_q, cu_seqlens_k=None if lengths[1] is None else cu_k, **options)
    for b in range(len(lengths[0])):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = attend(*(x[None, s] for x, s in ((q, rows), (k, keys), (v, keys), (dout, rows), (dlse, rows))), sinks, **options)
        for name, got, want in zip(NAMES, packed, alone, strict=True):
            assert_bitwise(got[keys if name in ("dk", "dv") else rows], want[0], f"{name} of sequence {b}")


def packed_eager(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The baseline: torch's attention, sequence after sequence."""
    parts = []
    for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False):
        if c == d:
            parts.append((q.new_zeros(1, b - a, q.shape[1], v.shape[-1]), torch.full((1, b - a, q.shape[1]), float("-inf"))))
        elif a < b:
            parts.append(eager(q[None, a:b], k[None, c:d], v[None, c:d], **options))
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_within_the_rule(dtype: torch.dtype, options: dict) -> None:
    options = dict(options)
    sinks = options.pop("sinks", False)

    def inputs(draw: Draw) -> Inputs:
        cu = {"cu_seqlens_q": offsets([3, 66, 0, 9, 4]), "cu_seqlens_k": offsets([20, 75, 9, 14, 0])}
        x = dict(q=draw.normal(82, 2, 24), k=draw.normal(118, 1, 24), v=draw.normal(118, 1, 16), **cu)
        return x | ({"sinks": draw.normal(2)} if sinks else {})

    gradients = ("q", "k", "v", "sinks") if sinks else ("q", "k", "v")
    case = Case("attention", "packed", inputs, lambda **x: tk.attention(**x, **options, return_lse=True), gradients,
                lambda **x: packed_eager(**x, **options))
    assert_within(case, dtype)


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_tiles_hold_every_row_once(block: int) -> None:
    """The closed form that finds a tile's sequence, in plain Python: every row in one tile, no tile past the bound."""
    for lengths in ([5], [0, 0, 3], [64, 1, 0, 63, 65], [1] * 9, torch.randint(0, 200, (40,)).tolist()):
        cu = offsets(lengths).tolist()
        first = [(start + i * (block - 1)) // block for i, start in enumerate(cu)]
        for i, n in enumerate(lengths):
            assert first[i + 1] - first[i] >= -(-n // block)
        assert first[-1] == tiles(cu[-1], block, torch.tensor(cu))


@pytest.mark.parametrize("cu", [[0, 9, 4, 12], [-3, 5, 99, 200], [5, 5, 12, 12], [12, 0, 12, 0]], ids=str)
def test_wrong_offsets_read_and_write_nothing_outside(cu: list[int]) -> None:
    """On a GPU nobody checks what cu_seqlens holds (that would wait for it); rows stay inside the tensors all the same."""
    guard = 70
    whole = [torch.full((guard + 12 + guard, h, 16), NAN) for h in (2, 1, 1, 2, 2, 1, 1)]
    q, k, v, out, dq, dk, dv = (x[guard : guard + 12] for x in whole)
    for x in (q, k, v):
        x.normal_()
    lse = torch.full((12, 2), NAN)
    bad = torch.tensor(cu, dtype=torch.int32)
    kernels.attention_forward(q, k, v, out, lse, causal=True, cu_seqlens_q=bad)
    kernels.attention_backward(q, k, v, out, lse, torch.randn(12, 2, 16), dq, dk, dv, causal=True, cu_seqlens_q=bad)
    for x in whole:
        assert x[:guard].isnan().all() and x[-guard:].isnan().all()
