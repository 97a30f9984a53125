"""What host code needs to hand tensors to C++ kernels: dtype codes, strides, result buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# csrc/include/types.h
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_poison = False


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of [B, S, H, D], or of [S, H, D] with 0 in front, before the last, contiguous dimension; in elements."""
    if x is None:
        return 0, 0, 0
    return (x.stride(0) if x.dim() == 4 else 0), x.stride(-3), x.stride(-2)


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised result on like's device; NaN-filled inside `poisoned_results`."""
    x = torch.empty(shape, dtype=like.dtype if dtype is None else dtype, device=like.device)  # new_empty takes 1 µs more
    if _poison and x.is_floating_point():
        x.fill_(float("nan"))
    return x


@contextmanager
def poisoned_results() -> Iterator[None]:
    """Inside, result buffers start as NaN, so that an element no kernel wrote shows; for tests and validate."""
    global _poison
    former, _poison = _poison, True
    try:
        yield
    finally:
        _poison = former
