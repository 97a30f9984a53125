"""How NSA and MoBA run on the C++ kernels: the branches, the choice of blocks, and what joins them.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim, Tc compressed keys, n blocks of a
query. l, d: length and stride of compressed blocks. Every forward and backward takes its op's arguments in the op's order
(ops/native_sparse.py).

The compressed branch is attention's own kernel, over groups of queries (native_sparse_groups.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinkernel.ops import attention_backends as attention
from thinkernel.ops import sparse_backends as sparse
from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import DTYPE_CODES, empty, pointer, rows_contiguous, strides
from thinkernel.ops.native_sparse_groups import Groups


def covers(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    return attention._cpu_misses(q, v)


def backward_covers(
    dout: Tensor, branches: Tensor, lse: Tensor, indices: Tensor, q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, gates: Tensor,
    cu_seqlens: Tensor | None, seqlens: Tensor | None, *sizes: Any,
) -> str | None:
    return covers(q, k, v) if seqlens is None else "seqlens: the C++ backward takes no cache"


# ---- the compressed branch ---------------------------------------------------------------------------------------


def _options(causal: bool, scale: float, left: int = -1) -> tuple[Any, ...]:
    """The options of attention's ops from `causal` on: no right end of a window, no chunk, no softcap."""
    return causal, scale, left, -1, 0, 0.0


def _within(block: int, T: int, step: int = 1) -> int:
    """A block in multiples of `step`: one that reaches past all T keys is as one that ends behind them, and kernels size buffers by it."""
    return min(block, (T // step + 1) * step)


def _compressed(q: Tensor, kc: Tensor, vc: Tensor, groups: Groups, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, S, H, Dv], lse [B, S, H] over the compressed keys."""
    kc, vc = rows_contiguous(kc), rows_contiguous(vc)
    if groups.key_counts is None:
        out, lse = attention.cpu_forward(groups.join(q), kc, vc, None, None, groups.cu_groups, groups.cu_keys, *_options(True, scale))
    elif groups.S == 1:  # one query sees all there are
        return attention.cpu_decode(q, kc, vc, groups.key_counts, None, None, None, None, None, 0, *_options(False, scale))
    else:
        joined = groups.join(q)
        out, lse = attention.cpu_decode(joined, kc, vc, groups.key_counts, None, None, None, None, None, 0, *_options(True, scale))
    return groups.split(out), groups.split(lse[..., None])[..., 0]


# ---- the choice ------------------------------------------------------------------------------------------------


def _positions(S: int, T: int, cu_seqlens: Tensor | None, seqlens: Tensor | None) -> Tensor:
    """Of the queries, [B|1, S] (packed [N])."""
    if cu_seqlens is not None:
        return torch.arange(S) - cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.long().diff())
    end = torch.full((1,), T) if seqlens is None else seqlens.long()
    return end[:, None] + torch.arange(-S, 0)


def _choose(
    q: Tensor, k: Tensor, lse: Tensor | None, T: int, block: int, compress_block: int, stride: int, slots: int, scale: float,
    cu_seqlens: Tensor | None, groups: Groups | None, seqlens: Tensor | None,
) -> Tensor:
    """NSA's blocks [B, S, Hkv, slots] from the compressed keys and their lse, or MoBA's [B, S, H, slots] from the keys
    (compress_block 0): csrc/cpu/block_select.cpp."""
    assert C is not None
    q, k = rows_contiguous(q), rows_contiguous(k)
    lse, cu_seqlens, seqlens = (None if x is None else x.contiguous() for x in (lse, _int32(cu_seqlens), _int32(seqlens)))
    cu_compressed = None if groups is None else groups.cu_keys
    indices = empty((*q.shape[:-2], k.shape[-2] if compress_block else q.shape[-2], slots), q, torch.int32)
    fields = attention._shape_fields(q, k, k, cu_seqlens, *_options(True, scale)) | dict(k_len=T)
    C.block_select(C.BlockSelectParams(
        **fields, slots=slots, block=block, compress_block=compress_block, stride=stride, q=pointer(q), k=pointer(k), lse=pointer(lse),
        q_stride=strides(q), k_stride=strides(k), cu_seqlens=pointer(cu_seqlens), cu_compressed=pointer(cu_compressed),
        seqlens=pointer(seqlens), indices=pointer(indices),
    ))  # fmt: skip
    return indices


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.int()


# ---- the chosen blocks -----------------------------------------------------------------------------------------


def _key_indices(indices: Tensor, positions: Tensor, block: int) -> Tensor:
    """Blocks [B, S, X, n] -> their keys up to the query's own [B, S, X, n block] int32, -1 for the others."""
    keys = (indices[..., None] * block + torch.arange(block, dtype=torch.int32)).flatten(-2)
    seen = (indices >= 0).repeat_interleave(block, -1) & (keys <= positions[..., None, None])
    return keys.masked_fill_(~seen, -1)


def _chosen(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block: int, scale: float, cu_seqlens: Tensor | None, seqlens: Tensor | None,
    results: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the chosen blocks -> out [B, S, H, Dv], lse [B, S, H], into `results`: csrc/cpu/block_sparse.cpp. The few
    queries of a cache go key by key: that kernel packs all keys first."""
    assert C is not None
    if seqlens is not None:
        keys = _key_indices(indices, _positions(q.shape[-3], k.shape[-3], cu_seqlens, seqlens), block)
        return sparse.cpu_attention(q, k, v, keys, None, None, None, seqlens, None, v.shape[-1], scale)
    out, lse = results or (empty((*q.shape[:-1], v.shape[-1]), q), empty(tuple(q.shape[:-1]), q, torch.float32))
    fields, held = _block_fields(q, k, v, indices, block, scale, cu_seqlens)
    C.block_sparse_forward(C.BlockSparseForwardParams(**fields, out=pointer(out), lse=pointer(lse)))
    return out, lse


def _block_fields(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block: int, scale: float, cu_seqlens: Tensor | None
) -> tuple[dict[str, Any], list[Tensor | None]]:
    """Fields of BlockSparseShape, and the tensors they point to."""
    q, k, v, indices = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), indices.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.int().contiguous()
    fields = attention._shape_fields(q, k, v, cu_seqlens, *_options(True, scale)) | dict(
        choosing=indices.shape[-2], slots=indices.shape[-1], block=block, q=pointer(q), k=pointer(k), v=pointer(v), q_stride=strides(q),
        k_stride=strides(k), v_stride=strides(v), indices=pointer(indices), cu_seqlens=pointer(cu_seqlens),
    )  # fmt: skip
    return fields, [q, k, v, indices, cu_seqlens]


def _chosen_backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block: int, scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv: csrc/cpu/block_sparse_backward.cpp"""
    assert C is not None
    dout, dq, dk, dv = dout.contiguous(), *(empty(tuple(x.shape), x) for x in (q, k, v))
    fields, held = _block_fields(q, k, v, indices, block, scale, cu_seqlens)
    C.block_sparse_backward(C.BlockSparseBackwardParams(
        **fields, out=pointer(out), lse=pointer(lse), dout=pointer(dout), dq=pointer(dq), dk=pointer(dk), dv=pointer(dv),
    ))
    return dq, dk, dv


# ---- NSA -------------------------------------------------------------------------------------------------------


def native_sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, gates: Tensor, cu_seqlens: Tensor | None, seqlens: Tensor | None,
    block: int, compress_block: int, stride: int, top_n: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, S, H, Dv]; of the branches out [3, B, S, H, Dv] and lse [3, B, S, H]; blocks [B, S, Hkv, n]."""
    branches, lse = empty((3, *q.shape[:-1], v.shape[-1]), q), empty((3, *q.shape[:-1]), q, torch.float32)
    if q.numel() == 0:
        return empty(tuple(branches.shape[1:]), q), branches, lse, empty((*q.shape[:-2], k.shape[-2], top_n), q, torch.int32)
    block, compress_block = (_within(x, k.shape[-3], stride) for x in (block, compress_block))
    groups = Groups(q, k.shape[-3], k.shape[-2], compress_block, stride, cu_seqlens, seqlens)
    branches[0], lse[0] = _compressed(q, kc, vc, groups, scale)
    sizes = k.shape[-3], block, compress_block, stride, top_n, scale
    indices = _choose(q, kc, lse[0], *sizes, cu_seqlens, groups, seqlens)
    if seqlens is None:
        _chosen(q, k, v, indices, block, scale, cu_seqlens, None, (branches[1], lse[1]))
        _near(q, k, v, branches[2], lse[2], cu_seqlens, window, scale)
    else:
        branches[1], lse[1] = _chosen(q, k, v, indices, block, scale, None, seqlens)
        cache = rows_contiguous(k), rows_contiguous(v), seqlens
        branches[2], lse[2] = attention.cpu_decode(q, *cache, None, None, None, None, None, 0, *_options(True, scale, window - 1))
    out, gates = empty(tuple(branches.shape[1:]), q), gates.float().contiguous()
    C.branch_gates(C.BranchGatesParams(**_gate_fields(branches.unbind(), gates), out=pointer(out)))
    return out, branches, lse, indices


def _near(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None, window: int, scale: float) -> None:
    """Attention over the window, into out [B, S, H, Dv] and lse [B, S, H]."""
    q, k, v, cu = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), _int32(cu_seqlens)
    C.attention_forward(C.AttentionForwardParams(
        q=pointer(q), k=pointer(k), v=pointer(v), cu_seqlens_q=pointer(cu), cu_seqlens_k=pointer(cu), out=pointer(out), lse=pointer(lse),
        q_stride=strides(q), k_stride=strides(k), v_stride=strides(v), out_stride=strides(out),
        **attention._shape_fields(q, k, v, cu, *_options(True, scale, window - 1)),
    ))  # fmt: skip


def _gate_fields(branches: Sequence[Tensor], gates: Tensor | None) -> dict[str, Any]:
    """Three contiguous branches [B, S, H, ·], gates float32 [B, S, H, 3] or None: all 1."""
    first, second, third = branches
    return dict(
        dtype=DTYPE_CODES[first.dtype], rows=first.numel() // first.shape[-1], value_dim=first.shape[-1], branch0=pointer(first),
        branch1=pointer(second), branch2=pointer(third), gates=pointer(gates), threads=torch.get_num_threads(),
    )  # fmt: skip


def native_sparse_backward(
    dout: Tensor, branches: Tensor, lse: Tensor, indices: Tensor, q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, gates: Tensor,
    cu_seqlens: Tensor | None, seqlens: Tensor | None, block: int, compress_block: int, stride: int, top_n: int, window: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dk_compressed, dv_compressed, dgates."""
    if q.numel() == 0:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, kc, vc, gates))
    dout, wide_gates, douts = dout.contiguous(), gates.float().contiguous(), empty(tuple(branches.shape), branches)
    dgates = empty(tuple(gates.shape), gates, torch.float32)
    C.branch_gates(C.BranchGatesParams(
        **_gate_fields(branches.unbind(), wide_gates), dout=pointer(dout), dbranches=pointer(douts), dgates=pointer(dgates)
    ))  # fmt: skip
    of_compressed, of_chosen, of_window = douts
    block, compress_block = (_within(x, k.shape[-3], stride) for x in (block, compress_block))
    groups = Groups(q, k.shape[-3], k.shape[-2], compress_block, stride, cu_seqlens, None)
    joined, wide_lse = groups.join(q), groups.join(lse[0][..., None])[..., 0].contiguous()
    dq, dkc, dvc, _ = attention.cpu_backward(
        groups.join(of_compressed), None, joined, kc, vc, groups.join(branches[0]), wide_lse, None, None, groups.cu_groups,
        groups.cu_keys, *_options(True, scale),
    )
    first = groups.split(dq)
    second, dk, dv = _chosen_backward(of_chosen, branches[1], lse[1], q, k, v, indices, block, scale, cu_seqlens)
    third, dk_near, dv_near, _ = attention.cpu_backward(
        of_window, None, q, k, v, branches[2], lse[2], None, None, cu_seqlens, cu_seqlens, *_options(True, scale, window - 1)
    )
    dq, first = empty(tuple(q.shape), q), first.contiguous()
    C.branch_gates(C.BranchGatesParams(**_gate_fields((first, second, third), None), out=pointer(dq)))
    return dq, dk.add_(dk_near), dv.add_(dv_near), dkc, dvc, dgates.to(gates.dtype)


# ---- MoBA ------------------------------------------------------------------------------------------------------


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, block: int, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, S, H, Dv], lse [B, S, H], blocks [B, S, H, top_k]."""
    if q.numel() == 0:
        shape = (*q.shape[:-1], top_k)
        return empty((*q.shape[:-1], v.shape[-1]), q), empty(tuple(q.shape[:-1]), q, torch.float32), empty(shape, q, torch.int32)
    block = _within(block, k.shape[-3])
    indices = _choose(q, k, None, k.shape[-3], block, 0, 1, top_k, scale, cu_seqlens, None, None)
    return (*_chosen(q, k, v, indices, block, scale, cu_seqlens, None), indices)


def block_backward(
    dout: Tensor, out: Tensor, lse: Tensor, indices: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, block: int,
    top_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    if q.numel() == 0:
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        return dq, dk, dv
    return _chosen_backward(dout, out, lse, q, k, v, indices, _within(block, k.shape[-3]), scale, cu_seqlens)
