"""How sparse attention's ops call the C++ and CUDA kernels: what each covers, result buffers, launch.

Shapes: N rows (all leading dimensions of scores), T scores a row. Every function takes its op's arguments in the op's
order (ops/sparse.py).
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
    return _topk_backward(grads, scores, lambda: cpu_topk(scores, k, lengths)[1])


def cuda_topk_backward(grads: Sequence[Tensor | None], scores: Tensor, k: int, lengths: Tensor | None) -> list[Tensor]:
    return _topk_backward(grads, scores, lambda: cuda_topk(scores, k, lengths)[1])


def _topk_backward(grads: Sequence[Tensor | None], scores: Tensor, choose: Callable[[], Tensor]) -> list[Tensor]:
    """[dscores [..., T]]: each value's gradient at the position it came from. Positions are distinct: no sums."""
    T = scores.shape[-1]
    dscores = scores.new_zeros(*scores.shape[:-1], T + 1)  # the last column takes what unused slots got, and is dropped
    if grads[0] is not None:
        indices = choose().long()
        dscores.scatter_(-1, indices.masked_fill(indices < 0, T), grads[0])
    return [dscores[..., :T].contiguous()]
