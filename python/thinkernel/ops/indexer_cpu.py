"""How the indexer's dense scores and its loss call the C++ kernels (csrc/cpu/indexer_scores.cpp, indexer_loss.cpp).

Shapes: B batch, S queries, T keys, Hi index heads, Di index dim, H heads of the attention, D head dim, K selected keys. Every function
takes its op's arguments in the op's order (ops/sparse.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import DTYPE_CODES, empty, pointer, rows_contiguous


def scores_covers(q: Tensor, k: Tensor, w: Tensor, causal: bool) -> str | None:
    if q.dtype not in DTYPE_CODES:
        return f"q: the C++ kernels take float32, bfloat16 and float16, not {q.dtype}"
    if k.dtype != q.dtype:
        return f"k: the C++ kernels take q's {q.dtype}, not {k.dtype}"
    return "w: the C++ kernels weigh scores in float32, not float64" if w.dtype == torch.float64 else None


def loss_covers(
    q: Tensor, k: Tensor, w: Tensor, target_q: Tensor, target_kv: Tensor, indices: Tensor | None, scale: float,
    target_lse: Tensor | None, reduction: str,
) -> str | None:  # fmt: skip
    for name, x in (("target_q", target_q), ("target_kv", target_kv)):
        if x.dtype != q.dtype:
            return f"{name}: the C++ kernels take q's {q.dtype}, not {x.dtype}"
    return scores_covers(q, k, w, True)


def _fields(q: Tensor, k: Tensor, w: Tensor, causal: bool) -> tuple[dict[str, Any], list[Tensor]]:
    """Fields of IndexerShape, and the tensors they point to."""
    q, k, w = q.contiguous(), rows_contiguous(k), w.float().contiguous()
    fields = dict(
        dtype=DTYPE_CODES[q.dtype], causal=int(causal), batch=q.shape[0], q_len=q.shape[1], k_len=k.shape[1], heads=q.shape[2],
        head_dim=q.shape[3], threads=torch.get_num_threads(), q=pointer(q), k=pointer(k), w=pointer(w), k_stride=k.stride()[:2],
    )  # fmt: skip
    return fields, [q, k, w]


def _target_fields(
    target_q: Tensor, target_kv: Tensor, indices: Tensor | None, scale: float, kept: Tensor
) -> tuple[dict[str, Any], list[Tensor | None]]:
    """Fields of IndexerTarget and `kept`, and the tensors they point to."""
    target_kv = target_kv[:, :, None] if target_kv.dim() == 3 else target_kv  # [B, T, Hkv, D]
    target_q, target_kv = target_q.contiguous(), rows_contiguous(target_kv)
    indices = None if indices is None else indices.to(torch.int32).contiguous()
    fields = dict(
        target_heads=target_q.shape[2], target_kv_heads=target_kv.shape[2], target_dim=target_q.shape[3],
        slots=0 if indices is None else indices.shape[2], scale=scale, target_q=pointer(target_q), target_k=pointer(target_kv),
        target_stride=target_kv.stride()[:3], indices=pointer(indices), kept=pointer(kept),
    )  # fmt: skip
    return fields, [target_q, target_kv, indices, kept]


def _gradients(q: Tensor, k: Tensor, w: Tensor) -> tuple[list[Tensor], dict[str, int]]:
    """[dq, dk, dw in float32] and the fields of IndexerGradients."""
    found = [empty(tuple(q.shape), q), empty(tuple(k.shape), k), empty(tuple(w.shape), w, torch.float32)]
    return found, {name: pointer(x) for name, x in zip(("dq", "dk", "dw"), found)}


def scores(q: Tensor, k: Tensor, w: Tensor, causal: bool) -> Tensor:
    """float32 [B, S, T]"""
    assert C is not None
    found = empty((*q.shape[:2], k.shape[1]), q, torch.float32)
    if found.numel():
        fields, held = _fields(q, k, w, causal)
        C.indexer_scores(C.IndexerScoresParams(**fields, scores=pointer(found)))
    return found


def scores_backward(grads: Sequence[Tensor | None], q: Tensor, k: Tensor, w: Tensor, causal: bool) -> list[Tensor]:
    """[dq, dk, dw]"""
    assert C is not None
    if grads[0] is None or grads[0].numel() == 0:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, w)]
    (dq, dk, dw), out = _gradients(q, k, w)
    dscores = grads[0].contiguous()
    fields, held = _fields(q, k, w, causal)
    C.indexer_scores_backward(C.IndexerScoresBackwardParams(**fields, **out, dscores=pointer(dscores)))
    return [dq, dk, dw.to(w.dtype)]


def loss(
    q: Tensor, k: Tensor, w: Tensor, target_q: Tensor, target_kv: Tensor, indices: Tensor | None, scale: float,
    target_lse: Tensor | None, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss ([B, S] or a number), and what backward needs."""
    assert C is not None
    last = 3 + 2 * target_q.shape[2] if indices is None else indices.shape[2]
    found, kept = empty(tuple(q.shape[:2]), q, torch.float32), empty((*q.shape[:2], last), q, torch.float32)
    total = torch.zeros((), dtype=torch.float64)
    if kept.numel() and k.shape[1]:
        fields, held = _fields(q, k, w, True)
        more, also_held = _target_fields(target_q, target_kv, indices, scale, kept)
        lse = None if target_lse is None else target_lse.float().contiguous()
        C.indexer_loss(C.IndexerLossParams(
            **fields, **more, target_lse=pointer(lse), loss=pointer(found), total=pointer(None if reduction == "none" else total)
        ))  # fmt: skip
    else:
        found.zero_(), kept.zero_()
    if reduction == "none":
        return found, kept
    return (total / found.numel() if reduction == "mean" else total).float(), kept


def loss_backward(dloss: Tensor, kept: Tensor, q: Tensor, k: Tensor, w: Tensor, *args: Any) -> list[Tensor]:
    """[dq, dk, dw]"""
    assert C is not None
    target_q, target_kv, indices, scale, _, reduction = args
    if kept.numel() == 0 or k.shape[1] == 0:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, w)]
    dloss = (dloss / (q.shape[0] * q.shape[1]) if reduction == "mean" else dloss).float().expand(q.shape[:2]).contiguous()
    (dq, dk, dw), out = _gradients(q, k, w)
    fields, held = _fields(q, k, w, True)
    more, also_held = _target_fields(target_q, target_kv, indices, scale, kept.contiguous())
    C.indexer_loss_backward(C.IndexerLossBackwardParams(**fields, **more, **out, dloss=pointer(dloss)))
    return [dq, dk, dw.to(w.dtype)]
