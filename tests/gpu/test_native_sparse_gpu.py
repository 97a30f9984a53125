"""The Triton NSA and MoBA kernels on a real GPU, at real sizes: numerics against the float64 reference, and bits that must not move.

Shapes: q [B, S, H, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv], packed [N, ·, ·], indices [B, S, U, n].
"""

from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from thinkernel.kernels import native_sparse as kernels
from thinkernel.ops.memory import poisoned_results
from thinkernel.ops.native_sparse import block_attention_op, native_sparse_attention_op
from thinkernel.reference import native_sparse as reference
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from thinkernel.testing.native_sparse import _fused, nsa_inputs
from torch import Tensor

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ("q", "k", "v", "k_compressed", "v_compressed", "gates")
PAPER = dict(block=64, compress_block=32, stride=16, top_n=16, window=512)
NAN = float("nan")


def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block: int) -> Tensor:
    """Given blocks: the specification in float64, otherwise as torch computes it. Differentiable."""
    S, T, U = q.shape[1], k.shape[1], indices.shape[2]
    positions = torch.arange(T - S, T, device=q.device)[None]
    visible = reference._chosen_keys(indices, positions, T, block).repeat_interleave(q.shape[2] // U, 1)  # [B, H, S, T]
    if q.dtype != torch.float64:
        return _fused(q, k, v, visible)
    return reference._attend(q, k, v, visible.unflatten(1, (k.shape[2], -1)), q.shape[-1] ** -0.5)[0]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "H, Hkv, U, S, T, D, Dv, block, slots",
    [
        (64, 4, 4, 700, 1500, 128, 128, 64, 16),
        (6, 2, 2, 300, 300, 192, 128, 24, 5),  # three heads a group
        (130, 1, 1, 90, 400, 64, 64, 64, 4),  # more heads than rows of a tile
        (8, 2, 8, 900, 900, 128, 128, 200, 3),  # every head chooses for itself: MoBA
        (4, 1, 4, 300, 300, 256, 256, 64, 3),
    ],
)
def test_chosen_blocks(H: int, Hkv: int, U: int, S: int, T: int, D: int, Dv: int, block: int, slots: int, dtype: torch.dtype) -> None:
    """Given blocks, forward and backward: one of them every query's, so that its list has several segments."""
    torch.manual_seed(H + S)
    q, k, v = (torch.randn(1, n, h, d, device="cuda").to(dtype) for n, h, d in ((S, H, D), (T, Hkv, D), (T, Hkv, Dv)))
    dout = torch.randn(1, S, H, Dv, device="cuda").to(dtype)
    own = (torch.arange(T - S, T, device="cuda") // block)[None, :, None, None]
    draws = torch.rand(1, S, U, -(-T // block), device="cuda").argsort(-1)[..., :slots]
    draws[..., 0], draws[..., -1:] = 0, own
    indices = draws.masked_fill(draws > own, -1).sort(-1).values
    indices[..., 1:].masked_fill_(indices.diff(dim=-1) == 0, -1)
    indices = indices.int().contiguous()
    out, lse = torch.full_like(dout, NAN), torch.full((1, S, H), NAN, device="cuda")
    kernels.block_attention(q, k, v, indices, out, lse, block=block, scale=D**-0.5)
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    kernels.block_backward(q, k, v, indices, out, lse, dout, *grads, block=block, scale=D**-0.5)
    wide, narrow = leaves(*(x.double() for x in (q, k, v))), leaves(q, k, v)
    want, base = attend(*wide, indices, block), attend(*narrow, indices, block)
    truth = [want, *torch.autograd.grad(want, wide, dout.double())]
    theirs = [base, *torch.autograd.grad(base, narrow, dout)]
    for name, got, a, b in zip(("out", "dq", "dk", "dv"), (out, *grads), truth, theirs, strict=True):
        check(got, a, b, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_choice_is_the_references(dtype: torch.dtype) -> None:
    """Blocks may differ only where their float64 scores lie within 16 float32 ulps of the row's largest."""
    S, T, top = 300, 3000, PAPER["top_n"]
    inputs = {n: x.cuda() for n, x in nsa_inputs(Draw(9, dtype), 1, S, T, 32, 2, 128, 128, PAPER).items()}
    wide = {n: x.double() for n, x in inputs.items()}
    position, block = torch.arange(T - S, T, device="cuda"), torch.arange(47, device="cuda")
    own = position[:, None, None] // 64
    sizes = [PAPER[n] for n in ("block", "compress_block", "stride", "top_n", "window")]
    visible = torch.arange(wide["k_compressed"].shape[1], device="cuda") * 16 + 31 <= position[:, None]
    probs = reference._attend(wide["q"], wide["k_compressed"], wide["v_compressed"], visible, 128**-0.5)[2]
    nsa = reference.selection_scores(probs.sum(2), 47, 64, 32, 16).transpose(1, 2)
    moba = torch.einsum("bskgd,bjkd->bskgj", wide["q"].unflatten(2, (2, 16)), reference.block_means(wide["k"], 64)).flatten(2, 3)

    def chosen(tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
        x = [tensors[n] for n in NAMES]
        with tk.use_backend(backend):
            return (native_sparse_attention_op(*x, None, None, *sizes, 128**-0.5)[3], block_attention_op(*x[:3], None, 64, top, 0.1)[2])

    forms = ((nsa, (block == 0) | (block >= own - 1)), (moba, block == own))
    for (scores, forced), found, exact in zip(forms, chosen(inputs, "triton"), chosen(wide, "reference"), strict=True):
        lowest = []
        for x in (found, exact):
            at = x.clamp_min(0).long()
            always = (x < 0) | forced.expand(scores.shape).gather(-1, at)
            lowest.append(scores.gather(-1, at).masked_fill(always, torch.inf).amin(-1))
        near = (lowest[0] - lowest[1]).abs() <= 16 * 2**-23 * scores.abs().amax(-1)
        assert ((found == exact).all(-1) | near).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["nsa", "moba"])
def test_bits(form: str, dtype: torch.dtype) -> None:
    """Again, alone instead of packed behind another sequence, and (NSA) from a cache: the same bits; nothing is left unwritten."""
    first, second = (nsa_inputs(Draw(n, dtype), 1, n, n, 32, 2, 128, 128, PAPER) for n in (333, 1500))
    names = NAMES if form == "nsa" else NAMES[:3]
    packed = {n: torch.cat([first[n][0], second[n][0]]).cuda() for n in names}
    alone = {n: second[n].cuda() for n in names}
    cu = torch.tensor([0, 333, 1833], dtype=torch.int32, device="cuda")

    def results(inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
        x = dict(zip(names, leaves(*inputs.values()), strict=True))
        with tk.use_backend("triton"), poisoned_results():
            if form == "nsa":
                out = tk.native_sparse_attention(**x, **PAPER, **options)  # type: ignore[arg-type]
            else:
                out = tk.block_attention(**x, block=100, top_k=4, **options)
            dout = torch.sin(torch.arange(out[..., -1500:, :, :].numel(), device="cuda") * 0.7).view(1500, 32, 128).to(dtype)
            out = out[-1500:] if options else out[0]
            return [out.detach(), *torch.autograd.grad(out, list(x.values()), dout)]

    once, again, single = results(packed, cu_seqlens=cu), results(packed, cu_seqlens=cu), results(alone)
    for name, a, b, c in zip(("out", *names), once, again, single, strict=True):
        assert not a.isnan().any(), name
        assert_bitwise(a, b, f"{name}, again")
        c = c if name == "out" else c[0]
        assert_bitwise(a[-len(c) :], c, f"{name}, alone")
    if form == "nsa":
        cache = {n: alone[n] for n in ("k", "v", "k_compressed", "v_compressed")}
        last = {n: alone[n][:, -1:] for n in ("q", "gates")}
        with tk.use_backend("triton"):
            out = tk.native_sparse_attention(  # type: ignore[arg-type]
                **last, **cache, **PAPER, seqlens=torch.tensor([1500], dtype=torch.int32, device="cuda"))
        assert_bitwise(out[0], single[0][-1:], "cache")
