"""Sparse attention with a lightning indexer (DSA: DeepSeek-V3.2, GLM-5), the specification.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, D head dim, Dv value dim, Hi indexer heads, Di indexer dim,
K = top_k, N packed tokens, P pages.

    I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s])                     indexer scores, s up to the position of t
    S_t     = the K largest of I[t, :], ties to the lower index        selection
    o_t     = attention of the main heads over S_t                      sparse attention
    L       = mean_t KL(p_t || softmax(I[t, S_t])),  dL/dI = (softmax(I) - p) / count
with p_t the main attention's probabilities inside S_t, averaged over heads and detached.

Indices are positions in the query's own sequence, distinct within a query; -1, or anything outside the sequence, is an
empty slot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .attention import compute_dtype, gather_cache, masked_softmax, sink_gate
from .mla import dequantize_latent, gather_latent


def topk(scores: Tensor, k: int, *, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of the first `lengths` scores of each row -> values [..., k], indices int32 [..., k], ascending.

    scores [..., T], lengths broadcastable to [...] (default T). A row with fewer than k scores ends in index -1,
    value -inf.
    Ties go to the lower index and -0.0 equals +0.0. -inf is a score like any other; NaN ranks below it.
    """
    T = scores.shape[-1]
    position = torch.arange(T, device=scores.device)
    # Ascending and stable on the negated scores: NaN comes last, and what lies past `lengths`, made NaN, after the
    # row's own NaN because its index is higher.
    keys = -scores.detach()
    limit = torch.full((), T, device=scores.device) if lengths is None else lengths.clamp(0, T)
    keys = keys.masked_fill(position >= limit[..., None], torch.nan)
    order = torch.sort(keys, dim=-1, stable=True).indices[..., :k]  # [..., min(k, T)]
    order = order.masked_fill(order >= limit[..., None], T).sort(-1).values
    order = F.pad(order, (0, k - order.shape[-1]), value=T)
    unused = order >= T
    values = F.pad(scores, (0, 1)).gather(-1, order.clamp_max(T)).masked_fill(unused, -torch.inf)
    return values, order.masked_fill(unused, -1).int()


def _raw_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """q [B,S,Hi,Di], k [B,T,Di], w [B,S,Hi] -> I [B,S,T], unmasked."""
    dtype = compute_dtype(q.dtype)
    z = rearrange(q.to(dtype), "b s h d -> b (h s) d") @ k.to(dtype).mT  # [B, Hi*S, T]
    z = z.unflatten(1, (q.shape[2], q.shape[1]))  # [B, Hi, S, T]
    return (z.relu() * rearrange(w.to(dtype), "b s h -> b h s 1")).sum(1)


def _causal(S: int, T: int, device: torch.device) -> Tensor:
    """Bottom-right aligned: bool [S, T], key s <= t + T - S."""
    return torch.arange(T, device=device) <= torch.arange(T - S, T, device=device)[:, None]


def indexer_scores(
    q: Tensor,  # [B, S, Hi, Di]
    k: Tensor,  # [B, T, Di]
    w: Tensor,  # [B, S, Hi]
    *,
    causal: bool = True,
) -> Tensor:
    """Dense indexer scores I [B, S, T] in float32 (float64 for float64), -inf where not visible."""
    scores = _raw_scores(q, k, w)
    return scores.masked_fill(~_causal(q.shape[1], k.shape[1], q.device), -torch.inf) if causal else scores


@torch.no_grad()
def indexer_topk(
    q: Tensor,  # [B, S, Hi, Di]  packed: [N, Hi, Di]
    k: Tensor,  # [B, T, Di]      packed: [Nk, Di]; decode: a cache [B, T, Di] or pages [P, page, Di]
    w: Tensor,  # [B, S, Hi]      packed: [N, Hi]
    *,
    top_k: int,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,  # [B+1]
    cu_seqlens_k: Tensor | None = None,  # default: cu_seqlens_q
    seqlens: Tensor | None = None,  # [B] keys in the cache, the S new ones included
    block_table: Tensor | None = None,  # [B, max_pages]
    k_scale: Tensor | None = None,  # float32, k's shape without Di: of a key in e4m3, multiplies its scores
) -> Tensor:
    """The keys each query attends to, `topk` of its visible scores -> int32 [B, S, top_k] (packed: [N, top_k])."""
    if cu_seqlens_q is not None:
        bounds_q, bounds_k = cu_seqlens_q.tolist(), (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).tolist()
        parts = [torch.empty(0, top_k, dtype=torch.int32, device=q.device)]
        for a, b, c, d in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True):
            scale = None if k_scale is None else k_scale[None, c:d]
            alone = q[None, a:b], k[None, c:d], w[None, a:b]
            parts.append(indexer_topk(*alone, top_k=top_k, causal=causal, k_scale=scale)[0])
        return torch.cat(parts)
    S = q.shape[1]
    if seqlens is not None:
        k = gather_cache(k.to(compute_dtype(q.dtype)), seqlens, block_table)
        k_scale = None if k_scale is None else gather_cache(k_scale, seqlens, block_table)
    scores = _raw_scores(q, k, w)
    if k_scale is not None:
        scores = scores * k_scale[:, None]
    T = k.shape[1]
    end = torch.full((1,), T, device=q.device) if seqlens is None else seqlens.long()
    lengths = end[:, None] + torch.arange(1 - S, 1, device=q.device) if causal else end[:, None]  # [B|1, S|1]
    return topk(scores, top_k, lengths=lengths.clamp_min(0))[1]


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """x [B, T, Hkv, D], indices [B, S, Hkv, K] in -1 ... T-1 -> [B, S, Hkv, K, D], zeros for -1.

    A zero row is put behind each sequence for -1 to read, so that the rows of x stay out of it, NaN or not.
    """
    B, T, Hkv, D = x.shape
    rows = F.pad(rearrange(x, "b t k d -> b k t d"), (0, 0, 0, 1))  # [B, Hkv, T+1, D]
    base = torch.arange(B * Hkv, device=x.device).view(B, 1, Hkv, 1) * (T + 1)
    # embedding, not indexing: its backward adds rows in a fixed order, several times faster than index_put
    return F.embedding(base + torch.where(indices < 0, T, indices), rows.flatten(0, 2))


def sparse_attention(
    q: Tensor,  # [B, S, H, D]  packed: [N, H, D]
    kv: Tensor | tuple[Tensor, Tensor],
    indices: Tensor,
    *,
    value_dim: int | None = None,  # latents only; default D
    scale: float | None = None,  # default D^-0.5
    sinks: Tensor | None = None,  # [H]
    cu_seqlens_q: Tensor | None = None,  # [B+1]
    cu_seqlens_k: Tensor | None = None,  # default: cu_seqlens_q
    seqlens: Tensor | None = None,  # [B]
    block_table: Tensor | None = None,  # [B, max_pages]
) -> tuple[Tensor, Tensor]:
    """Attention over the selected keys -> out [B, S, H, Dv] in q's dtype, lse [B, S, H] (packed: [N, ...]).

    A query whose slots are all empty gives 0 and -inf.
    Latents: kv [B, T, D] (packed [Nk, D], pages [P, page, D], FP8 bytes [..., 656]) and indices [B, S, K], the same
    for all heads.
    GQA: kv = (k [B, T, Hkv, D], v [B, T, Hkv, Dv]) or pages of them, and indices [B, S, Hkv, K].
    With `seqlens`, slots past a sequence's end count as empty and are never read.
    """
    if cu_seqlens_q is not None:
        bounds_q, bounds_k = cu_seqlens_q.tolist(), (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).tolist()
        parts = []
        for a, b, c, d in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True):
            part = (kv[0][None, c:d], kv[1][None, c:d]) if isinstance(kv, tuple) else kv[None, c:d]
            chosen = indices[None, a:b]
            parts.append(sparse_attention(q[None, a:b], part, chosen, value_dim=value_dim, scale=scale, sinks=sinks))
        if not parts:
            Dv = kv[1].shape[-1] if isinstance(kv, tuple) else value_dim or q.shape[-1]
            return q.new_zeros(0, q.shape[1], Dv), q.new_zeros(0, q.shape[1], dtype=compute_dtype(q.dtype))
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts])

    B, S, H, D = q.shape
    dtype, scale = compute_dtype(q.dtype), D**-0.5 if scale is None else scale
    if isinstance(kv, tuple):
        k, v = kv if seqlens is None else (gather_cache(x, seqlens, block_table) for x in kv)  # [B, T, Hkv, D|Dv]
    else:
        if seqlens is not None:
            kv = gather_latent(kv, seqlens=seqlens, block_table=block_table)
        elif kv.dtype == torch.uint8:
            kv = dequantize_latent(kv)
        k, v, indices = kv[:, :, None], None, indices[:, :, None]  # [B, T, 1, D], [B, S, 1, K]
    T, Hkv = k.shape[1], k.shape[2]
    end = T if seqlens is None else seqlens.view(-1, 1, 1, 1)
    indices = indices.masked_fill((indices < 0) | (indices >= end), -1).long()

    keys = gather_rows(k.to(dtype), indices)  # [B, S, Hkv, K, D]
    values = keys if v is None else gather_rows(v.to(dtype), indices)
    scores = (q.to(dtype) * scale).unflatten(2, (Hkv, H // Hkv)) @ keys.mT  # [B, S, Hkv, G, K]
    probs, lse = masked_softmax(scores, (indices >= 0)[:, :, :, None])
    # Latents: cut the output, not the gathered keys: that slice costs another [B, S, K, D] gradient, half the backward.
    out, lse = (probs @ values)[..., :value_dim].flatten(2, 3), lse.flatten(2, 3)
    if sinks is not None:
        out = out * sink_gate(lse, sinks.to(dtype))[..., None]
    return out.to(q.dtype), lse


def indexer_loss(
    q: Tensor,  # [B, S, Hi, Di]
    k: Tensor,  # [B, T, Di]
    w: Tensor,  # [B, S, Hi]
    target_q: Tensor,  # [B, S, H, D] queries of the main attention
    target_kv: Tensor,  # [B, T, D] its latents, or keys [B, T, Hkv, D]
    *,
    indices: Tensor | None = None,  # [B, S, K]; None: the dense warm-up stage, all visible keys
    scale: float,  # of the main attention
    target_lse: Tensor | None = None,  # [B, S, H] the main attention's lse, spares its recomputation
    reduction: str = "mean",
) -> Tensor:
    """KL(p_t || softmax(I_t)) over the selected keys; gradients flow to q, k and w alone.

    p_t = sum over heads of the main attention's probabilities inside S_t, divided by its own sum. S_t is what `indices`
    says, or every key up to the query's position (bottom-right aligned).
    reduction: "mean" over all B * S queries, "sum", or "none" [B, S]. A query without keys contributes 0.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: got {reduction!r}, takes "mean", "sum" or "none"')
    loss, _ = indexer_loss_kept(q, k, w, target_q, target_kv, indices, scale, target_lse)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def indexer_loss_kept(
    q: Tensor, k: Tensor, w: Tensor, target_q: Tensor, target_kv: Tensor, indices: Tensor | None, scale: float,
    target_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of each query [B, S], and what a kernel's backward needs of the forward.

    With indices [B, S, K]: softmax(I) - p, 0 in empty slots. Without [B, S, 3 + 2H]: x, a with softmax(I) = a e^(I - x); the
    sum over heads and keys of a e^(scale q.k - x) that p was divided by; and x, a of each head.
    """
    S, T = q.shape[1], k.shape[1]
    scores = _raw_scores(q, k, w)  # [B, S, T]
    if indices is None:
        visible = _causal(S, T, q.device)[None]  # [1, S, T]
        target, mass, shift = _target_dense(target_q, target_kv, visible, scale, target_lse)
    else:
        visible = (indices >= 0) & (indices < T)  # [B, S, K]
        indices = indices.masked_fill(~visible, -1).long()
        target, mass, shift = _target_sparse(target_q, target_kv, indices, scale, target_lse)
        scores = F.pad(scores, (0, 1)).gather(-1, indices.masked_fill(~visible, T))
    target = target.to(scores.dtype)
    probs, lse = masked_softmax(scores, visible)
    log_probs = torch.where(visible, scores - lse[..., None], 0.0)  # [B, S, K] or [B, S, T]
    loss = (torch.xlogy(target, target) - target * log_probs).sum(-1)  # [B, S]
    if indices is not None:
        return loss, probs.detach() - target
    heads = torch.stack((shift, torch.ones_like(shift)), -1).flatten(-2)  # [B, S, 2H]
    return loss, torch.cat((torch.stack((lse.detach(), torch.ones_like(mass), mass), -1), heads), -1)


def _normalized_target(scores: Tensor, visible: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """scores [B, S, H, K], visible [B|1, S, 1, K], lse [B, S, H] -> p [B, S, K], summing to 1 (no keys: 0), the sum [B, S]
    that it was divided by, and each head's lse, 0 for -inf."""
    probs = None
    if lse is None:
        probs, lse = masked_softmax(scores, visible)
    finite = lse.masked_fill(lse.isneginf(), 0.0).to(scores.dtype)
    if probs is None:
        probs = torch.exp(scores - finite[..., None]).masked_fill(~visible, 0.0)
    mass = probs.sum(2)
    total = mass.sum(-1)
    return mass / total.clamp_min(torch.finfo(mass.dtype).tiny)[..., None], total, finite


@torch.no_grad()
def _target_sparse(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The main attention's probabilities over the selected keys: indices [B, S, K] in -1 ... T-1 -> [B, S, K], ..."""
    dtype = compute_dtype(q.dtype)
    kv = kv[:, :, None] if kv.ndim == 3 else kv  # [B, T, Hkv, D]
    H, Hkv = q.shape[2], kv.shape[2]
    keys = gather_rows(kv.to(dtype), indices[:, :, None].expand(-1, -1, Hkv, -1))  # [B, S, Hkv, K, D]
    scores = ((q.to(dtype) * scale).unflatten(2, (Hkv, H // Hkv)) @ keys.mT).flatten(2, 3)  # [B, S, H, K]
    return _normalized_target(scores, (indices >= 0)[:, :, None], lse)


@torch.no_grad()
def _target_dense(
    q: Tensor, kv: Tensor, visible: Tensor, scale: float, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The main attention's probabilities over all visible keys: visible [B|1, S, T] -> [B, S, T], ..."""
    dtype = compute_dtype(q.dtype)
    kv = kv[:, :, None] if kv.ndim == 3 else kv
    query = (q.to(dtype) * scale).unflatten(2, (kv.shape[2], -1))  # [B, S, Hkv, G, D]
    scores = torch.einsum("bskgd,btkd->bskgt", query, kv.to(dtype)).flatten(2, 3)  # [B, S, H, T]
    return _normalized_target(scores, visible[:, :, None], lse)
