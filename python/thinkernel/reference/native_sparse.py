"""Block-sparse attention whose blocks are chosen by the attention itself: NSA and MoBA, the specification.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim, N packed tokens,
Tc compressed keys, n chosen blocks. l, d: length and stride of compressed blocks; l' of the blocks that are selected.

NSA (arXiv 2502.11089), query t at position p = t + T - S:
    o = g_0 Attn(q, Kc, Vc) + g_1 Attn(q, K and V of the chosen blocks, j <= p) + g_2 Attn(q, K, V, p - window < j <= p)
    compressed key i is visible iff i d + l - 1 <= p;  p_cmp: its probability in the first branch
    p_slc[j] = sum over m < l'/d, n < l/d of p_cmp[(l'/d) j + m - n], summed over the heads of a group
    chosen: block 0, the query's own and the one before it, and the largest p_slc of the rest; top_n in all
MoBA (arXiv 2502.13189), query and head by themselves:
    score of a block = q . mean(its keys);  chosen: the own block and the largest of the past ones, top_k in all

Ties go to the lower block. A choice has no gradient. What sees no key gives 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .attention import compute_dtype, gather_cache, masked_softmax
from .sparse import topk


def compressed_length(n: int, compress_block: int, stride: int) -> int:
    """How many compressed keys n keys have: whole blocks alone."""
    return max(0, (n - compress_block) // stride + 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,S,H,D], k [B,T,Hkv,D], visible [B|1, Hkv|1, G|1, S, T] -> out [B,S,H,Dv], lse [B,S,H], probs [B,Hkv,G,S,T]."""
    G = q.shape[2] // k.shape[2]
    query = rearrange(q * scale, "b s (k g) d -> b k (g s) d", g=G)
    scores = (query @ rearrange(k, "b t k d -> b k d t")).unflatten(2, (G, q.shape[1]))  # [B, Hkv, G, S, T]
    probs, lse = masked_softmax(scores, visible)
    out = probs.flatten(2, 3) @ rearrange(v, "b t k d -> b k t d")
    out = rearrange(out, "b k (g s) d -> b s (k g) d", g=G)
    return out, rearrange(lse, "b k g s -> b s (k g)"), probs


def selection_scores(probs: Tensor, blocks: int, block: int, compress_block: int, stride: int) -> Tensor:
    """p_slc [..., blocks] from p_cmp [..., Tc]: every offset m - n adds the p_cmp that lies there, 0 outside."""
    step, shifts = block // stride, compress_block // stride
    weights = torch.zeros(step + shifts - 1, dtype=probs.dtype, device=probs.device)  # of offsets 1 - shifts ... step - 1
    for n in range(shifts):
        weights[shifts - 1 - n : shifts - 1 - n + step] += 1  # offsets m - n
    behind = max(0, max(blocks, 1) * step - probs.shape[-1])
    padded = F.pad(probs, (shifts - 1, behind))
    return padded.unfold(-1, len(weights), step)[..., :blocks, :] @ weights


def _choose(scores: Tensor, forced: Tensor, seen: Tensor, count: int) -> Tensor:
    """scores [B, S, X, blocks], forced bool [B|1, S, blocks], seen [B|1, S] blocks that begin by p -> int32 [B, S, X, count]."""
    scores = scores.masked_fill(forced[:, :, None], torch.inf)
    return topk(scores, count, lengths=seen[:, :, None].expand(scores.shape[:-1]))[1]


def _chosen_keys(indices: Tensor, positions: Tensor, T: int, block: int) -> Tensor:
    """Block indices [B, S, X, n], positions [B|1, S] -> which keys are seen, bool [B, X, S, T]."""
    blocks = -(-T // block)
    named = torch.zeros(*indices.shape[:3], blocks + 1, dtype=torch.bool, device=indices.device)
    named.scatter_(-1, indices.long().masked_fill(indices < 0, blocks), True)
    key = torch.arange(T, device=indices.device)
    return (named[..., key // block] & (key <= positions[:, :, None])[:, :, None]).transpose(1, 2)


def native_sparse_attention(
    q: Tensor,  # [B, S, H, D]     packed: [N, H, D]
    k: Tensor,  # [B, T, Hkv, D]   packed: [N, Hkv, D]
    v: Tensor,  # [B, T, Hkv, Dv]
    k_compressed: Tensor,  # [B, Tc, Hkv, D], packed [Nc, Hkv, D]: the sequences' one after the other
    v_compressed: Tensor,  # [B, Tc, Hkv, Dv]
    gates: Tensor,  # [B, S, H, 3] compressed, selected, window; packed [N, H, 3]
    *,
    block: int = 64,
    compress_block: int = 32,
    stride: int = 16,
    top_n: int = 16,
    window: int = 512,
    scale: float | None = None,  # default D^-0.5
    cu_seqlens: Tensor | None = None,  # [B+1]
    seqlens: Tensor | None = None,  # [B] keys of a cache that count, the S new ones included
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out [B, S, H, Dv] in q's dtype; of the branches out [3, B, S, H, Dv] and lse [3, B, S, H]; blocks [B, S, Hkv, top_n].

    The last three carry no gradient."""
    sizes: dict[str, Any] = dict(block=block, compress_block=compress_block, stride=stride, top_n=top_n, window=window, scale=scale)
    if cu_seqlens is not None:
        cuts, at, parts = cu_seqlens.tolist(), 0, []
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            end = at + compressed_length(b - a, compress_block, stride)
            tensors = (q[a:b], k[a:b], v[a:b], k_compressed[at:end], v_compressed[at:end], gates[a:b])
            parts.append(native_sparse_attention(*(x[None] for x in tensors), **sizes))
            at = end
        if not parts:
            out, lse = q.new_zeros(0, q.shape[1], v.shape[-1]), q.new_zeros(3, 0, q.shape[1], dtype=compute_dtype(q.dtype))
            return out, out.new_zeros(3, *out.shape), lse, torch.zeros(0, k.shape[1], top_n, dtype=torch.int32, device=q.device)
        whole = [torch.cat(x, 1 if i in (0, 3) else 2) for i, x in enumerate(zip(*parts, strict=True))]
        return whole[0][0], whole[1][:, 0], whole[2][:, 0], whole[3][0]

    S, dtype, scale = q.shape[1], compute_dtype(q.dtype), q.shape[-1] ** -0.5 if scale is None else scale
    if seqlens is not None:
        k, v = gather_cache(k, seqlens, None), gather_cache(v, seqlens, None)
        counts = ((seqlens - compress_block).div(stride, rounding_mode="floor") + 1).clamp_min(0)
        k_compressed, v_compressed = gather_cache(k_compressed, counts, None), gather_cache(v_compressed, counts, None)
    T, Tc = k.shape[1], k_compressed.shape[1]
    last = torch.full((1,), T, device=q.device) if seqlens is None else seqlens.long()
    positions = last[:, None] + torch.arange(-S, 0, device=q.device)  # [B|1, S]
    q_wide, k_wide, v_wide = (x.to(dtype) for x in (q, k, v))

    ends = torch.arange(Tc, device=q.device) * stride + compress_block - 1  # the last key of each compressed block
    visible = (ends <= positions[:, :, None])[:, None, None]  # [B|1, 1, 1, S, Tc]
    compressed, lse_compressed, probs = _attend(q_wide, k_compressed.to(dtype), v_compressed.to(dtype), visible, scale)

    blocks = -(-T // block)
    scores = selection_scores(probs.detach().sum(2), blocks, block, compress_block, stride)  # [B, Hkv, S, blocks]
    own, index = positions.div(block, rounding_mode="floor"), torch.arange(blocks, device=q.device)
    forced = (index == 0) | (index >= own[:, :, None] - 1)
    indices = _choose(scores.transpose(1, 2), forced, (own + 1).clamp_min(0), top_n)  # [B, S, Hkv, top_n]
    visible = _chosen_keys(indices, positions, T, block)[:, :, None]  # [B, Hkv, 1, S, T]
    selected, lse_selected, _ = _attend(q_wide, k_wide, v_wide, visible, scale)

    key, p = torch.arange(T, device=q.device), positions[:, :, None]
    visible = ((key <= p) & (key > p - window))[:, None, None]
    near, lse_near, _ = _attend(q_wide, k_wide, v_wide, visible, scale)

    outs = torch.stack((compressed, selected, near))  # [3, B, S, H, Dv]
    out = torch.einsum("cbshd,bshc->bshd", outs, gates.to(dtype)).to(q.dtype)
    lse = torch.stack((lse_compressed, lse_selected, lse_near))
    return out, outs.detach().to(q.dtype), lse.detach(), indices


def block_attention(
    q: Tensor,  # [B, S, H, D]     packed: [N, H, D]
    k: Tensor,  # [B, T, Hkv, D]   packed: [N, Hkv, D]
    v: Tensor,  # [B, T, Hkv, Dv]
    *,
    block: int,
    top_k: int,
    scale: float | None = None,  # default D^-0.5
    cu_seqlens: Tensor | None = None,  # [B+1]
) -> tuple[Tensor, Tensor, Tensor]:
    """MoBA -> out [B, S, H, Dv] in q's dtype, lse [B, S, H], blocks [B, S, H, top_k]; the last two carry no gradient."""
    if cu_seqlens is not None:
        cuts = cu_seqlens.tolist()
        parts = [
            block_attention(q[None, a:b], k[None, a:b], v[None, a:b], block=block, top_k=top_k, scale=scale)
            for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
        if not parts:
            out, lse = q.new_zeros(0, q.shape[1], v.shape[-1]), q.new_zeros(0, q.shape[1], dtype=compute_dtype(q.dtype))
            return out, lse, torch.zeros(0, q.shape[1], top_k, dtype=torch.int32, device=q.device)
        return tuple(torch.cat(x, 1)[0] for x in zip(*parts, strict=True))  # type: ignore[return-value]

    S, T, Hkv, G = q.shape[1], k.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    dtype, scale = compute_dtype(q.dtype), q.shape[-1] ** -0.5 if scale is None else scale
    q_wide, k_wide, v_wide = (x.to(dtype) for x in (q, k, v))
    positions = torch.arange(T - S, T, device=q.device)[None]  # [1, S]
    own = positions.div(block, rounding_mode="floor")

    means = block_means(k_wide.detach(), block)  # [B, blocks, Hkv, D]
    scores = torch.einsum("bskgd,bjkd->bskgj", q_wide.detach().unflatten(2, (Hkv, G)), means).flatten(2, 3)
    forced = torch.arange(means.shape[1], device=q.device) == own[:, :, None]
    indices = _choose(scores, forced, (own + 1).clamp_min(0), top_k)  # [B, S, H, top_k]
    visible = _chosen_keys(indices, positions, T, block).unflatten(1, (Hkv, G))  # [B, Hkv, G, S, T]
    out, lse, _ = _attend(q_wide, k_wide, v_wide, visible, scale)
    return out.to(q.dtype), lse.detach(), indices


def block_means(k: Tensor, block: int) -> Tensor:
    """k [B, T, Hkv, D] -> the mean of each block of keys [B, blocks, Hkv, D], the last block's over what it has."""
    T = k.shape[1]
    blocks = -(-T // block)
    sums = F.pad(k, (0, 0, 0, 0, 0, blocks * block - T)).unflatten(1, (blocks, block)).sum(2)
    counts = (T - torch.arange(blocks, device=k.device) * block).clamp_max(block)
    return sums / counts.view(-1, 1, 1).to(k.dtype)
