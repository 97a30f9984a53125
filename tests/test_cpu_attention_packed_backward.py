"""The C++ backward on packed sequences: numerics against float64, and the bits of each sequence alone.

The op is called on the reference's forward, so that nothing here depends on which backend ran the forward.
Shapes: N packed queries, Nk packed keys, H query heads, Hkv key heads, D head dim, Dv value dim.
"""

from __future__ import annotations

from typing import Any

import pytest
import thinkernel as tk
import torch
from test_cpu_attention import _torch as torch_attention
from thinkernel.ops.attention import attention_backward
from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import poisoned_results
from thinkernel.reference import attention as reference
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "attention_backward"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("dq", "dk", "dv", "dsinks")

# Empty ones, a single token, more keys than queries and fewer, no keys at all, ends of blocks, one much longer than the rest.
LENGTHS = [(0, 0), (1, 1), (5, 5), (7, 19), (19, 7), (3, 0), (0, 4), (193, 193), (48, 300), (450, 450), (2, 2), (0, 0)]


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _packed(seed: int, dtype: torch.dtype, lengths: list[tuple[int, int]], H: int, Hkv: int, D: int, Dv: int) -> dict[str, Tensor]:
    draw = Draw(seed, dtype)
    N, Nk = (sum(x) for x in zip(*lengths))
    return dict(
        q=draw.normal(N, H, D), k=draw.normal(Nk, Hkv, D), v=draw.normal(Nk, Hkv, Dv), dout=draw.normal(N, H, Dv),
        dlse=draw.normal(N, H, dtype=torch.float32), cu_q=_cumulative([q for q, _ in lengths]), cu_k=_cumulative([k for _, k in lengths]),
    )


def _options(causal: bool, scale: float, window: tuple[int, int], chunk: int, softcap: float) -> tuple[Any, ...]:
    return causal, scale, *window, chunk, softcap


def _backward(x: dict[str, Tensor], out: Tensor, lse: Tensor, sinks: Tensor | None, options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    cu = (x["cu_q"], x["cu_k"]) if "cu_q" in x else (None, None)
    with tk.use_backend("cpu"), poisoned_results():
        return attention_backward(x["dout"], x["dlse"], x["q"], x["k"], x["v"], out, lse, sinks, None, *cu, *options)


def _forward(x: dict[str, Tensor], sinks: Tensor | None, options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    causal, scale, left, right, chunk, softcap = options
    return reference.attention(
        x["q"], x["k"], x["v"], causal=causal, scale=scale, window=None if left < 0 and right < 0 else (left, right),
        chunk=chunk or None, softcap=softcap or None, sinks=sinks, cu_seqlens_q=x["cu_q"], cu_seqlens_k=x["cu_k"],
    )


def _torch_forward(x: dict[str, Tensor], sinks: Tensor | None, options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """torch's attention (test_cpu_attention.py) on each sequence alone."""
    causal, scale, left, right, chunk, softcap = options
    parts = []
    for i in range(len(x["cu_q"]) - 1):
        one, _ = _sequence(x, i)
        parts.append(torch_attention(
            one["q"], one["k"], one["v"], causal=causal, key_start=None, scale=scale, chunk=chunk or None, sinks=sinks,
            window=None if left < 0 and right < 0 else (left, right), softcap=softcap or None,
        ))
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts])


def _gradients(x: dict[str, Tensor], sinks: Tensor | None, options: tuple[Any, ...], forward: Any, dtype: torch.dtype) -> list[Tensor]:
    """Autograd through `forward` in `dtype`."""
    leaves = {name: x[name].to(dtype).requires_grad_() for name in ("q", "k", "v")}
    sink = None if sinks is None else sinks.to(dtype).requires_grad_()
    out, lse = forward(x | leaves, sink, options)
    seen = torch.isfinite(lse)
    total = (out * x["dout"].to(out.dtype)).sum() + (lse[seen] * x["dlse"][seen]).sum()
    return list(torch.autograd.grad(total, [*leaves.values(), *([] if sink is None else [sink])]))


def _sequence(x: dict[str, Tensor], i: int) -> tuple[dict[str, Tensor], slice]:
    """Sequence i as a batch of one, and where its queries lie."""
    (a, b), (c, d) = (x[name][i : i + 2].tolist() for name in ("cu_q", "cu_k"))
    rows = {name: x[name][None, a:b] for name in ("q", "dout", "dlse")}
    return rows | {name: x[name][None, c:d] for name in ("k", "v")}, slice(a, b)


MASKS = [
    pytest.param(dict(causal=True), id="causal"),
    pytest.param(dict(), id="full"),
    pytest.param(dict(causal=True, window=(40, -1)), id="window"),
    pytest.param(dict(window=(30, 9)), id="two-sided-window"),
    pytest.param(dict(causal=True, chunk=50), id="chunk"),
    pytest.param(dict(causal=True, softcap=3.0, sinks=True), id="softcap-sinks"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_matches_float64_and_each_sequence_alone(mask, dtype):
    mask = dict(causal=False, scale=0.2, window=(-1, -1), chunk=0, softcap=0.0) | mask
    sinks = Draw(3).normal(4) if mask.pop("sinks", False) else None
    options = _options(**mask)
    x = _packed(1, dtype, LENGTHS, 4, 2, 24, 40)
    out, lse = _forward(x, sinks, options)
    found = _backward(x, out, lse, sinks, options)
    want, base = _gradients(x, sinks, options, _forward, torch.float64), _gradients(x, sinks, options, _torch_forward, dtype)
    for name, a, w, b in zip(NAMES, found, want, base):
        check(a, w, b, name=name)
    for i in range(len(LENGTHS)):
        one, rows = _sequence(x, i)
        keys = slice(*x["cu_k"][i : i + 2].tolist())
        alone = _backward(one, out[None, rows], lse[None, rows], sinks, options)
        for name, a, b in zip(NAMES, (found[0][rows], found[1][keys], found[2][keys]), alone):
            assert_bitwise(a, b[0], f"{name} of sequence {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths", [[(600, 600)], [(9, 9)] * 5 + [(800, 700)] + [(30, 30)] * 7, [(70, 70)] * 3], ids=["one", "one-long", "equal"]
)
def test_threads_agree(lengths, dtype):
    """On one thread sequences go by pairs of (sequence, head), on several the long ones go by blocks."""
    x = _packed(2, dtype, lengths, 2, 1, 40, 24)
    options = _options(True, 0.15, (-1, -1), 0, 0.0)
    sinks = Draw(4).normal(2)
    out, lse = _forward(x, sinks, options)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(_backward(x, out, lse, sinks, options))
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other):
            assert_bitwise(a, b, name)


def test_nothing_at_all():
    x = _packed(5, torch.float32, [(0, 0), (0, 0)], 2, 1, 8, 8)
    options = _options(True, 0.3, (-1, -1), 0, 0.0)
    dq, dk, dv, _ = _backward(x, x["dout"], x["dlse"], None, options)
    assert dq.shape == (0, 2, 8) and dk.shape == dv.shape == (0, 1, 8)


def test_packed_equals_padded_rows():
    """Equal lengths: packing is only another way to lay the batch out."""
    B, S = 3, 90
    x = _packed(6, torch.bfloat16, [(S, S)] * B, 4, 2, 32, 32)
    options = _options(True, 0.2, (-1, -1), 0, 0.0)
    out, lse = _forward(x, None, options)
    rows = {name: x[name].unflatten(0, (B, S)) for name in ("q", "k", "v", "dout", "dlse")}
    batch = _backward(rows, out.unflatten(0, (B, S)), lse.unflatten(0, (B, S)), None, options)
    for name, a, b in zip(NAMES[:3], _backward(x, out, lse, None, options), batch):
        assert_bitwise(a, b.flatten(0, 1), name)
