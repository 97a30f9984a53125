"""What host code needs to hand tensors to C++ kernels: dtype codes, strides, result buffers."""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from thinkernel.ops.dispatch import C

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


HUGE_FROM = 4 << 20  # bytes


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise  # type: ignore[no-any-return]


def _ask_for_huge_pages(x: Tensor) -> None:
    """For the whole 2 MiB pieces of x, if it is large and on the CPU. Fresh memory costs a fault per page, 1.2 us: 2.4 ms for
    8 MiB in 4 KiB pages, 0.9 in huge ones, where attention over 2048 tokens takes 13 ms."""
    if x.nbytes < HUGE_FROM or x.device.type != "cpu":
        return
    madvise = _madvise()
    if madvise is None:
        return
    page, start = 2 << 20, x.data_ptr()
    first = -(-start // page) * page
    length = (start + x.nbytes) // page * page - first
    if length > 0:
        madvise(first, length, 14)  # MADV_HUGEPAGE; where it is refused small pages do


def zeros_cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros for what every later token reads whole: two cores read 40 GB/s from huge pages and 29 from small ones."""
    x = torch.empty(shape, dtype=dtype, device=device)
    _ask_for_huge_pages(x)
    return x.zero_()


KEPT = range(1 << 17, 1 << 26)  # bytes; below, malloc has them at hand


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised result on like's device; NaN-filled inside `poisoned_results`.

    On the CPU the memory of a result of 128 KiB to 64 MiB is kept when its last tensor is gone and given to the next
    (csrc/include/buffers.h)."""
    wanted = like.dtype if dtype is None else dtype
    nbytes = math.prod(shape) * wanted.itemsize
    if nbytes in KEPT and like.is_cpu:
        x = torch.frombuffer(C.Buffer(nbytes), dtype=wanted).view(shape)
    else:
        x = like.new_empty(shape) if dtype is None else torch.empty(shape, dtype=dtype, device=like.device)
        if nbytes >= HUGE_FROM:
            _ask_for_huge_pages(x)
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
