"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) as a module.

Shapes: B batch, S tokens, T cached tokens, H heads, N nope dims, R rope dims, Dv value dims, C latent, Q query latent.

    c = RMSNorm(W_DKV x) [C], k_rope [R] one shared head;  k_nope, v = W_UK c, W_UV c per head
    q = [q_nope | q_rope] = W_UQ RMSNorm(W_DQ x);  scores = (q_nope·k_nope + q_rope·k_rope) · scale

Prefill and training expand the latents into heads; decode moves W_UK to the query's side and W_UV behind the softmax
("absorbed"), so that one head of C + R values a token is all that is cached and read.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from thinkernel.nn.cache import CacheStep, append_rows, check_step
from thinkernel.nn.linear import Linear, linear_per_head
from thinkernel.nn.rope import rotate
from thinkernel.ops.attention import attention
from thinkernel.ops.mla import mla_decode


class MultiHeadLatentAttention(nn.Module):
    """Causal MLA with all its projections. scale defaults to (nope_dim + rope_dim)^-0.5; YaRN models pass theirs,
    multiplied by `Yarn.softmax_factor`. q_latent None projects the query directly (V2-Lite)."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        *,
        kv_latent: int = 512,
        nope_dim: int = 128,
        rope_dim: int = 64,
        value_dim: int = 128,
        q_latent: int | None = 1536,
        bias: bool = False,
        eps: float = 1e-6,
        rope_interleaved: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_latent = heads, kv_latent
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.rope_interleaved = rope_interleaved
        self.scale = (nope_dim + rope_dim) ** -0.5 if scale is None else scale
        query_dim = heads * (nope_dim + rope_dim)
        if q_latent is None:
            self.q_proj = Linear(hidden, query_dim, bias=False)
        else:
            self.q_a_proj = Linear(hidden, q_latent, bias=bias)
            self.q_a_norm = nn.RMSNorm(q_latent, eps=eps)
            self.q_b_proj = Linear(q_latent, query_dim, bias=False)
        self.q_latent = q_latent
        self.kv_a_proj = Linear(hidden, kv_latent + rope_dim, bias=bias)
        self.kv_a_norm = nn.RMSNorm(kv_latent, eps=eps)
        self.kv_b_proj = Linear(kv_latent, heads * (nope_dim + value_dim), bias=False)
        self.o_proj = Linear(heads * value_dim, hidden, bias=bias)

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str) -> tuple:
        """The latents and the shared rotary key of every token, [B, T_max, C + R]."""
        return (torch.zeros(batch, capacity, self.kv_latent + self.rope_dim, dtype=dtype, device=device),)

    def _queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        latent = None if self.q_latent is None else self.q_a_norm(self.q_a_proj(x))  # [B, S, Q]
        q = self.q_proj(x) if latent is None else self.q_b_proj(latent)
        q = q.view(*x.shape[:-1], self.heads, self.nope_dim + self.rope_dim)  # [B, S, H, N + R]
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        return q_nope, rotate(q_rope, rope, interleaved=self.rope_interleaved), latent

    def _latents(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        latent, k_rope = self.kv_a_proj(x).split((self.kv_latent, self.rope_dim), dim=-1)
        k_rope = rotate(k_rope.unsqueeze(-2), rope, interleaved=self.rope_interleaved).squeeze(-2)
        return self.kv_a_norm(latent), k_rope  # [B, S, C], [B, S, R]

    def _up_weights(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, N, C] and W_UV [H, Dv, C], the two halves of every head of kv_b_proj."""
        weight = self.kv_b_proj.weight.view(self.heads, self.nope_dim + self.value_dim, self.kv_latent)
        return weight[:, : self.nope_dim], weight[:, self.nope_dim :]

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, key_start: Tensor | None
    ) -> Tensor:
        """Attention over full heads, [B, S, H, Dv]."""
        kv = self.kv_b_proj(latent).view(*latent.shape[:-1], self.heads, self.nope_dim + self.value_dim)
        k_nope, v = kv.split((self.nope_dim, self.value_dim), dim=-1)  # [B, S, H, N], [B, S, H, Dv]
        q = torch.cat((q_nope, q_rope), dim=-1)  # [B, S, H, N + R]
        k = torch.cat((k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], self.rope_dim)), dim=-1)
        return cast(Tensor, attention(q, k, v, causal=True, scale=self.scale, key_start=key_start))

    def _absorb(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """Queries that score latents directly, [B, S, H, C + R]."""
        up_k, _ = self._up_weights()
        return torch.cat((linear_per_head(q_nope, up_k.transpose(1, 2)), q_rope), dim=-1)

    def _emit(self, attended: Tensor) -> Tensor:
        """Values [B, S, H, Dv] of attended latents [B, S, H, C]."""
        _, up_v = self._up_weights()
        return linear_per_head(attended, up_v)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        *,
        key_start: Tensor | None = None,
        cache: tuple[Tensor, ...] | None = None,
        step: CacheStep | None = None,
    ) -> Tensor:
        """x [B, S, hidden] -> [B, S, hidden]. rope: cos and sin [B, S, R/2]; key_start [B]: left padding; with a cache
        the S tokens are appended to it and see all that is in it."""
        check_step(cache, step)
        q_nope, q_rope, _ = self._queries(x, rope)
        latent, k_rope = self._latents(x, rope)
        if cache is not None and step is not None:
            append_rows(cache[0], torch.cat((latent, k_rope), dim=-1), step)
        if cache is None or step is None or step.fresh:
            out = self._expanded(q_nope, q_rope, latent, k_rope, key_start)
        else:
            attended = mla_decode(
                self._absorb(q_nope, q_rope),
                cache[0][:, : step.extent],  # [B, T, C + R]
                seqlens=step.seqlens,
                value_dim=self.kv_latent,
                scale=self.scale,
            )  # [B, S, H, C]
            out = self._emit(cast(Tensor, attended))
        return self.o_proj(out.flatten(-2))
