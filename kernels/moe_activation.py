"""The experts' activations on tiles: a = act(gate, up) and its gradient, in float32. Formulas: reference/moe.py.

With g = min(gate, limit) and u = clamp(up, ±limit), where a limit is given; clamped entries have gradient 0:
    swiglu   a = g·σ(g)·u                     dg = da·u·σ(g)·(1 + g·(1 − σ(g)))            du = da·g·σ(g)
    gpt_oss  a = (u + 1)·g·σ(1.702g)          dg = da·(u + 1)·σ·(1 + 1.702g·(1 − σ))       du = da·g·σ
    geglu    a = gelu(g)·u                    dg = da·u·gelu'(g)                           du = da·gelu(g)
    relu2    a = max(g, 0)²                   dg = da·2·max(g, 0)
"""
from __future__ import annotations

import triton
import triton.language as tl

from .primitives import logistic, tanh

ACTIVATIONS = ("swiglu", "gpt_oss", "geglu", "geglu_tanh", "relu2")
SWIGLU, GPT_OSS, GEGLU, GEGLU_TANH, RELU2 = (tl.constexpr(i) for i in range(5))


@triton.jit
def _gelu(g, TANH: tl.constexpr):
    """gelu(g) and its derivative."""
    if TANH:
        square = g * g
        t = tanh(0.7978845608028654 * g * (1.0 + 0.044715 * square))
        half = 0.5 * (1.0 + t)
        slope = half + 0.5 * g * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3 * 0.044715 * square)
    else:
        half = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        slope = half + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    return g * half, slope


@triton.jit
def activate(gate, up, limit, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """a; without a limit it is inf. EXACT: for float32 results. Comparisons keep NaN where minimum and maximum drop it."""
    g = tl.where(gate > limit, limit, gate)
    u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if ACTIVATION == SWIGLU:
        a = g * logistic(g, EXACT) * u
    elif ACTIVATION == GPT_OSS:
        a = (u + 1.0) * g * logistic(1.702 * g, EXACT)
    elif ACTIVATION == RELU2:
        a = tl.where(gate < 0.0, 0.0, gate)
        a = a * a
    else:
        half, _ = _gelu(g, ACTIVATION == GEGLU_TANH)
        a = half * u
    return a


@triton.jit
def activate_backward(gate, up, limit, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """a, and what da is multiplied with to make dgate and dup."""
    g = tl.where(gate > limit, limit, gate)
    u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if ACTIVATION == SWIGLU:
        s = logistic(g, EXACT)
        by_up = g * s
        a = by_up * u
        by_gate = u * s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == GPT_OSS:
        s = logistic(1.702 * g, EXACT)
        by_up = g * s
        a = (u + 1.0) * by_up
        by_gate = (u + 1.0) * s * (1.0 + 1.702 * g * (1.0 - s))
    elif ACTIVATION == RELU2:
        by_up = tl.where(gate < 0.0, 0.0, gate)
        a = by_up * by_up
        by_gate = 2.0 * by_up
    else:
        by_up, slope = _gelu(g, ACTIVATION == GEGLU_TANH)
        a = by_up * u
        by_gate = u * slope
    if ACTIVATION != RELU2:
        by_gate = tl.where(gate > limit, 0.0, by_gate)
        by_up = tl.where((up > limit) | (up < -limit), 0.0, by_up)
    return a, by_gate, by_up
