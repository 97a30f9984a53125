"""Grouped-query attention as a module.

Shapes: B batch, S tokens, T cached tokens, N packed tokens, H query heads, Hkv key heads, D head dim, Dv value dim,
R rotary dims, P pages. x [B, S, hidden], or packed [N, hidden].

    q, k, v = W_Q x, W_K x, W_V x per head;  q, k = RoPE(norm(q)), RoPE(norm(k))
    out = W_O (attention(q, k, v) · sigmoid(gate))

Norm, RoPE and gate are optional. Sources: GQA (Ainslie et al., arXiv:2305.13245), QK-norm (Henry et al.,
arXiv:2010.04245), the gate (Qiu et al., arXiv:2505.06708); what each model does is transformers' modeling_<model>.py.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from thinkernel.nn.activation import sigmoid
from thinkernel.nn.cache import CacheStep, check_step
from thinkernel.nn.linear import Linear
from thinkernel.nn.norm import ZeroCentredRMSNorm
from thinkernel.nn.rope import rotate_front
from thinkernel.ops import checks
from thinkernel.ops.attention import append_kv, attention, attention_decode
from thinkernel.ops.memory import zeros_cache

QK_NORMS = (False, True, "head", "full")
GATES = (None, "q_proj", "gate_proj")


class GroupedQueryAttention(nn.Module):
    """Causal MHA / GQA / MQA with its projections, under the names of a Hugging Face checkpoint: q_proj, k_proj,
    v_proj, o_proj, q_norm, k_norm, sinks, gate_proj. The state dict of a transformers attention layer loads as it is.

    Args:
        hidden, heads, kv_heads, head_dim: sizes; kv_heads defaults to heads, head_dim to hidden / heads.
        value_dim: Dv where it is not head_dim.
        bias: biases on q, k and v; out_bias: on o, by default as bias (Llama, gpt-oss: both, Qwen2: q, k, v alone).
        qk_norm: RMSNorm of queries and keys before RoPE: "head" (or True) over each head (Qwen3, Gemma 3), "full" over
            all heads of the projection together (OLMo 2). eps is the norm's; norm_zero_centred: its gain is 1 + weight
            (Qwen3-Next, Gemma 3).
        rotary_dim: R, the leading dims of a head that RoPE turns, default head_dim. A layer without positions (NoPE)
            is one that is called without `rope`.
        rope_interleaved: pairs 2i with 2i + 1 (GLM-4) instead of i with i + R/2.
        scale, window, chunk, softcap: as in tk.attention. Gemma's scale is query_pre_attn_scalar^-0.5; a
            sliding_window W is the window (W − 1, 0).
        sinks: one learned logit per head in the softmax, with value 0 (gpt-oss).
        gate: what the attention's result is multiplied by after a sigmoid: None; "q_proj", whose rows then hold
            [query | gate] head by head (Qwen3-Next); or "gate_proj", a projection of its own (AFMoE).

    float32, bfloat16, float16; float64 on the reference backend. On the CPU a token's result has the same bits alone, in
    any batch, behind left padding, packed and decoded (with qk_norm="full" below 32768 dims: torch sums a longer single
    row in parts). Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        value_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: bool | str = False,
        norm_zero_centred: bool = False,
        eps: float = 1e-6,
        rotary_dim: int | None = None,
        rope_interleaved: bool = False,
        scale: float | None = None,
        window: tuple[int, int] | None = None,
        chunk: int | None = None,
        sinks: bool = False,
        softcap: float | None = None,
        gate: str | None = None,
    ) -> None:
        super().__init__()
        checks.integer("hidden", hidden, 1)
        checks.integer("heads", heads, 1)
        kv_heads = heads if kv_heads is None else kv_heads
        checks.integer("kv_heads", kv_heads, 1)
        if heads % kv_heads:
            raise ValueError(f"kv_heads: got {kv_heads}, takes a divisor of heads = {heads}")
        if head_dim is None and hidden % heads:
            raise ValueError(f"heads: got {heads}, takes a divisor of hidden = {hidden} where head_dim is not given")
        head_dim = hidden // heads if head_dim is None else head_dim
        checks.integer("head_dim", head_dim, 1)
        value_dim = head_dim if value_dim is None else value_dim
        checks.integer("value_dim", value_dim, 1)
        if rotary_dim is not None:
            checks.integer("rotary_dim", rotary_dim, 2)
            if rotary_dim % 2 or rotary_dim > head_dim:
                raise ValueError(f"rotary_dim: got {rotary_dim}, takes an even number up to head_dim = {head_dim}")
        checks.one_of("qk_norm", qk_norm, QK_NORMS)
        if norm_zero_centred and not qk_norm:
            raise ValueError("norm_zero_centred: got True, takes a qk_norm beside it")
        checks.one_of("gate", gate, GATES)
        checks.positive("softcap", softcap)
        if window is not None:
            if not isinstance(window, (tuple, list)) or len(window) != 2:
                raise ValueError(f"window: got {window!r}, takes (left, right), −1 for unlimited")
            for side in window:
                checks.integer("window", side, -1)
        if chunk is not None:
            checks.integer("chunk", chunk, 1)

        self.hidden, self.heads, self.kv_heads = hidden, heads, kv_heads
        self.head_dim, self.value_dim, self.rotary_dim = head_dim, value_dim, rotary_dim or head_dim
        self.rope_interleaved, self.scale, self.softcap = rope_interleaved, scale, softcap
        self.window, self.chunk, self.gate, self.qk_norm = window, chunk, gate, "head" if qk_norm is True else qk_norm
        query_dim = head_dim + value_dim if gate == "q_proj" else head_dim  # rows of q_proj per head
        self.q_proj = Linear(hidden, heads * query_dim, bias=bias)
        self.k_proj = Linear(hidden, kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden, kv_heads * value_dim, bias=bias)
        self.o_proj = Linear(heads * value_dim, hidden, bias=bias if out_bias is None else out_bias)
        self.gate_proj = Linear(hidden, heads * value_dim, bias=False) if gate == "gate_proj" else None
        self.q_norm: nn.RMSNorm | None = None
        self.k_norm: nn.RMSNorm | None = None
        if qk_norm:
            norm = ZeroCentredRMSNorm if norm_zero_centred else nn.RMSNorm
            full = qk_norm == "full"
            self.q_norm = norm(heads * head_dim if full else head_dim, eps=eps)
            self.k_norm = norm(kv_heads * head_dim if full else head_dim, eps=eps)
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str) -> tuple:
        """Keys [B, T_max, Hkv, D] and values [B, T_max, Hkv, Dv]; new_cache(P, page size, …) makes pages."""
        return tuple(
            zeros_cache((batch, capacity, self.kv_heads, dim), dtype, device)
            for dim in (self.head_dim, self.value_dim)
        )

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        *,
        key_start: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        step: CacheStep | None = None,
        prefix: tuple[Any, ...] | None = None,
    ) -> Tensor:
        """x [B, S, hidden] -> [B, S, hidden], every token over itself and what came before it.

        rope: cos and sin [B, S, R/2] (packed [N, R/2]) from RotaryEmbedding; None: no positions.
        key_start: [B] int32, the first real token of rows padded on the left. What padding rows give has no meaning.
        cu_seqlens: [B + 1] int32 offsets: x is packed sequences [N, hidden], positions restart in each
            (packed_positions).
        cache, step: the S tokens are appended to the cache (new_cache) at step's place and see all that is in it. There
            is a backward for an empty cache alone. Padding belongs on the right then.
        prefix: with a cache, keys and values before every row's own, as tk.attention_decode takes them: read once for
            all rows, not counted by step.seqlens; the rows' positions go on from it."""
        self._check(x, rope, key_start, cu_seqlens, cache, step, prefix)
        q, k, v, gate = self._project(x, rope)
        out = self._attend(q, k, v, key_start, cu_seqlens, cache, step, prefix)  # [B, S, H, Dv]
        if gate is not None:
            out = out * sigmoid(gate)
        return self.o_proj(out.flatten(-2))

    def _project(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """-> q [B, S, H, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv], gate [B, S, H, Dv] or None."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))
        gate = None
        if self.gate == "q_proj":
            q, gate = q.split((self.head_dim, self.value_dim), dim=-1)
        elif self.gate_proj is not None:
            gate = self.gate_proj(x).unflatten(-1, (self.heads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            if self.qk_norm == "full":
                q, k = self.q_norm(q.flatten(-2)).view(q.shape), self.k_norm(k.flatten(-2)).view(k.shape)
            else:
                q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q = rotate_front(q, rope, interleaved=self.rope_interleaved)
            k = rotate_front(k, rope, interleaved=self.rope_interleaved)
        return q, k, v, gate

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_start: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        step: CacheStep | None,
        prefix: tuple[Any, ...] | None,
    ) -> Tensor:
        options: dict[str, Any] = dict(
            causal=True, scale=self.scale, window=self.window, chunk=self.chunk, sinks=self.sinks, softcap=self.softcap
        )
        if cache is None or step is None:
            return cast(Tensor, attention(q, k, v, key_start=key_start, cu_seqlens_q=cu_seqlens, **options))
        append_kv(*cache, k.detach(), v.detach(), seqlens=step.seqlens, block_table=step.block_table)
        if step.fresh and prefix is None:
            return cast(Tensor, attention(q, k, v, **options))
        # [B, T, Hkv, D] or pages
        k_cache, v_cache = cache if step.block_table is not None else (t[:, : step.extent] for t in cache)
        out = attention_decode(
            q.to(k_cache.dtype), k_cache, v_cache, seqlens=step.seqlens, block_table=step.block_table, prefix=prefix, **options
        )
        return cast(Tensor, out).to(q.dtype)  # the cache's dtype is the caller's choice, also under autocast

    def _check(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        key_start: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        step: CacheStep | None,
        prefix: tuple[Any, ...] | None,
    ) -> None:
        dims, where = (3, "[B, S, hidden]") if cu_seqlens is None else (2, "[N, hidden] with cu_seqlens")
        checks.tensor("x", x, dims, where)
        checks.size("x", x, -1, self.hidden, "hidden")
        check_step(cache, step)
        if rope is not None:
            _check_rope(rope, x, self.rotary_dim)
        if cache is not None:
            for name, given in (("key_start", key_start), ("cu_seqlens", cu_seqlens)):
                if given is not None:
                    raise ValueError(f"{name}: takes no cache beside it; with a cache, rows are padded on the right")
        elif prefix is not None:
            raise ValueError("prefix: takes a cache beside it")


def _check_rope(rope: tuple[Tensor, Tensor], x: Tensor, rotary_dim: int) -> None:
    """cos and sin belong to x's tokens, or to one row of them for the whole batch, and turn rotary_dim dims."""
    if not isinstance(rope, (tuple, list)) or len(rope) != 2:
        raise ValueError(f"rope: got {type(rope).__name__}, takes (cos, sin)")
    want = [*x.shape[:-1], rotary_dim / 2]
    for t in rope:
        if t.dim() > x.dim() or any(a != b and (a != 1 or i == 0) for i, (a, b) in enumerate(zip(t.shape[::-1], want[::-1]))):
            raise ValueError(f"rope: got shape {list(t.shape)}, takes {[*x.shape[:-1], rotary_dim // 2]}, half of rotary_dim last")
