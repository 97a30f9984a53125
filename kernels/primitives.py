"""Device functions that every family's kernels share, and the one function that launches them.

Legend: a tile is a block of rows [ROWS, COLUMNS] of a matrix whose last dimension is contiguous.
"""
from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def dot(a, b, accumulator, DEPTH: tl.constexpr = 128):
    """accumulator + a·b in float32, and IEEE float32 where the operands are float32 (no tf32).

    float32 operands deeper than DEPTH are multiplied in parts that deep (or 64), whose results are then added.
    """
    if _INTERPRET:  # its bfloat16 product multiplies the raw 16-bit words
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype == tl.float32 and a.shape[1] > DEPTH:
        # Without tensor cores each thread holds its operands' whole depth in registers: 256 deep they spill.
        PART: tl.constexpr = DEPTH if DEPTH < 64 else 64
        PARTS: tl.constexpr = a.shape[1] // PART
        a_parts = tl.permute(tl.reshape(a, (a.shape[0], PARTS, PART)), (1, 0, 2))
        b_parts = tl.reshape(b, (PARTS, PART, b.shape[1]))
        result = accumulator + tl.sum(tl.dot(a_parts, b_parts, input_precision="ieee"), 0)
    else:
        result = tl.dot(a, b, accumulator, input_precision="ieee")
    return result


@triton.jit
def load_tile(pointer, stride, rows_left, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
              WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Columns FIRST … FIRST+COLUMNS−1 of the ROWS rows at `pointer`; 0 past `rows_left` rows and past WIDTH columns."""
    row = tl.arange(0, ROWS)
    if WIDE:
        row = row.to(tl.int64)
    column = FIRST + tl.arange(0, COLUMNS)
    at = pointer + row[:, None] * stride + column[None, :]
    if FIRST + COLUMNS > WIDTH:
        tile = tl.load(at, mask=(row < rows_left)[:, None] & (column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(at, mask=(row < rows_left)[:, None], other=0.0)
    return tile


@triton.jit
def store_tile(pointer, tile, stride, rows_left, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
               WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """The inverse of load_tile: rows past `rows_left` and columns past WIDTH are not written."""
    row = tl.arange(0, ROWS)
    if WIDE:
        row = row.to(tl.int64)
    column = FIRST + tl.arange(0, COLUMNS)
    at = pointer + row[:, None] * stride + column[None, :]
    tl.store(at, tile.to(pointer.dtype.element_ty), mask=(row < rows_left)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def convert(x, DTYPE: tl.constexpr):
    """x as DTYPE, to nearest even; the interpreter's own conversion to bfloat16 cuts the low bits off."""
    if _INTERPRET and DTYPE == tl.bfloat16 and x.dtype != tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536, bits)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def again(x):
    """The int32 x, of which the compiler does not know that it is x: what is derived from it is computed here, and not kept in registers
    across the loop before."""
    if not _INTERPRET:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
    return x


@triton.jit
def exact_exp(x):
    """e^x in float32 to an ulp; tl.exp rounds x·log2(e), which at x = −15 costs 1e-6."""
    if _INTERPRET:
        y = tl.exp(x)
    else:
        y = libdevice.exp(x)
    return y


@triton.jit
def logistic(x, EXACT: tl.constexpr = True):
    """1/(1 + e^−x), to an ulp or two; not EXACT: good enough for 16-bit results, and without the branches of an exact quotient."""
    if EXACT:
        y = tl.div_rn(tl.zeros_like(x) + 1.0, 1.0 + exact_exp(-x))
    else:
        y = 1.0 / (1.0 + tl.exp(-x))
    return y


@triton.jit
def tanh(x):
    """tanh to about 2 ulp: its series below 1/4, where 1 − 2/(1 + e^2x) cancels."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    size = tl.abs(x)
    large = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size))
    return tl.where(size < 0.25, series, tl.where(x < 0, -large, large))


def is_wide(stride: int, rows: int) -> bool:
    """Whether offsets inside one tile of `rows` rows need 64 bits (offsets between tiles always have them)."""
    return abs(stride) * rows >= 2**31


def launch(kernel, grid: tuple[int, ...], *arguments, warps: int, stages: int, device: torch.device, **constants) -> None:
    """Run `kernel` on the device's current stream. Descriptors made inside a kernel need scratch memory from an allocator."""
    if INTERPRET:
        from .interpreter import interpreting

        with interpreting():
            kernel[grid](*arguments, **constants)
    else:
        if constants.get("DESCRIPTORS"):
            triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=warps, num_stages=stages, **constants)
