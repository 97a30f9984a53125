"""NSA's and MoBA's references against plain loops over queries, gradcheck, causality, packing, ties."""

from __future__ import annotations

import pytest
import torch
from thinkernel.reference.native_sparse import (
    block_attention,
    compressed_length,
    native_sparse_attention,
    selection_scores,
)
from torch import Tensor
from torch.testing import assert_close

SIZES = dict(block=8, compress_block=4, stride=2, top_n=4, window=6)


def nsa_inputs(B: int, S: int, T: int, H: int = 4, Hkv: int = 2, D: int = 6, Dv: int = 5, *, seed: int = 0, sizes: dict = SIZES,
               grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    Tc = compressed_length(T, sizes["compress_block"], sizes["stride"])
    shapes = [(B, S, H, D), (B, T, Hkv, D), (B, T, Hkv, Dv), (B, Tc, Hkv, D), (B, Tc, Hkv, Dv), (B, S, H, 3)]
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) * (2 if i == 0 else 1) for i, shape in enumerate(shapes)]
    found[-1] = found[-1].sigmoid()
    return [x.requires_grad_(grad) for x in found]


def one_softmax(q: Tensor, keys: list[Tensor], values: list[Tensor], width: int) -> tuple[Tensor, list[float]]:
    """One query over a list of keys -> its output and the probabilities, by plain arithmetic."""
    if not keys:
        return torch.zeros(width, dtype=q.dtype), []
    e = [float(torch.exp(q @ x * q.shape[-1] ** -0.5)) for x in keys]
    return sum(p / sum(e) * x for p, x in zip(e, values, strict=True)), [p / sum(e) for p in e]


def nsa_by_loops(q, k, v, kc, vc, gates, *, block, compress_block, stride, top_n, window):
    """-> out and the chosen blocks, query by query, as the paper's equations say it."""
    B, S, H, _ = q.shape
    T, Hkv, Dv = k.shape[1], k.shape[2], v.shape[-1]
    out = torch.zeros(B, S, H, Dv, dtype=q.dtype)
    chosen = torch.full((B, S, Hkv, top_n), -1)
    for b in range(B):
        for t in range(S):
            p = t + T - S
            for g in range(Hkv):
                heads = range(g * H // Hkv, (g + 1) * H // Hkv)
                seen = [i for i in range(kc.shape[1]) if i * stride + compress_block - 1 <= p]
                total: dict[int, float] = {}
                for h in heads:
                    o, probs = one_softmax(q[b, t, h], [kc[b, i, g] for i in seen], [vc[b, i, g] for i in seen], Dv)
                    out[b, t, h] += gates[b, t, h, 0] * o
                    for i, x in zip(seen, probs, strict=True):
                        total[i] = total.get(i, 0.0) + x
                count = p // block + 1
                offsets = [m - n for m in range(block // stride) for n in range(compress_block // stride)]
                importance = [sum(total.get(block // stride * j + x, 0.0) for x in offsets) for j in range(count)]
                forced = {0, count - 1, max(0, count - 2)}
                order = sorted(range(count), key=lambda j: (j not in forced, -importance[j], j))[:top_n]
                chosen[b, t, g, : len(order)] = torch.tensor(sorted(order))
                picked = [j for j in range(p + 1) if j // block in order]
                near = [j for j in range(p + 1) if j > p - window]
                for h in heads:
                    for c, keys in ((1, picked), (2, near)):
                        o, _ = one_softmax(q[b, t, h], [k[b, j, g] for j in keys], [v[b, j, g] for j in keys], Dv)
                        out[b, t, h] += gates[b, t, h, c] * o
    return out, chosen


@pytest.mark.parametrize(
    "S, T, sizes",
    [
        (50, 50, SIZES),
        (7, 45, SIZES),  # the last queries of a longer sequence
        (3, 3, SIZES),  # shorter than a compressed block
        (37, 37, dict(block=8, compress_block=4, stride=4, top_n=3, window=1)),
        (41, 41, dict(block=4, compress_block=8, stride=2, top_n=5, window=100)),
        (40, 40, dict(block=6, compress_block=6, stride=2, top_n=4, window=7)),
    ],
)
def test_nsa_equals_plain_loops(S, T, sizes):
    inputs = nsa_inputs(2, S, T, seed=S, sizes=sizes)
    out, branches, lse, indices = native_sparse_attention(*inputs, **sizes)
    expected, chosen = nsa_by_loops(*inputs, **sizes)
    assert torch.equal(indices.long(), chosen)
    assert_close(out, expected)
    assert branches.shape == (3, *out.shape) and lse.shape == (3, *out.shape[:-1])
    assert_close((branches * inputs[-1].permute(3, 0, 1, 2)[..., None]).sum(0), expected)


def test_selection_scores_of_the_paper_weigh_1_2_2_2_1():
    probs = torch.rand(3, 17, dtype=torch.float64)
    scores = selection_scores(probs, 5, 64, 32, 16)
    padded = torch.nn.functional.pad(probs, (1, 8))
    for j in range(5):
        near = padded[:, 4 * j : 4 * j + 5]  # 4j - 1 ... 4j + 3
        assert_close(scores[:, j], near @ torch.tensor([1.0, 2, 2, 2, 1], dtype=torch.float64))


@pytest.mark.parametrize("S, T, block, top_k", [(29, 29, 4, 3), (5, 30, 8, 2), (9, 9, 16, 3), (20, 20, 4, 1)])
def test_moba_equals_plain_loops(S, T, block, top_k):
    q, k, v = nsa_inputs(2, S, T, seed=T)[:3]
    out, _, indices = block_attention(q, k, v, block=block, top_k=top_k)
    for b in range(2):
        for t in range(S):
            p = t + T - S
            for h in range(4):
                g, own = h // 2, p // block
                means = [k[b, j * block : (j + 1) * block, g].mean(0) for j in range(own)]  # whole blocks, all in the past
                past = sorted(range(own), key=lambda j: (-float(q[b, t, h] @ means[j]), j))[: top_k - 1]
                kept = sorted([*past, own])
                assert indices[b, t, h].tolist() == kept + [-1] * (top_k - len(kept))
                keys = [j for j in range(p + 1) if j // block in kept]
                expected, _ = one_softmax(q[b, t, h], [k[b, j, g] for j in keys], [v[b, j, g] for j in keys], 5)
                assert_close(out[b, t, h], expected)


def test_gradcheck():
    sizes = dict(block=4, compress_block=4, stride=2, top_n=3, window=3)
    inputs = nsa_inputs(1, 14, 14, 2, 1, 3, 2, sizes=sizes, grad=True)
    assert torch.autograd.gradcheck(lambda *x: native_sparse_attention(*x, **sizes)[0], inputs)
    inputs = nsa_inputs(1, 3, 3, 2, 1, 3, 2, sizes=sizes, grad=True)  # no compressed key is visible to the first three
    assert torch.autograd.gradcheck(lambda *x: native_sparse_attention(*x, **sizes)[0], inputs)
    q, k, v = nsa_inputs(1, 11, 11, 4, 2, 3, 2, grad=True)[:3]
    assert torch.autograd.gradcheck(lambda *x: block_attention(*x, block=4, top_k=2)[0], (q, k, v))


def test_the_future_changes_nothing():
    inputs = nsa_inputs(1, 48, 48, seed=5)
    before = native_sparse_attention(*inputs, **SIZES)
    moba = block_attention(*inputs[:3], block=8, top_k=3)
    for t in (0, 7, 8, 30):
        q, k, v, kc, vc, gates = (x.clone() for x in inputs)
        k[:, t + 1 :], v[:, t + 1 :], q[:, t + 1 :] = 1e3, 7.0, 3.0
        hidden = compressed_length(t + 1, 4, 2)
        kc[:, hidden:], vc[:, hidden:] = 9.0, -5.0
        after = native_sparse_attention(q, k, v, kc, vc, gates, **SIZES)
        assert torch.equal(after[0][:, : t + 1], before[0][:, : t + 1]) and torch.equal(after[3][:, : t + 1], before[3][:, : t + 1])
        after = block_attention(q, k, v, block=8, top_k=3)
        assert torch.equal(after[0][:, : t + 1], moba[0][:, : t + 1]) and torch.equal(after[2][:, : t + 1], moba[2][:, : t + 1])


def test_packed_equals_separate():
    lengths = [19, 0, 3, 33, 1]
    parts = [nsa_inputs(1, n, n, seed=n) for n in lengths]
    packed = [torch.cat([part[i][0] for part in parts]) for i in range(6)]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    out, branches, lse, indices = native_sparse_attention(*packed, **SIZES, cu_seqlens=cu)
    moba = block_attention(*packed[:3], block=8, top_k=2, cu_seqlens=cu)
    for part, a, b in zip(parts, cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        alone = native_sparse_attention(*part, **SIZES)
        assert torch.equal(out[a:b], alone[0][0]) and torch.equal(indices[a:b], alone[3][0])
        assert torch.equal(branches[:, a:b], alone[1][:, 0]) and torch.equal(lse[:, a:b], alone[2][:, 0])
        for x, y in zip(moba, block_attention(*part[:3], block=8, top_k=2), strict=True):
            assert torch.equal(x[a:b], y[0])


def test_a_cache_equals_the_last_queries():
    inputs = nsa_inputs(2, 40, 40, seed=3)
    full = native_sparse_attention(*inputs, **SIZES)
    seqlens = torch.tensor([40, 23], dtype=torch.int32)
    q, k, v, kc, vc, gates = inputs
    new = [torch.stack([x[b, n - 3 : n] for b, n in enumerate(seqlens.tolist())]) for x in (q, gates)]
    k, kc = k.clone(), kc.clone()
    k[1, 23:], kc[1, compressed_length(23, 4, 2) :] = torch.nan, torch.nan  # never read
    out, _, _, indices = native_sparse_attention(new[0], k, v, kc, vc, new[1], **SIZES, seqlens=seqlens)
    for b, n in enumerate(seqlens.tolist()):
        assert_close(out[b], full[0][b, n - 3 : n])
        assert torch.equal(indices[b], full[3][b, n - 3 : n])


def test_ties_go_to_the_lower_block():
    q, k, v, kc, vc, gates = nsa_inputs(1, 80, 80)
    _, _, _, indices = native_sparse_attention(torch.zeros_like(q), k, v, kc, vc, gates, **SIZES)
    # all scores equal: whole inner blocks tie, and the last visible compressed key lies in the own block or the one before
    assert indices[0, 79, 0].tolist() == [0, 1, 8, 9]
    _, _, blocks = block_attention(torch.zeros_like(q), k, v, block=8, top_k=4)
    assert blocks[0, 79, 0].tolist() == [0, 1, 2, 9] and blocks[0, 3, 0].tolist() == [0, -1, -1, -1]
