"""Deterministic top-k by radix select: the k largest scores of a row, ties to the lower index, in ascending index order.

Shapes: N rows, T scores a row, k kept, a score is an integer of 32 or 16 bits here (its bits); P parts of a row.

    order(x) = the bits of x as a number that compares as x does, −0.0 as +0.0, NaN below all
    digit by digit (8 bits, from the top): count the row's digits, take the one that the k-th largest has, go on with those that share it
    then every score above the k-th, and of those equal to it the first ones, in the row's order

Counts are integers, so nothing depends on how a row is cut up. A row has one program; where that leaves the GPU idle, P programs a
row count their parts, and each adds the row's counts up for itself at the beginning of the next digit's launch.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs_sparse
from .primitives import launch

INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
LONGEST = 2**31 - 2**16  # positions within a block past the end stay below 2^31


@triton.jit
def _order(bits, INF: tl.constexpr):
    """The bits of floats (sign-extended to int32) -> int32 that compare as the floats do; NaN lowest."""
    SIZE: tl.constexpr = 0x7FFFFFFF if INF > 0xFFFF else 0x7FFF
    size = bits & SIZE
    order = tl.where(bits < 0, bits ^ SIZE, bits)
    return tl.where(size > INF, -SIZE - 1, tl.where(size == 0, 0, order))


@triton.jit
def _load(row_ptr, at, last, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the row -> positions, which of them count, bits. WHOLE: all do, so that the load is one of whole vectors."""
    n = at + tl.arange(0, BLOCK)
    live = n < last
    if WHOLE:
        bits = tl.load(row_ptr + n)
    else:
        bits = tl.load(row_ptr + n, mask=live, other=0)
    return n, live, bits


@triton.jit
def _count_blocks(counts, row_ptr, first, last, threshold, mask, shift, flip, WHOLE: tl.constexpr, INF: tl.constexpr, BLOCK: tl.constexpr):
    for at in range(first, last, BLOCK):
        _, live, bits = _load(row_ptr, at, last, WHOLE, BLOCK)
        order = _order(bits.to(tl.int32), INF)
        digit = ((order >> shift) & 255) ^ flip
        counts += tl.histogram(digit, 256, mask=live & (((order ^ threshold) & mask) == 0))
    return counts


@triton.jit
def _count(row_ptr, first, last, threshold, mask, shift, flip, INF: tl.constexpr, BLOCK: tl.constexpr):
    """How often each value [256] of the digit at `shift` occurs in row[first : last] among scores that have the threshold's bits in `mask`.

    flip: 128 for the first digit, whose highest bit is the sign, else 0.
    """
    counts = tl.zeros([256], tl.int32)
    whole = first + tl.maximum(last - first, 0) // BLOCK * BLOCK
    counts = _count_blocks(counts, row_ptr, first, whole, threshold, mask, shift, flip, True, INF, BLOCK)
    return _count_blocks(counts, row_ptr, whole, last, threshold, mask, shift, flip, False, INF, BLOCK)


@triton.jit
def _choose(counts, threshold, need, shift, flip):
    """The digit that the need-th largest has -> the threshold with it, how many that share it are needed, the digit."""
    value = tl.arange(0, 256)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # [256] scores with a larger digit
    digit = tl.sum(tl.where((above < need) & (above + counts >= need), value, 0), 0)
    need -= tl.sum(tl.where(value > digit, counts, 0), 0)
    return threshold | ((digit - flip) << shift), need, digit


@triton.jit
def _take_blocks(row_ptr, first, last, threshold, need, n_above, n_equal, values_ptr, indices_ptr, WHOLE: tl.constexpr,
                 INF: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr):
    for at in range(first, last, BLOCK):
        n, live, bits = _load(row_ptr, at, last, WHOLE, BLOCK)
        order = _order(bits.to(tl.int32), INF)
        above = live & (order > threshold)
        equal = live & (order == threshold)
        both = above.to(tl.int32) | (equal.to(tl.int32) << 16)
        before = tl.cumsum(both, 0) - both
        equals = n_equal + (before >> 16)
        slot = n_above + (before & 0xFFFF) + tl.minimum(equals, need)
        kept = above | (equal & (equals < need))
        tl.store(indices_ptr + slot, n, mask=kept)
        if VALUES:
            tl.store(values_ptr + slot, bits, mask=kept)
        total = tl.sum(both, 0)
        n_above += total & 0xFFFF
        n_equal += total >> 16
    return n_above, n_equal


@triton.jit
def _take(row_ptr, first, last, threshold, need, n_above, n_equal, values_ptr, indices_ptr, INF: tl.constexpr, VALUES: tl.constexpr,
          BLOCK: tl.constexpr):
    """Write what row[first : last] keeps; n_above, n_equal: how many of the row's scores before are above the threshold, equal to it."""
    whole = first + tl.maximum(last - first, 0) // BLOCK * BLOCK
    n_above, n_equal = _take_blocks(
        row_ptr, first, whole, threshold, need, n_above, n_equal, values_ptr, indices_ptr, True, INF, VALUES, BLOCK)
    _take_blocks(row_ptr, whole, last, threshold, need, n_above, n_equal, values_ptr, indices_ptr, False, INF, VALUES, BLOCK)


@triton.jit
def _fill(first, k, values_ptr, indices_ptr, INF: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr):
    """Unused slots: index −1, value −inf."""
    for at in range(first, k, BLOCK):
        slot = at + tl.arange(0, BLOCK)
        tl.store(indices_ptr + slot, tl.full([BLOCK], -1, tl.int32), mask=slot < k)
        if VALUES:
            SIGN: tl.constexpr = -0x7FFFFFFF - 1 if INF > 0xFFFF else -0x8000
            tl.store(values_ptr + slot, tl.full([BLOCK], SIGN + INF, tl.int32).to(values_ptr.dtype.element_ty), mask=slot < k)


@triton.jit
def _length(lengths_ptr, row, T, LENGTHS: tl.constexpr):
    length = T
    if LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + row), 0), T)
    return length


@triton.jit(do_not_specialize=["T", "k"])
def _row_kernel(scores_ptr, lengths_ptr, values_ptr, indices_ptr, T, k, stride_row, INF: tl.constexpr, DIGITS: tl.constexpr,
                LENGTHS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    length = _length(lengths_ptr, row, T, LENGTHS)
    row_ptr = scores_ptr + row * stride_row
    if VALUES:
        values_ptr += row * k
    indices_ptr += row * k
    kept = tl.minimum(k, length)
    none = length * 0
    threshold = none
    need = kept
    mask = none
    for digit in range(DIGITS):
        shift = 8 * (DIGITS - 1 - digit)
        flip = tl.where(digit == 0, 128, 0)
        counts = _count(row_ptr, 0, length, threshold, mask, shift, flip, INF, BLOCK)
        threshold, need, _ = _choose(counts, threshold, need, shift, flip)
        mask = none - (1 << shift)
    _take(row_ptr, 0, length, threshold, need, none, none, values_ptr, indices_ptr, INF, VALUES, BLOCK)
    _fill(kept, k, values_ptr, indices_ptr, INF, VALUES, BLOCK)


@triton.jit(do_not_specialize=["T", "k", "part", "parts"])
def _part_kernel(scores_ptr, lengths_ptr, values_ptr, indices_ptr, before_ptr, counts_ptr, state_ptr, T, k, part, parts, stride_row,
                 DIGIT: tl.constexpr, INF: tl.constexpr, DIGITS: tl.constexpr, LENGTHS: tl.constexpr, VALUES: tl.constexpr,
                 BLOCK: tl.constexpr):
    """One program: `part` scores of one row, counted by their digit DIGIT (0 … DIGITS − 1) into counts [N, P, 256], or at last written.

    before [N, P, 256]: the counts of the digit before.
    state [N, P, 3]: the threshold's digits so far, how many that share them are needed, scores of the parts before that lie above.
    """
    at = tl.program_id(0).to(tl.int64)  # row·P + part
    row = at // parts
    mine = (at % parts).to(tl.int32)
    length = _length(lengths_ptr, row, T, LENGTHS)
    kept = tl.minimum(k, length)
    row_ptr = scores_ptr + row * stride_row
    first = tl.multiple_of(mine * part, BLOCK)
    last = tl.minimum(length, first + part)
    SHIFT: tl.constexpr = 8 * (DIGITS - 1 - DIGIT)
    n_above = length * 0
    n_equal = n_above
    threshold = n_above
    need = kept
    mask = n_above
    value = tl.arange(0, 256)
    if DIGIT > 0:
        if DIGIT > 1:
            threshold = tl.load(state_ptr + at * 3)
            need = tl.load(state_ptr + at * 3 + 1)
            n_above = tl.load(state_ptr + at * 3 + 2)
        of_row = before_ptr + row * parts * 256 + value
        counts = tl.zeros([256], tl.int32)
        before = tl.zeros([256], tl.int32)
        for p in range(0, parts):
            theirs = tl.load(of_row + p * 256)
            counts += theirs
            before += tl.where(p < mine, theirs, 0)
        threshold, need, digit = _choose(counts, threshold, need, SHIFT + 8, 128 if DIGIT == 1 else 0)
        mask -= 1 << (SHIFT + 8)
        n_above += tl.sum(tl.where(value > digit, before, 0), 0)
        n_equal = tl.sum(tl.where(value == digit, before, 0), 0)
    if DIGIT < DIGITS:
        if DIGIT > 0:
            tl.store(state_ptr + at * 3, threshold)
            tl.store(state_ptr + at * 3 + 1, need)
            tl.store(state_ptr + at * 3 + 2, n_above)
        counts = _count(row_ptr, first, last, threshold, mask, SHIFT, 0 if DIGIT > 0 else 128, INF, BLOCK)
        tl.store(counts_ptr + at * 256 + value, counts)
    else:
        if VALUES:
            values_ptr += row * k
        indices_ptr += row * k
        _take(row_ptr, first, last, threshold, need, n_above, n_equal, values_ptr, indices_ptr, INF, VALUES, BLOCK)
        if mine == 0:
            _fill(kept, k, values_ptr, indices_ptr, INF, VALUES, BLOCK)


def covers(scores: Tensor, k: int) -> str | None:
    """Why select cannot take this call, naming the argument; None if it can."""
    if scores.dtype not in INFINITY:
        return f"scores: {scores.dtype} is not one of {tuple(INFINITY)}"
    if max(scores.shape[-1], k) > LONGEST:
        return f"scores: T = {scores.shape[-1]} and k = {k} are not both at most {LONGEST}"
    return None


def select(scores: Tensor, lengths: Tensor | None, values: Tensor | None, indices: Tensor) -> None:
    """scores [N,T] (rows any stride apart), lengths [N] int32 or None -> indices [N,k] int32, values [N,k] if given: both contiguous.

    Nothing of a row past its length is read. Nothing here waits for the GPU.
    """
    (N, T), k = scores.shape, indices.shape[1]
    if N * k == 0:
        return
    bits = torch.int32 if scores.dtype == torch.float32 else torch.int16
    plan = configs_sparse.topk(N, T)
    constants: dict[str, Any] = dict(
        INF=INFINITY[scores.dtype], DIGITS=bits.itemsize, LENGTHS=lengths is not None, VALUES=values is not None, BLOCK=plan.block,
        warps=plan.warps, stages=2, device=scores.device)
    tensors = scores.view(bits), lengths, None if values is None else values.view(bits), indices
    if plan.parts == 1:
        launch(_row_kernel, (N,), *tensors, T, k, scores.stride(0), **constants)
        return
    counts = torch.empty((2, N, plan.parts, 256), dtype=torch.int32, device=scores.device)
    state = torch.empty((N, plan.parts, 3), dtype=torch.int32, device=scores.device)
    for digit in range(constants["DIGITS"] + 1):
        launch(_part_kernel, (N * plan.parts,), *tensors, counts[1 - digit % 2], counts[digit % 2], state, T, k, plan.part, plan.parts,
               scores.stride(0), DIGIT=digit, **constants)
