"""Decoding with a shared prefix on the CPU: against float64, and bit for bit the plain call on a cache that holds the prefix.

Shapes: B batch, Sq new queries, T cache positions, P prefix keys, H query heads, Hkv key heads, D head dim, Dv value dim.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import thinkernel as tk
import torch
from cache_pages import paged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import poisoned_results
from thinkernel.reference import attention as reference
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "attention_decode"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = C.isa_levels() if hasattr(C, "isa_levels") else []
MASKS: list[dict[str, Any]] = [
    {}, {"causal": False}, {"window": (40, 0)}, {"window": (700, 2), "causal": False}, {"chunk": 300}, {"softcap": 3.0}, {"sinks": True},
    {"window": (600, 0), "softcap": 5.0, "sinks": True},
]


@pytest.fixture(autouse=True)
def _cpu_backend():
    threads = torch.get_num_threads()
    with tk.use_backend("cpu"), poisoned_results():
        yield
    torch.set_num_threads(threads)


class Problem:
    """A shared prefix of `length` keys and a cache of own keys, both followed by NaN, and the cache that holds both."""

    def __init__(self, seed: int, dtype: torch.dtype, counts: list[int], length: int, Sq: int, H: int, Hkv: int, D: int, Dv: int):
        draw, B, T = Draw(seed, dtype), len(counts), max(counts, default=0) + 3
        self.counts, self.length, self.draw = counts, length, draw
        self.seqlens = torch.tensor(counts, dtype=torch.int32)
        self.q = draw.normal(B, Sq, H, D)
        self.own = [draw.normal(B, T, Hkv, width) for width in (D, Dv)]
        self.shared = [draw.normal(length + 2, Hkv, width) for width in (D, Dv)]
        for x in self.own:
            for b, n in enumerate(counts):
                x[b, n:] = float("nan")
        for x in self.shared:
            x[length:] = float("nan")
        self.whole = [torch.cat([s[:length].expand(B, -1, -1, -1), x], 1) for s, x in zip(self.shared, self.own)]

    def plain(self, **options: Any) -> tuple[Tensor, Tensor]:
        return tk.attention_decode(self.q, *self.whole, seqlens=self.seqlens + self.length, return_lse=True, **options)

    def with_prefix(self, page: int | None = None, prefix_page: int | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        prefix, own = (*self.shared, self.length), self.own
        if prefix_page is not None:
            (k, table), (v, _) = (paged(x[None], [self.length], prefix_page, Draw(5)) for x in self.shared)
            prefix = (k, v, self.length, table[0])
        if page is not None:
            (k, table), (v, _) = (paged(x, self.counts, page, Draw(6)) for x in self.own)
            own, options = [k, v], options | {"block_table": table}
        return tk.attention_decode(self.q, *own, seqlens=self.seqlens, prefix=prefix, return_lse=True, **options)

    def check(self, got: tuple[Tensor, Tensor], **options: Any) -> None:
        def run(cast: Any) -> tuple[Tensor, Tensor]:
            some = {name: cast(x) if isinstance(x, Tensor) else x for name, x in options.items()}
            shared = [cast(x) for x in self.shared]
            own = [cast(x) for x in self.own]
            return reference.attention_decode(cast(self.q), *own, seqlens=self.seqlens, prefix=(*shared, self.length), **some)

        for name, x, want, base in zip(("out", "lse"), got, run(lambda x: x.double()), run(lambda x: x)):
            check(x, want, base, name=name)


def _same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], what: str) -> None:
    assert_bitwise(a[0], b[0], what)
    assert_bitwise(a[1], b[1], f"lse, {what}")


# ---- numerics and bits -----------------------------------------------------------------------------------------

SHAPES = [  # counts, length, Sq, H, Hkv, D, Dv: what each one is for
    pytest.param([70, 1, 513], 1024, 1, 8, 2, 64, 64, id="whole-splits"),
    pytest.param([70, 600, 9], 1100, 1, 8, 2, 64, 48, id="a-tail-with-the-own-keys"),
    pytest.param([5, 700], 512, 4, 4, 1, 128, 128, id="sixteen-rows-mqa"),
    pytest.param([40, 900], 1040, 16, 4, 2, 64, 64, id="packed-own-splits"),
    pytest.param([200, 330], 530, 90, 4, 2, 32, 32, id="a-chunk-of-a-prompt"),
    pytest.param([30, 0, 2], 700, 2, 6, 3, 80, 40, id="head-dim-no-tile-row"),
    pytest.param([30, 31] * 20, 513, 1, 8, 1, 32, 32, id="many-samples"),
    pytest.param([300, 31], 200, 1, 4, 2, 64, 64, id="shorter-than-a-split"),
    pytest.param([0, 0, 0], 600, 1, 4, 2, 64, 64, id="no-own-keys"),
    pytest.param([33, 600], 0, 1, 4, 2, 64, 64, id="empty-prefix"),
    pytest.param([700], 1030, 2, 4, 2, 64, 64, id="one-sequence"),
    pytest.param([], 600, 1, 4, 2, 64, 64, id="no-sequence"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts, length, Sq, H, Hkv, D, Dv", SHAPES)
def test_prefix(counts, length, Sq, H, Hkv, D, Dv, dtype):
    x = Problem(1, dtype, counts, length, Sq, H, Hkv, D, Dv)
    plain = x.plain()
    x.check(x.with_prefix())
    for page, prefix_page in ((None, None), (64, None), (None, 16), (7, 96), (32, 1)):
        _same(x.with_prefix(page, prefix_page), plain, f"pages of {page}, prefix in pages of {prefix_page}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS[1:], ids=lambda m: "+".join(m))
@pytest.mark.parametrize("Sq", [1, 3])
def test_masks_caps_and_sinks(Sq, mask, dtype):
    # Enough sequences that the largest error on either side is not one unlucky pair (see tests/test_cpu_attention.py).
    x = Problem(2, dtype, [9, 480, 77, 300] * 6, 1100, Sq, 4, 2, 64, 64)
    options = mask | {"sinks": x.draw.normal(4)} if "sinks" in mask else mask
    got = x.with_prefix(**options)
    _same(got, x.plain(**options), "with the prefix in the cache")
    x.check(got, **options)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    counts=st.lists(st.integers(0, 700), min_size=1, max_size=6), length=st.one_of(st.integers(0, 1300), st.sampled_from([512, 1024])),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 5)), Sq=st.one_of(st.integers(1, 4), st.integers(5, 50)),
    dims=st.tuples(*[st.one_of(st.integers(1, 80), st.sampled_from([32, 64, 128, 256]))] * 2), dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(MASKS), page=st.sampled_from([None, 1, 13, 16, 64]), prefix_page=st.sampled_from([None, 1, 13, 16, 64, 512]),
    seed=st.integers(0, 10**6),
)
def test_any_prefix(counts, length, heads, Sq, dims, dtype, mask, page, prefix_page, seed):
    Hkv, group = heads
    x = Problem(seed, dtype, counts, length, Sq, Hkv * group, Hkv, *dims)
    options = mask | {"sinks": x.draw.normal(Hkv * group)} if "sinks" in mask else mask
    _same(x.with_prefix(page, prefix_page, **options), x.plain(**options), "with the prefix in the cache")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("Sq", [1, 8])
def test_threads_and_batch_move_no_bits(Sq, dtype):
    x = Problem(3, dtype, [100, 530, 8, 77, 1], 1600, Sq, 8, 2, 64, 64)
    results = []
    for threads in (1, 2, 4, 1):
        torch.set_num_threads(threads)
        results.append(x.with_prefix())
    for other in results[1:]:
        _same(results[0], other, "threads")
    for b in (0, 3):
        alone = tk.attention_decode(
            x.q[b : b + 1], *(y[b : b + 1] for y in x.own), seqlens=x.seqlens[b : b + 1], prefix=(*x.shared, x.length), return_lse=True
        )
        _same(alone, (results[0][0][b : b + 1], results[0][1][b : b + 1]), f"row {b} alone")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D, Dv", [(256, 256), (129, 64), (192, 128), (96, 33)])
def test_a_decoded_row_has_the_bits_of_a_prefilled_one(D, Dv, dtype):
    """Head dims of more than one summation block: the streamed scores sum as the packed ones do."""
    x = Problem(9, dtype, [300, 530], 600, 1, 4, 2, D, Dv)
    out, lse = x.with_prefix()
    for b, n in enumerate(x.counts):
        total = x.length + n
        queries = torch.cat([x.draw.normal(1, 3, 4, D), x.q[b : b + 1]], 1)
        rows, rows_lse = tk.attention(queries, *(y[b : b + 1, :total] for y in x.whole), causal=True, return_lse=True)
        _same((rows[0, -1], rows_lse[0, -1]), (out[b, 0], lse[b, 0]), f"prefill of row {b}")


def test_strided_prefix():
    """A prefix cut out of a cache [B, Hkv, T, D] of another layout is taken where it lies."""
    x = Problem(4, torch.bfloat16, [60, 200], 700, 1, 4, 2, 64, 64)
    plain = x.plain()
    x.shared = [y.transpose(0, 1).contiguous().transpose(0, 1) for y in x.shared]
    _same(x.with_prefix(), plain, "a transposed prefix")


def test_keys_and_values_in_one_memory():
    """K and V may be the same tensor; prefix and cache too."""
    draw = Draw(7)
    cache, q = draw.normal(2, 1200, 2, 32), draw.normal(2, 1, 4, 32)
    seqlens = torch.tensor([100, 400], dtype=torch.int32)
    out = tk.attention_decode(q, cache, cache, seqlens=seqlens, prefix=(cache[0], cache[0], 600))
    whole = torch.cat([cache[0, :600].expand(2, -1, -1, -1), cache], 1)
    assert_bitwise(out, tk.attention_decode(q, whole, whole, seqlens=seqlens + 600), "one memory")


def test_bad_prefix():
    x = Problem(8, torch.float32, [5, 6], 40, 1, 4, 2, 32, 32)
    pages = [x.draw.normal(4, 16, 2, 32) for _ in range(2)]

    def call(*prefix: Any) -> None:
        tk.attention_decode(x.q, *x.own, seqlens=x.seqlens, prefix=prefix)

    call(*pages, 40, torch.tensor([3, 0, 1], dtype=torch.int32))
    call(*pages, 32, torch.tensor([3, 0, -9], dtype=torch.int32))  # the third page is not used
    for page in (4, -1):
        with pytest.raises(ValueError, match=f"prefix block_table: got {page}"):
            call(*pages, 40, torch.tensor([3, page, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match="prefix length"):
        call(*pages, 49, torch.tensor([3, 0, 1], dtype=torch.int32))
    with pytest.raises(TypeError, match="prefix block_table"):
        call(*pages, 40, torch.tensor([3.0, 0.0, 1.0]))
    with pytest.raises(TypeError, match="prefix k: got torch.bfloat16"):
        call(*(p.bfloat16() for p in pages), 40, torch.tensor([3, 0, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match="prefix v"):
        call(pages[0], pages[1][:3], 40, torch.tensor([3, 0, 1], dtype=torch.int32))


# ---- ISA levels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_lower_isa_level(level):
    """The same tests in a process that is held to a lower level: a few by default, see also the slow form."""
    _run_at(level, "test_prefix and (tail or packed or chunk)")


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_lower_isa_level_whole(level):
    _run_at(level, "not isa_level")


def _run_at(level: str, which: str) -> None:
    assert C.isa() != level, "the highest level runs in this process"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", which]
    run = subprocess.run(command, env=os.environ | {"THINKERNEL_ISA": level}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
