"""MLA on the CPU: absorbed decode, append and gather against float64, and bit for bit against themselves in other forms.

Shapes: B batch, Sq new queries, H heads, T cache positions, P prefix tokens, L value dim, R rope, D = L + R.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import thinkernel as tk
import torch
from cache_pages import NOBODYS, paged
from cpu_levels import level  # noqa: F401
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from thinkernel.ops.dispatch import C
from thinkernel.reference import mla as reference
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "mla_decode"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 192**-0.5


class Problem:
    """Queries and caches whose unused slots are NaN. counts: own tokens of each sequence; length: of a shared prefix."""

    def __init__(
        self, dtype: torch.dtype, counts: list[int], Sq: int, H: int, L: int, R: int, *, length: int = 0, fp8: bool = False, seed: int = 1,
        scale: float = SCALE,
    ):
        draw, B, T, D = Draw(seed, dtype), len(counts), max(counts, default=0) + 3, L + R
        self.dtype, self.counts, self.length, self.L, self.scale, self.draw = dtype, counts, length, L, scale, draw
        self.seqlens = torch.tensor(counts, dtype=torch.int32)
        self.q = draw.normal(B, Sq, H, D)
        self.cache, self.shared = draw.normal(B, T, D), draw.normal(length + 2, D)
        if fp8:
            self.cache, self.shared = (reference.quantize_latent(x[..., :L], x[..., L:]) for x in (self.cache, self.shared))
        poison = 0x7F if fp8 else float("nan")
        for b, n in enumerate(counts):
            self.cache[b, n:] = poison
        self.shared[length:] = poison

    @property
    def prefix(self) -> tuple[Any, ...] | None:
        return (self.shared, self.length) if self.length else None

    def run(self, page: int | None = None, prefix_page: int | None = None, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        cache, table, prefix = self.cache[rows], None, self.prefix
        if page is not None:
            cache, table = paged(cache, self.counts[rows], page, Draw(6))
        if prefix is not None and prefix_page is not None:
            shared, prefix_table = paged(self.shared[None], [self.length], prefix_page, Draw(5))
            prefix = (shared, self.length, prefix_table[0])
        return tk.mla_decode(
            self.q[rows], cache, seqlens=self.seqlens[rows], block_table=table, value_dim=self.L, scale=self.scale, prefix=prefix,
            return_lse=True,
        )

    def whole(self) -> tuple[Tensor, Tensor]:
        """The same on a cache that holds the prefix itself."""
        both = torch.cat([self.shared[: self.length].expand(len(self.counts), -1, -1), self.cache], 1)
        return tk.mla_decode(self.q, both, seqlens=self.seqlens + self.length, value_dim=self.L, scale=self.scale, return_lse=True)

    def check(self, got: tuple[Tensor, Tensor]) -> None:
        def run(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            cache, shared = (
                (reference.dequantize_latent(x) if x.dtype == torch.uint8 else x).to(dtype) for x in (self.cache, self.shared)
            )
            prefix = (shared, self.length) if self.length else None
            return reference.mla_decode(
                self.q.to(dtype), cache, seqlens=self.seqlens, value_dim=self.L, scale=self.scale, prefix=prefix
            )

        for name, x, want, base in zip(("out", "lse"), got, run(torch.float64), run(self.dtype)):
            check(x, want, base, name=name)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], what: str) -> None:
    assert_bitwise(a[0], b[0], what)
    assert_bitwise(a[1], b[1], f"lse, {what}")


def same_values(got: Tensor, want: Tensor, what: str) -> None:
    """To the bit, whichever NaN it is."""
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan), what
    assert_bitwise(got.masked_fill(nan, 0), want.masked_fill(nan, 0), what)


# ---- numerics and bits -----------------------------------------------------------------------------------------

SHAPES = [  # counts, Sq, H, L, R: what each one is for
    pytest.param([300, 33, 1], 1, 16, 512, 64, id="v3"),
    pytest.param([40, 257, 0], 2, 5, 512, 64, id="odd-heads"),
    pytest.param([700], 1, 128, 512, 64, id="128-heads"),
    pytest.param([1100, 30], 3, 20, 256, 64, id="two-splits"),
    pytest.param([70, 2, 64] * 8, 1, 3, 32, 8, id="many-sequences-40-values"),
    pytest.param([90, 600], 70, 4, 64, 32, id="a-chunk-of-a-prompt"),
    pytest.param([5, 2, 0], 6, 2, 33, 14, id="more-queries-than-tokens"),
    pytest.param([50, 1, 33, 9] * 60, 2, 4, 1, 1, id="one-value"),  # enough of them that no side is lucky
    pytest.param([], 1, 4, 32, 32, id="no-sequence"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts, Sq, H, L, R", SHAPES)
def test_decode(counts, Sq, H, L, R, dtype):
    x = Problem(dtype, counts, Sq, H, L, R)
    got = x.run()
    x.check(got)
    for page in (64, 32, 7, 1):
        same(x.run(page), got, f"pages of {page}")
    same(x.run(), got, "run again")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_cache(dtype):
    """Within the rule of the float64 result on the values that the bytes stand for; in bfloat16 the bits of their own cache."""
    x = Problem(dtype, [300, 0, 33], 2, 9, 512, 64, fp8=True, length=70)
    got = x.run()
    x.check(got)
    same(x.run(64, 16), got, "in pages")
    same(x.whole(), got, "with the prefix in the cache")
    if dtype == torch.bfloat16:
        x.cache, x.shared = (reference.dequantize_latent(y) for y in (x.cache, x.shared))
        same(x.run(), got, "from bfloat16")


PREFIXES = [  # counts, length, Sq, H
    pytest.param([70, 1, 313], 1024, 1, 4, id="whole-splits"),
    pytest.param([70, 600], 1100, 2, 4, id="a-tail-with-the-own-tokens"),
    pytest.param([30, 31] * 20, 2050, 1, 8, id="many-samples"),
    pytest.param([300, 31], 200, 1, 4, id="shorter-than-a-split"),
    pytest.param([0, 0], 1030, 2, 4, id="no-own-tokens"),
    pytest.param([7], 1030, 2, 4, id="one-sequence"),
]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("counts, length, Sq, H", PREFIXES)
def test_prefix(counts, length, Sq, H, dtype):
    x = Problem(dtype, counts, Sq, H, 64, 32, length=length)
    got = x.run()
    x.check(got)
    for page, prefix_page in ((None, None), (64, None), (None, 16), (7, 96)):
        same(x.run(page, prefix_page), x.whole(), f"pages of {page}, prefix in pages of {prefix_page}")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("counts, Sq, H", [([100, 530, 8, 77, 1], 1, 16), ([2100, 1300], 2, 5), ([90], 1, 128), ([600] * 9, 1, 3)])
def test_threads_and_batch_move_no_bits(counts, Sq, H, dtype):
    x = Problem(dtype, counts, Sq, H, 64, 32, length=1030)
    results = []
    for threads in (1, 2, 4, 7):
        torch.set_num_threads(threads)
        results.append(x.run())
    for other in results[1:]:
        same(results[0], other, "threads")
    out, lse = results[0]
    for b in {0, len(counts) - 1}:
        same(x.run(rows=slice(b, b + 1)), (out[b : b + 1], lse[b : b + 1]), f"sequence {b} alone")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H, L, R", [(16, 512, 64), (3, 40, 32), (128, 64, 32)])
def test_a_decoded_token_has_the_bits_of_a_prefilled_one(H, L, R, dtype):
    """Each token's row of one call with many queries, and of calls with one or two at a time over the cache as it was then."""
    n = 280
    x = Problem(dtype, [n], n, H, L, R)
    out, lse = x.run()
    for end, queries in ((n, 1), (n, 2), (n - 1, 1), (257, 1), (256, 3), (33, 1), (1, 1)):
        rows = slice(end - queries, end)
        kv = x.cache.clone()
        kv[:, end:] = float("nan")
        now = torch.tensor([end], dtype=torch.int32)
        got = tk.mla_decode(x.q[:, rows], kv, seqlens=now, value_dim=L, scale=SCALE, return_lse=True)
        same(got, (out[:, rows], lse[:, rows]), f"{queries} tokens before {end}")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_heads_bits_do_not_depend_on_the_other_heads(dtype):
    x = Problem(dtype, [300, 40], 1, 40, 64, 32)
    out, lse = x.run()
    for heads in (slice(0, 1), slice(17, 20), slice(39, 40)):
        got = tk.mla_decode(x.q[:, :, heads], x.cache, seqlens=x.seqlens, value_dim=64, scale=SCALE, return_lse=True)
        same(got, (out[:, :, heads], lse[:, :, heads]), f"heads {heads}")


@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
def test_scales(scale):
    x = Problem(torch.float32, [40, 300], 2, 5, 64, 32, scale=scale)
    x.check(x.run())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_large_scores(dtype):
    """A maximum that jumps from block to block: what was summed before is scaled down, to nothing at last."""
    x = Problem(dtype, [700], 1, 16, 64, 32)
    x.cache *= torch.linspace(0.1, 8, 703)[None, :, None].to(dtype)
    x.check(x.run())
    x.cache = x.cache.flip(1).roll(-3, 1)
    x.check(x.run())


def test_nan_stays_in_its_sequence_and_row():
    x = Problem(torch.float32, [300, 40], 1, 4, 64, 32)
    clean = x.run()
    x.cache[1, 7, 90] = float("nan")  # of the rope: it reaches the scores alone
    x.q[0, 0, 2, 5] = float("nan")
    out, lse = x.run()
    assert out[1].isnan().all() and lse[1].isnan().all()
    assert out[0, 0, 2].isnan().all() and lse[0, 0, 2].isnan()
    keep = [0, 1, 3]
    same((out[0, :, keep], lse[0, :, keep]), (clean[0][0, :, keep], clean[1][0, :, keep]), "the other heads")


def test_strided_arguments():
    x = Problem(torch.bfloat16, [60, 200], 2, 4, 64, 32)
    got = x.run()
    x.q = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    x.cache = torch.cat([x.cache, x.cache], -1)[..., :96]
    same(x.run(), got, "views")
    x.cache = x.cache.transpose(1, 2).contiguous().transpose(1, 2)
    same(x.run(), got, "a cache with its values apart")


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    counts=st.lists(st.integers(0, 600), max_size=4), Sq=st.integers(1, 9), H=st.integers(1, 40),
    dims=st.tuples(st.one_of(st.integers(1, 90), st.sampled_from([128, 256])), st.integers(0, 40)), dtype=st.sampled_from(DTYPES),
    length=st.sampled_from([0, 0, 5, 1024, 1500]), page=st.sampled_from([None, 1, 13, 32, 64]),
    prefix_page=st.sampled_from([None, 1, 64]), threads=st.integers(1, 4), seed=st.integers(0, 10**6),
)
@example(counts=[1, 600], Sq=8, H=17, dims=(320, 0), dtype=torch.bfloat16, length=1024, page=64, prefix_page=64, threads=3, seed=0)
def test_any_shape(counts, Sq, H, dims, dtype, length, page, prefix_page, threads, seed):
    torch.set_num_threads(threads)
    x = Problem(dtype, counts, Sq, H, *dims, length=length, seed=seed)
    got = x.run(page, prefix_page)
    same(x.whole(), got, "with the prefix in the cache")
    if got[1].isfinite().sum() * dims[0] >= 2000:  # the largest error of a few sums may be luck, on either side
        x.check(got)


# ---- cache -----------------------------------------------------------------------------------------------------


def specials(draw: Draw, *shape: int) -> Tensor:
    """Numbers of every size, zeros of both signs, subnormals here and there."""
    x = draw.normal(*shape, dtype=torch.float32) * torch.exp2(draw.integers(-30, 30, *shape[:-1], 1).float())
    flat = x.view(-1)
    for value in (0.0, -0.0, 448.0, -448.0, 2.0**-140, -(2.0**-129)):
        flat[draw.integers(0, len(flat), 2).long()] = value
    return x


@pytest.mark.parametrize("page", [None, 1, 5, 64])
@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_and_gather(dtype, cache_dtype, page):
    """To the bit what the reference does, in place, and nothing beside it."""
    draw, B, T, Sq, (L, R) = Draw(3), 4, 130, 3, (512, 64)
    seqlens = torch.tensor([130, 2, 0, 67], dtype=torch.int32)
    latent, rope = specials(draw, B, Sq, L).to(dtype), draw.normal(B, Sq, R).to(dtype)
    width = 656 if cache_dtype == torch.uint8 else L + R
    rows = torch.randint(0, 255, (B, T, width * cache_dtype.itemsize), generator=draw.generator, dtype=torch.uint8).view(cache_dtype)
    kv, table = rows, None
    if page is not None:
        kv, table = paged(rows, [T] * B, page, draw)
        for b, n in enumerate(seqlens.tolist()):
            table[b, -(-n // page) :] = NOBODYS
    ours, theirs = kv.clone(), kv.clone()
    tk.append_latent(ours, latent, rope, seqlens=seqlens, block_table=table)
    reference.append_latent(theirs, latent, rope, seqlens=seqlens, block_table=table)
    assert_bitwise(ours.view(torch.uint8), theirs.view(torch.uint8), "append")
    got = tk.gather_latent(ours, seqlens=seqlens, block_table=table)
    same_values(got, reference.gather_latent(theirs, seqlens=seqlens, block_table=table), "gather")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), power=st.integers(-40, 110), dtype=st.sampled_from(DTYPES))
def test_quantised_bits(seed, power, dtype):
    draw = Draw(seed)
    latent = (draw.normal(2, 3, 512, dtype=torch.float32) * 2.0**power).to(dtype)
    rope, kv = draw.normal(2, 3, 64).to(dtype), torch.zeros(2, 3, 656, dtype=torch.uint8)
    tk.append_latent(kv, latent, rope, seqlens=torch.tensor([3, 3]))
    assert_bitwise(kv, reference.quantize_latent(latent, rope), f"2^{power}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_group(value):
    """NaN comes back as NaN, an infinity as the largest number; the other groups of the token are what they would have been."""
    draw, kv, now = Draw(5), torch.zeros(1, 1, 656, dtype=torch.uint8), torch.tensor([1])
    latent, rope = draw.normal(1, 1, 512), draw.normal(1, 1, 64)
    clean = reference.quantize_latent(latent, rope)
    latent[0, 0, 130] = value
    tk.append_latent(kv, latent, rope, seqlens=now)
    for groups in (slice(0, 128), slice(256, 512), slice(512, 516), slice(520, 656)):
        assert_bitwise(kv[..., groups], clean[..., groups], f"bytes {groups}")
    back = tk.gather_latent(kv, seqlens=now)[0, 0]
    assert back[130].isnan() if value != value else back[130] == (448 if value > 0 else -448)
    assert back[128:256].isnan().sum() == int(value != value)


def test_every_byte_and_scale_is_read_exactly():
    """All 256 codes under scales that are powers of two, others, tiny, huge, negative, infinite and NaN."""
    scales = [1.0, 2.0**-13, 2.0**20, 2.0**-126, 2.0**-133, 2.0**120, 2.0**127, 0.3, 1e-4, -2.0, 0.0, float("inf"), float("nan")]
    kv = torch.zeros(1, len(scales), 656, dtype=torch.uint8)
    kv[..., :256] = torch.arange(256, dtype=torch.uint8)
    kv[..., 256:512] = torch.arange(256, dtype=torch.uint8).flip(0)
    kv[0, :, 512:528] = torch.tensor(scales)[:, None].repeat(1, 4).view(torch.uint8)
    kv[..., 528:] = torch.arange(64, dtype=torch.bfloat16).view(torch.uint8)
    got = tk.gather_latent(kv, seqlens=torch.tensor([len(scales)]))
    same_values(got, reference.dequantize_latent(kv), "values")


def test_chunked_prefill_from_a_quantised_cache():
    """Append a prompt in two pieces to FP8 pages; the second attends to all: as over the gathered tokens."""
    draw, H, n, page = Draw(4, torch.bfloat16), 6, 90, 16
    kv = torch.full((9, page, 656), 0x7F, dtype=torch.uint8)
    table = draw.permutation(9)[:7].view(1, 7).int()
    latent, rope, q = draw.normal(1, n, 512), draw.normal(1, n, 64), draw.normal(1, n, H, 576)
    for a, b in ((0, 50), (50, n)):
        now = torch.tensor([b], dtype=torch.int32)
        tk.append_latent(kv, latent[:, a:b], rope[:, a:b], seqlens=now, block_table=table)
        out = tk.mla_decode(q[:, a:b], kv, seqlens=now, block_table=table, scale=SCALE)
    dense = tk.gather_latent(kv, seqlens=now, block_table=table)
    assert dense.dtype == torch.bfloat16 and (dense[:, n:] == 0).all()
    assert_bitwise(tk.mla_decode(q[:, 50:], dense, seqlens=now, scale=SCALE), out, "gathered")


# ---- bad input -------------------------------------------------------------------------------------------------


def call(**changes: Any) -> None:
    draw = Draw(1)
    arguments: dict[str, Any] = dict(
        q=draw.normal(2, 1, 4, 96), kv_cache=draw.normal(9, 16, 96), seqlens=torch.tensor([40, 7], dtype=torch.int32),
        block_table=draw.pages(2, 3), value_dim=64, scale=0.1,
    )
    tk.mla_decode(**arguments | changes)


BAD = [
    (dict(q=torch.zeros(2, 1, 4, 95)), ValueError, "q: got size 95"),
    (dict(q=torch.zeros(2, 4, 96)), ValueError, "q: got shape"),
    (dict(q=torch.zeros(2, 1, 4, 96, dtype=torch.bfloat16)), TypeError, "kv_cache: got torch.float32"),
    (dict(q=torch.zeros(2, 1, 4, 96, dtype=torch.int32)), TypeError, "q: got torch.int32"),
    (dict(kv_cache=torch.zeros(9, 16, 656, dtype=torch.uint8)), ValueError, "q: got size 96"),
    (dict(kv_cache=torch.zeros(9, 16, 600, dtype=torch.uint8)), ValueError, "kv_cache: got size 600"),
    (dict(kv_cache=torch.zeros(9, 0, 96)), ValueError, "kv_cache: got pages of 0"),
    (dict(kv_cache=None), TypeError, "kv_cache: got NoneType"),
    (dict(seqlens=torch.tensor([40, 49])), ValueError, "seqlens: got 49"),
    (dict(seqlens=torch.tensor([40, -1])), ValueError, "seqlens: got -1"),
    (dict(seqlens=torch.tensor([40.0, 1.0])), TypeError, "seqlens: got torch.float32"),
    (dict(seqlens=torch.tensor([40])), ValueError, "seqlens: got shape"),
    (dict(block_table=torch.tensor([[0, 1, 9], [0, 1, 2]])), ValueError, "block_table: got 9"),
    (dict(block_table=torch.tensor([[0, -1, 2], [0, 1, 2]])), ValueError, "block_table: got -1"),
    (dict(block_table=torch.zeros(3, 3, dtype=torch.int32)), ValueError, "block_table: got size 3"),
    (dict(block_table=None), ValueError, "kv_cache: got size 9"),
    (dict(value_dim=0), ValueError, "value_dim: got 0"),
    (dict(value_dim=97), ValueError, "value_dim: got 97"),
    (dict(value_dim=1.5), TypeError, "value_dim: got float"),
    (dict(scale="1"), TypeError, "scale: got str"),
    (dict(scale=float("nan")), ValueError, "scale: got nan"),
    (dict(prefix=3), TypeError, "prefix: got int"),
    (dict(prefix=(torch.zeros(5, 96),)), TypeError, "prefix: got 1 values"),
    (dict(prefix=(torch.zeros(5, 96), 6)), ValueError, "prefix length: got 6"),
    (dict(prefix=(torch.zeros(5, 96), 2.0)), TypeError, "prefix length: got float"),
    (dict(prefix=(torch.zeros(5, 95), 5)), ValueError, "prefix kv: got size 95"),
    (dict(prefix=(torch.zeros(5, 96).half(), 5)), TypeError, "prefix kv: got torch.float16"),
    (dict(prefix=(torch.zeros(2, 8, 96), 10, torch.tensor([0, 2]))), ValueError, "prefix block_table: got 2"),
    (dict(prefix=(torch.zeros(2, 8, 96), 17, torch.tensor([0, 1]))), ValueError, "prefix length: got 17"),
    (dict(prefix=(torch.zeros(2, 0, 96), 0, torch.tensor([0, 1]))), ValueError, "prefix kv: got pages of 0"),
    (dict(prefix=(torch.zeros(2, 8, 96), 10, torch.tensor([0.0]))), TypeError, "prefix block_table: got torch.float32"),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_decode(changes, error, message):
    call()
    with pytest.raises(error, match=message):
        call(**changes)


def test_bad_append_and_gather():
    draw = Draw(2)
    good: dict[str, Any] = dict(
        kv_cache=draw.normal(5, 4, 48), latent=draw.normal(2, 1, 32), rope=draw.normal(2, 1, 16), seqlens=torch.tensor([6, 1]),
        block_table=torch.tensor([[0, 1], [3, 9]]),
    )
    append = functools.partial(tk.append_latent)
    append(**good)
    bad: list[tuple[dict[str, Any], str]] = [
        (dict(rope=draw.normal(2, 1, 15)), "rope: got 15"), (dict(rope=draw.normal(2, 2, 16)), "rope: got shape"),
        (dict(latent=draw.normal(2, 32)), "latent: got shape"), (dict(seqlens=torch.tensor([9, 1])), "seqlens: got 9"),
        (dict(seqlens=torch.tensor([6, 5])), "block_table: got 9"), (dict(block_table=torch.zeros(1, 2, dtype=torch.int32)), "block_table"),
        (dict(kv_cache=draw.normal(1, 4, 48).expand(5, 4, 48)), "kv_cache: got an expanded"),
        (dict(kv_cache=torch.zeros(5, 4, 656, dtype=torch.uint8)), "latent: got size 32"),
    ]
    for L in (576, 500, 520):  # 576 in all, but not as 512 + 64
        latent, rope = draw.normal(2, 1, L), draw.normal(2, 1, 576 - L)
        bad.append((dict(kv_cache=torch.zeros(5, 4, 656, dtype=torch.uint8), latent=latent, rope=rope), f"latent: got size {L}"))
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            append(**good | changes)
    for lengths in (None, torch.tensor(3)):
        with pytest.raises((TypeError, ValueError), match="seqlens: got"):
            tk.gather_latent(good["kv_cache"], seqlens=lengths)
    with pytest.raises(ValueError, match="block_table: got 9"):
        tk.gather_latent(good["kv_cache"], seqlens=torch.tensor([6, 5]), block_table=good["block_table"])


def test_a_cache_and_autograd():
    """Appending is an in-place change that autograd notices; no gradient goes into a cache, or comes out of it unsaid."""
    cache, w, new = torch.zeros(1, 4, 96), torch.ones(96, requires_grad=True), torch.ones(1, 1, 64, requires_grad=True)
    product = (cache * w).sum()
    tk.append_latent(cache, new, torch.ones(1, 1, 32), seqlens=torch.tensor([1]))
    assert not cache.requires_grad and cache[0, 0].eq(1).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with tk.use_backend("reference"):
        tk.append_latent(cache, new, torch.ones(1, 1, 32), seqlens=torch.tensor([2]))
    assert not cache.requires_grad
    gathered = tk.gather_latent(cache.requires_grad_(), seqlens=torch.tensor([2]))
    with pytest.raises(NotImplementedError, match="gather_latent has no gradient"):
        gathered.sum().backward()
    with torch.inference_mode():
        tk.append_latent(torch.zeros(1, 4, 96), new, torch.ones(1, 1, 32), seqlens=torch.tensor([1]))


@pytest.mark.parametrize("size", [1.0, 1e3, 1e5])
def test_very_large_scores_in_bfloat16(size):
    """bfloat16 scores of up to 1e12: the largest keeps its probability, and lse is it."""
    draw = Draw(11, torch.bfloat16)
    q, cache, seqlens = draw.normal(2, 3, 8, 96) * size, draw.normal(2, 300, 96) * size, torch.tensor([300, 77])
    run = functools.partial(tk.mla_decode, seqlens=seqlens, value_dim=64, scale=0.1, return_lse=True)
    out, lse = run(q, cache)
    with tk.use_backend("reference"):
        want, want_lse = run(q.double(), cache.double())
        base, base_lse = run(q, cache)
    check(out, want, base, name="out")
    check(lse, want_lse, base_lse, name="lse")
