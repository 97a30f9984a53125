"""How sparse_attention's ops call the Triton kernels: what they cover, result buffers, launch. Each function takes its op's arguments.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, K slots, D head dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinkernel.ops.memory import empty, rows_contiguous


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.int().contiguous()


def _slots(indices: Tensor) -> Tensor:
    """int32, contiguous; what 32 bits cannot hold names no key and must not wrap to one."""
    return (indices.clamp(-1, 2**31 - 1) if indices.dtype == torch.int64 else indices).int().contiguous()


def covers(q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor, *rest: Any) -> str | None:
    from thinkernel.kernels import sparse_attention as kernels

    value_dim, scale = rest[-2:]
    return kernels.covers(q, kv, v, value_dim, scale)


def attention(
    q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor, sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    seqlens: Tensor | None, block_table: Tensor | None, value_dim: int, scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, S, H, Dv], lse [B, S, H]."""
    from thinkernel.kernels import sparse_attention as kernels

    out, lse = empty((*q.shape[:-1], value_dim), q), empty(tuple(q.shape[:-1]), q, torch.float32)
    kernels.sparse_attention(
        rows_contiguous(q), rows_contiguous(kv), None if v is None else rows_contiguous(v), _slots(indices), out, lse, scale=scale,
        sinks=sinks, cu_seqlens_q=_int32(cu_q), cu_seqlens_k=_int32(cu_k), seqlens=_int32(seqlens), block_table=_int32(block_table),
    )
    return out, lse


def backward_covers(
    grads: Sequence[Tensor | None], out: Tensor, lse: Tensor, q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor,
    sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, seqlens: Tensor | None, block_table: Tensor | None, *rest: Any,
) -> str | None:
    from thinkernel.kernels import sparse_attention_backward as kernels

    return kernels.covers(q, kv, v, block_table) or covers(q, kv, v, indices, *rest)


def backward(
    grads: Sequence[Tensor | None], out: Tensor, lse: Tensor, q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor,
    sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, seqlens: Tensor | None, block_table: Tensor | None, value_dim: int,
    scale: float,
) -> list[Tensor]:
    """[dq, dkv or dk, dv, dsinks], those of tensors alone."""
    from thinkernel.kernels import sparse_attention_backward as kernels

    dout = torch.zeros_like(out) if grads[0] is None else grads[0]
    dlse = None if grads[1] is None else grads[1].float()
    dq, dk = empty(tuple(q.shape), q), empty(tuple(kv.shape), kv)
    dv = None if v is None else empty(tuple(v.shape), v)
    dsinks = None if sinks is None else empty(tuple(sinks.shape), sinks, torch.float32)
    kernels.sparse_attention_backward(
        rows_contiguous(q), rows_contiguous(kv), None if v is None else rows_contiguous(v), _slots(indices), out, lse, dout, dq, dk, dv,
        scale=scale, dlse=dlse, sinks=sinks, dsinks=dsinks, cu_seqlens_q=_int32(cu_q), cu_seqlens_k=_int32(cu_k), seqlens=_int32(seqlens),
    )
    if dsinks is not None and sinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    return [x for x in (dq, dk, dv, dsinks) if x is not None]
