"""The sparse references: top-k against a Python oracle, DSA against transformers, gradients against differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkernel.reference.attention import attention
from thinkernel.reference.mla import dequantize_latent, mla_decode, quantize_latent
from thinkernel.reference.sparse import indexer_loss, indexer_scores, indexer_topk, sparse_attention, topk
from torch import Tensor
from torch.testing import assert_close

INF, NAN = torch.inf, torch.nan


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def random_indices(*shape: int, T: int, K: int, seed: int = 0, fill: float = 0.7) -> Tensor:
    """[*shape, K] distinct indices below T in ascending order, -1 at the end; the first row is all -1."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(math.prod(shape)):
        count = 0 if row == 0 else min(T, round(K * (fill + (1 - fill) * torch.rand(1, generator=generator).item())))
        kept = torch.randperm(T, generator=generator)[:count].sort().values
        rows.append(torch.cat([kept, torch.full((K - count,), -1)]))
    return torch.stack(rows).view(*shape, K).int()


# ---- top-k


def topk_oracle(row: list[float], k: int, length: int) -> list[int]:
    def rank(j: int):
        return (math.isnan(row[j]), 0.0 if math.isnan(row[j]) else -row[j], j)  # -0.0 == 0.0 in Python too

    kept = sorted(sorted(range(length), key=rank)[:k])
    return kept + [-1] * (k - len(kept))


def check_topk(scores: Tensor, k: int, lengths: Tensor | None = None) -> None:
    values, indices = topk(scores, k, lengths=lengths)
    assert indices.dtype == torch.int32 and values.dtype == scores.dtype
    T = scores.shape[-1]
    flat_lengths = [T] * scores[..., 0:1].numel() if lengths is None else lengths.expand(scores.shape[:-1]).flatten()
    for row, got, kept, length in zip(scores.view(-1, T), values.view(-1, k), indices.view(-1, k), flat_lengths):
        expected = topk_oracle(row.tolist(), k, int(length))
        assert kept.tolist() == expected
        wanted = torch.stack([row[j] if j >= 0 else row.new_tensor(-INF) for j in expected])
        assert torch.equal(got.nan_to_num(7e4), wanted.nan_to_num(7e4))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 3),
    T=st.integers(1, 12),
    k=st.integers(1, 14),
    palette=st.sampled_from(
        [[0.0, -0.0], [1.0], [-INF], [0.0, -0.0, 1.0, -1.0], [-INF, 0.0, INF], [NAN, -INF, 0.0], [1.0, 1.0 + 2**-20]]
    ),
    data=st.data(),
)
def test_topk_equals_the_oracle_on_adversarial_rows(rows, T, k, palette, data):
    row = st.lists(st.sampled_from(palette), min_size=T, max_size=T)
    scores = torch.tensor([data.draw(row) for _ in range(rows)])
    lengths = data.draw(st.none() | st.lists(st.integers(0, T), min_size=rows, max_size=rows).map(torch.tensor))
    check_topk(scores, k, lengths)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_topk_random_rows(dtype):
    scores = randn(2, 9, 257, dtype=dtype)  # bfloat16 has many ties here
    check_topk(scores, 31)
    check_topk(scores, 31, torch.arange(9) * 6)  # broadcast over the batch, shorter than k among them
    check_topk(scores, 300, torch.tensor([[257], [1]]))


def test_topk_edges():
    values, indices = topk(torch.zeros(2, 0), 3)
    assert (indices == -1).all() and (values == -INF).all() and indices.shape == (2, 3)
    values, indices = topk(torch.zeros(0, 5), 3)
    assert indices.shape == (0, 3)
    _, indices = topk(randn(2, 5), 0)
    assert indices.shape == (2, 0)
    scores = randn(3, 6, grad=True)
    topk(scores, 2)[0].sum().backward()
    assert_close(scores.grad.sum(-1), torch.full((3,), 2.0, dtype=torch.float64))


# ---- indexer


def indexer_inputs(B, S, T, Hi=3, Di=8, *, seed=0, grad=False):
    return (
        randn(B, S, Hi, Di, seed=seed, grad=grad),
        randn(B, T, Di, seed=seed + 1, grad=grad),
        randn(B, S, Hi, seed=seed + 2, grad=grad),
    )


@pytest.mark.parametrize("S, T", [(5, 5), (2, 6), (6, 3)])
def test_indexer_scores_equal_the_definition(S, T):
    q, k, w = indexer_inputs(2, S, T)
    scores = indexer_scores(q, k, w)
    for b in range(2):
        for t in range(S):
            for s in range(T):
                expected = sum(w[b, t, j] * (q[b, t, j] @ k[b, s]).clamp_min(0) for j in range(3))
                if s > t + T - S:
                    expected = torch.tensor(-INF, dtype=torch.float64)
                assert_close(scores[b, t, s], expected)
    dense = indexer_scores(q, k, w, causal=False)
    assert dense.isfinite().all() and torch.equal(dense[scores > -INF], scores[scores > -INF])


def test_indexer_scores_gradcheck():
    inputs = indexer_inputs(1, 3, 4, Hi=2, Di=3, grad=True)
    assert torch.autograd.gradcheck(lambda *x: indexer_scores(*x, causal=False), inputs)
    assert torch.autograd.gradcheck(lambda *x: indexer_scores(*x).nan_to_num(neginf=0.0), inputs)


@pytest.mark.parametrize("S, T, top_k", [(7, 7, 3), (2, 9, 4), (5, 3, 2), (4, 4, 9)])
@pytest.mark.parametrize("causal", [True, False])
def test_indexer_topk_selects_by_its_scores(S, T, top_k, causal):
    q, k, w = indexer_inputs(2, S, T)
    indices = indexer_topk(q, k, w, top_k=top_k, causal=causal)
    assert indices.shape == (2, S, top_k) and indices.dtype == torch.int32
    scores = indexer_scores(q, k, w, causal=causal)
    for b in range(2):
        for t in range(S):
            length = min(T, max(0, t + T - S + 1)) if causal else T
            assert indices[b, t].tolist() == topk_oracle(scores[b, t].tolist(), top_k, length)


def test_indexer_topk_ties_go_to_the_lower_index():
    q, w = torch.ones(1, 6, 2, 4), torch.ones(1, 6, 2)
    assert indexer_topk(q, torch.zeros(1, 6, 4), w, top_k=3)[0, -1].tolist() == [0, 1, 2]
    assert indexer_topk(q, -torch.ones(1, 6, 4), -w, top_k=3)[0, 1].tolist() == [0, 1, -1]  # every score is -0.0


def paged(dense: Tensor, seqlens: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """dense [B, T, ...] -> pages in shuffled order, NaN (0x7f bytes) in every slot no sequence owns, table -1 there."""
    B, T = dense.shape[:2]
    per_row = -(-T // page) + 1
    order = torch.randperm(B * per_row, generator=torch.Generator().manual_seed(1)).view(B, per_row)
    poison = 0x7F if dense.dtype == torch.uint8 else NAN
    pages = torch.full((B * per_row, page, *dense.shape[2:]), poison, dtype=dense.dtype)
    table = torch.full((B, per_row), -1, dtype=torch.int32)
    for b in range(B):
        for j in range(int(seqlens[b])):
            table[b, j // page] = order[b, j // page]
            pages[order[b, j // page], j % page] = dense[b, j]
    return pages, table


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("Sq", [1, 2])
def test_indexer_decode_is_the_last_rows_of_prefill(page, Sq):
    T, seqlens = 11, torch.tensor([11, 2, 6], dtype=torch.int32)
    q, k, w = indexer_inputs(3, T, T)
    k_scale = randn(3, T).exp()
    last = torch.stack([torch.arange(n - Sq, n) for n in seqlens.tolist()])  # [B, Sq]
    rows = torch.arange(3)[:, None]
    stale = torch.arange(T) >= seqlens[:, None]
    cache, scales, table = k.masked_fill(stale[..., None], NAN), k_scale.masked_fill(stale, NAN), None
    if page is not None:
        (cache, table), (scales, _) = paged(k, seqlens, page), paged(k_scale, seqlens, page)
    options = dict(top_k=4, seqlens=seqlens, block_table=table)
    got = indexer_topk(q[rows, last], cache, w[rows, last], **options)
    scaled = indexer_topk(q[rows, last], cache, w[rows, last], k_scale=scales, **options)
    for b, n in enumerate(seqlens.tolist()):
        one = slice(b, b + 1)
        assert torch.equal(got[b], indexer_topk(q[one, :n], k[one, :n], w[one, :n], top_k=4)[0, -Sq:])
        expected = indexer_topk(q[one, :n], k[one, :n] * k_scale[one, :n, None], w[one, :n], top_k=4)
        assert torch.equal(scaled[b], expected[0, -Sq:])


def test_packed_equals_each_sequence_alone():
    lengths = [3, 0, 6]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    qi, ki, w = (x[0] for x in indexer_inputs(1, 9, 9))
    q, kv = randn(9, 2, 6), randn(9, 6, seed=1)
    indices = indexer_topk(qi, ki, w, top_k=2, cu_seqlens_q=cu)
    out, lse = sparse_attention(q, kv, indices, value_dim=4, cu_seqlens_q=cu)
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist()):
        alone = indexer_topk(qi[None, a:b], ki[None, a:b], w[None, a:b], top_k=2)
        assert torch.equal(indices[a:b], alone[0])
        expected = sparse_attention(q[None, a:b], kv[None, a:b], alone, value_dim=4)
        assert_close(out[a:b], expected[0][0])
        assert_close(lse[a:b], expected[1][0])


# ---- sparse attention


def masked_attention(q, k, v, indices, scale, sinks):
    """Dense attention with everything but `indices` [B, S, Hkv, K] masked, head by head."""
    B, S, H, _ = q.shape
    T, Hkv = k.shape[1:3]
    out, lse = q.new_zeros(B, S, H, v.shape[-1]), q.new_full((B, S, H), -INF)
    for b in range(B):
        for t in range(S):
            for h in range(H):
                kept = [j for j in indices[b, t, h * Hkv // H].tolist() if 0 <= j < T]
                if kept:
                    s = scale * k[b, kept, h * Hkv // H] @ q[b, t, h]
                    lse[b, t, h] = s.logsumexp(0)
                    extra = s if sinks is None else torch.cat([s, sinks[h : h + 1]])
                    out[b, t, h] = extra.softmax(0)[: len(kept)] @ v[b, kept, h * Hkv // H]
    return out, lse


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("K", [1, 4, 20])
def test_latents_equal_masked_attention(K, with_sinks):
    q, kv = randn(2, 5, 3, 12), randn(2, 9, 12, seed=1)
    indices = random_indices(2, 5, T=9, K=K)
    sinks = randn(3) if with_sinks else None
    out, lse = sparse_attention(q, kv, indices, value_dim=8, scale=0.4, sinks=sinks)
    expected = masked_attention(q, kv[:, :, None], kv[:, :, None, :8], indices[:, :, None], 0.4, sinks)
    assert_close(out, expected[0])
    assert_close(lse, expected[1])
    assert (out[0, 0] == 0).all() and (lse[0, 0] == -INF).all()


@pytest.mark.parametrize("H, Hkv", [(4, 2), (3, 3), (4, 1)])
def test_grouped_heads_equal_masked_attention(H, Hkv):
    q, k, v = randn(2, 5, H, 6), randn(2, 9, Hkv, 6, seed=1), randn(2, 9, Hkv, 5, seed=2)
    indices, sinks = random_indices(2, 5, Hkv, T=9, K=4), randn(H)
    out, lse = sparse_attention(q, (k, v), indices, sinks=sinks)
    expected = masked_attention(q, k, v, indices, 6**-0.5, sinks)
    assert_close(out, expected[0])
    assert_close(lse, expected[1])


def test_selecting_everything_is_dense_attention():
    q, kv = randn(2, 6, 3, 12), randn(2, 6, 12, seed=1)
    everything = torch.arange(6).masked_fill(torch.arange(6) > torch.arange(6)[:, None], -1).expand(2, 6, 6)
    out, lse = sparse_attention(q, kv, everything, value_dim=8)
    expected = attention(q, kv[:, :, None], kv[:, :, None, :8], causal=True)
    assert_close(out, expected[0])
    assert_close(lse, expected[1])


@pytest.mark.parametrize("poison", [-1, 9, 1000, -7])
def test_empty_slots_are_never_read(poison):
    q, kv = randn(1, 3, 2, 4, grad=True), randn(1, 9, 4, seed=1)
    kv[0, 0], kv[0, 8] = NAN, NAN
    kv.requires_grad_()
    indices = torch.tensor([[[2, 5, poison], [poison] * 3, [1, poison, poison]]], dtype=torch.int32)
    out, lse = sparse_attention(q, kv, indices, value_dim=3)
    assert out.isfinite().all() and (out[0, 1] == 0).all() and (lse[0, 1] == -INF).all()
    out.sum().backward()
    assert q.grad.isfinite().all() and kv.grad.isfinite().all() and (q.grad[0, 1] == 0).all()
    assert (kv.grad[0].abs().sum(-1) > 0).tolist() == [j in (1, 2, 5) for j in range(9)]


@pytest.mark.parametrize("kind", ["latent", "grouped"])
def test_sparse_attention_gradcheck(kind):
    q, sinks = randn(1, 3, 2, 3, grad=True), randn(2, grad=True)
    if kind == "latent":
        kv, indices = (randn(1, 5, 3, grad=True),), random_indices(1, 3, T=5, K=3)
    else:
        kv = randn(1, 5, 2, 3, grad=True), randn(1, 5, 2, 2, seed=1, grad=True)
        indices = random_indices(1, 3, 2, T=5, K=3)

    def run(q, sinks, *kv):
        value_dim = 2 if kind == "latent" else None
        out, lse = sparse_attention(q, kv[0] if kind == "latent" else kv, indices, value_dim=value_dim, sinks=sinks)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(run, (q, sinks, *kv))


@pytest.mark.parametrize("page", [None, 3])
@pytest.mark.parametrize("kind", ["latent", "grouped", "fp8"])
def test_sparse_decode_over_caches(kind, page):
    seqlens = torch.tensor([8, 3, 0], dtype=torch.int32)
    indices = random_indices(3, 1, 2, T=8, K=5, seed=3)  # some past the end of the shorter rows
    dim = 576 if kind == "fp8" else 12
    q, dense = randn(3, 1, 4, dim, dtype=torch.float32), randn(3, 8, 576, dtype=torch.float32)
    if kind == "fp8":
        cache = quantize_latent(dense[..., :512], dense[..., 512:])
        k = dequantize_latent(cache).float()[:, :, None]
        v, indices = k[..., :512], indices[:, :, :1]
    elif kind == "latent":
        cache = dense[..., :12].contiguous()
        k, indices = cache[:, :, None], indices[:, :, :1]
        v = k[..., :10]
    else:
        k, v = dense[..., :24].view(3, 8, 2, 12), dense[..., 24:34].view(3, 8, 2, 5)
    caches, table = ((k, v) if kind == "grouped" else (cache,)), None
    if page is not None:
        pairs = [paged(x, seqlens, page) for x in caches]
        caches, table = tuple(p for p, _ in pairs), pairs[0][1]
    elif kind != "fp8":
        stale = torch.arange(8) >= seqlens[:, None]
        caches = tuple(x.masked_fill(stale.view(3, 8, *[1] * (x.ndim - 2)), NAN) for x in caches)
    value_dim = None if kind == "grouped" else v.shape[-1]
    out, lse = sparse_attention(
        q,
        caches if kind == "grouped" else caches[0],
        indices if kind == "grouped" else indices[:, :, 0],
        value_dim=value_dim,
        scale=dim**-0.5,
        seqlens=seqlens,
        block_table=table,
    )
    valid = indices.masked_fill(indices >= seqlens[:, None, None, None], -1)
    expected = masked_attention(q, k, v, valid, dim**-0.5, None)
    assert_close(out, expected[0])
    assert_close(lse, expected[1])


def test_sparse_decode_with_all_keys_is_mla_decode():
    seqlens = torch.tensor([6, 4], dtype=torch.int32)
    q, cache = randn(2, 1, 3, 12), randn(2, 6, 12, seed=1)
    everything = torch.arange(6).expand(2, 1, 6)
    got = sparse_attention(q, cache, everything, value_dim=8, scale=0.3, seqlens=seqlens)
    expected = mla_decode(q, cache, seqlens=seqlens, value_dim=8, scale=0.3)
    for a, b in zip(got, expected):
        assert_close(a, b)


# ---- indexer loss


def loss_inputs(B=2, S=4, T=4, H=3, D=6, *, Hkv=None, grad=True):
    keys = randn(B, T, D, seed=7) if Hkv is None else randn(B, T, Hkv, D, seed=7)
    return (*indexer_inputs(B, S, T, grad=grad), randn(B, S, H, D, seed=5), keys)


def loss_oracle(scores, target_q, target_kv, kept, scale):
    """KL per query [B, S] and p [B, S, T]; kept[b][t] lists the keys."""
    B, S, H, _ = target_q.shape
    keys = target_kv[:, :, None] if target_kv.ndim == 3 else target_kv
    T, Hkv = keys.shape[1:3]
    p = torch.zeros(B, S, T, dtype=torch.float64)
    loss = torch.zeros(B, S, dtype=torch.float64)
    for b in range(B):
        for t in range(S):
            j = kept[b][t]
            if j:
                for h in range(H):
                    p[b, t, j] += (scale * keys[b, j, h * Hkv // H] @ target_q[b, t, h]).softmax(0) / H
                log_q = scores[b, t, j].log_softmax(0)
                loss[b, t] = (p[b, t, j] * (p[b, t, j].log() - log_q)).sum()
    return loss, p


@pytest.mark.parametrize("Hkv", [None, 1, 3])
@pytest.mark.parametrize("S, T", [(4, 4), (2, 6), (5, 3)])
@pytest.mark.parametrize("sparse", [True, False])
def test_indexer_loss_value_and_gradients(S, T, sparse, Hkv):
    q, k, w, target_q, target_kv = loss_inputs(S=S, T=T, Hkv=Hkv)
    target_q.requires_grad_()
    target_kv.requires_grad_()
    if sparse:
        indices = random_indices(2, S, T=T, K=3)
        kept = [[[j for j in row if j >= 0] for row in batch] for batch in indices.tolist()]
    else:
        indices = None
        kept = [[list(range(max(0, t + T - S + 1))) for t in range(S)]] * 2
    scores = indexer_scores(q, k, w, causal=False).detach().requires_grad_()
    per_query, p = loss_oracle(scores.detach(), target_q.detach(), target_kv.detach(), kept, 0.4)

    options = dict(indices=indices, scale=0.4)
    assert_close(indexer_loss(q, k, w, target_q, target_kv, reduction="none", **options).detach(), per_query)
    total = indexer_loss(q, k, w, target_q, target_kv, reduction="sum", **options)
    assert_close(total.detach(), per_query.sum())
    assert_close(indexer_loss(q, k, w, target_q, target_kv, **options).detach(), per_query.mean())

    d_scores = torch.zeros_like(scores)  # softmax(I) - p, on the keys of each query
    for b in range(2):
        for t in range(S):
            if kept[b][t]:
                d_scores[b, t, kept[b][t]] = scores.detach()[b, t, kept[b][t]].softmax(0) - p[b, t, kept[b][t]]
    expected = torch.autograd.grad(indexer_scores(q, k, w, causal=False), (q, k, w), d_scores)
    total.backward()
    for x, want in zip((q, k, w), expected):
        assert_close(x.grad, want)
    assert target_q.grad is None and target_kv.grad is None  # the target is detached


@pytest.mark.parametrize("sparse", [True, False])
def test_indexer_loss_gradcheck_and_target_lse(sparse):
    q, k, w, target_q, target_kv = loss_inputs(B=1, S=3, T=4)
    indices = random_indices(1, 3, T=4, K=3) if sparse else None
    loss = lambda *x: indexer_loss(*x, target_q, target_kv, indices=indices, scale=0.4)
    assert torch.autograd.gradcheck(loss, (q, k, w))
    if sparse:
        _, lse = sparse_attention(target_q, target_kv, indices, scale=0.4)
    else:
        _, lse = attention(target_q, target_kv[:, :, None], target_kv[:, :, None], causal=True, scale=0.4)
    with_lse = indexer_loss(q, k, w, target_q, target_kv, indices=indices, scale=0.4, target_lse=lse)
    assert_close(with_lse, loss(q, k, w))


def test_indexer_loss_vanishes_when_the_indexer_agrees():
    q, keys = randn(1, 5, 1, 8).abs(), randn(1, 5, 8, seed=1).abs()  # positive products: the ReLU is the identity
    w = torch.full((1, 5, 1), 0.3, dtype=torch.float64)
    assert_close(indexer_loss(q, keys, w, q, keys, scale=0.3), torch.zeros((), dtype=torch.float64))
    assert indexer_loss(q, keys, 10 * w, q, keys, scale=0.3) > 0.01


def test_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="reduction.*'total'"):
        indexer_loss(*loss_inputs(), scale=1.0, reduction="total")


# ---- the whole of DSA against transformers


@pytest.fixture(scope="module")
def deepseek_attention():
    from transformers import DeepseekV32Config
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32RotaryEmbedding

    config = DeepseekV32Config(
        hidden_size=48, num_hidden_layers=1, vocab_size=32, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10,
        index_topk=5, index_head_dim=16, index_n_heads=4,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    module = DeepseekV32Attention(config, 0).eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=1.0 if p.ndim == 1 else p.shape[-1] ** -0.5)
    return config, module, DeepseekV32RotaryEmbedding(config)


def test_dsa_equals_transformers(deepseek_attention):
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

    config, module, rotary = deepseek_attention
    B, S, H, nope, rank = 2, 14, 4, 12, 16
    x = randn(B, S, 48, dtype=torch.float32)
    cos, sin = rotary(x, torch.arange(S)[None].expand(B, -1))
    mask = torch.zeros(S, S).masked_fill(torch.arange(S) > torch.arange(S)[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        mask = mask.expand(B, 1, S, S)
        expected, _ = module(x, (cos, sin), mask)

        # the projections and rotations are the module's; scores, selection and attention are ours
        q_latent = module.q_a_layernorm(module.q_a_proj(x))
        q = module.q_b_proj(q_latent).view(B, S, H, -1)
        latent, k_rope = module.kv_a_proj_with_mqa(x).split([rank, 8], dim=-1)
        latent = module.kv_a_layernorm(latent)
        k_rope = k_rope[:, :, None]
        q_rope, k_rope = hf.apply_rotary_pos_emb_interleave(q[..., nope:], k_rope, cos, sin, unsqueeze_dim=2)
        indexer = module.indexer
        qi = indexer.wq_b(q_latent).view(B, S, 4, 16)
        ki = indexer.k_norm(indexer.wk(x))[:, :, None]
        qi_rope, ki_rope = hf.apply_rotary_pos_emb(qi[..., :8], ki[..., :8], cos, sin, unsqueeze_dim=2)
        qi, ki = torch.cat([qi_rope, qi[..., 8:]], dim=-1), torch.cat([ki_rope, ki[..., 8:]], dim=-1)[:, :, 0]
        w = indexer.weights_proj(x) * 4**-0.5 * 16**-0.5

        indices = indexer_topk(qi, ki, w, top_k=5)
        theirs = indexer(x, q_latent, (cos, sin), mask[:, 0], None)
        for b in range(B):
            for t in range(S):
                ours = {j for j in indices[b, t].tolist() if j >= 0}
                assert ours == {j for j in theirs[b, t].tolist() if j <= t}

        w_uk, w_uv = module.kv_b_proj.weight.view(H, nope + 10, rank).split([nope, 10], dim=1)
        absorbed = torch.cat([torch.einsum("bshn,hnl->bshl", q[..., :nope], w_uk), q_rope], dim=-1)
        kv = torch.cat([latent, k_rope[:, :, 0]], dim=-1)
        out, _ = sparse_attention(absorbed, kv, indices, value_dim=rank, scale=module.scaling)
        out = module.o_proj(torch.einsum("bshl,hvl->bshv", out, w_uv).flatten(2))
    assert_close(out, expected, rtol=2e-5, atol=2e-5)
