"""DeepSeek sparse attention (DeepSeek-V3.2) as a module: MLA over the keys that a light indexer selects.

Shapes: B batch, S tokens, T cached tokens, H heads, C latent, R rope dims, Hi indexer heads, Di indexer dims, K top-k.

    I[t, s] = Σ_j w[t, j] · ReLU(q[t, j]·k[s]);  token t attends to the K keys of largest I[t, ·]

The selection has no gradient. The indexer learns from its own loss, the divergence of softmax(I) from the main
attention's probabilities, over inputs detached from the main model, which learns from the language loss alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from thinkernel.nn.cache import CacheStep, append_rows
from thinkernel.nn.linear import Linear
from thinkernel.nn.mla import MultiHeadLatentAttention
from thinkernel.nn.rope import rotate_front
from thinkernel.ops import checks
from thinkernel.ops.attention import attention
from thinkernel.ops.sparse import indexer_loss, indexer_topk, sparse_attention


class Indexer(nn.Module):
    """Projects tokens to the queries, the key and the head weights that score keys for sparse attention.

    RoPE turns the first rope_dim of each query and key, half-split in V3.2 and interleaved in GLM-5; the key passes a
    LayerNorm (with bias, eps 1e-6) before it."""

    def __init__(
        self, hidden: int, q_latent: int, heads: int, dim: int, rope_dim: int, *, rope_interleaved: bool = False
    ) -> None:
        super().__init__()
        checks.integer("heads", heads, 1)
        if rope_dim > dim:
            raise ValueError(f"dim: got {dim} indexer dims, takes at least rope_dim = {rope_dim}")
        self.heads, self.dim, self.rope_dim, self.rope_interleaved = heads, dim, rope_dim, rope_interleaved
        self.q_proj = Linear(q_latent, heads * dim, bias=False)
        self.k_proj = Linear(hidden, dim, bias=False)
        self.k_norm = nn.LayerNorm(dim, eps=1e-6)
        self.weight_proj = Linear(hidden, heads, bias=False)

    def forward(self, x: Tensor, q_latent: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, hidden], q_latent [B, S, Q] -> q [B, S, Hi, Di], k [B, S, Di], w [B, S, Hi] float32."""
        q = self.q_proj(q_latent).view(*x.shape[:-1], self.heads, self.dim)
        q = rotate_front(q, rope, interleaved=self.rope_interleaved)
        k = self.k_norm(self.k_proj(x)).unsqueeze(-2)  # one shared head
        k = rotate_front(k, rope, interleaved=self.rope_interleaved).squeeze(-2)
        w = self.weight_proj(x).to(torch.promote_types(x.dtype, torch.float32))
        return q, k, w * (self.heads * self.dim) ** -0.5


class SparseLatentAttention(MultiHeadLatentAttention):
    """MLA whose every query attends to top_k keys. Takes the arguments of MultiHeadLatentAttention besides.

    shared_indexer: the layer has no indexer and attends to the keys that an earlier layer chose, which it is given (GLM-5)."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        *,
        top_k: int = 2048,
        indexer_heads: int = 64,
        indexer_dim: int = 128,
        indexer_rope_interleaved: bool = False,
        shared_indexer: bool = False,
        q_latent: int = 1536,
        **options: Any,
    ) -> None:
        super().__init__(hidden, heads, q_latent=q_latent, **options)
        if q_latent is None:
            raise ValueError("q_latent: got None, takes a size (the indexer reads the query latent)")
        checks.integer("top_k", top_k, 1)
        self.top_k = top_k
        self.indexer = None if shared_indexer else Indexer(
            hidden, q_latent, indexer_heads, indexer_dim, self.rope_dim, rope_interleaved=indexer_rope_interleaved
        )  # fmt: skip

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str) -> tuple:
        """Latents [B, T_max, C + R] and, with an indexer, its keys [B, T_max, Di]."""
        if dtype == torch.uint8:
            raise ValueError("dtype: got uint8, takes a floating dtype (sparse attention has no FP8 cache in a module yet)")
        if self.indexer is None:
            return super().new_cache(batch, capacity, dtype=dtype, device=device)
        index_keys = torch.zeros(batch, capacity, self.indexer.dim, dtype=dtype, device=device)
        return (*super().new_cache(batch, capacity, dtype=dtype, device=device), index_keys)

    def forward(  # type: ignore[override]  # a second result, and only where it is asked for
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        *,
        key_start: Tensor | None = None,
        cache: tuple[Tensor, ...] | None = None,
        step: CacheStep | None = None,
        sparse: bool = True,
        indices: Tensor | None = None,
        return_indexer_loss: bool = False,
        return_indices: bool = False,
    ) -> Any:
        """x [B, S, hidden] -> [B, S, hidden], with return_indexer_loss also the indexer's loss per query [B, S], with
        return_indices also the chosen keys int32 [B, S, K], for the layers that share them.

        sparse=False is the warm-up stage: dense attention, the loss over all keys, no indices (None). indices: of a layer
        with shared_indexer alone, what an earlier layer returned. Padding belongs on the right."""
        self._check(x, None, None, cache, step, None, "auto")
        self._check_sparse(key_start, cache, sparse, indices, return_indexer_loss)
        q_nope, q_rope, q_latent = self._queries(x, rope)
        latent, k_rope = self._latents(x, rope)
        kv = torch.cat((latent, k_rope), dim=-1)  # [B, S, C + R]
        index = None if self.indexer is None else self.indexer(x.detach(), cast(Tensor, q_latent).detach(), rope)

        absorbed, lse = None, None  # lse [B, S, H]: the loss shares the attention's
        if sparse:
            seqlens, keys, extent = None, kv, x.shape[1]
            if cache is not None and step is not None:
                append_rows(cache[0], kv, step)
                if index is not None:
                    append_rows(cache[1], index[1], step)
                if not step.fresh or cache[0].dtype != kv.dtype:  # as the cache holds them, whether they came alone or not
                    seqlens, extent = step.seqlens, step.extent
                    keys = cache[0][:, :extent]  # [B, T, C + R]
            if index is not None:
                index_q, index_keys, index_w = index
                if seqlens is not None and cache is not None:
                    index_keys = cache[1][:, :extent]  # [B, T, Di]
                with torch.no_grad():
                    q = index_q.to(index_keys.dtype)
                    indices = indexer_topk(q, index_keys, index_w, top_k=self.top_k, seqlens=seqlens)  # [B, S, K]
            absorbed = self._absorb(q_nope, q_rope)  # [B, S, H, C + R]
            attended, lse = sparse_attention(
                absorbed.to(keys.dtype), keys, cast(Tensor, indices), value_dim=self.kv_latent, scale=self.scale, seqlens=seqlens,
                return_lse=True,
            )  # [B, S, H, C]
            out = self._emit(attended.to(absorbed.dtype))
        else:
            heads = self._full_heads(q_nope, q_rope, latent, k_rope)
            out, lse = attention(*heads, causal=True, scale=self.scale, return_lse=True)

        out = self.o_proj(out.flatten(-2))
        results = [out]
        if return_indexer_loss and index is not None:
            if absorbed is None:
                with torch.no_grad():
                    absorbed = self._absorb(q_nope, q_rope)
            index_q, index_k, index_w = index
            loss = indexer_loss(
                index_q,
                index_k,
                index_w,
                absorbed.detach(),
                kv.detach(),
                indices=indices,
                scale=self.scale,
                target_lse=lse,
                reduction="none",
            )  # [B, S]
            results.append(loss)
        if return_indices:
            results.append(indices)
        return out if len(results) == 1 else tuple(results)

    def _check_sparse(
        self,
        key_start: Tensor | None,
        cache: tuple[Tensor, ...] | None,
        sparse: bool,
        indices: Tensor | None,
        return_indexer_loss: bool,
    ) -> None:
        if key_start is not None:
            raise ValueError("key_start: sparse attention takes no left padding; pad on the right")
        if cache is not None and (return_indexer_loss or not sparse):
            name = "return_indexer_loss" if return_indexer_loss else "sparse"
            raise ValueError(f"{name}: takes its default where a cache is given (generation)")
        if self.indexer is not None and indices is not None:
            raise ValueError("indices: this layer has an indexer of its own (shared_indexer = False), so it must be None")
        if self.indexer is None and sparse and indices is None:
            raise ValueError("indices: got None, takes what an earlier layer chose (shared_indexer = True)")
        if self.indexer is None and return_indexer_loss:
            raise ValueError("return_indexer_loss: this layer has no indexer (shared_indexer = True)")
