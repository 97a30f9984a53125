"""NSA and MoBA ops: attention over blocks of keys that it chooses itself. Formulas: reference/native_sparse.py.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, D head dim, Dv value dim, N packed tokens, Tc compressed keys.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from thinkernel.ops import checks
from thinkernel.ops import native_sparse_cpu as cpu
from thinkernel.ops import native_sparse_gpu as gpu
from thinkernel.ops.attention import _check_heads
from thinkernel.ops.library import Op, gradients
from thinkernel.reference import native_sparse as reference
from thinkernel.reference.native_sparse import compressed_length


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- the raw ops -----------------------------------------------------------------------------------------------
# The forwards return what their backwards need as well: outputs and lse of the branches, and the chosen blocks.

_NSA = (
    "Tensor q, Tensor k, Tensor v, Tensor k_compressed, Tensor v_compressed, Tensor gates, Tensor? cu_seqlens, Tensor? seqlens, "
    "int block, int compress_block, int stride, int top_n, int window, float scale"
)
_MOBA = "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int block, int top_k, float scale"


def _nsa_reference(
    q: Tensor, k: Tensor, v: Tensor, k_compressed: Tensor, v_compressed: Tensor, gates: Tensor, cu_seqlens: Tensor | None,
    seqlens: Tensor | None, block: int, compress_block: int, stride: int, top_n: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.native_sparse_attention(
        q, k, v, k_compressed, v_compressed, gates, block=block, compress_block=compress_block, stride=stride, top_n=top_n,
        window=window, scale=scale, cu_seqlens=cu_seqlens, seqlens=seqlens,
    )


def _moba_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, block: int, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.block_attention(q, k, v, block=block, top_k=top_k, scale=scale, cu_seqlens=cu_seqlens)


def _nsa_fake(q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, gates: Tensor, *options: Any) -> tuple[Tensor, ...]:
    out, top_n = q.new_empty(*q.shape[:-1], v.shape[-1]), options[5]
    indices = q.new_empty(*q.shape[:-2], k.shape[-2], top_n, dtype=torch.int32)
    return out, q.new_empty(3, *out.shape), q.new_empty(3, *q.shape[:-1], dtype=_wide(q)), indices


def _moba_fake(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, block: int, top_k: int, scale: float) -> tuple[Tensor, ...]:
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_wide(q))
    return out, lse, q.new_empty(*q.shape[:-1], top_k, dtype=torch.int32)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


native_sparse_attention_op = Op("native_sparse_attention", f"({_NSA}) -> (Tensor, Tensor, Tensor, Tensor)", _nsa_fake)
native_sparse_attention_backward_op = Op(
    "native_sparse_attention_backward",
    f"(Tensor dout, Tensor branches, Tensor lse, Tensor indices, {_NSA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda dout, branches, lse, indices, *args: _like(*args[:6]),
)
block_attention_op = Op("block_attention", f"({_MOBA}) -> (Tensor, Tensor, Tensor)", _moba_fake)
block_attention_backward_op = Op(
    "block_attention_backward",
    f"(Tensor dout, Tensor out, Tensor lse, Tensor indices, {_MOBA}) -> (Tensor, Tensor, Tensor)",
    lambda dout, out, lse, indices, *args: _like(*args[:3]),
)


@native_sparse_attention_op.kernel("reference")
def _nsa_run(*args: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return _nsa_reference(*args)


@block_attention_op.kernel("reference")
def _moba_run(*args: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return _moba_reference(*args)


@native_sparse_attention_backward_op.kernel("reference")
def _nsa_run_backward(dout: Tensor, branches: Tensor, lse: Tensor, indices: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(gradients(_nsa_reference, args, range(6), (dout, None, None, None)))


@block_attention_backward_op.kernel("reference")
def _moba_run_backward(dout: Tensor, out: Tensor, lse: Tensor, indices: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(gradients(_moba_reference, args, range(3), (dout, None, None)))


native_sparse_attention_op.kernel("cpu", cpu.covers)(cpu.native_sparse_forward)
native_sparse_attention_backward_op.kernel("cpu", cpu.backward_covers)(cpu.native_sparse_backward)
block_attention_op.kernel("cpu", cpu.covers)(cpu.block_forward)
block_attention_backward_op.kernel("cpu", lambda dout, out, lse, indices, *args: cpu.covers(*args))(cpu.block_backward)

native_sparse_attention_op.kernel("triton", gpu.native_sparse_covers)(gpu.native_sparse_forward)
native_sparse_attention_backward_op.kernel("triton", gpu.native_sparse_backward_covers)(gpu.native_sparse_backward)
block_attention_op.kernel("triton", gpu.block_covers)(gpu.block_forward)
block_attention_backward_op.kernel("triton", gpu.block_backward_covers)(gpu.block_backward)


# ---- what index tensors contain ----------------------------------------------------------------------------------


@native_sparse_attention_op.check
def _check_nsa_contents(
    q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, gates: Tensor, cu_seqlens: Tensor | None, seqlens: Tensor | None,
    block: int, compress_block: int, stride: int, *options: Any,
) -> None:
    checks.cumulative("cu_seqlens", cu_seqlens, q.shape[0])
    checks.within("seqlens", seqlens, 0, k.shape[1], f"the cache holds {k.shape[1]} positions")
    if cu_seqlens is not None and checks.checks_contents(cu_seqlens):
        cuts = cu_seqlens.tolist()
        count = sum(compressed_length(b - a, compress_block, stride) for a, b in zip(cuts, cuts[1:]))
        checks.size("k_compressed", kc, 0, count, "compressed blocks of the sequences")


@block_attention_op.check
def _check_moba_contents(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *options: Any) -> None:
    checks.cumulative("cu_seqlens", cu_seqlens, q.shape[0])


# ---- autograd --------------------------------------------------------------------------------------------------


def _nsa_setup(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*args[:8], *outputs[1:])
    ctx.options = args[8:]
    ctx.mark_non_differentiable(*outputs[1:])


def _nsa_backward(ctx: Any, dout: Tensor, *unused: Any) -> tuple[Any, ...]:
    *tensors, branches, lse, indices = ctx.saved_tensors
    found = native_sparse_attention_backward_op(dout, branches, lse, indices, *tensors, *ctx.options)
    return (*found, *(None,) * 8)


def _moba_setup(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*args[:4], *outputs)
    ctx.options = args[4:]
    ctx.mark_non_differentiable(*outputs[1:])


def _moba_backward(ctx: Any, dout: Tensor, *unused: Any) -> tuple[Any, ...]:
    *tensors, out, lse, indices = ctx.saved_tensors
    return (*block_attention_backward_op(dout, out, lse, indices, *tensors, *ctx.options), *(None,) * 4)


native_sparse_attention_op.differentiate(_nsa_setup, _nsa_backward, reference=_nsa_reference)
native_sparse_attention_op.autocast("q", "k", "v", "k_compressed", "v_compressed")
native_sparse_attention_backward_op.refuse_gradient("double backward is not supported")
block_attention_op.differentiate(_moba_setup, _moba_backward, reference=_moba_reference)
block_attention_op.autocast("q", "k", "v")
block_attention_backward_op.refuse_gradient("double backward is not supported")


# ---- public ----------------------------------------------------------------------------------------------------


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    dims, row = (3, "[N, H, D] with cu_seqlens") if cu_seqlens is not None else (4, "[B, S, H, D]")
    checks.tensor("q", q, dims, row)
    checks.tensor("k", k, dims, row.replace("S", "T").replace("H", "Hkv"))
    checks.tensor("v", v, dims, row.replace("S", "T").replace("H", "Hkv").replace("D", "Dv"))
    _check_heads(q, k, v, "k", "v")
    checks.size("k", k, 0, q.shape[0], "B of q" if cu_seqlens is None else "N of q")
    if cu_seqlens is not None:
        checks.tensor("cu_seqlens", cu_seqlens, 1, "[B + 1]", checks.INTEGERS)
    checks.same_device("q", q, k=k, v=v, cu_seqlens=cu_seqlens)


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else checks.number("scale", scale)


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_compressed: Tensor,
    v_compressed: Tensor,
    gates: Tensor,
    *,
    block: int = 64,
    compress_block: int = 32,
    stride: int = 16,
    top_n: int = 16,
    window: int = 512,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    seqlens: Tensor | None = None,
) -> Tensor:
    """Native sparse attention: o = Σ_c gates_c · attention over the compressed keys, the chosen blocks and the window.

    Args:
        q: [B, S, H, D], packed [N, H, D] with cu_seqlens. float32, bfloat16, float16 (float64: reference).
        k, v: [B, T, Hkv, D] and [B, T, Hkv, Dv]; query i sits at position i + T − S and sees nothing after itself.
        k_compressed, v_compressed: [B, Tc, Hkv, ·], key i standing for keys i·stride … i·stride + compress_block − 1; only
            whole blocks: Tc = (T − compress_block) // stride + 1. Packed: the sequences' one after the other.
        gates: [B, S, H, 3], the weights of compressed, chosen and window branch (NSA's sigmoid is the caller's).
        block, top_n: size of a block that is chosen, and how many; the first, the query's own and the one before it always are,
            the others by the compressed branch's probabilities, summed over the heads of a group. No gradient flows through it.
        compress_block, stride: both block and compress_block are multiples of stride.
        window: keys of the window branch, the query's own among them.
        cu_seqlens: [B + 1] int32 offsets of packed sequences.
        seqlens: [B] int32: k, v and the compressed keys are caches of which sequence b holds the first seqlens[b] keys, the S
            new ones included; for decoding, without a gradient on the C++ and Triton backends.

    Returns [B, S, H, Dv]. Differentiable in all six tensors. Ties go to the lower block. Raises ValueError or TypeError naming the
    argument. Source: arXiv 2502.11089.
    """
    _check_qkv(q, k, v, cu_seqlens)
    for name, x, like in (("k_compressed", k_compressed, k), ("v_compressed", v_compressed, v)):
        checks.tensor(name, x, k.dim(), "[B, Tc, Hkv, D] (packed: [Nc, Hkv, D])")
        checks.same_dtype(name, x, "q", q)
        checks.shape(name, x, (*k_compressed.shape[:-2], *like.shape[-2:]), f"Tc and the heads of {'k' if like is k else 'v'}")
    checks.tensor("gates", gates, q.dim(), "[B, S, H, 3]")
    checks.shape("gates", gates, (*q.shape[:-1], 3), "[B, S, H, 3]")
    checks.integer("stride", stride, 1)
    for name, value in (("block", block), ("compress_block", compress_block)):
        checks.integer(name, value, 1)
        if value % stride:
            raise ValueError(f"{name}: got {value}, takes a multiple of stride = {stride}")
    checks.integer("top_n", top_n, 3)
    checks.integer("window", window, 1)
    if seqlens is not None:
        if cu_seqlens is not None:
            raise ValueError("seqlens: packed sequences (cu_seqlens) have no cache, so it must be None")
        checks.tensor("seqlens", seqlens, 1, "[B]", checks.INTEGERS)
        checks.shape("seqlens", seqlens, q.shape[:1], "[B]")
    if cu_seqlens is None:
        checks.size("k_compressed", k_compressed, 0, q.shape[0], "B of q")
        checks.size("k_compressed", k_compressed, 1, compressed_length(k.shape[1], compress_block, stride), "whole blocks of k")
    checks.same_device("q", q, k_compressed=k_compressed, v_compressed=v_compressed, gates=gates, seqlens=seqlens)
    return cast(Tensor, native_sparse_attention_op(
        q, k, v, k_compressed, v_compressed, gates, cu_seqlens, seqlens, block, compress_block, stride, top_n, window, _scale(q, scale)
    )[0])


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block: int, top_k: int, scale: float | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mixture of block attention (MoBA): causal attention of every query and head over top_k blocks of keys.

    Args:
        q: [B, S, H, D], packed [N, H, D] with cu_seqlens. float32, bfloat16, float16 (float64: reference).
        k, v: [B, T, Hkv, D] and [B, T, Hkv, Dv]; query i sits at position i + T − S.
        block: keys of a block, counted from the sequence's first key.
        top_k: blocks of a query: its own one, causally, and of the past ones those with the largest q·mean(k of the block).
        cu_seqlens: [B + 1] int32 offsets of packed sequences.

    Returns [B, S, H, Dv]. Differentiable in q, k and v; the choice has no gradient, ties go to the lower block. Raises ValueError
    or TypeError naming the argument. Source: arXiv 2502.13189.
    """
    _check_qkv(q, k, v, cu_seqlens)
    checks.integer("block", block, 1)
    checks.integer("top_k", top_k, 1)
    return cast(Tensor, block_attention_op(q, k, v, cu_seqlens, block, top_k, _scale(q, scale))[0])
