"""How top-k, the indexer and its loss call the Triton kernels: what they cover, result buffers, launch.

Shapes: N rows (all leading dimensions of scores), T scores a row or keys; B batch, S queries, Hi index heads, Di index dim. Every
function takes its op's arguments in the op's order (ops/sparse.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinkernel.ops.memory import empty, rows_contiguous
from thinkernel.ops.sparse_backends import scatter_topk_gradient


def topk_covers(scores: Tensor, k: int, lengths: Tensor | None) -> str | None:
    from thinkernel.kernels import topk as kernels

    return kernels.covers(scores, k)


def topk(scores: Tensor, k: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """values [..., k], indices int32 [..., k]"""
    from thinkernel.kernels import topk as kernels

    lead = tuple(scores.shape[:-1])
    values, indices = empty((*lead, k), scores), empty((*lead, k), scores, torch.int32)
    N = math.prod(lead)
    rows = rows_contiguous(scores).reshape(N, scores.shape[-1])
    counts = None if lengths is None else lengths.reshape(-1).clamp(0, scores.shape[-1]).int().contiguous()
    kernels.select(rows, counts, values.view(N, k), indices.view(N, k))
    return values, indices


def topk_backward(grads: Sequence[Tensor | None], scores: Tensor, k: int, lengths: Tensor | None) -> list[Tensor]:
    return scatter_topk_gradient(grads, scores, lambda: topk(scores, k, lengths)[1])


# ---- the indexer -----------------------------------------------------------------------------------------------


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.int().contiguous()


def _learnt(q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and w as the kernels take them: contiguous, w in float32; k with contiguous rows."""
    return q.contiguous(), rows_contiguous(k), w.float().contiguous()


def _gradients(q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dw, the last two in float32; kernels add to dk."""
    dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    return empty(tuple(q.shape), q), dk, empty(tuple(w.shape), w, torch.float32)


def scores_covers(q: Tensor, k: Tensor, w: Tensor, causal: bool) -> str | None:
    from thinkernel.kernels import indexer as kernels

    if k.dtype != q.dtype:
        return f"k: {k.dtype} is not q's {q.dtype}"
    return kernels.covers(q, k, w)


def scores(q: Tensor, k: Tensor, w: Tensor, causal: bool) -> Tensor:
    """float32 [B, S, T]"""
    from thinkernel.kernels import indexer as kernels

    found = empty((*q.shape[:2], k.shape[1]), q, torch.float32)
    kernels.indexer_scores(*_learnt(q, k, w), found, causal=causal)
    return found


def scores_backward(grads: Sequence[Tensor | None], q: Tensor, k: Tensor, w: Tensor, causal: bool) -> list[Tensor]:
    """[dq, dk, dw]"""
    from thinkernel.kernels import indexer as kernels

    if grads[0] is None or grads[0].numel() == 0:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, w)]
    dq, dk, dw = _gradients(q, k, w)
    kernels.indexer_scores_backward(*_learnt(q, k, w), grads[0].contiguous(), dq, dk, dw, causal=causal)
    return [dq, dk.to(k.dtype), dw.to(w.dtype)]


def indexer_covers(
    q: Tensor, k: Tensor, w: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, seqlens: Tensor | None, block_table: Tensor | None,
    k_scale: Tensor | None, top_k: int, causal: bool,
) -> str | None:
    from thinkernel.kernels import indexer as kernels

    if k_scale is not None and k_scale.dtype == torch.float64:
        return "k_scale: scores are scaled in float32, not float64"
    return kernels.covers(q, k, w)


def indexer_topk(
    q: Tensor, k: Tensor, w: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, seqlens: Tensor | None, block_table: Tensor | None,
    k_scale: Tensor | None, top_k: int, causal: bool,
) -> Tensor:
    """indices int32 [B, S, top_k]"""
    from thinkernel.kernels import indexer as kernels

    indices = empty((*q.shape[:-2], top_k), q, torch.int32)
    if indices.numel():
        cu_q = _int32(cu_q)
        kernels.indexer_topk(
            *_learnt(q, k, w), indices, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_q if cu_k is None else _int32(cu_k),
            seqlens=_int32(seqlens), block_table=_int32(block_table), k_scale=None if k_scale is None else k_scale.float(),
        )
    return indices


# ---- the loss --------------------------------------------------------------------------------------------------


def loss_covers(
    q: Tensor, k: Tensor, w: Tensor, target_q: Tensor, target_kv: Tensor, indices: Tensor | None, scale: float,
    target_lse: Tensor | None, reduction: str,
) -> str | None:  # fmt: skip
    from thinkernel.kernels import indexer_loss as kernels

    return scores_covers(q, k, w, True) or kernels.covers(target_q, target_kv)


def _target(S: int, target_q: Tensor, target_kv: Tensor, indices: Tensor | None, scale: float) -> Any:
    from thinkernel.kernels import indexer_loss as kernels

    target_kv = target_kv[:, :, None] if target_kv.dim() == 3 else target_kv  # [B, T, Hkv, D]
    indices = None if indices is None else indices.flatten(0, 1).int().contiguous()
    return kernels.Target(target_q.contiguous().flatten(0, 1), rows_contiguous(target_kv), S, indices, scale)


def loss(
    q: Tensor, k: Tensor, w: Tensor, target_q: Tensor, target_kv: Tensor, indices: Tensor | None, scale: float,
    target_lse: Tensor | None, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss ([B, S] or a number), and what backward needs."""
    from thinkernel.kernels import indexer_loss as kernels

    (B, S), H = q.shape[:2], target_q.shape[2]
    last = 3 + 2 * H if indices is None else indices.shape[2]
    found, kept = empty((B, S), q, torch.float32), empty((B, S, last), q, torch.float32)
    if kept.numel() and k.shape[1]:
        q, k, w = _learnt(q, k, w)
        lse = None if target_lse is None else target_lse.float().reshape(B * S, H).contiguous()
        target = _target(S, target_q, target_kv, indices, scale)
        kernels.indexer_loss(q.flatten(0, 1), k, w.flatten(0, 1), target, lse, found.view(B * S), kept.view(B * S, last))
    else:
        found.zero_(), kept.zero_()
    if reduction == "none":
        return found, kept
    total = found.double().sum()
    return (total / found.numel() if reduction == "mean" else total).float(), kept


def loss_backward(dloss: Tensor, kept: Tensor, q: Tensor, k: Tensor, w: Tensor, *args: Any) -> list[Tensor]:
    """[dq, dk, dw]"""
    from thinkernel.kernels import indexer_loss as kernels

    target_q, target_kv, indices, scale, _, reduction = args
    if kept.numel() == 0 or k.shape[1] == 0:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, w)]
    B, S = q.shape[:2]
    dloss = (dloss / (B * S) if reduction == "mean" else dloss).float().expand(B, S).contiguous()
    dq, dk, dw = _gradients(q, k, w)
    flat, keys, weights = _learnt(q, k, w)
    kernels.indexer_loss_backward(
        flat.flatten(0, 1), keys, weights.flatten(0, 1), _target(S, target_q, target_kv, indices, scale),
        kept.contiguous().flatten(0, 1), dloss.view(B * S), dq.flatten(0, 1), dk, dw.flatten(0, 1),
    )
    return [dq, dk.to(k.dtype), dw.to(w.dtype)]
