"""How route calls the CUDA kernels: what these cover, result buffers, launch. Experts' kernels are Triton's.

Shapes: N tokens, E experts, K experts a token. Arguments in the order of the ops in ops/moe.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import DTYPE_CODES, empty, pointer, rows_contiguous
from thinkernel.reference.moe import SCORES

MAX_EXPERTS, MAX_TOP_K = 1024, 32


def _covers(logits: Tensor, top_k: int, bias: Tensor | None) -> str | None:
    if logits.dtype not in DTYPE_CODES:
        return f"logits: the CUDA kernel takes float32, bfloat16 and float16, not {logits.dtype}"
    if not 1 <= logits.shape[1] <= MAX_EXPERTS:
        return f"logits: the CUDA kernel takes 1 to {MAX_EXPERTS} experts, not {logits.shape[1]}"
    if top_k > MAX_TOP_K:
        return f"top_k: the CUDA kernel takes at most {MAX_TOP_K}, not {top_k}"
    if bias is not None and bias.dtype == torch.float64:
        return "bias: the CUDA kernel adds it in float32, not float64"
    if logits.shape[0] * top_k >= 1 << 31:
        return f"logits: the CUDA kernel takes fewer than 2^31 slots, not {logits.shape[0]} tokens times {top_k}"
    return None


def route_covers(logits: Tensor, experts: Tensor | None, bias: Tensor | None, top_k: int, *options: Any) -> str | None:
    return _covers(logits, top_k, bias)


def route_backward_covers(dweights: Tensor, logits: Tensor, chosen: Tensor, *options: Any) -> str | None:
    return _covers(logits, chosen.shape[1], None)


def _shape(logits: Tensor, top_k: int, score: str, renormalize: bool, scaling: float) -> dict[str, Any]:
    """Fields of RouteShape; logits' rows are contiguous."""
    return dict(
        dtype=DTYPE_CODES[logits.dtype], score=SCORES.index(score), renormalize=int(renormalize), tokens=logits.shape[0],
        experts=logits.shape[1], top_k=top_k, scaling=scaling, logits=pointer(logits), stride=logits.stride(0),
    )  # fmt: skip


def route(
    logits: Tensor, experts: Tensor | None, bias: Tensor | None, top_k: int, score: str, n_group: int, topk_group: int,
    group_score: str, renormalize: bool, scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """csrc/cuda/route_kernel.cuh."""
    assert C is not None
    logits, bias = rows_contiguous(logits), None if bias is None else bias.float().contiguous()
    n, n_expert = logits.shape
    chosen, weights = empty((n, top_k), logits, torch.int32), empty((n, top_k), logits, torch.float32)
    if experts is not None:
        chosen.copy_(experts)
    counts, order, offsets = (empty((size,), logits, torch.int32) for size in (n_expert, n * top_k, n_expert + 1))
    fields = _shape(logits, top_k, score, renormalize, scaling) | dict(
        groups=n_group, top_groups=topk_group, group_max=int(group_score == "max"), bias=pointer(bias), replay=int(experts is not None),
        chosen=pointer(chosen), weights=pointer(weights), counts=pointer(counts), order=pointer(order), offsets=pointer(offsets),
    )  # fmt: skip
    with torch.cuda.device(logits.device):
        size = C.route_cuda_workspace_bytes(C.RouteForwardCudaParams(**fields))
        workspace = logits.new_empty(size, dtype=torch.uint8)
        params = C.RouteForwardCudaParams(**fields, workspace=pointer(workspace), workspace_bytes=size)
        C.route_forward_cuda(params, torch.cuda.current_stream().cuda_stream)
    return weights, chosen, counts, order, offsets


def route_backward(dweights: Tensor, logits: Tensor, chosen: Tensor, score: str, renormalize: bool, scaling: float) -> Tensor:
    """dlogits [N, E]: csrc/cuda/route_kernel.cuh."""
    assert C is not None
    logits, dweights, chosen = rows_contiguous(logits), dweights.float().contiguous(), chosen.contiguous()
    dlogits = empty(tuple(logits.shape), logits)
    with torch.cuda.device(logits.device):
        C.route_backward_cuda(C.RouteBackwardParams(
            **_shape(logits, chosen.shape[1], score, renormalize, scaling), chosen=pointer(chosen), dweights=pointer(dweights),
            dlogits=pointer(dlogits),
        ), torch.cuda.current_stream().cuda_stream)  # fmt: skip
    return dlogits
