"""Triton attention under the interpreter: numerics against the float64 reference, and the bits that must not move.

Shapes: q [B, S, H, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv]; under the interpreter tiles are 32 × 32 and a key split holds 64
keys, so T > 64 crosses splits and T > 32 crosses blocks.
"""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thinkernel.kernels import attention as triton_attention
from thinkernel.reference import attention as reference
from thinkernel.testing.compare import assert_bitwise, check

DTYPES = [torch.float32, torch.float16]
NAN = float("nan")

# B, S, T, H, Hkv, D, Dv, options. Sizes that no block divides; D in one block, two blocks and padded.
CASES = {
    "causal": (2, 37, 70, 4, 2, 24, 40, dict(causal=True)),
    "full, S > T": (1, 70, 33, 2, 1, 16, 16, dict(causal=False, scale=0.3)),
    "causal, S > T: rows that see nothing": (2, 45, 20, 2, 2, 32, 32, dict(causal=True)),
    "three splits": (1, 33, 150, 3, 3, 17, 9, dict(causal=True)),
    "one query": (3, 1, 65, 8, 2, 64, 64, dict(causal=True)),
    "two-part head dim": (1, 40, 40, 2, 1, 96, 64, dict(causal=True)),
    "left padding": (3, 40, 100, 2, 1, 48, 32, dict(causal=True, key_start=[0, 41, 100])),
    "left padding, full": (2, 20, 50, 2, 1, 16, 16, dict(causal=False, key_start=[3, 33])),
    "window, softcap": (1, 100, 100, 4, 1, 16, 16, dict(causal=True, window=(20, -1), softcap=3.0)),
    "two-sided window": (2, 50, 90, 2, 1, 32, 16, dict(causal=False, window=(9, 30))),
    "chunk, sinks, left padding": (2, 60, 90, 2, 1, 32, 16, dict(causal=True, chunk=25, key_start=[0, 40], sinks=True)),
}


def make(case: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict]:
    B, S, T, H, Hkv, D, Dv, options = case
    options = dict(options)
    if "key_start" in options:
        options["key_start"] = torch.tensor(options["key_start"], dtype=torch.int32)
    if "sinks" in options:
        options["sinks"] = torch.randn(H)
    # Heads first in memory, so that the strides are not the contiguous ones.
    q, k, v = (torch.randn(B, h, n, d).to(dtype).transpose(1, 2) for h, n, d in ((H, S, D), (Hkv, T, D), (Hkv, T, Dv)))
    return q, k, v, options


def forward(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    out = torch.full((*q.shape[:3], v.shape[-1]), NAN, dtype=q.dtype)
    lse = torch.full(q.shape[:3], NAN)
    triton_attention.attention_forward(q, k, v, out, lse, **options)
    return out, lse


def half_torch(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The baseline: attention as PyTorch computes it in the inputs' dtype, weights rounded to it before they meet v."""
    G = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(G, 2).transpose(1, 2) for x in (k, v))  # [B, H, T, .]
    S, T = q.shape[1], k.shape[2]
    visible = reference.visible_keys(torch.arange(T - S, T)[None], torch.arange(T), options.get("key_start"), None,
                                     options["causal"], options.get("window"), options.get("chunk"))
    s = (q.transpose(1, 2) @ k.transpose(-1, -2)).float() * options.get("scale", q.shape[-1] ** -0.5)
    if options.get("softcap"):
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    p, lse = reference.masked_softmax(s, None if visible is None else visible[:, None])
    out = (p.to(v.dtype) @ v).transpose(1, 2)  # [B, S, H, Dv]
    lse = lse.transpose(1, 2)
    if options.get("sinks") is not None:
        out = (out * reference.sink_gate(lse, options["sinks"])[..., None]).to(v.dtype)
    return out, lse


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The baseline where torch has the op: its own attention, float32 lse and all; the lse itself from half_torch."""
    S, T, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    visible = reference.visible_keys(torch.arange(T - S, T)[None], torch.arange(T), options.get("key_start"), None,
                                     options["causal"], options.get("window"), options.get("chunk"))
    mask = None if visible is None else visible[:, None]
    heads = [q.transpose(1, 2), *(x.repeat_interleave(G, 2).transpose(1, 2) for x in (k, v))]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=options.get("scale"))
    return out.transpose(1, 2), half_torch(q, k, v, **options)[1]


def with_gradients(attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, dtype: torch.dtype, options: dict) -> list[Tensor]:
    """attend's out, lse and the gradients of q, k, v (and sinks), all computed in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        leaves.append(options["sinks"])
    out, lse = attend(*leaves[:3], **options)
    loss = (out * dout.to(out.dtype)).sum(dtype=lse.dtype) + (lse.masked_fill(lse.isinf(), 0.0) * dlse.to(lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_and_backward(case: tuple, dtype: torch.dtype) -> None:
    q, k, v, options = make(case, dtype)
    dout, dlse = torch.randn(*q.shape[:3], v.shape[-1]).to(dtype), torch.randn(q.shape[:3])
    has_lse_gradient = "softcap" in options or "sinks" in options  # torch's own attention has none of the three
    if not has_lse_gradient:
        dlse.zero_()
    want = with_gradients(reference.attention, q, k, v, dout, dlse, torch.float64, options)
    torch_same = with_gradients(half_torch if has_lse_gradient else sdpa, q, k, v, dout, dlse, dtype, options)
    out, lse = forward(q, k, v, **options)
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    if "sinks" in options:
        grads.append(torch.full((q.shape[2],), NAN))
    triton_attention.attention_backward(q, k, v, out, lse, dout, *grads[:3], dlse=dlse, dsinks=grads[3] if len(grads) > 3 else None, **options)
    for name, got, ref, base in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), [out, lse, *grads], want, torch_same):
        check(got, ref, base, name=name)


def paged(cache: Tensor, page: int, seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """A dense cache [B, T, ...] as shuffled pages and their table; everything past a sequence's end is NaN, table entries −1."""
    B, T = cache.shape[:2]
    count = -(-T // page)
    spare = 2
    pages = torch.full((B * count + spare, page, *cache.shape[2:]), NAN).to(cache.dtype)
    table = torch.full((B, count), -1, dtype=torch.int32)
    numbers = iter(torch.randperm(B * count + spare).tolist())
    for b in range(B):
        for i in range(-(-int(seqlens[b]) // page)):
            n = next(numbers)
            rows = cache[b, i * page : min((i + 1) * page, int(seqlens[b]))]
            pages[n, : len(rows)] = rows
            table[b, i] = n
    return pages, table


DECODE = {
    "one split": (3, 1, 60, 4, 2, 32, 32, [60, 1, 0], {}),
    "several splits": (3, 1, 200, 4, 1, 24, 40, [200, 65, 64], {}),
    "speculative": (2, 5, 150, 6, 2, 16, 16, [150, 3], {}),
    "more rows than a tile": (1, 9, 100, 8, 1, 16, 16, [97], {}),
    "not causal": (2, 3, 90, 2, 1, 16, 16, [90, 40], dict(causal=False)),
    "window, sinks, softcap": (2, 2, 180, 4, 2, 16, 16, [180, 70], dict(window=(30, -1), sinks=True, softcap=4.0)),
    "chunk": (2, 1, 180, 2, 2, 16, 16, [180, 131], dict(chunk=50)),
}


@pytest.mark.parametrize("page", [0, 7], ids=["dense", "page 7"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DECODE.values(), ids=DECODE.keys())
def test_decode(case: tuple, dtype: torch.dtype, page: int) -> None:
    B, Sq, T, H, Hkv, D, Dv, lengths, options = case
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.randn(H)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    q, k, v = torch.randn(B, Sq, H, D).to(dtype), torch.randn(B, T, Hkv, D).to(dtype), torch.randn(B, T, Hkv, Dv).to(dtype)
    out, lse = torch.full((B, Sq, H, Dv), NAN, dtype=dtype), torch.full((B, Sq, H), NAN)
    past = torch.arange(T)[None, :, None, None] >= seqlens[:, None, None, None]
    k_cache, v_cache, table = k.masked_fill(past, NAN), v.masked_fill(past, NAN), None
    if page:
        torch.manual_seed(7)
        k_cache, table = paged(k, page, seqlens)
        torch.manual_seed(7)
        v_cache, _ = paged(v, page, seqlens)
    triton_attention.attention_decode(q, k_cache, v_cache, out, lse, seqlens=seqlens, block_table=table, **options)

    wide = {x: (y.double() if x == "sinks" else y) for x, y in options.items()}
    want = reference.attention_decode(q.double(), k.double(), v.double(), seqlens=seqlens, **wide)
    rows = []
    for b, n in enumerate(lengths):
        o, e = half_torch(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], **{"causal": True, **options})
        rows.append((o, e))
    check(out, want[0], torch.cat([o for o, _ in rows]), name="out")
    check(lse, want[1], torch.cat([e for _, e in rows]), name="lse")


def test_a_page_number_outside_the_cache_counts_as_empty() -> None:
    q, k, v = torch.randn(1, 1, 2, 16), torch.randn(3, 16, 1, 16), torch.randn(3, 16, 1, 16)
    results = []
    for table in ([2, 3, 0], [2, -1, 0]):
        out, lse = torch.full((1, 1, 2, 16), NAN), torch.full((1, 1, 2), NAN)
        triton_attention.attention_decode(q, k, v, out, lse, seqlens=torch.tensor([48], dtype=torch.int32), block_table=torch.tensor([table], dtype=torch.int32))
        results.append((out, lse))
    keys, values = torch.cat([k[2], k[0]])[None].double(), torch.cat([v[2], v[0]])[None].double()
    want = reference.attention(q.double(), keys, values)
    base = half_torch(q, keys.float(), values.float(), causal=False)
    for out, lse in results:
        check(out, want[0], base[0])
        check(lse, want[1], base[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 50, 4, 32).to(dtype), torch.randn(3, 130, 2, 32).to(dtype), torch.randn(3, 130, 2, 32).to(dtype)
    out, lse = forward(q, k, v, causal=True)
    alone = forward(q[1:2], k[1:2], v[1:2], causal=True)
    assert_bitwise(out[1:2], alone[0])
    assert_bitwise(lse[1:2], alone[1])
    few = forward(q[:, 43:], k, v, causal=True)  # the last 7 queries without the ones before them
    assert_bitwise(out[:, 43:], few[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_left_padding_moves_nothing(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(1, 60, 2, 32).to(dtype), torch.randn(1, 90, 1, 32).to(dtype), torch.randn(1, 90, 1, 32).to(dtype)
    dout = torch.randn(1, 60, 2, 32).to(dtype)
    pad = 13
    padded = [torch.cat([torch.full((1, pad, *x.shape[2:]), NAN, dtype=dtype), x], 1) for x in (k, v)]
    start = torch.tensor([pad], dtype=torch.int32)
    plain, moved = forward(q, k, v, causal=True), forward(q, *padded, causal=True, key_start=start)
    assert_bitwise(plain[0], moved[0])
    assert_bitwise(plain[1], moved[1])
    a, b = [torch.full_like(x, NAN) for x in (q, k, v)], [torch.full_like(x, NAN) for x in (q, *padded)]
    triton_attention.attention_backward(q, k, v, *plain, dout, *a, causal=True)
    triton_attention.attention_backward(q, *padded, *moved, dout, *b, causal=True, key_start=start)
    assert_bitwise(a[0], b[0], "dq")
    for i, name in ((1, "dk"), (2, "dv")):
        assert_bitwise(a[i], b[i][:, pad:], name)
        assert (b[i][:, :pad] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_equals_prefill(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 3, 4, 32).to(dtype), torch.randn(2, 200, 2, 32).to(dtype), torch.randn(2, 200, 2, 32).to(dtype)
    out, lse = forward(q, k, v, causal=True)
    got, got_lse = torch.full_like(out, NAN), torch.full_like(lse, NAN)
    triton_attention.attention_decode(q, k, v, got, got_lse, seqlens=torch.tensor([200, 200], dtype=torch.int32))
    assert_bitwise(got, out)
    assert_bitwise(got_lse, lse)


def test_nan_stays_in_its_row() -> None:
    q, k, v = torch.randn(2, 20, 2, 16), torch.randn(2, 20, 1, 16), torch.randn(2, 20, 1, 16)
    clean, _ = forward(q, k, v, causal=True)
    q[1, 7, 0, 3] = NAN
    out, lse = forward(q, k, v, causal=True)
    assert out[1, 7, 0].isnan().all() and lse[1, 7, 0].isnan()
    clean[1, 7, 0] = NAN
    assert_bitwise(out, clean)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["no batch", "no queries", "no keys"])
def test_empty(shape: tuple[int, int, int]) -> None:
    B, S, T = shape
    q, k, v = torch.randn(B, S, 2, 16), torch.randn(B, T, 1, 16), torch.randn(B, T, 1, 16)
    out, lse = forward(q, k, v, causal=True)
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    triton_attention.attention_backward(q, k, v, out, lse, torch.randn_like(out), *grads, causal=True)
    assert (out == 0).all() and torch.isneginf(lse).all() and all((g == 0).all() for g in grads)


def test_covers_names_the_argument() -> None:
    q, k = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 1, 16)
    assert triton_attention.covers(q, k, k) is None
    assert triton_attention.covers(q.double(), k, k).startswith("q:")
    assert triton_attention.covers(q, k.half(), k).startswith("k:")
    assert triton_attention.covers(q, k, k, scale=-1.0).startswith("scale:")
    assert triton_attention.covers(q, k, k, cu_seqlens_q=torch.tensor([0, 2])).startswith("cu_seqlens_q:")
    wide = torch.randn(1, 2, 1, 320)
    assert triton_attention.covers(torch.randn(1, 2, 2, 320), wide, k).startswith("q:")
