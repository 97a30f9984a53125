"""Attention, the specification: MHA, GQA and MQA, prefill and decode, in plain differentiable torch.

Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim,
N packed tokens, P pages.

    s   = scale * q . k                 then, with a softcap c,  s = c * tanh(s / c)
    lse = log sum_j exp(s_j)            over the visible keys only; it never counts the sink
    o   = sum_j exp(s_j - lse) v_j      times sigmoid(lse - sink) where the head has a sink

Query i sits at position p = i + T - S (the last query faces the last key). Key j is visible when it is valid,
and `j <= p` (causal), `p - left <= j <= p + right` (window; -1 is unlimited), `j >= chunk * floor(p / chunk)` (chunk).
A query that sees no key gives o = 0, lse = -inf and zero gradients.
float16 and bfloat16 are computed in float32 and only the result is rounded; float64 stays float64.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def masked_softmax(scores: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the visible entries of the last dimension -> (probabilities, lse), safe for rows that see nothing.

    `visible` is bool, broadcastable to `scores`. An empty row is computed on constant zeros and overwritten afterwards,
    so no gradient meets the `-inf - -inf` that a plain softmax of masked scores would produce.
    """
    if scores.shape[-1] == 0:
        return scores, scores.sum(-1) - torch.inf
    empty = None
    if visible is not None:
        empty = ~visible.any(-1, keepdim=True)  # [..., 1]
        hidden = torch.zeros_like(empty, dtype=scores.dtype).masked_fill(~empty, -torch.inf)
        scores = torch.where(visible, scores, hidden)
    probs = scores.softmax(-1)
    # lse = s - log p holds for every entry; the largest is the well-conditioned one. A quarter of logsumexp's cost.
    largest = scores.detach().max(-1, keepdim=True).indices
    lse = (scores.gather(-1, largest) - probs.gather(-1, largest).log()).squeeze(-1)
    if empty is not None and empty.any():
        probs, lse = probs.masked_fill(empty, 0.0), lse.masked_fill(empty.squeeze(-1), -torch.inf)
    return probs, lse


def sink_gate(lse: Tensor, sinks: Tensor) -> Tensor:
    """What a sink logit leaves of the output, sigmoid(lse - sink): one more logit in the softmax whose value is 0."""
    return torch.sigmoid(lse.masked_fill(lse.isneginf(), 0.0) - sinks)


def visible_keys(
    positions: Tensor,
    keys: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    chunk: int | None,
) -> Tensor | None:
    """Which keys each query sees -> bool [B or 1, S, T], or None when every query sees every key.

    positions [B or 1, S] of the queries, keys [T] the key indices; start, end [B]: valid keys are start <= j < end.
    Chunks are counted from `start`, so that left padding moves nothing.
    """
    p, j = positions[:, :, None], keys  # [B|1, S, 1], [T]
    rules = []
    if start is not None:
        rules.append(j >= start[:, None, None])
    if end is not None:
        rules.append(j < end[:, None, None])
    if causal:
        rules.append(j <= p)
    if window is not None:
        left, right = window
        if left >= 0:
            rules.append(j >= p - left)
        if right >= 0:
            rules.append(j <= p + right)
    if chunk is not None:
        origin = 0 if start is None else start[:, None, None]
        rules.append(j - origin >= chunk * torch.div(p - origin, chunk, rounding_mode="floor"))
    if not rules:
        return None
    visible = rules[0]
    for rule in rules[1:]:
        visible = visible & rule
    return visible


def attend(
    q: Tensor,  # [B, S, H, D]
    k: Tensor,  # [B, T, Hkv, D]
    v: Tensor,  # [B, T, Hkv, Dv]
    visible: Tensor | None,  # bool [B or 1, S, T]; None: everything
    scale: float | None,
    sinks: Tensor | None,  # [H]
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention under a given mask -> out [B, S, H, Dv] in q's dtype, lse [B, S, H]."""
    _, S, H, D = q.shape
    Hkv = k.shape[2]
    G, dtype = H // Hkv, compute_dtype(q.dtype)
    scale = D**-0.5 if scale is None else scale
    query = rearrange(q.to(dtype), "b s (k g) d -> b k (g s) d", k=Hkv)
    scores = query @ rearrange(k.to(dtype), "b t k d -> b k d t") * scale  # [B, Hkv, G*S, T]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(2, (G, S))  # [B, Hkv, G, S, T]
    probs, lse = masked_softmax(scores, None if visible is None else visible[:, None, None])
    out = probs.flatten(2, 3) @ rearrange(v.to(dtype), "b t k d -> b k t d")  # [B, Hkv, G*S, Dv]
    out = rearrange(out, "b k (g s) d -> b s (k g) d", g=G)
    lse = rearrange(lse, "b k g s -> b s (k g)")
    if sinks is not None:
        out = out * sink_gate(lse, sinks.to(dtype))[..., None]
    return out.to(q.dtype), lse


def attention(
    q: Tensor,  # [B, S, H, D]   packed: [N, H, D]
    k: Tensor,  # [B, T, Hkv, D] packed: [Nk, Hkv, D]
    v: Tensor,  # [B, T, Hkv, Dv]
    *,
    causal: bool = False,
    scale: float | None = None,  # default D^-0.5
    window: tuple[int, int] | None = None,  # (left, right), -1 unlimited
    chunk: int | None = None,
    sinks: Tensor | None = None,  # [H]
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,  # [B+1] int32, from 0 to N
    cu_seqlens_k: Tensor | None = None,  # default: cu_seqlens_q
    key_start: Tensor | None = None,  # [B] int32, first valid key (left padding)
) -> tuple[Tensor, Tensor]:
    """Attention -> out [B, S, H, Dv] in q's dtype, lse [B, S, H] in float32 (packed: [N, H, Dv], [N, H]).

    What lies before `key_start` is never read: NaN there changes nothing.
    """
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        options = dict(causal=causal, scale=scale, window=window, chunk=chunk, sinks=sinks, softcap=softcap)
        return _attention_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    S, T = q.shape[1], k.shape[1]
    keys = torch.arange(T, device=q.device)
    positions = torch.arange(T - S, T, device=q.device)[None]  # [1, S]
    if key_start is not None:
        padding = (keys < key_start[:, None])[:, :, None, None]  # [B, T, 1, 1]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    visible = visible_keys(positions, keys, key_start, None, causal, window, chunk)
    return attend(q, k, v, visible, scale, sinks, softcap)


def _attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """Each sequence on its own: q [N,H,D], k and v [Nk,Hkv,D] -> out [N,H,Dv], lse [N,H]."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = [
        attention(q[None, a:b], k[None, c:d], v[None, c:d], **options)
        for a, b, c, d in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True)
    ]
    if not parts:
        return q.new_zeros(0, q.shape[1], v.shape[-1]), q.new_zeros(0, q.shape[1], dtype=compute_dtype(q.dtype))
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts])


def gather_cache(cache: Tensor, seqlens: Tensor, block_table: Tensor | None) -> Tensor:
    """The first seqlens[b] entries of each sequence, zeros after them -> dense [B, T, ...].

    cache [B, T, ...], or pages [P, page, ...] with block_table [B, max_pages] (then T = max_pages * page).
    Slots and table entries past a sequence's end may hold anything; nothing of them reaches the result.
    """
    if block_table is not None:
        page = cache.shape[1]
        used = torch.arange(block_table.shape[1], device=cache.device) * page < seqlens[:, None]  # [B, max_pages]
        cache = cache[block_table.masked_fill(~used, 0).long()].flatten(1, 2)  # [B, max_pages * page, ...]
    stale = torch.arange(cache.shape[1], device=cache.device) >= seqlens[:, None]  # [B, T]
    return cache.masked_fill(stale.view(*stale.shape, *[1] * (cache.ndim - 2)), 0)


def append_cache(cache: Tensor, new: Tensor, seqlens: Tensor, block_table: Tensor | None) -> None:
    """Write new [B, Sq, ...] at positions seqlens - Sq ... seqlens - 1 of each sequence, in place.

    Negative positions are dropped: a row with seqlens 0 takes no part.
    """
    B, Sq = new.shape[:2]
    position = seqlens[:, None].long() + torch.arange(-Sq, 0, device=cache.device)  # [B, Sq]
    row, i = torch.nonzero(position >= 0, as_tuple=True)
    position = position[row, i]
    value = new[row, i].to(cache.dtype)
    if block_table is None:
        cache[row, position] = value
    else:
        page = cache.shape[1]
        cache[block_table[row, position // page].long(), position % page] = value


def attention_decode(
    q: Tensor,  # [B, Sq, H, D]
    k_cache: Tensor,  # [B, T, Hkv, D] or pages [P, page, Hkv, D]
    v_cache: Tensor,  # [B, T, Hkv, Dv] or pages [P, page, Hkv, Dv]
    *,
    seqlens: Tensor,  # [B] int32, keys of each sequence, the Sq new ones included
    block_table: Tensor | None = None,  # [B, max_pages] int32
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,  # [H]
    softcap: float | None = None,
    prefix: tuple | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of Sq new queries over a cache -> out [B, Sq, H, Dv], lse [B, Sq, H]: the last Sq rows of the prefill.

    `prefix` holds keys that stand before every row's own: (k [Tp, Hkv, D], v [Tp, Hkv, Dv], length), or pages with
    their table: (k_pages, v_pages, length, block_table [max_pages]). `seqlens` counts the rows' own keys only;
    their positions go on from the prefix.
    """
    Sq = q.shape[1]
    k, v = gather_cache(k_cache, seqlens, block_table), gather_cache(v_cache, seqlens, block_table)
    if prefix is not None:
        shared_k, shared_v = _gather_prefix(*prefix)
        k = torch.cat([repeat(shared_k, "t k d -> b t k d", b=len(q)).to(k.dtype), k], dim=1)
        v = torch.cat([repeat(shared_v, "t k d -> b t k d", b=len(q)).to(v.dtype), v], dim=1)
        seqlens = seqlens + len(shared_k)
    positions = seqlens[:, None] + torch.arange(-Sq, 0, device=q.device)  # [B, Sq]
    visible = visible_keys(positions, torch.arange(k.shape[1], device=q.device), None, seqlens, causal, window, chunk)
    return attend(q, k, v, visible, scale, sinks, softcap)


def _gather_prefix(
    k: Tensor, v: Tensor, length: int | Tensor, block_table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    length = int(length)
    if block_table is None:
        return k[:length], v[:length]
    used = block_table[: -(-length // k.shape[1])].long()
    return k[used].flatten(0, 1)[:length], v[used].flatten(0, 1)[:length]


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    *,
    seqlens: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Write k_new and v_new [B, Sq, Hkv, D] into the caches in place; `seqlens` [B] counts them already."""
    append_cache(k_cache, k_new, seqlens, block_table)
    append_cache(v_cache, v_new, seqlens, block_table)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys together, from the results over each -> out [..., H, Dv], lse [..., H].

    lse = logaddexp(lse_a, lse_b), out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b; both empty: 0 and -inf.
    A sink is applied once, after merging.
    """
    dtype = compute_dtype(torch.promote_types(out_a.dtype, torch.promote_types(lse_a.dtype, lse_b.dtype)))
    empty = lse_a.isneginf() & lse_b.isneginf()
    a, b = lse_a.to(dtype).masked_fill(empty, 0.0), lse_b.to(dtype).masked_fill(empty, 0.0)
    lse = torch.logaddexp(a, b)
    out = torch.exp(a - lse)[..., None] * out_a.to(dtype) + torch.exp(b - lse)[..., None] * out_b.to(dtype)
    return out.masked_fill(empty[..., None], 0.0).to(out_a.dtype), lse.masked_fill(empty, -torch.inf)
