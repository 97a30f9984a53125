"""How top-k, the indexer and its loss call the Triton kernels: what they cover, result buffers, launch.

Shapes: N rows (all leading dimensions of scores), T scores a row or keys; B batch, S queries, Hi index heads, Di index dim. Every
function takes its op's arguments in the op's order (ops/sparse.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
