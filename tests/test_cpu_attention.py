"""Attention's C++ kernels: numerics against float64 on every ISA level, and the bits that must not move.

Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, D head dim, Dv value dim, P pages.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import thinkernel as tk
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thinkernel.ops.dispatch import C
from thinkernel.reference import attention as reference
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "attention_forward"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = C.isa_levels() if hasattr(C, "isa_levels") else []


@pytest.fixture(autouse=True)
def _cpu_backend():
    threads = torch.get_num_threads()
    with tk.use_backend("cpu"):
        yield
    torch.set_num_threads(threads)


def _inputs(seed: int, dtype: torch.dtype, B: int, S: int, T: int, H: int, Hkv: int, D: int, Dv: int) -> list[Tensor]:
    draw = Draw(seed, dtype)
    return [draw.normal(B, S, H, D), draw.normal(B, T, Hkv, D), draw.normal(B, T, Hkv, Dv)]


def _strided(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; the last dimension stays contiguous."""
    if layout == "bhsd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        wide = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 3), float("nan"), dtype=x.dtype)
        view = wide[:, 1:, 1:-1, 2:-1]
        view.copy_(x)
        return view
    return x


def _torch(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_start: Tensor | None, scale: float | None, window=None, chunk=None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What torch does in the inputs' dtype: its fused SDPA where that exists, else eager attention with probabilities in the dtype.

    The fused kernel wants equal head dims, so all three are padded with zeros; its lse is not differentiable, so lse comes
    from the scores.
    """
    group, S, T = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = (q @ k.mT).float() * scale  # [B, H, S, T]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions, keys = torch.arange(T - S, T)[None], torch.arange(T)
    visible = reference.visible_keys(positions, keys, key_start, None, causal, window, chunk)
    visible = torch.ones(1, S, T, dtype=torch.bool) if visible is None else visible
    visible = visible[:, None]  # [B|1, 1, S, T]
    probs, lse = reference.masked_softmax(scores, visible)
    if softcap or sinks is not None or T == 0:
        out = probs.to(v.dtype) @ v
    else:
        empty, width = ~visible.any(-1, keepdim=True), max(q.shape[-1], v.shape[-1])
        wide = [F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*wide, attn_mask=visible | empty, scale=scale)[..., : v.shape[-1]]
        out = out.masked_fill(empty, 0.0)
    out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    if sinks is not None:
        out = (out.float() * reference.sink_gate(lse, sinks.float())[..., None]).to(q.dtype)
    return out, lse


def _check_all(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_start: Tensor | None = None, scale: float | None = None,
    backward: bool = True, seed: int = 0, **mask,
) -> None:
    """Forward, lse and the gradients of q, k, v (and sinks) through both outputs, by the numerics rule."""
    draw = Draw(seed + 1, q.dtype)
    dout = draw.normal(*q.shape[:3], v.shape[-1])  # [B, S, H, Dv]
    dlse = draw.normal(*q.shape[:3], dtype=torch.float32)  # [B, S, H]
    sinks = mask.pop("sinks", None)

    def run(function, cast):
        leaves = [cast(x).detach().requires_grad_(backward) for x in (q, k, v) + (() if sinks is None else (sinks,))]
        extra = {} if sinks is None else {"sinks": leaves[3]}
        out, lse = function(*leaves[:3], causal=causal, key_start=key_start, scale=scale, **extra, **mask)
        grads = ()
        if backward:
            seen = torch.isfinite(lse)
            total = (out * dout.to(out.dtype)).sum() + torch.where(seen, lse * dlse.to(lse.dtype), torch.zeros_like(lse)).sum()
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return [out, lse, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves))]

    got = run(lambda *a, **o: tk.attention(*a, return_lse=True, **o), lambda x: x)
    want = run(reference.attention, lambda x: x.double())
    base = run(_torch, lambda x: x)
    for name, x, w, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got, want, base):
        check(x.detach(), w.detach(), b.detach(), name=name)


# ---- numerics --------------------------------------------------------------------------------------------------

SHAPES = [  # B, S, T, H, Hkv, D, Dv, causal: what each one is for
    pytest.param(2, 65, 65, 4, 2, 64, 64, True, id="one-past-a-block"),
    pytest.param(1, 260, 600, 4, 1, 128, 128, True, id="two-splits-mqa"),
    pytest.param(1, 70, 1100, 2, 2, 32, 32, False, id="three-splits"),
    pytest.param(8, 40, 13, 3, 3, 20, 20, True, id="more-queries-than-keys"),  # so few numbers that one draw is noise
    pytest.param(2, 9, 33, 6, 3, 1, 5, True, id="head-dim-1"),
    pytest.param(1, 50, 50, 2, 1, 256, 256, True, id="head-dim-256"),
    pytest.param(1, 50, 50, 2, 2, 192, 128, True, id="mla-prefill-dims"),
    pytest.param(1, 33, 33, 8, 1, 33, 17, False, id="odd-dims"),
    pytest.param(1, 560, 560, 2, 1, 16, 16, True, id="three-query-blocks"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, S, T, H, Hkv, D, Dv, causal", SHAPES)
def test_matches_float64(B, S, T, H, Hkv, D, Dv, causal, dtype):
    q, k, v = _inputs(11, dtype, B, S, T, H, Hkv, D, Dv)
    _check_all(q, k, v, causal=causal)


def test_matches_torch_sdpa_at_length():
    q, k, v = _inputs(12, torch.float32, 1, 1300, 1300, 2, 1, 64, 64)
    out = tk.attention(q, k, v, causal=True)
    ref, _ = reference.attention(q.double(), k.double(), v.double(), causal=True)
    wide = [x.repeat_interleave(2, 2) for x in (k, v)]
    sdpa = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, *wide)), is_causal=True).transpose(1, 2)
    check(out, ref, sdpa, name="out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mask",
    [dict(window=(5, 0)), dict(window=(600, 2)), dict(window=(-1, 3)), dict(chunk=37), dict(softcap=2.0), dict(sinks=True),
     dict(window=(40, 0), softcap=5.0, sinks=True)],
    ids=lambda m: "+".join(m),
)
def test_masks_caps_and_sinks(mask, dtype):
    # Many sequences: the largest error of one small draw is one unlucky (query, key) pair on either side, and the ratio of
    # two such maxima swings by 2 from seed to seed (root mean square errors: 0.84 to 0.98 of torch's).
    q, k, v = _inputs(13, dtype, 24, 45, 700, 4, 2, 48, 40)
    if "sinks" in mask:
        mask = mask | {"sinks": Draw(14).normal(4)}
    _check_all(q, k, v, causal="window" not in mask or mask["window"][1] <= 0, **mask)


def test_scale_of_any_sign():
    q, k, v = _inputs(15, torch.float32, 1, 20, 30, 2, 1, 16, 16)
    for scale in (0.0, -0.7, 1.3):
        _check_all(q, k, v, causal=True, scale=scale)


def test_large_scores_stay_finite():
    q, k, v = _inputs(16, torch.float32, 1, 30, 30, 2, 2, 64, 64)
    _check_all(q * 30, k * 30, v, causal=True)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 70), st.integers(1, 3), st.integers(1, 4),
                    st.integers(1, 72), st.integers(1, 72)),
    dtype=st.sampled_from(DTYPES), causal=st.booleans(), padded=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(["bshd", "bhsd", "padded"])] * 3), seed=st.integers(0, 10**6),
)
def test_any_shape_and_stride(sizes, dtype, causal, padded, layouts, seed):
    B, S, T, Hkv, group, D, Dv = sizes
    q, k, v = _inputs(seed, dtype, B, S, T, Hkv * group, Hkv, D, Dv)
    start = Draw(seed).integers(0, T + 1, B) if padded and B else None
    plain = tk.attention(q, k, v, causal=causal, key_start=start, return_lse=True)
    q, k, v = (_strided(x, layout) for x, layout in zip((q, k, v), layouts))
    for a, b in zip(plain, tk.attention(q, k, v, causal=causal, key_start=start, return_lse=True)):
        assert_bitwise(a, b, "strides")
    # Gradients of a softmax over a handful of keys cancel to rounding noise in torch's own float32 too: rows are judged
    # from 8 keys up.
    _check_all(q, k, v, causal=causal, key_start=start, backward=T >= 8 and S <= T, seed=seed)


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_very_large_scores_in_bfloat16(size):
    """Up to 1e12: the largest keeps its probability, however long the row; a decoded row too."""
    draw = Draw(12, torch.bfloat16)
    q, k, v = draw.normal(1, 70, 4, 64) * size, draw.normal(1, 1300, 2, 64) * size, draw.normal(1, 1300, 2, 64)
    _check_all(q, k, v, causal=True, scale=0.1, backward=False)
    seqlens = torch.tensor([1300])
    out, lse = tk.attention_decode(q[:, :1], k, v, seqlens=seqlens, scale=0.1, return_lse=True)
    want = reference.attention_decode(q[:, :1].double(), k.double(), v.double(), seqlens=seqlens, scale=0.1)
    base = reference.attention_decode(q[:, :1], k, v, seqlens=seqlens, scale=0.1)
    check(out, want[0], base[0], name="out")
    check(lse, want[1], base[1], name="lse")


def test_rows_that_see_nothing():
    q, k, v = _inputs(17, torch.float32, 2, 12, 5, 2, 1, 8, 8)
    start = torch.tensor([0, 5], dtype=torch.int32)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = tk.attention(q, k, v, causal=True, key_start=start, return_lse=True)
    assert (out[0, :7] == 0).all() and (lse[0, :7] == -torch.inf).all()
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dq[0, :7] == 0).all() and (dq[1] == 0).all() and (dk[1] == 0).all() and (dv[1] == 0).all()
    assert torch.isfinite(dq).all() and torch.isfinite(dk).all() and (dv[0] != 0).any()


def test_nan_stays_in_its_query_row():
    q, k, v = _inputs(18, torch.float32, 1, 70, 70, 2, 1, 16, 16)
    clean = tk.attention(q, k, v, causal=True)
    q[0, 33, 1, 4] = float("nan")
    out = tk.attention(q, k, v, causal=True)
    assert out[0, 33, 1].isnan().all()
    out[0, 33, 1] = clean[0, 33, 1]
    assert_bitwise(out, clean, "other rows")


def test_padding_is_never_read():
    q, k, v = _inputs(19, torch.bfloat16, 2, 40, 40, 2, 1, 16, 16)
    start = torch.tensor([9, 31], dtype=torch.int32)
    for b in range(2):
        k[b, : start[b]], v[b, : start[b]] = float("nan"), float("nan")
    for x in (q, k, v):
        x.requires_grad_()
    out = tk.attention(q, k, v, causal=True, key_start=start)
    assert torch.isfinite(out).all()
    for grad in torch.autograd.grad(out.float().square().sum(), (q, k, v)):
        assert torch.isfinite(grad).all()


# ---- the bits that must not move -------------------------------------------------------------------------------


def _everything(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, **options) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = tk.attention(q, k, v, return_lse=True, **options)
    return [out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))]


NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, Hkv", [(1, 1), (2, 3)])
def test_runs_and_threads_agree(B, Hkv, dtype):
    """One pair of (batch, head) takes the two-pass backward on two threads and more, and the one-pass form on one."""
    S, H = 530, 2 * Hkv
    q, k, v = _inputs(21, dtype, B, S, S, H, Hkv, 40, 24)
    draw = Draw(22, dtype)
    dout, dlse = draw.normal(B, S, H, 24), draw.normal(B, S, H, dtype=torch.float32)
    results = []
    for threads in (1, 2, 4, 1):
        torch.set_num_threads(threads)
        results.append(_everything(q, k, v, dout, dlse, causal=True))
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other):
            assert_bitwise(a, b, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_alone_equals_row_in_batch(dtype):
    q, k, v = _inputs(23, dtype, 5, 100, 100, 4, 2, 64, 64)
    draw = Draw(24, dtype)
    dout, dlse = draw.normal(*q.shape), draw.normal(*q.shape[:3], dtype=torch.float32)
    together = _everything(q, k, v, dout, dlse, causal=True)
    for b in (0, 3):
        alone = _everything(*(x[b : b + 1] for x in (q, k, v, dout, dlse)), causal=True)
        for name, a, x in zip(NAMES, alone, together):
            assert_bitwise(a, x[b : b + 1], f"{name} of batch row {b}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_left_padding_moves_no_bits(dtype):
    n, pads = 600, [0, 7, 41]
    q, k, v = _inputs(25, dtype, 1, n, n, 4, 2, 32, 32)
    draw = Draw(26, dtype)
    dout, dlse = draw.normal(*q.shape), draw.normal(*q.shape[:3], dtype=torch.float32)
    plain = _everything(q, k, v, dout, dlse, causal=True)
    width = n + max(pads)

    def padded(x):
        noise = Draw(27, x.dtype).normal(len(pads), width, *x.shape[2:])
        rows = [torch.cat([noise[i, : width - n], x[0]]) for i in range(len(pads))]
        return torch.stack(rows)

    # every row holds the same sequence at the end; key_start cuts the rest off
    start = torch.full((len(pads),), width - n, dtype=torch.int32)
    found = _everything(*(padded(x) for x in (q, k, v, dout, dlse)), causal=True, key_start=start)
    for name, a, x in zip(NAMES, plain, found):
        for i in range(len(pads)):
            assert_bitwise(x[i : i + 1, width - n :], a, f"{name} of padded row {i}")
    for pad in pads:
        cut = width - n - pad
        some = [padded(x)[:1, cut:] for x in (q, k, v, dout, dlse)]
        found = _everything(*some, causal=True, key_start=torch.tensor([pad], dtype=torch.int32))
        for name, a, x in zip(NAMES, plain, found):
            assert_bitwise(x[:, pad:], a, f"{name} with {pad} of padding")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_has_the_same_bits_among_fewer_queries(dtype):
    q, k, v = _inputs(28, dtype, 1, 300, 900, 4, 2, 64, 64)
    out, lse = tk.attention(q, k, v, causal=True, return_lse=True)
    for count in (1, 2, 17, 130):
        part, part_lse = tk.attention(q[:, -count:], k, v, causal=True, return_lse=True)
        assert_bitwise(part, out[:, -count:], f"out of the last {count}")
        assert_bitwise(part_lse, lse[:, -count:], f"lse of the last {count}")


# ---- decode ----------------------------------------------------------------------------------------------------


def _paged(cache: Tensor, seqlens: Tensor, page: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """The first seqlens[b] positions of each row in shuffled pages; everything else is NaN, unused entries −7."""
    B, T = cache.shape[:2]
    max_pages = -(-T // page)
    order = draw.pages(B, max_pages)
    pages = torch.full((B * max_pages + 3, page, *cache.shape[2:]), float("nan"), dtype=cache.dtype)
    table = torch.full((B, max_pages), -7, dtype=torch.int32)
    for b in range(B):
        for i in range(-(-int(seqlens[b]) // page)):
            n = min(page, int(seqlens[b]) - i * page)
            table[b, i] = order[b, i]
            pages[order[b, i].item(), :n] = cache[b, i * page : i * page + n]
    return pages, table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Sq, H, Hkv", [(1, 8, 2), (3, 4, 4), (40, 6, 3)])
def test_decode(Sq, H, Hkv, dtype):
    """Against float64; equal to the prefill's last rows, to pages of any size, and to a row decoded alone, bit for bit."""
    B, T, D, Dv = 4, 1200, 64, 48
    draw = Draw(31, dtype)
    q = draw.normal(B, Sq, H, D)
    k, v = draw.normal(B, T, Hkv, D), draw.normal(B, T, Hkv, Dv)
    seqlens = torch.tensor([1200, 513, 63, 0], dtype=torch.int32)
    for b in range(B):
        k[b, seqlens[b] :], v[b, seqlens[b] :] = float("nan"), float("nan")
    out, lse = tk.attention_decode(q, k, v, seqlens=seqlens, return_lse=True)
    want, want_lse = reference.attention_decode(q.double(), k.double(), v.double(), seqlens=seqlens)
    base, base_lse = reference.attention_decode(q, k, v, seqlens=seqlens)
    check(out, want, base, name="out")
    check(lse, want_lse, base_lse, name="lse")

    for b in range(B):
        n = int(seqlens[b])
        alone = tk.attention_decode(q[b : b + 1], k[b : b + 1], v[b : b + 1], seqlens=seqlens[b : b + 1])
        assert_bitwise(alone, out[b : b + 1], f"row {b} alone")
        if n < Sq:
            continue
        queries = torch.cat([draw.normal(1, n - Sq, H, D), q[b : b + 1]], 1)
        rows, rows_lse = tk.attention(queries, k[b : b + 1, :n], v[b : b + 1, :n], causal=True, return_lse=True)
        assert_bitwise(rows[0, n - Sq :], out[b], f"prefill of row {b}")
        assert_bitwise(rows_lse[0, n - Sq :], lse[b], f"prefill's lse of row {b}")

    for page in (1, 16, 31, 64):
        pages_k, table = _paged(k, seqlens, page, Draw(32))
        pages_v, _ = _paged(v, seqlens, page, Draw(32))
        found, found_lse = tk.attention_decode(q, pages_k, pages_v, seqlens=seqlens, block_table=table, return_lse=True)
        assert_bitwise(found, out, f"pages of {page}")
        assert_bitwise(found_lse, lse, f"lse, pages of {page}")


def test_decode_threads_agree():
    draw = Draw(33, torch.bfloat16)
    q, k, v = draw.normal(2, 1, 8, 64), draw.normal(2, 2000, 2, 64), draw.normal(2, 2000, 2, 64)
    seqlens = torch.tensor([2000, 700], dtype=torch.int32)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(tk.attention_decode(q, k, v, seqlens=seqlens))
    for other in results[1:]:
        assert_bitwise(results[0], other, "out")


@pytest.mark.parametrize("mask", [dict(window=(100, 0)), dict(softcap=3.0), dict(sinks=True), dict(chunk=300)], ids=lambda m: "+".join(m))
def test_decode_masks(mask):
    draw = Draw(34)
    q, k, v = draw.normal(2, 2, 4, 32), draw.normal(2, 900, 2, 32), draw.normal(2, 900, 2, 32)
    seqlens = torch.tensor([900, 333], dtype=torch.int32)
    if "sinks" in mask:
        mask = {"sinks": draw.normal(4)}
    out, lse = tk.attention_decode(q, k, v, seqlens=seqlens, return_lse=True, **mask)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in mask.items()}
    want, want_lse = reference.attention_decode(q.double(), k.double(), v.double(), seqlens=seqlens, **wide)
    base, base_lse = reference.attention_decode(q, k, v, seqlens=seqlens, **mask)
    check(out, want, base, name="out")
    check(lse, want_lse, base_lse, name="lse")


# ---- ISA levels ------------------------------------------------------------------------------------------------

CORE = "test_matches_float64 or test_masks_caps_and_sinks or test_runs_and_threads_agree or test_decode or test_left_padding"


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_lower_isa_level(level):
    """The numerics and the bitwise tests again, in a process that is held to a lower level."""
    assert C.isa() != level, "the highest level runs in this process"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", CORE]
    run = subprocess.run(command, env=os.environ | {"THINKERNEL_ISA": level}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


_ONE_SHAPE = """
import torch, thinkernel as tk
from thinkernel.ops.dispatch import C
from thinkernel.reference import attention as reference
torch.manual_seed(0)
q, k, v = (torch.randn(1, 70, h, 24, requires_grad=True) for h in (4, 2, 2))
with tk.use_backend("cpu"):
    out = tk.attention(q, k, v, causal=True)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
ref = reference.attention(*wide, causal=True)[0]
want = torch.autograd.grad(ref.square().sum(), wide)
for a, b in zip((out, *grads), (ref, *want)):
    assert (a.detach().double() - b.detach()).abs().max() < 2e-5 * b.detach().abs().max()
print(C.isa())
"""


@pytest.mark.parametrize("level", LEVELS)
def test_every_isa_level_runs(level):
    run = subprocess.run(
        [sys.executable, "-c", _ONE_SHAPE], env=os.environ | {"THINKERNEL_ISA": level}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == level
