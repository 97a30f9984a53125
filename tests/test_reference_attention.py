"""The attention reference against a pure-Python oracle, torch's SDPA, transformers' eager attentions, and itself."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkernel.reference.attention import append_kv, attention, attention_decode, merge_attention
from thinkernel.testing.compare import check
from torch import Tensor
from torch.testing import assert_close

INF = torch.inf


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def qkv(B, S, T, H, Hkv, D, Dv, *, seed=0, dtype=torch.float64, grad=False):
    return (
        randn(B, S, H, D, seed=3 * seed, dtype=dtype, grad=grad),
        randn(B, T, Hkv, D, seed=3 * seed + 1, dtype=dtype, grad=grad),
        randn(B, T, Hkv, Dv, seed=3 * seed + 2, dtype=dtype, grad=grad),
    )


def oracle(q, k, v, *, causal=False, scale=None, window=None, chunk=None, sinks=None, softcap=None, key_start=None):
    """The definition, key by key in Python: q [B,S,H,D], k [B,T,Hkv,D], v [B,T,Hkv,Dv]."""
    B, S, H, D = q.shape
    T, Hkv = k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    out, lse = torch.zeros(B, S, H, v.shape[-1], dtype=q.dtype), torch.full((B, S, H), -INF, dtype=q.dtype)
    for b in range(B):
        first = 0 if key_start is None else int(key_start[b])
        for i in range(S):
            p = i + T - S
            seen = []
            for j in range(first, T):
                hidden = causal and j > p
                hidden |= window is not None and window[0] >= 0 and j < p - window[0]
                hidden |= window is not None and window[1] >= 0 and j > p + window[1]
                hidden |= chunk is not None and j - first < chunk * math.floor((p - first) / chunk)
                if not hidden:
                    seen.append(j)
            for h in range(H if seen else 0):
                s = [scale * float(q[b, i, h] @ k[b, j, h * Hkv // H]) for j in seen]
                if softcap:
                    s = [softcap * math.tanh(x / softcap) for x in s]
                lse[b, i, h] = math.log(sum(math.exp(x) for x in s))
                total = sum(math.exp(x) for x in s) + (0.0 if sinks is None else math.exp(float(sinks[h])))
                for x, j in zip(s, seen):
                    out[b, i, h] += math.exp(x) / total * v[b, j, h * Hkv // H]
    return out, lse


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(0, 6)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    causal=st.booleans(),
    window=st.sampled_from([None, (-1, -1), (0, 0), (2, 0), (1, 2), (-1, 1), (3, -1)]),
    chunk=st.sampled_from([None, 1, 3]),
    softcap=st.sampled_from([None, 1.5]),
    with_sinks=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_feature_equals_the_definition(sizes, heads, causal, window, chunk, softcap, with_sinks, padded, seed):
    (B, S, T), (H, Hkv) = sizes, heads
    q, k, v = qkv(B, S, T, H, Hkv, 5, 3, seed=seed)
    options = dict(causal=causal, window=window, chunk=chunk, softcap=softcap)
    options["sinks"] = randn(H, seed=seed) if with_sinks else None
    options["key_start"] = torch.tensor([seed % (T + 1), 0][:B], dtype=torch.int32) if padded else None
    out, lse = attention(q, k, v, **options)
    expected_out, expected_lse = oracle(q, k, v, **options)
    assert_close(out, expected_out)
    assert_close(lse, expected_lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("H, Hkv", [(4, 4), (6, 2), (4, 1)])
def test_equals_sdpa_forward_and_backward(H, Hkv, causal):
    q, k, v = qkv(2, 17, 17, H, Hkv, 16, 24, grad=True)
    dout = randn(2, 17, H, 24, seed=9)
    out, _ = attention(q, k, v, causal=causal)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True).transpose(1, 2)
    assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)):
        assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_within_the_rule(dtype):
    q, k, v = qkv(2, 33, 33, 4, 2, 32, 32, dtype=dtype)
    out, lse = attention(q, k, v, causal=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    baseline = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    ref64, _ = attention(q.double(), k.double(), v.double(), causal=True)
    check(out, ref64, baseline, dtype=dtype, name="out")


def hf_mask(S, T, *, left=-1):
    i, j = torch.arange(T - S, T)[:, None], torch.arange(T)
    visible = (j <= i) & ((j >= i - left) if left >= 0 else True)
    return torch.zeros(1, 1, S, T, dtype=torch.float64).masked_fill(~visible, -INF)


def test_equals_transformers_eager_gqa():
    from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

    q, k, v = qkv(2, 9, 13, 6, 2, 16, 16)
    module = SimpleNamespace(num_key_value_groups=3, training=False)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected, _ = eager_attention_forward(module, *heads, hf_mask(9, 13), scaling=0.3)
    out, _ = attention(q, k, v, causal=True, scale=0.3)
    assert_close(out, expected, rtol=2e-6, atol=2e-6)  # its softmax is in float32


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_sinks_equal_gpt_oss_eager(sliding_window):
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v = qkv(2, 11, 11, 4, 2, 16, 16, grad=True)
    sinks = randn(4, seed=5, grad=True)
    module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    mask = hf_mask(11, 11, left=-1 if sliding_window is None else sliding_window - 1)
    expected, _ = eager_attention_forward(module, *heads, mask, scaling=0.25)
    window = None if sliding_window is None else (sliding_window - 1, 0)
    out, _ = attention(q, k, v, causal=True, scale=0.25, sinks=sinks, window=window)
    assert_close(out, expected)
    dout, inputs = randn(2, 11, 4, 16, seed=8), (q, k, v, sinks)
    for got, want in zip(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout)):
        assert_close(got, want)


def test_softcap_equals_gemma2_eager():
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    q, k, v = qkv(2, 10, 10, 4, 2, 16, 16)
    q = 4 * q  # scores well into the bend of the tanh
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected, _ = eager_attention_forward(module, *heads, hf_mask(10, 10), scaling=0.25, softcap=3.0)
    out, _ = attention(q, k, v, causal=True, scale=0.25, softcap=3.0)
    assert_close(out, expected, rtol=2e-6, atol=2e-6)  # its softmax is in float32


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "sinks": True},
        {"softcap": 1.5, "window": (2, 1), "sinks": True},
        {"causal": True, "chunk": 2, "key_start": [2, 4]},
        {"causal": True, "softcap": 2.0, "sinks": True, "key_start": [0, 3]},
    ],
)
@pytest.mark.parametrize("S, T", [(2, 4), (4, 3)])
def test_gradcheck_out_and_lse(S, T, options):
    q, k, v = qkv(2, S, T, 2, 1, 2, 1, grad=True)
    options = dict(options)
    sinks = randn(2, seed=5, grad=True) if options.pop("sinks", False) else None
    key_start = torch.tensor(options.pop("key_start")) if "key_start" in options else None
    key_start = None if key_start is None else key_start.clamp_max(T)

    def run(q, k, v, sinks):
        out, lse = attention(q, k, v, sinks=sinks, key_start=key_start, **options)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v, sinks))


def test_rows_that_see_nothing():
    q, k, v = qkv(2, 5, 3, 2, 1, 8, 8, dtype=torch.float32, grad=True)
    sinks = randn(2, dtype=torch.float32, grad=True)
    out, lse = attention(q, k, v, causal=True, sinks=sinks, key_start=torch.tensor([0, 3]))
    empty = torch.tensor([[True, True, False, False, False], [True] * 5])
    assert (out[empty] == 0).all() and (lse[empty] == -INF).all() and lse[~empty].isfinite().all()
    (out.sum() + lse[~empty].sum() + lse[empty].nan_to_num().sum()).backward()
    assert (q.grad[empty] == 0).all() and (q.grad[~empty] != 0).any()
    for x in (q, k, v, sinks):
        assert x.grad.isfinite().all()
    assert (k.grad[1] == 0).all() and (v.grad[1] == 0).all()


def test_left_padding_moves_nothing():
    # three padding keys and chunks of four: the chunks have to be counted from the first valid key
    q, k, v = qkv(1, 9, 9, 4, 2, 16, 16)
    pad = torch.full((1, 3, 2, 16), torch.nan, dtype=torch.float64)
    options = dict(causal=True, window=(5, 0), chunk=4, sinks=randn(4))
    out, lse = attention(q, k, v, **options)
    pq = torch.cat([randn(1, 3, 4, 16, seed=8), q], dim=1)
    pk, pv = (torch.cat([pad, x], dim=1).requires_grad_() for x in (k, v))
    padded_out, padded_lse = attention(pq, pk, pv, key_start=torch.tensor([3]), **options)
    assert_close(padded_out[:, 3:], out)
    assert_close(padded_lse[:, 3:], lse)
    padded_out[:, 3:].sum().backward()
    assert (pk.grad[:, :3] == 0).all() and (pv.grad[:, :3] == 0).all() and pk.grad[:, 3:].isfinite().all()


@pytest.mark.parametrize("lengths_q, lengths_k", [([3, 0, 5], None), ([1, 4], [6, 4]), ([2, 3], [0, 3]), ([], [])])
def test_packed_equals_each_sequence_alone(lengths_q, lengths_k):
    lengths_k = lengths_q if lengths_k is None else lengths_k
    N, Nk = sum(lengths_q), sum(lengths_k)
    q, k, v = (x[0] for x in qkv(1, N, Nk, 4, 2, 8, 6))
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    options = dict(causal=True, window=(2, 0), softcap=2.0, sinks=randn(4))
    out, lse = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    assert out.shape == (N, 4, 6) and lse.shape == (N, 4)
    for b in range(len(lengths_q)):
        here_q, here_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        expected_out, expected_lse = oracle(q[None, here_q], k[None, here_k], v[None, here_k], **options)
        assert_close(out[here_q], expected_out[0])
        assert_close(lse[here_q], expected_lse[0])


def paged(dense: Tensor, seqlens: Tensor, page: int, seed: int) -> tuple[Tensor, Tensor]:
    """dense [B, T, ...] -> pages in shuffled order with NaN in every slot no sequence owns, and their table."""
    B, T = dense.shape[:2]
    per_row = -(-T // page) + 1
    order = torch.randperm(B * per_row, generator=torch.Generator().manual_seed(seed)).view(B, per_row)
    pages = torch.full((B * per_row, page, *dense.shape[2:]), torch.nan, dtype=dense.dtype)
    table = torch.full((B, per_row), -1, dtype=torch.int32)
    for b in range(B):
        for j in range(int(seqlens[b])):
            table[b, j // page] = order[b, j // page]
            pages[order[b, j // page], j % page] = dense[b, j]
    return pages, table


@pytest.mark.parametrize("page", [None, 1, 4])
@pytest.mark.parametrize("Sq", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": (3, 0), "sinks": True}, {"chunk": 4, "softcap": 2.0}]
)
def test_decode_is_the_last_rows_of_prefill(Sq, page, options):
    B, T, H, Hkv = 4, 13, 4, 2
    seqlens = torch.tensor([13, 3, 8, 0], dtype=torch.int32)
    q, k, v = qkv(B, T, T, H, Hkv, 8, 6)
    options = {"causal": True} | options | ({"sinks": randn(H)} if options.get("sinks") else {})
    q_new = torch.zeros(B, Sq, H, 8, dtype=torch.float64)
    expected_out = torch.zeros(B, Sq, H, 6, dtype=torch.float64)
    expected_lse = torch.full((B, Sq, H), -INF, dtype=torch.float64)
    for b, n in enumerate(seqlens.tolist()):
        if n:
            q_new[b] = q[b, n - Sq : n]
            out, lse = attention(q[b : b + 1, :n], k[b : b + 1, :n], v[b : b + 1, :n], **options)
            expected_out[b], expected_lse[b] = out[0, -Sq:], lse[0, -Sq:]
    if page is None:
        stale = (torch.arange(T) >= seqlens[:, None])[:, :, None, None]
        caches, table = (k.masked_fill(stale, torch.nan), v.masked_fill(stale, torch.nan)), None
    else:
        (k_pages, table), (v_pages, _) = paged(k, seqlens, page, 1), paged(v, seqlens, page, 1)
        caches = k_pages, v_pages
    out, lse = attention_decode(q_new, *caches, seqlens=seqlens, block_table=table, **options)
    assert_close(out, expected_out)
    assert_close(lse, expected_lse)


@pytest.mark.parametrize("pages", [False, True])
def test_shared_prefix_is_part_of_every_row(pages):
    B, Sq, length = 3, 2, 7
    seqlens = torch.tensor([2, 5, 3], dtype=torch.int32)
    q, k, v = qkv(B, Sq, 5, 4, 2, 8, 6)
    _, shared_k, shared_v = qkv(1, 1, 10, 4, 2, 8, 6, seed=4)
    options = dict(window=(8, 0), sinks=randn(4))
    if pages:
        (pk, table), (pv, _) = (paged(x, torch.tensor([length]), 4, 2) for x in (shared_k, shared_v))
        prefix = (pk, pv, length, table[0])
    else:
        prefix = (shared_k[0], shared_v[0], length)
    out, lse = attention_decode(q, k, v, seqlens=seqlens, prefix=prefix, **options)
    for b, n in enumerate(seqlens.tolist()):
        whole_k = torch.cat([shared_k[:, :length], k[b : b + 1, :n]], dim=1)
        whole_v = torch.cat([shared_v[:, :length], v[b : b + 1, :n]], dim=1)
        expected_out, expected_lse = oracle(q[b : b + 1], whole_k, whole_v, causal=True, **options)
        assert_close(out[b], expected_out[0])
        assert_close(lse[b], expected_lse[0])


@pytest.mark.parametrize("page", [None, 2])
def test_append_writes_the_new_keys_and_nothing_else(page):
    B, Sq, T = 3, 2, 8
    seqlens = torch.tensor([8, 2, 0], dtype=torch.int32)  # the last row is inactive
    _, k_new, v_new = qkv(B, 1, Sq, 2, 2, 4, 3)
    shape = (B, T) if page is None else (B * T // page, page)
    k_cache, v_cache = randn(*shape, 2, 4, seed=6), randn(*shape, 2, 3, seed=7)
    table = None
    if page is not None:
        table = torch.randperm(B * T // page, generator=torch.Generator().manual_seed(0)).view(B, -1).int()
    before_k, before_v = k_cache.clone(), v_cache.clone()
    append_kv(k_cache, v_cache, k_new, v_new, seqlens=seqlens, block_table=table)
    for cache, before, new in ((k_cache, before_k, k_new), (v_cache, before_v, v_new)):
        for b in range(2):
            for i in range(Sq):
                j = int(seqlens[b]) - Sq + i
                slot = (b, j) if page is None else (int(table[b, j // page]), j % page)
                assert torch.equal(cache[slot], new[b, i])
                before[slot] = new[b, i]
        assert torch.equal(cache, before)


def test_merge_equals_attention_over_all_keys():
    q, k, v = qkv(2, 6, 9, 4, 2, 8, 6)
    whole_out, whole_lse = attention(q, k, v)
    parts = [attention(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 4), (4, 9))]
    out, lse = merge_attention(*parts[0], *parts[1])
    assert_close(out, whole_out)
    assert_close(lse, whole_lse)
    nothing = attention(q, k[:, :0], v[:, :0])
    out, lse = merge_attention(*nothing, whole_out, whole_lse)
    assert torch.equal(out, whole_out) and torch.equal(lse, whole_lse)
    out, lse = merge_attention(*nothing, *nothing)
    assert (out == 0).all() and (lse == -INF).all()


def test_merge_gradients():
    out_a, out_b = randn(1, 3, 2, 4, grad=True), randn(1, 3, 2, 4, seed=1, grad=True)
    lse_a, lse_b = randn(1, 3, 2, grad=True), randn(1, 3, 2, seed=1, grad=True)

    def run(out_a, lse_a, out_b, lse_b):
        empty_a = torch.tensor([True, False, True])[None, :, None]
        empty_b = torch.tensor([True, True, False])[None, :, None]
        a = out_a.masked_fill(empty_a[..., None], 0.0), lse_a.masked_fill(empty_a, -INF)
        b = out_b.masked_fill(empty_b[..., None], 0.0), lse_b.masked_fill(empty_b, -INF)
        out, lse = merge_attention(*a, *b)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(run, (out_a, lse_a, out_b, lse_b))
    assert torch.autograd.gradcheck(merge_attention, (out_a, lse_a, out_b, lse_b))


def test_huge_scores_do_not_overflow():
    q, k, v = qkv(1, 4, 6, 2, 1, 8, 8, dtype=torch.float32)
    out, lse = attention(100 * q, 100 * k, v)
    expected, expected_lse = attention(100 * q.double(), 100 * k.double(), v.double())
    assert out.isfinite().all() and lse.isfinite().all()
    assert_close(lse, expected_lse.float())
