"""How sparse attention's ops call the C++ and CUDA kernels: what each covers, result buffers, launch.

Shapes: N rows (all leading dimensions of scores), T scores a row; of attention B batch, S queries, T keys, H heads, Hkv key
heads, D head dim, Dv value dim, K slots. Every function takes its op's arguments in the op's order (ops/sparse.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import DTYPE_CODES, empty, pointer, rows_contiguous


def topk_covers(scores: Tensor, k: int, lengths: Tensor | None) -> str | None:
    if scores.dtype not in DTYPE_CODES:
        return f"scores is {scores.dtype}; the kernels take float32, bfloat16 and float16"
    if max(scores.shape[-1], k) >= 2**31:
        return f"T = {scores.shape[-1]} and k = {k} must stay below 2^31"
    return None


def _topk_buffers(scores: Tensor, k: int, lengths: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None], dict[str, Any]]:
    """values, indices, what the fields point to, fields of TopkParams."""
    lead = tuple(scores.shape[:-1])
    values, indices = empty((*lead, k), scores), empty((*lead, k), scores, torch.int32)
    rows = rows_contiguous(scores).reshape(math.prod(lead), scores.shape[-1])  # [N, T]
    counts = None if lengths is None else lengths.reshape(-1).contiguous()  # [N]
    if counts is not None and counts.dtype != torch.int32:
        counts = counts.clamp(0, scores.shape[-1]).int()
    fields = dict(
        scores=pointer(rows), lengths=pointer(counts), values=pointer(values), indices=pointer(indices),
        dtype=DTYPE_CODES[scores.dtype], rows=rows.shape[0], length=rows.shape[1], row_stride=rows.stride(0), k=k,
    )  # fmt: skip
    return values, indices, (rows, counts), fields


def cpu_topk(scores: Tensor, k: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """values [..., k], indices int32 [..., k]: csrc/cpu/topk.cpp."""
    assert C is not None
    values, indices, held, fields = _topk_buffers(scores, k, lengths)
    if indices.numel():
        C.topk(C.TopkParams(**fields, threads=torch.get_num_threads()))
    return values, indices


def cuda_topk(scores: Tensor, k: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """values [..., k], indices int32 [..., k]: csrc/cuda/topk_kernel.cuh."""
    assert C is not None
    values, indices, held, fields = _topk_buffers(scores, k, lengths)
    if indices.numel() == 0:
        return values, indices
    with torch.cuda.device(scores.device):
        workspace_bytes = C.topk_cuda_workspace_bytes(C.TopkParams(**fields))
        workspace = held[0].new_empty(workspace_bytes, dtype=torch.uint8)
        params = C.TopkParams(**fields, workspace=pointer(workspace), workspace_bytes=workspace_bytes)
        C.topk_cuda(params, torch.cuda.current_stream().cuda_stream)
    return values, indices


def cpu_topk_backward(grads: Sequence[Tensor | None], scores: Tensor, k: int, lengths: Tensor | None) -> list[Tensor]:
    return scatter_topk_gradient(grads, scores, lambda: cpu_topk(scores, k, lengths)[1])


def cuda_topk_backward(grads: Sequence[Tensor | None], scores: Tensor, k: int, lengths: Tensor | None) -> list[Tensor]:
    return scatter_topk_gradient(grads, scores, lambda: cuda_topk(scores, k, lengths)[1])


def scatter_topk_gradient(grads: Sequence[Tensor | None], scores: Tensor, choose: Callable[[], Tensor]) -> list[Tensor]:
    """[dscores [..., T]]: each value's gradient at the position it came from. Positions are distinct: no sums."""
    T = scores.shape[-1]
    dscores = scores.new_zeros(*scores.shape[:-1], T + 1)  # the last column takes what unused slots got, and is dropped
    if grads[0] is not None:
        indices = choose().long()
        dscores.scatter_(-1, indices.masked_fill(indices < 0, T), grads[0])
    return [dscores[..., :T].contiguous()]


# ---- attention over selected keys ------------------------------------------------------------------------------


def attention_covers(q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor, *rest: Any) -> str | None:
    return None if q.dtype in DTYPE_CODES else f"q: the C++ kernels take float32, bfloat16 and float16, not {q.dtype}"


def attention_backward_covers(
    grads: Sequence[Tensor | None], out: Tensor, lse: Tensor, q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor,
    sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, seqlens: Tensor | None, block_table: Tensor | None, *rest: Any,
) -> str | None:
    if block_table is not None:
        return "block_table: the C++ backward takes keys that do not lie in pages"
    if kv.dtype == torch.uint8:
        return "kv: quantised latents have no gradient in C++"
    return attention_covers(q, kv, v, indices)


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def _row_strides(x: Tensor | None, packed: bool) -> tuple[int, int, int]:
    """{sequence or page, position, head} of k or v [B, T, Hkv, D] (packed without B), or of latents, which have no heads."""
    if x is None:
        return 0, 0, 0
    steps = [0, *x.stride()[:-1], 0] if packed else [*x.stride()[:-1], 0]
    return steps[0], steps[1], steps[2]


def _attention_fields(
    q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor, sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    seqlens: Tensor | None, table: Tensor | None, value_dim: int, scale: float,
) -> tuple[dict[str, Any], list[Tensor | None]]:
    """Fields of SparseShape, and the tensors they point to."""
    packed = cu_q is not None
    q, kv, v = q.contiguous(), rows_contiguous(kv), None if v is None else rows_contiguous(v)
    indices, sinks = indices.to(torch.int32).contiguous(), None if sinks is None else sinks.float().contiguous()
    cu_q, cu_k, seqlens, table = _int32(cu_q), _int32(cu_q if cu_k is None else cu_k), _int32(seqlens), _int32(table)
    fields = dict(
        dtype=DTYPE_CODES[q.dtype], quantised=int(kv.dtype == torch.uint8), batch=len(cu_q) - 1 if cu_q is not None else q.shape[0],
        q_len=q.shape[-3], k_len=kv.shape[0 if packed else 1], heads=q.shape[-2], kv_heads=1 if v is None else v.shape[-2],
        head_dim=q.shape[-1], value_dim=value_dim, slots=indices.shape[-1], scale=scale, threads=torch.get_num_threads(),
        q=pointer(q), k=pointer(kv), v=pointer(v), k_stride=_row_strides(kv, packed), v_stride=_row_strides(v, packed),
        indices=pointer(indices), sinks=pointer(sinks), cu_seqlens_q=pointer(cu_q), cu_seqlens_k=pointer(cu_k),
        seqlens=pointer(seqlens), block_table=pointer(table), page_size=0 if table is None else kv.shape[1],
        max_pages=0 if table is None else table.shape[1],
    )  # fmt: skip
    return fields, [q, kv, v, indices, sinks, cu_q, cu_k, seqlens, table]


def cpu_attention(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """out [B, S, H, Dv], lse [B, S, H]: csrc/cpu/sparse_attention.cpp."""
    assert C is not None
    value_dim = args[-2]
    out, lse = empty((*q.shape[:-1], value_dim), q), empty(tuple(q.shape[:-1]), q, torch.float32)
    if lse.numel():
        fields, held = _attention_fields(q, *args)
        C.sparse_forward(C.SparseForwardParams(**fields, out=pointer(out), lse=pointer(lse)))
    return out, lse


def cpu_attention_backward(grads: Sequence[Tensor | None], out: Tensor, lse: Tensor, q: Tensor, *args: Any) -> list[Tensor]:
    """[dq, dkv or dk, dv, dsinks], those of tensors alone: csrc/cpu/sparse_backward.cpp."""
    assert C is not None
    kv, v, indices, sinks = args[:4]
    dout = torch.zeros_like(out) if grads[0] is None else grads[0].contiguous()
    dlse = None if grads[1] is None else grads[1].float().contiguous()
    dq, dk = empty(tuple(q.shape), q), empty(tuple(kv.shape), kv)
    dv = None if v is None else empty(tuple(v.shape), v)
    dsinks = None if sinks is None else empty(tuple(sinks.shape), sinks, torch.float32)
    fields, held = _attention_fields(q, *args)
    C.sparse_backward(C.SparseBackwardParams(
        **fields, out=pointer(out), lse=pointer(lse), dout=pointer(dout), dlse=pointer(dlse), dq=pointer(dq), dk=pointer(dk),
        dv=pointer(dv), dsinks=pointer(dsinks),
    ))
    if dsinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    return [x for x in (dq, dk, dv, dsinks) if x is not None]


# ---- the indexer -----------------------------------------------------------------------------------------------


def indexer_covers(
    q: Tensor, k: Tensor, w: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, seqlens: Tensor | None, block_table: Tensor | None,
    k_scale: Tensor | None, top_k: int, causal: bool,
) -> str | None:
    if q.dtype not in DTYPE_CODES:
        return f"q: the C++ kernels take float32, bfloat16 and float16, not {q.dtype}"
    if k.dtype not in (q.dtype, torch.float8_e4m3fn):
        return f"k: the C++ kernels take q's {q.dtype} and float8_e4m3fn, not {k.dtype}"
    if w.dtype == torch.float64 or (k_scale is not None and k_scale.dtype == torch.float64):
        return "w: the C++ kernels weigh scores in float32, not float64"
    return None


def cpu_indexer_topk(
    q: Tensor, k: Tensor, w: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, seqlens: Tensor | None, block_table: Tensor | None,
    k_scale: Tensor | None, top_k: int, causal: bool,
) -> Tensor:
    """indices int32 [B, S, top_k]: csrc/cpu/indexer_topk.cpp."""
    assert C is not None
    packed = cu_q is not None
    indices = empty((*q.shape[:-2], top_k), q, torch.int32)
    if indices.numel() == 0:
        return indices
    q, k, w = q.contiguous(), rows_contiguous(k), w.float().contiguous()
    k_scale = None if k_scale is None else k_scale.float()
    cu_q, cu_k, seqlens, block_table = _int32(cu_q), _int32(cu_q if cu_k is None else cu_k), _int32(seqlens), _int32(block_table)
    C.indexer_topk(C.IndexerTopkParams(
        dtype=DTYPE_CODES[q.dtype], quantised=int(k.dtype == torch.float8_e4m3fn), causal=int(causal),
        batch=len(cu_q) - 1 if cu_q is not None else q.shape[0], q_len=q.shape[-3], k_len=k.shape[0 if packed else 1], heads=q.shape[-2],
        head_dim=q.shape[-1], top_k=top_k, threads=torch.get_num_threads(), q=pointer(q), k=pointer(k), w=pointer(w),
        k_scale=pointer(k_scale), k_stride=_row_strides(k, packed)[:2],
        k_scale_stride=(0, 0) if k_scale is None else (0, k_scale.stride(0)) if packed else k_scale.stride(),
        cu_seqlens_q=pointer(cu_q), cu_seqlens_k=pointer(cu_k), seqlens=pointer(seqlens), block_table=pointer(block_table),
        page_size=0 if block_table is None else k.shape[1], max_pages=0 if block_table is None else block_table.shape[1],
        indices=pointer(indices),
    ))
    return indices
