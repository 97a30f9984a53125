"""Attention as torch itself computes it in the inputs' dtype: the baseline that the numerics rule measures against.

Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, D head dim, Dv value dim, N packed tokens, P pages.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thinkernel.reference.attention import gather_cache, masked_softmax, sink_gate, visible_keys


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None,
    window: tuple[int, int] | None = None, chunk: int | None = None, sinks: Tensor | None = None,
    softcap: float | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | None = None, sdpa: bool = True,
) -> tuple[Tensor, Tensor]:
    """tk.attention(..., return_lse=True): torch's fused SDPA with a mask, and where that lacks a feature (softcap, sinks) the
    fused formulas in plain torch (`FusedAttention`). A row that sees nothing gives 0 and −inf.

    sdpa=False: the formulas even so, for calls whose queries see a handful of keys (see there).
    SDPA takes one head dim, so the smaller one is padded with zeros; it returns no lse, which comes from float32 scores.
    """
    options: dict[str, Any] = dict(causal=causal, scale=scale, window=window, chunk=chunk, sinks=sinks, softcap=softcap, sdpa=sdpa)
    if cu_seqlens_q is not None:
        cuts_q = cu_seqlens_q.tolist()
        cuts_k = cuts_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
        parts = [
            torch_attention(q[None, a:b], k[None, c:d], v[None, c:d], **options)
            for a, b, c, d in zip(cuts_q, cuts_q[1:], cuts_k, cuts_k[1:], strict=False)
        ]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts])

    S, T, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if key_start is not None:
        padding = (torch.arange(T) < key_start[:, None])[:, :, None, None]  # [B, T, 1, 1]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    visible = visible_keys(torch.arange(T - S, T)[None], torch.arange(T), key_start, None, causal, window, chunk)
    visible = torch.ones(1, 1, S, T, dtype=torch.bool) if visible is None else visible[:, None]  # [B|1, 1, S, T]
    if softcap or sinks is not None or T == 0 or not sdpa:
        sinks = q.new_full((q.shape[1],), -torch.inf) if sinks is None else sinks
        out, lse = FusedAttention.apply(q, k, v, sinks, visible, scale, softcap or 0.0)
        return out.transpose(1, 2), lse.transpose(1, 2)
    empty, width = ~visible.any(-1, keepdim=True), max(q.shape[-1], v.shape[-1])
    # Contiguous: SDPA leaves its fused kernel for an eager softmax where a last dimension is not, and a layout chose the baseline.
    q_wide, k_wide, v_wide = (F.pad(x, (0, width - x.shape[-1])).contiguous() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_wide, k_wide, v_wide, attn_mask=visible | empty, scale=scale)[..., : v.shape[-1]]
    _, lse = masked_softmax(FusedAttention.scores(q, k, scale, 0.0), visible)
    return out.masked_fill(empty, 0.0).transpose(1, 2), lse.transpose(1, 2)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [.., m, n] @ b [.., n, k] as torch computes it among 16 rows and columns: for a single row or column it takes another
    routine, which adds in more lanes (half the error) and which no kernel that keeps a row's bits can follow."""
    m, k = a.shape[-2], b.shape[-1]
    return (F.pad(a, (0, 0, 0, max(0, 16 - m))) @ F.pad(b, (0, max(0, 16 - k))))[..., :m, :k]


class FusedAttention(torch.autograd.Function):
    """What every fused kernel computes (FlashAttention-2, arXiv 2307.08691) in torch's own products: scores, softmax and sums in
    float32, probabilities and their gradients rounded to the dtype before a product, Δ from the rounded output.

    An eager softmax, which SDPA too runs on small shapes, is no baseline for such a backward where a row sees a key or two: it
    subtracts Σ P∘dP in place of ⟨dO, O⟩, and its terms cancel exactly. (Two keys a row, float32: root mean square error of dQ
    0.6e-7 eager, 1.5e-7 by these formulas and by our kernels.)
    q [B, H, S, D], k [B, H, T, D], v [B, H, T, Dv], sinks [H] (−inf: none), visible bool.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Tensor, scale: float, softcap: float) -> Any:
        scores = FusedAttention.scores(q, k, scale, softcap)
        probs, lse = masked_softmax(scores, visible)
        gate = sink_gate(lse, sinks.float()[:, None])[..., None]
        out = (gate * product(probs.to(v.dtype), v).float()).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, visible, out, lse)
        ctx.options = scale, softcap
        return out, lse

    @staticmethod
    def scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
        scores = product(q.float(), k.float().mT) * scale  # [B, H, S, T]
        return softcap * torch.tanh(scores / softcap) if softcap else scores

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        q, k, v, sinks, visible, out, lse = ctx.saved_tensors
        scale, softcap = ctx.options
        scores = FusedAttention.scores(q, k, scale, softcap)
        empty = lse.isneginf()
        probs = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None]).masked_fill(~visible, 0.0)
        gated = probs * sink_gate(lse, sinks.float()[:, None])[..., None]
        delta = (dout.float() * out.float()).sum(-1, keepdim=True)
        ds = gated * (product(dout.float(), v.float().mT) - delta) + probs * dlse.masked_fill(empty, 0.0)[..., None]
        if softcap:
            ds = ds * (1 - (scores / softcap) ** 2)
        ds = ds.to(q.dtype)
        left = torch.sigmoid(sinks.float()[:, None] - lse).masked_fill(empty, 0.0)  # e^(sink − L)
        dsinks = -(left * delta[..., 0]).sum((0, 2)).to(sinks.dtype)
        return scale * product(ds, k), scale * product(ds.mT, q), product(gated.to(v.dtype).mT, dout), dsinks, None, None, None


def torch_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, seqlens: Tensor, block_table: Tensor | None = None,
    prefix: tuple[Any, ...] | None = None, causal: bool = True, **options: Any,
) -> tuple[Tensor, Tensor]:
    """tk.attention_decode(..., return_lse=True): `torch_attention` of each sequence over its keys laid out densely."""
    k, v = (gather_cache(x, seqlens, block_table) for x in (k_cache, v_cache))
    shared: list[Tensor] = []
    if prefix is not None:
        length, table = prefix[2], prefix[3] if len(prefix) == 4 else None
        shared = [(x if table is None else x[table[: -(-length // x.shape[1])].long()].flatten(0, 1))[:length] for x in prefix[:2]]
    lse = q.new_empty(0, *q.shape[1:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    rows = [(q.new_empty(0, *q.shape[1:3], v.shape[-1]), lse)]
    for b, n in enumerate(seqlens.tolist()):
        own = [x[b, :n] for x in (k, v)]
        both = [torch.cat(pair) for pair in zip(shared, own, strict=True)] if shared else own
        rows.append(torch_attention(q[b : b + 1], both[0][None], both[1][None], causal=causal, **options))
    return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])


def torch_sparse_attention(
    q: Tensor, kv: Tensor | tuple[Tensor, Tensor], indices: Tensor, *, value_dim: int | None = None, scale: float | None = None,
    sinks: Tensor | None = None, return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """tk.sparse_attention(..., return_lse=True) of dense keys: the fused formulas over all keys, those not named masked out."""
    k, v = kv if isinstance(kv, tuple) else (kv[:, :, None], kv[:, :, None, :value_dim])
    indices = indices if isinstance(kv, tuple) else indices[:, :, None]  # [B, S, Hkv, K]
    T, group = k.shape[1], q.shape[2] // k.shape[2]
    named = torch.zeros(*indices.shape[:3], T + 1, dtype=torch.bool)
    named.scatter_(-1, indices.long().masked_fill((indices < 0) | (indices >= T), T), True)
    visible = named[..., :T].repeat_interleave(group, 2).transpose(1, 2)  # [B, H, S, T]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    sinks = q.new_full((q.shape[1],), -torch.inf) if sinks is None else sinks
    out, lse = FusedAttention.apply(q, k, v, sinks, visible, q.shape[-1] ** -0.5 if scale is None else scale, 0.0)
    return out.transpose(1, 2), lse.transpose(1, 2)
