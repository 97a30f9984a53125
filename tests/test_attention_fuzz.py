"""Malformed calls of the attention functions: each ends in an error that names the argument, on every backend.

A row is (the argument the message must begin with, what is changed in a good call, the errors allowed). Shapes:
B batch, S queries, T keys, H query heads, Hkv key heads, D head dim, Dv value dim, N packed tokens, P pages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import thinkernel as tk
import torch
from thinkernel.ops import dispatch
from thinkernel.testing.compare import assert_bitwise
from thinkernel.testing.inputs import Draw
from torch import Tensor

BACKENDS = ["auto", "reference", pytest.param("cpu", marks=pytest.mark.skipif(dispatch.C is None, reason=dispatch.C_MISSING))]
B, S, T, H, Hkv, D, Dv, PAGE = 2, 3, 9, 4, 2, 8, 6, 4
NAN, INF = float("nan"), float("inf")


# Features that the C++ kernels are about to take over; with that, this goes.
PENDING = re.compile(r"'cpu' does not cover this call: (cu_seqlens_q|prefix): not in the C\+\+ kernels yet")


@contextmanager
def skipping_what_is_pending() -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:
        if PENDING.search(str(error)):
            pytest.skip(str(error))
        raise


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return Draw(0, dtype).normal(*shape)


def ints(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# ---- good calls ----------------------------------------------------------------------------------------------------


def dense() -> dict[str, Any]:
    return dict(q=normal(B, S, H, D), k=normal(B, T, Hkv, D), v=normal(B, T, Hkv, Dv), causal=True)


def packed() -> dict[str, Any]:
    return dict(q=normal(10, H, D), k=normal(12, Hkv, D), v=normal(12, Hkv, Dv), causal=True, cu_seqlens_q=ints(0, 4, 10),
                cu_seqlens_k=ints(0, 5, 12))


def cache() -> dict[str, Any]:
    return dict(q=normal(B, S, H, D), k_cache=normal(B, T, Hkv, D), v_cache=normal(B, T, Hkv, Dv), seqlens=ints(9, 5))


def pages() -> dict[str, Any]:
    return dict(q=normal(B, S, H, D), k_cache=normal(7, PAGE, Hkv, D), v_cache=normal(7, PAGE, Hkv, Dv), seqlens=ints(9, 5),
                block_table=ints([0, 3, 5], [1, 2, 6]))


def prefix_of(length: Any = 5, **change: Any) -> tuple[Any, ...]:
    found = dict(k=normal(6, Hkv, D), v=normal(6, Hkv, Dv)) | change
    return found["k"], found["v"], length


def prefix_pages(length: Any = 10, table: Any = None, **change: Any) -> tuple[Any, ...]:
    found = dict(k=normal(5, PAGE, Hkv, D), v=normal(5, PAGE, Hkv, Dv)) | change
    return found["k"], found["v"], length, ints(4, 0, 2) if table is None else table


def prefixed() -> dict[str, Any]:
    return cache() | {"prefix": prefix_of()}


def prefixed_pages() -> dict[str, Any]:
    return pages() | {"prefix": prefix_pages()}


def append() -> dict[str, Any]:
    return dict(k_cache=normal(B, T, Hkv, D), v_cache=normal(B, T, Hkv, Dv), k_new=normal(B, S, Hkv, D), v_new=normal(B, S, Hkv, Dv),
                seqlens=ints(9, 5))


def append_pages() -> dict[str, Any]:
    return append() | {name: x for name, x in pages().items() if name != "q"}


def merge() -> dict[str, Any]:
    return dict(out_a=normal(B, S, H, Dv), lse_a=normal(B, S, H), out_b=normal(B, S, H, Dv), lse_b=normal(B, S, H))


GOOD = [(tk.attention, dense), (tk.attention, packed), (tk.attention_decode, cache), (tk.attention_decode, pages),
        (tk.attention_decode, prefixed), (tk.attention_decode, prefixed_pages), (tk.append_kv, append), (tk.append_kv, append_pages),
        (tk.merge_attention, merge)]


# ---- what is wrong with each ---------------------------------------------------------------------------------------

NOT_TENSORS = [[1.0, 2.0], 3, "q", np.zeros((2, 3, 4, 8), np.float32)]
OPTIONS: list[tuple[str, Any]] = [
    ("causal", 1), ("causal", None), ("causal", "no"), ("causal", torch.tensor(True)),
    ("scale", NAN), ("scale", INF), ("scale", -INF), ("scale", "0.1"), ("scale", torch.tensor(0.1)), ("scale", True), ("scale", [0.1]),
    ("scale", 1e300), ("scale", 10**400), ("scale", 1 + 2j),
    ("window", 5), ("window", "55"), ("window", (5,)), ("window", (5, 0, 0)), ("window", ()), ("window", (-2, 0)), ("window", (0, -5)),
    ("window", (1.0, 0)), ("window", (NAN, 0)), ("window", (None, 0)), ("window", (True, 0)), ("window", ("3", 0)),
    ("window", (torch.tensor(3), 0)), ("window", torch.tensor([3, 0])), ("window", (-(2**70), 0)), ("window", {3, 0}),
    ("chunk", 0), ("chunk", -1), ("chunk", 4.0), ("chunk", "4"), ("chunk", True), ("chunk", torch.tensor(4)), ("chunk", (4,)),
    ("chunk", -(2**80)),
    ("softcap", 0), ("softcap", 0.0), ("softcap", -3.0), ("softcap", NAN), ("softcap", INF), ("softcap", -INF), ("softcap", "5"),
    ("softcap", True), ("softcap", torch.tensor(5.0)), ("softcap", 1e300), ("softcap", 1e-300), ("softcap", 10**400),
    ("sinks", normal(H + 1)), ("sinks", normal(Hkv)), ("sinks", normal(1, H)), ("sinks", normal(H).sum()), ("sinks", ints(1, 2, 3, 4)),
    ("sinks", torch.ones(H, dtype=torch.bool)), ("sinks", [0.0] * H), ("sinks", 0.5), ("sinks", meta(H)),
    ("sinks", torch.ones(H, dtype=torch.complex64)),
]

DENSE = [
    ("q", dict(q=normal(B, S, H))), ("q", dict(q=normal(1, B, S, H, D))), ("q", dict(q=normal(D))), ("q", dict(q=torch.tensor(1.0))),
    ("k", dict(k=normal(B, T, D))), ("k", dict(k=normal(1, B, T, Hkv, D))), ("v", dict(v=normal(B, T, Dv))), ("v", dict(v=normal(Dv))),
    ("k", dict(k=normal(B, T, Hkv, D + 1))), ("k", dict(k=normal(B + 1, T, Hkv, D), v=normal(B + 1, T, Hkv, Dv))),
    ("k", dict(k=normal(1, T, Hkv, D), v=normal(1, T, Hkv, Dv))), ("v", dict(v=normal(B, T + 1, Hkv, Dv))),
    ("v", dict(v=normal(B, T, H, Dv))), ("v", dict(v=normal(1, T, Hkv, Dv))), ("k", dict(k=normal(B, T, 3, D), v=normal(B, T, 3, Dv))),
    ("k", dict(k=normal(B, T, 8, D), v=normal(B, T, 8, Dv))), ("k", dict(k=normal(B, T, 0, D), v=normal(B, T, 0, Dv))),
    ("q", dict(q=normal(B, S, 0, D))), ("q", dict(q=normal(B, S, H, 0), k=normal(B, T, Hkv, 0))), ("v", dict(v=normal(B, T, Hkv, 0))),
    ("k", dict(k=normal(B, T, Hkv, D, dtype=torch.bfloat16))), ("v", dict(v=normal(B, T, Hkv, Dv, dtype=torch.float16))),
    ("k", dict(q=normal(B, S, H, D, dtype=torch.float64))), ("q", dict(q=torch.ones(B, S, H, D, dtype=torch.int32))),
    ("q", dict(q=torch.ones(B, S, H, D, dtype=torch.complex64))), ("q", dict(q=torch.ones(B, S, H, D, dtype=torch.bool))),
    ("v", dict(v=torch.ones(B, T, Hkv, Dv, dtype=torch.uint8))), ("q", dict(q=torch.ones(B, S, H, D).to(torch.float8_e4m3fn))),
    ("q", dict(q=normal(B, S, H, D).to_sparse())), ("k", dict(k=normal(B, T, Hkv, D).to_sparse())),
    ("k", dict(k=meta(B, T, Hkv, D))), ("v", dict(v=meta(B, T, Hkv, Dv))), ("k", dict(q=meta(B, S, H, D))),
    ("key_start", dict(key_start=ints(0, 10))), ("key_start", dict(key_start=ints(-1, 0))), ("key_start", dict(key_start=ints(0))),
    ("key_start", dict(key_start=ints(0, 0, 0))), ("key_start", dict(key_start=ints([0, 0]))), ("key_start", dict(key_start=3)),
    ("key_start", dict(key_start=[0, 1])), ("key_start", dict(key_start=torch.zeros(2))),
    ("key_start", dict(key_start=meta(2, dtype=torch.int32))),
    ("key_start", dict(key_start=torch.zeros(2, dtype=torch.int16))), ("key_start", dict(key_start=torch.tensor([True, False]))),
    ("key_start", dict(key_start=ints(0, 2**31, dtype=torch.int64))), ("key_start", dict(key_start=ints(0, -(2**62), dtype=torch.int64))),
    ("key_start", dict(key_start=ints(0, 2**32, dtype=torch.int64))), ("key_start", dict(key_start=ints(10, 0), causal=False)),
    ("cu_seqlens_k", dict(cu_seqlens_k=ints(0, 9))), ("q", dict(cu_seqlens_q=ints(0, 4, 10))),
    *[(name, {name: x}) for name in ("q", "k", "v") for x in [None, *NOT_TENSORS]],
    *[(name, {name: x}) for name, x in OPTIONS],
]

PACKED = [
    ("q", dict(q=normal(1, 10, H, D))), ("k", dict(k=normal(1, 12, Hkv, D))), ("v", dict(v=normal(1, 12, Hkv, Dv))),
    ("v", dict(v=normal(11, Hkv, Dv))), ("k", dict(k=normal(12, 3, D), v=normal(12, 3, Dv))),
    *[(name, {name: bad}) for name, end in (("cu_seqlens_q", 10), ("cu_seqlens_k", 12)) for bad in (
        ints(0, 7, end - 1), ints(0, 4, end + 1), ints(1, 4, end), ints(-1, 4, end), ints(0, end + 1, end), ints(0, -2, end),
        ints(4, 0, end),
        ints(0, 4, end).float(), ints(0, 4, end).short(), ints([0, 4, end]), meta(3, dtype=torch.int32), [0, 4, end], end,
        ints(0, 2**32, end, dtype=torch.int64), ints(0, 4, 2**32 + end, dtype=torch.int64))],
    ("cu_seqlens_q", dict(cu_seqlens_q=ints(), cu_seqlens_k=ints())), ("cu_seqlens_q", dict(cu_seqlens_q=ints(0), cu_seqlens_k=ints(0))),
    ("cu_seqlens_k", dict(cu_seqlens_k=ints(0, 12))), ("cu_seqlens_k", dict(cu_seqlens_k=ints(0, 2, 4, 12))),
    ("cu_seqlens_k", dict(cu_seqlens_k=None)),  # then the queries' offsets, which do not end at the keys' 12
    ("cu_seqlens_k", dict(cu_seqlens_q=None, q=normal(B, S, H, D), k=normal(B, T, Hkv, D), v=normal(B, T, Hkv, Dv))),
    ("key_start", dict(key_start=ints(0, 1))),
]

CACHE = [
    ("q", dict(q=normal(B, H, D))), ("q", dict(q=normal(B, S, H, D, 1))), ("k_cache", dict(k_cache=normal(T, Hkv, D))),
    ("v_cache", dict(v_cache=normal(T, Hkv, Dv))), ("k_cache", dict(k_cache=normal(B + 1, T, Hkv, D), v_cache=normal(B + 1, T, Hkv, Dv))),
    ("v_cache", dict(v_cache=normal(B, T - 1, Hkv, Dv))), ("v_cache", dict(v_cache=normal(B, T, 1, Dv))),
    ("k_cache", dict(k_cache=normal(B, T, Hkv, D - 1))), ("k_cache", dict(k_cache=normal(B, T, 3, D), v_cache=normal(B, T, 3, Dv))),
    ("k_cache", dict(k_cache=normal(B, T, Hkv, D, dtype=torch.bfloat16))),
    ("v_cache", dict(v_cache=normal(B, T, Hkv, Dv, dtype=torch.float16))),
    ("k_cache", dict(k_cache=torch.ones(B, T, Hkv, D, dtype=torch.int8))), ("k_cache", dict(k_cache=meta(B, T, Hkv, D))),
    ("v_cache", dict(v_cache=meta(B, T, Hkv, Dv))), ("q", dict(q=normal(B, S, 0, D))),
    ("k_cache", dict(k_cache=normal(B, T, Hkv, D).to_sparse())),
    *[("seqlens", dict(seqlens=x)) for x in (
        ints(10, 5), ints(9, -1), ints(9), ints(9, 5, 1), ints([9, 5]), torch.tensor(9), ints(9, 5).float(), ints(9, 5).short(),
        [9, 5], 9, None,
        meta(2, dtype=torch.int32), ints(9, 2**31, dtype=torch.int64), ints(9, 2**32 + 5, dtype=torch.int64), ints(9, -(2**40),
        dtype=torch.int64),
        torch.tensor([True, True]))],
    *[(name, {name: x}) for name in ("q", "k_cache", "v_cache") for x in [None, *NOT_TENSORS]],
    *[(name, {name: x}) for name, x in OPTIONS],
    *[("prefix", dict(prefix=x)) for x in (
        normal(6, Hkv, D), (), prefix_of()[:2], (*prefix_pages(), 1), 5, "abc", {"k": 1}, prefix_of(None), prefix_of(-1), prefix_of(7),
        prefix_of(2**70),
        prefix_of(2.0), prefix_of(True), prefix_of("5"), prefix_of(torch.tensor(5)), prefix_of(k=None), prefix_of(v=None),
        prefix_of(k=[1.0]),
        prefix_of(k=normal(1, 6, Hkv, D)), prefix_of(v=normal(6, Dv)), prefix_of(k=normal(6, H, D)), prefix_of(k=normal(6, Hkv, D + 1)),
        prefix_of(v=normal(6, Hkv, D)), prefix_of(v=normal(3, Hkv, Dv)), prefix_of(k=normal(5, Hkv, D)),
        prefix_of(k=normal(6, Hkv, D, dtype=torch.bfloat16)),
        prefix_of(v=normal(6, Hkv, Dv, dtype=torch.float16)), prefix_of(k=ints(0).expand(6, Hkv, D)), prefix_of(k=meta(6, Hkv, D)),
        prefix_of(v=meta(6, Hkv, Dv)), prefix_of(v=normal(6, Hkv, Dv).to_sparse()),
        prefix_pages(13), prefix_pages(-1), prefix_pages(2**40), prefix_pages(table=ints(4, 5, 2)), prefix_pages(table=ints(4, -1, 2)),
        prefix_pages(table=ints(4, 0, 2**20)), prefix_pages(table=ints(4, 2**32, 2, dtype=torch.int64)),
        prefix_pages(table=ints([4, 0, 2])),
        prefix_pages(table=ints(4, 0, 2).float()), prefix_pages(table=[4, 0, 2]), prefix_pages(table=3),
        prefix_pages(table=meta(3, dtype=torch.int32)),
        prefix_pages(table=ints()), prefix_pages(table=ints(4, 0)), prefix_pages(k=normal(6, Hkv, D)),
        prefix_pages(v=normal(5, PAGE, H, Dv)),
        prefix_pages(v=normal(4, PAGE, Hkv, Dv)), prefix_pages(v=normal(5, PAGE - 1, Hkv, Dv)),
        prefix_pages(0, k=normal(5, 0, Hkv, D), v=normal(5, 0, Hkv, Dv)), prefix_pages(k=normal(5, PAGE, Hkv, D, dtype=torch.float64)))],
]

TABLES = [  # of the cache's pages, in decode and append alike
    ("block_table", dict(block_table=ints([0, 3, 7], [1, 2, 6]))), ("block_table", dict(block_table=ints([0, -1, 5], [1, 2, 6]))),
    ("block_table", dict(block_table=ints([0, 3, 5], [1, 7, 6]))), ("block_table", dict(block_table=ints([0, 3, 5], [1, 2**30, 6]))),
    ("block_table", dict(block_table=ints([0, 3, 2**32], [1, 2, 6], dtype=torch.int64))), ("block_table", dict(block_table=ints(0, 3, 5))),
    ("block_table", dict(block_table=ints([0, 3, 5]))), ("block_table", dict(block_table=ints([0, 3, 5], [1, 2, 6]).float())),
    ("block_table", dict(block_table=ints([0, 3, 5], [1, 2, 6]).short())), ("block_table", dict(block_table=[[0, 3, 5], [1, 2, 6]])),
    ("block_table", dict(block_table=5)), ("block_table", dict(block_table=meta(2, 3, dtype=torch.int32))),
    ("seqlens", dict(seqlens=ints(13, 5))),
    ("seqlens", dict(seqlens=ints(9, -3))), ("seqlens", dict(block_table=ints([0, 3], [1, 2]))),
    ("seqlens", dict(block_table=ints([], []))),
    ("k_cache", dict(k_cache=normal(7, 0, Hkv, D), v_cache=normal(7, 0, Hkv, Dv))), ("v_cache", dict(v_cache=normal(6, PAGE, Hkv, Dv))),
    ("v_cache", dict(v_cache=normal(7, PAGE - 1, Hkv, Dv))), ("k_cache", dict(k_cache=normal(7 * PAGE, Hkv, D))),
]

APPEND = [
    ("k_new", dict(k_new=normal(B, S, H, D))), ("k_new", dict(k_new=normal(B, S, Hkv, D + 1))), ("k_new", dict(k_new=normal(B, Hkv, D))),
    ("v_new", dict(v_new=normal(B, S, Hkv, D))), ("v_new", dict(v_new=normal(B, S + 1, Hkv, Dv))),
    ("v_new", dict(v_new=normal(1, S, Hkv, Dv))),
    ("v_new", dict(v_new=normal(S, Hkv, Dv))), ("seqlens", dict(k_new=normal(1, S, Hkv, D), v_new=normal(1, S, Hkv, Dv))),
    ("k_new", dict(k_new=torch.ones(B, S, Hkv, D, dtype=torch.int32))), ("v_new", dict(v_new=meta(B, S, Hkv, Dv))),
    ("k_cache", dict(k_new=meta(B, S, Hkv, D), v_new=meta(B, S, Hkv, Dv))), ("k_cache", dict(k_cache=normal(B, T, Hkv))),
    ("v_cache", dict(v_cache=normal(B, T - 4, Hkv, Dv))), ("v_cache", dict(v_cache=normal(B, T, H, Dv))),
    ("v_cache", dict(v_cache=meta(B, T, Hkv, Dv))),
    ("k_cache", dict(k_cache=normal(B, 1, Hkv, D).expand(B, T, Hkv, D))),
    ("v_cache", dict(v_cache=normal(1, T, Hkv, Dv).expand(B, T, Hkv, Dv))),
    ("k_cache", dict(k_cache=normal(B + 1, T, Hkv, D), v_cache=normal(B + 1, T, Hkv, Dv))),
    *[("seqlens", dict(seqlens=x)) for x in (ints(10, 5), ints(9, -1), ints(9), ints([9, 5]), ints(9, 5).float(), [9, 5], None,
                                             ints(9, 2**33, dtype=torch.int64), meta(2, dtype=torch.int32))],
    *[(name, {name: x}) for name in ("k_cache", "v_cache", "k_new", "v_new") for x in (None, 3, [1.0])],
]

MERGE = [
    ("out_b", dict(out_b=normal(B, S, H, Dv + 1))), ("out_b", dict(out_b=normal(B, S, Dv))), ("lse_a", dict(lse_a=normal(B, S, H + 1))),
    ("lse_b", dict(lse_b=normal(B, S))), ("lse_a", dict(lse_a=normal(B, H, S))), ("lse_a", dict(lse_a=normal(B, S, H, 1))),
    ("out_b", dict(out_b=normal(B, S, H, Dv, dtype=torch.bfloat16))), ("out_a", dict(out_a=ints(1).expand(B, S, H, Dv))),
    ("lse_a", dict(lse_a=torch.ones(B, S, H, dtype=torch.int64))), ("lse_b", dict(lse_b=meta(B, S, H))),
    ("out_b", dict(out_b=meta(B, S, H, Dv))),
    ("out_a", dict(out_a=torch.tensor(1.0))), ("out_a", dict(out_a=normal(B, S, H, Dv).to_sparse())),
    *[(name, {name: x}) for name in ("out_a", "lse_a", "out_b", "lse_b") for x in (None, 3, [1.0])],
]

CALLS = [
    (function, good, name, change)
    for function, good, table in (
        (tk.attention, dense, DENSE), (tk.attention, packed, PACKED), (tk.attention_decode, cache, CACHE),
        (tk.attention_decode, pages, TABLES),
        (tk.append_kv, append, APPEND), (tk.append_kv, append_pages, TABLES), (tk.merge_attention, merge, MERGE))
    for name, change in table
]


def _ids() -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for _, good, name, _ in CALLS:
        seen[key := f"{good.__name__}-{name}"] += 1
        names.append(f"{key}-{seen[key]}")
    return names


def test_there_are_enough():
    assert len(CALLS) >= 300


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function, good", GOOD, ids=lambda x: getattr(x, "__name__", None))
@pytest.mark.filterwarnings("ignore:thinkernel:RuntimeWarning")
def test_the_good_calls_pass(function, good, backend):
    """What the malformed calls are variations of is fine."""
    if function is tk.merge_attention and backend == "cpu":
        pytest.skip("plain torch")
    with tk.use_backend(backend), skipping_what_is_pending():
        function(**good())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function, good, name, change", CALLS, ids=_ids())
@pytest.mark.filterwarnings("ignore:thinkernel:RuntimeWarning")
def test_a_malformed_call_names_its_argument(function, good, name, change, backend):
    with tk.use_backend(backend), skipping_what_is_pending(), pytest.raises((ValueError, TypeError)) as error:
        function(**(good() | change))
    message = str(error.value)
    assert re.match(rf"{name}\b", message), message
    assert type(error.value) in (ValueError, TypeError)
    assert "got" in message or "must be None" in message or "needs" in message, message


@pytest.mark.skipif(dispatch.C is None, reason=dispatch.C_MISSING)
@pytest.mark.parametrize("change", [
    {name: x.double() for name, x in dense().items() if name != "causal"},
    dict(q=normal(B, S, H, 257), k=normal(B, T, Hkv, 257)),
    dict(v=normal(B, T, Hkv, 300)),
], ids=["float64", "head-dim-257", "value-dim-300"])
@pytest.mark.filterwarnings("ignore:thinkernel:RuntimeWarning")
def test_what_the_cpu_kernels_do_not_take(change):
    """Forced: an error that names the argument. By default: the reference, and right."""
    call = dense() | change
    renamed = {"q": "q", "k": "k_cache", "v": "v_cache"}
    step = {renamed[name]: x for name, x in call.items() if name in renamed} | {"seqlens": ints(9, 5)}
    for function, inputs in ((tk.attention, call), (tk.attention_decode, step)):
        with tk.use_backend("cpu"), pytest.raises(NotImplementedError, match=r"does not cover this call: q: "):
            function(**inputs)
        with tk.use_backend("reference"):
            want = function(**inputs)
        assert_bitwise(function(**inputs), want)


def test_decode_refuses_a_gradient():
    inputs = cache()
    inputs["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="attention_decode has no gradient"):
        tk.attention_decode(**inputs).sum().backward()


def test_nothing_is_written_by_a_refused_append():
    inputs = append() | {"seqlens": ints(9, 10)}
    before = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    with pytest.raises(ValueError, match="^seqlens"):
        tk.append_kv(**inputs)
    assert_bitwise(inputs["k_cache"], before[0])
    assert_bitwise(inputs["v_cache"], before[1])


# ---- odd but right -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("huge", [2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70], ids=lambda n: f"2^{n.bit_length() - 1}")
@pytest.mark.parametrize("queries, keys", [(3, 9), (9, 3)])
def test_huge_windows_and_chunks_hide_nothing(huge, queries, keys, backend):
    q, k, v = normal(B, queries, H, D), normal(B, keys, Hkv, D), normal(B, keys, Hkv, Dv)
    step = dict(q=q, k_cache=k, v_cache=v, seqlens=ints(keys, 2))
    with tk.use_backend(backend):
        for causal in (True, False):
            plain = tk.attention(q, k, v, causal=causal)
            decoded = tk.attention_decode(**step, causal=causal)
            for options in (dict(window=(huge, huge)), dict(window=(huge, -1)), dict(window=[-1, huge]), dict(chunk=huge)):
                assert_bitwise(tk.attention(q, k, v, causal=causal, **options), plain, str(options))
                assert_bitwise(tk.attention_decode(**step, causal=causal, **options), decoded, f"decode {options}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_entries_may_hold_anything(backend):
    """Table entries and slots past a sequence's end: out of range, NaN, never looked at; a length 0 takes no part."""
    inputs = pages()
    clean = tk.attention_decode(**inputs)
    wild = inputs | {"block_table": ints([0, 3, 5, -9], [1, 2, 2**30, 99])}
    wild["k_cache"], wild["v_cache"] = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    for page, used in ((5, 1), (2, 1), (4, 0), (6, 0)):
        wild["k_cache"][page, used:], wild["v_cache"][page, used:] = NAN, NAN
    with tk.use_backend(backend):
        found = tk.attention_decode(**wild)
        empty = tk.attention_decode(**wild | {"seqlens": ints(9, 0)})
    if backend != "reference":
        assert_bitwise(found, clean)
    torch.testing.assert_close(found, clean)
    assert (empty[1] == 0).all()
    caches = {name: wild[name].clone() for name in ("k_cache", "v_cache")}
    new = dict(k_new=normal(B, S, Hkv, D), v_new=normal(B, S, Hkv, Dv))
    with tk.use_backend(backend):
        tk.append_kv(**caches, **new, seqlens=ints(2, 0), block_table=wild["block_table"])  # one position lies before 0
    assert_bitwise(caches["k_cache"][0, :2], new["k_new"][0, 1:])
    caches["k_cache"][0, :2], caches["v_cache"][0, :2] = wild["k_cache"][0, :2], wild["v_cache"][0, :2]
    assert_bitwise(caches["k_cache"], wild["k_cache"], "the other slots")
    assert_bitwise(caches["v_cache"], wild["v_cache"], "the other slots")
