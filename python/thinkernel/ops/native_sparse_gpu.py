"""How NSA's and MoBA's ops call the Triton kernels: the branches, the choice of blocks, and what joins them.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, D head dim, Dv value dim, Tc compressed keys, n blocks of a query. Every
function takes its op's arguments in the op's order (ops/native_sparse.py). Nothing here waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkernel.ops.memory import empty, rows_contiguous
from thinkernel.ops.native_sparse_groups import Groups


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.int().contiguous()


def _zeros(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors)


# ---- NSA -------------------------------------------------------------------------------------------------------


def native_sparse_covers(
    q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, gates: Tensor, cu_seqlens: Tensor | None, seqlens: Tensor | None,
    block: int, compress_block: int, stride: int, top_n: int, window: int, scale: float,
) -> str | None:
    from thinkernel.kernels import native_sparse as kernels

    return kernels.covers(rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), scale, block, compress_block, stride)


def native_sparse_backward_covers(dout: Tensor, branches: Tensor, lse: Tensor, indices: Tensor, *args: Any) -> str | None:
    seqlens = args[7]
    return native_sparse_covers(*args) if seqlens is None else "seqlens: the Triton backward takes no cache"


def _compressed(q: Tensor, kc: Tensor, vc: Tensor, groups: Groups, out: Tensor, lse: Tensor, scale: float) -> None:
    """Attention over the compressed keys, into out [B, S, H, Dv] and lse [B, S, H]."""
    from thinkernel.kernels import attention

    if groups.key_counts is not None and groups.S == 1:  # one query sees all there are
        return attention.attention_decode(q, kc, vc, out, lse, seqlens=groups.key_counts, causal=False, scale=scale)
    joined = groups.join(q)
    wide, wide_lse = empty((*joined.shape[:-1], vc.shape[-1]), q), empty(tuple(joined.shape[:-1]), q, torch.float32)
    if groups.key_counts is not None:
        attention.attention_decode(joined, kc, vc, wide, wide_lse, seqlens=groups.key_counts, scale=scale)
    else:
        attention.attention_forward(
            joined, kc, vc, wide, wide_lse, causal=True, scale=scale, cu_seqlens_q=groups.cu_groups, cu_seqlens_k=groups.cu_keys
        )
    out.copy_(groups.split(wide))
    lse.copy_(groups.split(wide_lse[..., None])[..., 0])


def native_sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, gates: Tensor, cu_seqlens: Tensor | None, seqlens: Tensor | None,
    block: int, compress_block: int, stride: int, top_n: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, S, H, Dv]; of the branches out [3, B, S, H, Dv] and lse [3, B, S, H]; blocks [B, S, Hkv, n]."""
    from thinkernel.kernels import attention
    from thinkernel.kernels import native_sparse as kernels

    branches, lse = empty((3, *q.shape[:-1], v.shape[-1]), q), empty((3, *q.shape[:-1]), q, torch.float32)
    out, indices = empty(tuple(branches.shape[1:]), q), empty((*q.shape[:-2], k.shape[-2], top_n), q, torch.int32)
    if q.numel() == 0:
        return out, branches, lse, indices
    q, k, v, kc, vc = (rows_contiguous(x) for x in (q, k, v, kc, vc))
    cu, counts = _int32(cu_seqlens), _int32(seqlens)
    groups = Groups(q, k.shape[-3], k.shape[-2], compress_block, stride, cu, counts)
    _compressed(q, kc, vc, groups, branches[0], lse[0], scale)
    kernels.choose(
        q, kc, lse[0], indices, T=k.shape[-3], block=block, compress_block=compress_block, stride=stride, scale=scale, cu_seqlens=cu,
        cu_compressed=groups.cu_keys, seqlens=counts,
    )
    kernels.block_attention(q, k, v, indices, branches[1], lse[1], block=block, scale=scale, cu_seqlens=cu, seqlens=counts)
    near: dict[str, Any] = dict(causal=True, scale=scale, window=(window - 1, -1))
    if counts is None:
        attention.attention_forward(q, k, v, branches[2], lse[2], cu_seqlens_q=cu, cu_seqlens_k=cu, **near)
    else:
        attention.attention_decode(q, k, v, branches[2], lse[2], seqlens=counts, **near)
    kernels.branch_gates(branches.unbind(), gates.contiguous(), out)
    return out, branches, lse, indices


def native_sparse_backward(
    dout: Tensor, branches: Tensor, lse: Tensor, indices: Tensor, q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, gates: Tensor,
    cu_seqlens: Tensor | None, seqlens: Tensor | None, block: int, compress_block: int, stride: int, top_n: int, window: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dk_compressed, dv_compressed, dgates."""
    from thinkernel.kernels import attention
    from thinkernel.kernels import native_sparse as kernels

    if q.numel() == 0:
        return _zeros(q, k, v, kc, vc, gates)
    q, k, v, kc, vc, cu = *(rows_contiguous(x) for x in (q, k, v, kc, vc)), _int32(cu_seqlens)
    douts, dgates = empty(tuple(branches.shape), branches), empty(tuple(gates.shape), gates)
    kernels.branch_gates_backward(branches, gates.contiguous(), dout.to(q.dtype).contiguous(), douts, dgates)
    of_compressed, of_chosen, of_window = douts

    groups = Groups(q, k.shape[-3], k.shape[-2], compress_block, stride, cu, None)
    joined, wide_lse = groups.join(q), groups.join(lse[0][..., None])[..., 0].contiguous()
    first, dkc, dvc = (empty(tuple(x.shape), x) for x in (joined, kc, vc))
    attention.attention_backward(
        joined, kc, vc, groups.join(branches[0]), wide_lse, groups.join(of_compressed), first, dkc, dvc, causal=True, scale=scale,
        cu_seqlens_q=groups.cu_groups, cu_seqlens_k=groups.cu_keys,
    )
    first = groups.split(first).contiguous()
    second, dk, dv = (empty(tuple(x.shape), x) for x in (q, k, v))
    kernels.block_backward(
        q, k, v, indices, branches[1], lse[1], of_chosen, second, dk, dv, block=block, scale=scale, cu_seqlens=cu
    )
    third, dk_near, dv_near = (empty(tuple(x.shape), x) for x in (q, k, v))
    attention.attention_backward(
        q, k, v, branches[2], lse[2], of_window, third, dk_near, dv_near, causal=True, scale=scale, window=(window - 1, -1),
        cu_seqlens_q=cu, cu_seqlens_k=cu,
    )
    dq = empty(tuple(q.shape), q)
    kernels.branch_gates((first, second, third), None, dq)
    return dq, dk.add_(dk_near), dv.add_(dv_near), dkc, dvc, dgates


# ---- MoBA ------------------------------------------------------------------------------------------------------


def block_covers(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, block: int, top_k: int, scale: float) -> str | None:
    from thinkernel.kernels import native_sparse as kernels

    return kernels.covers(rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), scale, block)


def block_backward_covers(dout: Tensor, out: Tensor, lse: Tensor, indices: Tensor, *args: Any) -> str | None:
    return block_covers(*args)


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, block: int, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, S, H, Dv], lse [B, S, H], blocks [B, S, H, top_k]."""
    from thinkernel.kernels import native_sparse as kernels

    out, lse = empty((*q.shape[:-1], v.shape[-1]), q), empty(tuple(q.shape[:-1]), q, torch.float32)
    indices = empty((*q.shape[:-1], top_k), q, torch.int32)
    if q.numel() == 0:
        return out, lse, indices
    q, k, v, cu = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), _int32(cu_seqlens)
    kernels.choose(q, k, None, indices, T=k.shape[-3], block=block, cu_seqlens=cu)
    kernels.block_attention(q, k, v, indices, out, lse, block=block, scale=scale, cu_seqlens=cu)
    return out, lse, indices


def block_backward(
    dout: Tensor, out: Tensor, lse: Tensor, indices: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, block: int,
    top_k: int, scale: float,
) -> tuple[Tensor, ...]:
    """dq, dk, dv."""
    from thinkernel.kernels import native_sparse as kernels

    if q.numel() == 0:
        return _zeros(q, k, v)
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    dq, dk, dv = (empty(tuple(x.shape), x) for x in (q, k, v))
    kernels.block_backward(
        q, k, v, indices, out, lse, dout.to(q.dtype).contiguous(), dq, dk, dv, block=block, scale=scale, cu_seqlens=_int32(cu_seqlens)
    )
    return dq, dk, dv
