"""Batch-invariant linear: y = x·Wᵀ + b, where a row's bits never depend on the other rows.

Shapes: N rows (all leading dimensions), I in, O out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from thinkernel.ops import checks
from thinkernel.ops.dispatch import C
from thinkernel.ops.library import Op
from thinkernel.ops.memory import DTYPE_CODES, empty, pointer, rows_contiguous
from thinkernel.reference import linear as reference

linear_forward = Op(
    "linear_forward",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)
linear_backward = Op(
    "linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    lambda dy, x, weight, need_x, need_weight, need_bias: (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    ),
)


@linear_forward.kernel("reference")
def _reference_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return reference.linear(x, weight, bias)


@linear_backward.kernel("reference")
def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    dy, wide_x = dy.to(compute), x.to(compute)
    dx = (dy @ weight.to(compute)).to(x.dtype) if need_x else x.new_empty(0)
    dw = (dy.T @ wide_x).to(weight.dtype) if need_weight else weight.new_empty(0)
    return dx, dw, dy.sum(0).to(weight.dtype) if need_bias else weight.new_empty(0)


def _covers_dtype(x: Tensor, *rest: Any) -> str | None:
    return None if x.dtype in DTYPE_CODES else f"x: takes float32, bfloat16 and float16, not {x.dtype}"


@linear_forward.kernel("cpu", _covers_dtype)
def _cpu_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight = rows_contiguous(x), rows_contiguous(weight)
    y = empty((x.shape[0], weight.shape[0]), x)  # [N, O]
    bias = None if bias is None else bias.contiguous()
    C.linear_forward(C.LinearForwardParams(
        dtype=DTYPE_CODES[x.dtype], n=x.shape[0], **{"in": x.shape[1]}, out=weight.shape[0], x=x.data_ptr(),
        x_stride=x.stride(0), weight=weight.data_ptr(), weight_stride=weight.stride(0), bias=pointer(bias),
        y=y.data_ptr(), y_stride=y.stride(0), threads=torch.get_num_threads(),
    ))
    return y


def _gradient_buffers(
    x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [N, I], dweight [O, I], dbias [O]; empty where not needed."""
    dx = empty(tuple(x.shape) if need_x else (0,), x)
    dw = empty(tuple(weight.shape) if need_weight else (0,), weight)
    return dx, dw, empty((weight.shape[0] if need_bias else 0,), weight)


@linear_backward.kernel("cpu", lambda dy, x, *rest: _covers_dtype(x))
def _cpu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, weight = rows_contiguous(dy.to(x.dtype)), rows_contiguous(x), rows_contiguous(weight)
    dx, dw, db = _gradient_buffers(x, weight, need_x, need_weight, need_bias)
    C.linear_backward(C.LinearBackwardParams(
        dtype=DTYPE_CODES[x.dtype], n=x.shape[0], **{"in": x.shape[1]}, out=weight.shape[0], dy=dy.data_ptr(),
        dy_stride=dy.stride(0), x=x.data_ptr(), x_stride=x.stride(0), weight=weight.data_ptr(),
        weight_stride=weight.stride(0), dx=pointer(dx) if need_x else 0, dweight=pointer(dw) if need_weight else 0,
        dbias=pointer(db) if need_bias else 0, threads=torch.get_num_threads(),
    ))
    return dx, dw, db


@linear_forward.kernel("triton", _covers_dtype)
def _triton_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from thinkernel.kernels import linear as kernels

    y = empty((x.shape[0], weight.shape[0]), x)
    kernels.linear(x, weight, bias, y)
    return y


@linear_backward.kernel("triton", lambda dy, x, *rest: _covers_dtype(x))
def _triton_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dy·W and dW = dyᵀ·x are the forward kernel on transposed views; db is one column sum."""
    from thinkernel.kernels import linear as kernels

    dy = dy.to(x.dtype)
    dx, dw, db = _gradient_buffers(x, weight, need_x, need_weight, need_bias)
    if need_x:
        kernels.linear(dy, weight.T, None, dx)
    if need_weight:
        kernels.linear(dy.T, x.T, None, dw)
    if need_bias:
        db.copy_(dy.float().sum(0))
    return dx, dw, db


def _setup(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = args
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias = ctx.needs_input_grad
    dx, dw, db = linear_backward(dy, *ctx.saved_tensors, need_x, need_weight, need_bias and ctx.has_bias)
    return dx if need_x else None, dw if need_weight else None, db if need_bias and ctx.has_bias else None


linear_forward.differentiate(_setup, _backward, reference=_reference_forward)
linear_forward.autocast("x", "weight", "bias")
linear_backward.refuse_gradient("double backward is not supported")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times weight [O, I] transposed plus bias [O] -> [..., O], differentiable, batch-invariant.

    float32, bfloat16, float16 (float64: reference), one dtype for all; accumulated in float32 in one fixed order along
    I, so that a row's bits are the same alone and in any batch, on any thread count. torch's own matmul does not
    promise that: 947 of 1024 values of a float32 F.linear differ between a row alone and in a batch.
    Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("x", x, range(1, 9), "[..., I]")
    checks.tensor("weight", weight, 2, "[O, I]")
    checks.size("weight", weight, 1, x.shape[-1], "I of x")
    if bias is not None:
        checks.tensor("bias", bias, 1, "[O]")
        checks.shape("bias", bias, weight.shape[:1], "[O]")
    checks.cast_together("weight", weight, "x", x)
    if bias is not None:
        checks.cast_together("bias", bias, "x", x)
    checks.same_device("x", x, weight=weight, bias=bias)
    rows = math.prod(x.shape[:-1])  # not -1: I may be 0
    return linear_forward(x.reshape(rows, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])
