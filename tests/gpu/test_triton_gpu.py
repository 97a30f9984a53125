"""The Triton kernels on a real GPU, at real sizes: numerics against the float64 reference, and bits that must not move.

Shapes: q [B, S, H, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv]; hidden [N, D], weight [V, D].
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from thinkernel.kernels import attention, grpo, linear
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
    out, lse = poisoned(*q.shape[:3], v.shape[-1], dtype=q.dtype), poisoned(*q.shape[:3])
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


def logprob(hidden: Tensor, weight: Tensor, target: Tensor, g_lp: Tensor, g_ent: Tensor) -> list[Tensor]:
    rows = [poisoned(len(hidden)) for _ in range(3)]
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
