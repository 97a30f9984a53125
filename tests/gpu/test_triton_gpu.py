"""The Triton kernels on a real GPU, at real sizes: numerics against the float64 reference, and bits that must not move.

Shapes: q [B, S, H, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv]; hidden [N, D], weight [V, D].
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from thinkernel.kernels import attention, configs, grpo, linear
from thinkernel.reference import attention as attention_reference
from thinkernel.reference import grpo as grpo_reference
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAN = float("nan")


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype, device="cuda")


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options) -> list[Tensor]:
    """out, lse, dq, dk, dv of the Triton kernels, every buffer poisoned before."""
    out, lse = poisoned(*q.shape[:-1], v.shape[-1], dtype=q.dtype), poisoned(*q.shape[:-1])
    attention.attention_forward(q, k, v, out, lse, **options)
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    attention.attention_backward(q, k, v, out, lse, dout, *grads, **options)
    return [out, lse, *grads]


def reference_attend(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dtype: torch.dtype, **options) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = attention_reference.attention(*leaves, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def torch_attend(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> list[Tensor]:
    """The baseline: torch's own attention in the inputs' dtype, with its aligned-to-the-bottom-right mask; lse from the reference."""
    S, T, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    heads = [leaves[0], *(x.repeat_interleave(G, 2) for x in leaves[1:])]
    mask = torch.ones(S, T, dtype=torch.bool, device="cuda").tril(T - S) if causal else None
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads), attn_mask=mask).transpose(1, 2)
    lse = attention_reference.attention(q, k, v, causal=causal)[1]
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D,Dv", [(64, 64), (128, 128), (192, 128), (256, 256), (80, 72)])
@pytest.mark.parametrize("S,T,causal", [(1000, 2311, True), (700, 700, True), (513, 1100, False)])
def test_attention(S: int, T: int, causal: bool, D: int, Dv: int, dtype: torch.dtype) -> None:
    torch.manual_seed(S + D)
    q, k, v = normal(2, S, 8, D, dtype=dtype), normal(2, T, 2, D, dtype=dtype), normal(2, T, 2, Dv, dtype=dtype)
    dout = normal(2, S, 8, Dv, dtype=dtype)
    want, base = reference_attend(q, k, v, dout, torch.float64, causal=causal), torch_attend(q, k, v, dout, causal)
    first, second = (attend(q, k, v, dout, causal=causal) for _ in range(2))
    for name, got, again, ref, same in zip(("out", "lse", "dq", "dk", "dv"), first, second, want, base, strict=True):
        assert_bitwise(got, again, f"{name}, second run")
        check(got, ref, same, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_row_alone_and_left_padded(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    q, k, v = normal(3, 300, 8, 128, dtype=dtype), normal(3, 2200, 2, 128, dtype=dtype), normal(3, 2200, 2, 128, dtype=dtype)
    dout = normal(3, 300, 8, 128, dtype=dtype)
    batch = attend(q, k, v, dout, causal=True)
    one = slice(1, 2)
    for name, all_rows, alone in zip(
        ("out", "lse", "dq", "dk", "dv"), batch, attend(q[one], k[one], v[one], dout[one], causal=True), strict=True
    ):
        assert_bitwise(all_rows[one], alone, name)
    start = torch.tensor([37], dtype=torch.int32, device="cuda")
    padded = [torch.cat([poisoned(1, 37, 2, 128, dtype=dtype), x[one]], 1) for x in (k, v)]
    moved = attend(q[one], *padded, dout[one], causal=True, key_start=start)
    for i, name in enumerate(("out", "lse", "dq")):
        assert_bitwise(batch[i][one], moved[i], f"{name}, padded")
    for i, name in ((3, "dk"), (4, "dv")):
        assert_bitwise(batch[i][one], moved[i][:, 37:], f"{name}, padded")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [0, 16, 64])
@pytest.mark.parametrize("D,Dv,Sq", [(64, 64, 1), (128, 128, 1), (128, 128, 5), (192, 128, 1), (256, 256, 2)])
def test_decode(D: int, Dv: int, Sq: int, page: int, dtype: torch.dtype) -> None:
    torch.manual_seed(D + page)
    lengths = torch.tensor([3000, 1, 1024, 2049], dtype=torch.int32, device="cuda")
    B, T = 4, 3008
    q, k, v = normal(B, Sq, 8, D, dtype=dtype), normal(B, T, 2, D, dtype=dtype), normal(B, T, 2, Dv, dtype=dtype)
    stale = torch.arange(T, device="cuda")[None, :, None, None] >= lengths[:, None, None, None]
    k_cache, v_cache, table = k.masked_fill(stale, NAN), v.masked_fill(stale, NAN), None
    if page:
        order = torch.randperm(B * T // page, device="cuda")
        table = order.reshape(B, -1).int()
        pages = [x.reshape(-1, page, 2, x.shape[-1]) for x in (k_cache, v_cache)]
        k_cache, v_cache = (torch.empty_like(x).index_copy_(0, order, x) for x in pages)
    out, lse = poisoned(B, Sq, 8, Dv, dtype=dtype), poisoned(B, Sq, 8)
    attention.attention_decode(q, k_cache, v_cache, out, lse, seqlens=lengths, block_table=table)
    want = attention_reference.attention_decode(q.double(), k.double(), v.double(), seqlens=lengths)
    positions = lengths[:, None] + torch.arange(-Sq, 0, device="cuda")  # [B, Sq]
    seen = attention_reference.visible_keys(positions, torch.arange(T, device="cuda"), None, lengths, True, None, None)
    heads = [x.repeat_interleave(4, 2).transpose(1, 2) for x in (k, v)]
    base = F.scaled_dot_product_attention(q.transpose(1, 2), *heads, attn_mask=seen[:, None]).transpose(1, 2)
    check(out, want[0], base.nan_to_num(0.0), name="out")
    check(lse, want[1], attention_reference.attention_decode(q, k, v, seqlens=lengths)[1], name="lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [dict(causal=True), dict(causal=False), dict(causal=True, window=(300, -1), softcap=20.0)], ids=str)
@pytest.mark.parametrize("D,Dv", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_packed(D: int, Dv: int, options: dict, dtype: torch.dtype) -> None:
    """Sequences of 0 … 1500 rows, each bit for bit as it is alone (where test_attention holds it to the rule)."""
    torch.manual_seed(D)
    queries, keys = [700, 0, 1, 333, 900], [700, 40, 1500, 0, 2100]
    cu_q, cu_k = (torch.tensor([0, *n], device="cuda").cumsum(0).int() for n in (queries, keys))
    q, dout = normal(sum(queries), 8, D, dtype=dtype), normal(sum(queries), 8, Dv, dtype=dtype)
    k, v = normal(sum(keys), 2, D, dtype=dtype), normal(sum(keys), 2, Dv, dtype=dtype)
    packed = attend(q, k, v, dout, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    for i, (a, c) in enumerate(zip(cu_q[:-1].tolist(), cu_k[:-1].tolist(), strict=True)):
        rows, own = slice(a, a + queries[i]), slice(c, c + keys[i])
        alone = attend(q[None, rows], k[None, own], v[None, own], dout[None, rows], **options)
        for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), packed, alone, strict=True):
            assert_bitwise(got[own if name in ("dk", "dv") else rows], want[0], f"{name} of sequence {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [500, 2048, 2100])
@pytest.mark.parametrize("D,Dv", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_decode_with_a_shared_prefix(D: int, Dv: int, length: int, dtype: torch.dtype) -> None:
    """Dense and in pages: the bits of the call over the joined keys."""
    torch.manual_seed(D + length)
    B, T, page = 20, 1600, 64
    q, shared_k, shared_v = normal(B, 2, 8, D, dtype=dtype), normal(length, 2, D, dtype=dtype), normal(length, 2, Dv, dtype=dtype)
    k, v, seqlens = normal(B, T, 2, D, dtype=dtype), normal(B, T, 2, Dv, dtype=dtype), torch.randint(2, T, (B,), device="cuda").int()
    joined = [torch.cat([shared.expand(B, *shared.shape), x], 1) for shared, x in ((shared_k, k), (shared_v, v))]
    count = -(-length // page)
    table = torch.randperm(count, device="cuda").int()
    pages = []
    for x in (shared_k, shared_v):
        filled = torch.cat([x, poisoned(count * page - length, 2, x.shape[-1], dtype=dtype)]).unflatten(0, (count, page))
        pages.append(torch.empty_like(filled).index_copy_(0, table.long(), filled))
    calls = {
        "joined": (*joined, dict(seqlens=seqlens + length)),
        "prefix": (k, v, dict(seqlens=seqlens, prefix=(shared_k, shared_v, length, None))),
        "prefix in pages": (k, v, dict(seqlens=seqlens, prefix=(*pages, length, table))),
    }
    results = {}
    for name, (keys, values, options) in calls.items():
        results[name] = poisoned(B, 2, 8, Dv, dtype=dtype), poisoned(B, 2, 8)
        attention.attention_decode(q, keys, values, *results[name], **options)
    for name in ("prefix", "prefix in pages"):
        assert_bitwise(results[name][0], results["joined"][0], f"out, {name}")
        assert_bitwise(results[name][1], results["joined"][1], f"lse, {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D,Dv", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_tensor_descriptors_move_no_bit(D: int, Dv: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """configs.DESCRIPTORS (off until measured) against the plain loads."""
    q, k, v = normal(2, 700, 8, D, dtype=dtype), normal(2, 1500, 2, D, dtype=dtype), normal(2, 1500, 2, Dv, dtype=dtype)
    results = []
    for on in (False, True):
        for arch in configs.DESCRIPTORS:
            monkeypatch.setitem(configs.DESCRIPTORS, arch, on)
        results.append((poisoned(2, 700, 8, Dv, dtype=dtype), poisoned(2, 700, 8)))
        attention.attention_forward(q, k, v, *results[-1], causal=True)
    assert_bitwise(results[1][0], results[0][0], "out")
    assert_bitwise(results[1][1], results[0][1], "lse")


@pytest.mark.parametrize("options", [{}, dict(window=(700, -1), softcap=20.0)], ids=str)
@pytest.mark.parametrize("D,Dv,dtype", [
    (64, 64, torch.bfloat16), (256, 256, torch.bfloat16), (64, 64, torch.float32), (128, 128, torch.float32), (192, 128, torch.float32),
], ids=str)
def test_decode_equals_prefill(D: int, Dv: int, dtype: torch.dtype, options: dict) -> None:
    """The last rows of a prefill, decoded: the same bits, though the tiles differ. Only where both tiles put a row into threads
    alike on sm_90: at the other sizes tl.sum adds a row's weights in another order, and lse may differ in its last bit."""
    torch.manual_seed(D)
    q, k, v = normal(2, 900, 8, D, dtype=dtype), normal(2, 2500, 2, D, dtype=dtype), normal(2, 2500, 2, Dv, dtype=dtype)
    out, lse = poisoned(2, 900, 8, Dv, dtype=dtype), poisoned(2, 900, 8)
    attention.attention_forward(q, k, v, out, lse, causal=True, **options)
    for count in (1, 5, 16):
        got, got_lse = poisoned(2, count, 8, Dv, dtype=dtype), poisoned(2, count, 8)
        seqlens = torch.full((2,), 2500, dtype=torch.int32, device="cuda")
        attention.attention_decode(q[:, -count:], k, v, got, got_lse, seqlens=seqlens, **options)
        assert_bitwise(got, out[:, -count:], f"out, {count} queries")
        assert_bitwise(got_lse, lse[:, -count:], f"lse, {count} queries")


def logprob(hidden: Tensor, weight: Tensor, target: Tensor, g_lp: Tensor, g_ent: Tensor) -> list[Tensor]:
    rows = [poisoned(len(hidden), dtype=t) for t in (torch.float32, torch.float32, torch.float64)]
    grpo.linear_logprob_forward(hidden, weight, target, None, *rows)
    dhidden, dweight = torch.full_like(hidden, NAN), torch.full_like(weight, NAN)
    grpo.linear_logprob_backward(hidden, weight, target, None, rows[2], rows[1], g_lp, g_ent, dhidden, dweight, None)
    return [*rows[:2], dhidden, dweight]


def logprob_in(dtype: torch.dtype, hidden: Tensor, weight: Tensor, target: Tensor, g_lp: Tensor, g_ent: Tensor) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    rows = grpo_reference.logprob(F.linear(*leaves), target)
    return [*(r.detach() for r in rows), *torch.autograd.grad(rows, leaves, [g.to(rows[0].dtype) for g in (g_lp, g_ent)])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,D,V", [(1000, 1024, 50257), (130, 1000, 32064)])
def test_linear_logprob(N: int, D: int, V: int, dtype: torch.dtype) -> None:
    torch.manual_seed(N)
    hidden, weight = normal(N, D, dtype=dtype), (torch.randn(V, D, device="cuda") * 2 / D**0.5).to(dtype)
    target = torch.randint(0, V, (N,), device="cuda")
    target[::3] = -100
    grads = torch.randn(2, N, device="cuda")
    want, base = (logprob_in(t, hidden, weight, target, *grads) for t in (torch.float64, dtype))
    first, second = (logprob(hidden, weight, target, *grads) for _ in range(2))
    for name, got, again, ref, same in zip(("logprob", "entropy", "dhidden", "dweight"), first, second, want, base, strict=True):
        assert_bitwise(got, again, f"{name}, second run")
        check(got, ref, same, name=name)
    one = slice(100, 101)
    alone = logprob(hidden[one], weight, target[one], *(g[one] for g in grads))
    for name, all_rows, row in zip(("logprob", "entropy", "dhidden"), first, alone, strict=False):
        assert_bitwise(all_rows[one], row, f"{name}, a row alone")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M,K,N", [(1000, 1024, 3000), (33, 1000, 1111)])
def test_linear(M: int, K: int, N: int, dtype: torch.dtype) -> None:
    torch.manual_seed(M)
    x, weight, bias = normal(M, K, dtype=dtype), normal(N, K, dtype=dtype), normal(N, dtype=dtype)
    out, alone = poisoned(M, N, dtype=dtype), poisoned(1, N, dtype=dtype)
    linear.linear(x, weight, bias, out)
    check(out, F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias))
    for i in (0, M - 1):
        linear.linear(x[i : i + 1], weight, bias, alone)
        assert_bitwise(out[i : i + 1], alone, f"row {i} alone")
