"""Grouped-query attention as a module.

Shapes: B batch, S tokens, T cached tokens, H query heads, Hkv key heads, D head dim. x [B, S, hidden].
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from thinkernel.nn.cache import CacheStep, check_step
from thinkernel.nn.linear import Linear
from thinkernel.nn.rope import rotate
from thinkernel.ops.attention import append_kv, attention, attention_decode


class GroupedQueryAttention(nn.Module):
    """Causal MHA / GQA / MQA with projections: out = W_O · attention(W_Q x, W_K x, W_V x).

    qk_norm puts an RMSNorm over each head's query and key (Qwen3); window is the (left, right) of tk.attention;
    sinks adds one learned logit per head to the softmax (gpt-oss); softcap is Gemma 2's c·tanh(s/c).
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qk_norm: bool = False,
        bias: bool = False,
        eps: float = 1e-6,
        rope_interleaved: bool = False,
        scale: float | None = None,
        window: tuple[int, int] | None = None,
        sinks: bool = False,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        head_dim = hidden // heads if head_dim is None else head_dim
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads: got {kv_heads}, takes a divisor of heads = {heads}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope_interleaved, self.scale, self.window, self.softcap = rope_interleaved, scale, window, softcap
        self.q_proj = Linear(hidden, heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden, kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden, kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, hidden, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str) -> tuple:
        """Keys and values, each [B, T_max, Hkv, D]."""
        shape = (batch, capacity, self.kv_heads, self.head_dim)
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        *,
        key_start: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        step: CacheStep | None = None,
    ) -> Tensor:
        """x [B, S, hidden] -> [B, S, hidden]. rope: cos and sin [B, S, D/2]; key_start [B]: left padding; with a cache
        the S tokens are appended to it and see all that is in it."""
        check_step(cache, step)
        batch, size, _ = x.shape
        q = self.q_proj(x).view(batch, size, self.heads, self.head_dim)  # [B, S, H, D]
        k = self.k_proj(x).view(batch, size, self.kv_heads, self.head_dim)  # [B, S, Hkv, D]
        v = self.v_proj(x).view(batch, size, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q = rotate(q, rope, interleaved=self.rope_interleaved)
            k = rotate(k, rope, interleaved=self.rope_interleaved)
        options: dict[str, Any] = dict(scale=self.scale, window=self.window, sinks=self.sinks, softcap=self.softcap)
        if cache is not None and step is not None:
            append_kv(*cache, k.detach(), v.detach(), seqlens=step.seqlens)
        if cache is None or step is None or step.fresh:
            out = attention(q, k, v, causal=True, key_start=key_start, **options)
        else:
            k_cache, v_cache = (t[:, : step.extent] for t in cache)  # [B, T, Hkv, D]
            out = attention_decode(q, k_cache, v_cache, seqlens=step.seqlens, causal=True, **options)
        return self.o_proj(cast(Tensor, out).flatten(-2))
