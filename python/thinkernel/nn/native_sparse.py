"""Native sparse attention (NSA, arXiv:2502.11089) as a module.

Shapes: B batch, S tokens, T cached tokens, N packed tokens, H query heads, Hkv key heads, D head dim, Dv value dim, R rotary dims;
l, d: length and stride of compressed blocks, Tc = (T − l) // d + 1 of them. x [B, S, hidden], or packed [N, hidden].

    q, k, v = W_Q x, W_K x, W_V x per head, q and k with RoPE;  gates = sigmoid(W_G x), three per head
    Kc_i = R(e) φ_k(R(−e) k_j, j = i d … e),  Vc_i = φ_v(v_j),  e = i d + l − 1 the block's last position
    out = W_O native_sparse_attention(q, k, v, Kc, Vc, gates)

φ adds an embedding of the place in the block and is an MLP over the block's l vectors side by side, or their mean. R(p) is RoPE's
rotation at position p: φ sees keys turned by their place in the block alone, and what it gives is turned like a key at e. So
everything a new block needs lies in the cache or in the step that completes it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from thinkernel.nn.activation import sigmoid, silu
from thinkernel.nn.attention import GroupedQueryAttention
from thinkernel.nn.cache import CacheStep, append_rows
from thinkernel.nn.linear import Linear
from thinkernel.nn.rope import rotate_front
from thinkernel.ops import checks
from thinkernel.ops.memory import zeros_cache
from thinkernel.ops.native_sparse import native_sparse_attention
from thinkernel.reference.native_sparse import compressed_length


class BlockCompression(nn.Module):
    """φ: the vectors of a block [..., l, D] -> one [..., D], the same for all heads. inner: the MLP's width, None: the mean."""

    def __init__(self, length: int, dim: int, inner: int | None) -> None:
        super().__init__()
        self.position = None if inner is None else nn.Parameter(torch.randn(length, dim) * 0.02)
        self.up = None if inner is None else Linear(length * dim, inner)
        self.down = None if inner is None else Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.position is None or self.up is None or self.down is None:
            return x.mean(-2)
        return self.down(silu(self.up((x + self.position).flatten(-2))))


class NativeSparseAttention(GroupedQueryAttention):
    """Causal attention of three gated branches: compressed keys, the blocks these choose, a window.

    Args:
        hidden, heads, kv_heads, head_dim, value_dim, bias, qk_norm, eps, rotary_dim, rope_interleaved, scale: as in
            GroupedQueryAttention, whose projections these are.
        block, compress_block, stride, top_n, window: as in tk.native_sparse_attention.
        compression: "mlp" or "mean". compress_inner: the MLP's width, default 4 head dims.

    float32, bfloat16, float16; float64 on the reference backend. Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        value_dim: int | None = None,
        block: int = 64,
        compress_block: int = 32,
        stride: int = 16,
        top_n: int = 16,
        window: int = 512,
        compression: str = "mlp",
        compress_inner: int | None = None,
        bias: bool = False,
        qk_norm: bool | str = False,
        eps: float = 1e-6,
        rotary_dim: int | None = None,
        rope_interleaved: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__(
            hidden, heads, kv_heads, head_dim, value_dim=value_dim, bias=bias, qk_norm=qk_norm, eps=eps, rotary_dim=rotary_dim,
            rope_interleaved=rope_interleaved, scale=scale,
        )  # fmt: skip
        checks.one_of("compression", compression, ("mlp", "mean"))
        for name, value, least in (("stride", stride, 1), ("top_n", top_n, 3), ("window", window, 1)):
            checks.integer(name, value, least)
        for name, value in (("block", block), ("compress_block", compress_block)):
            checks.integer(name, value, 1)
            if value % stride:
                raise ValueError(f"{name}: got {value}, takes a multiple of stride = {stride}")
        if compress_inner is not None:
            checks.integer("compress_inner", compress_inner, 1)
        inner = None if compression == "mean" else compress_inner or 4 * self.head_dim
        self.compress_k = BlockCompression(compress_block, self.head_dim, inner)
        self.compress_v = BlockCompression(compress_block, self.value_dim, inner)
        self.branch_gates = Linear(hidden, heads * 3, bias=bias)
        self.compress_block, self.stride = compress_block, stride
        self.sizes: dict[str, Any] = dict(
            block=block, compress_block=compress_block, stride=stride, top_n=top_n, window=window, scale=scale
        )

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str) -> tuple:
        """Keys [B, T_max, Hkv, D], values [B, T_max, Hkv, Dv], and the compressed ones of as many tokens."""
        blocks = compressed_length(capacity, self.compress_block, self.stride)
        return tuple(
            zeros_cache((batch, length, self.kv_heads, dim), dtype, device)
            for length in (capacity, blocks)
            for dim in (self.head_dim, self.value_dim)
        )

    def forward(  # type: ignore[override]  # without left padding and prefixes
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: tuple[Tensor, ...] | None = None,
        step: CacheStep | None = None,
    ) -> Tensor:
        """x [B, S, hidden] -> [B, S, hidden], every token over itself and what came before it.

        rope, cu_seqlens: as in GroupedQueryAttention. cache, step: the S tokens are appended to the cache (new_cache) and see
        all that is in it; there is a backward for an empty cache alone. Padding belongs on the right."""
        self._check(x, rope, None, cu_seqlens, cast(Any, cache), step, None)
        if cu_seqlens is not None:
            checks.tensor("cu_seqlens", cu_seqlens, 1, "[B + 1]", checks.INTEGERS)
            checks.cumulative("cu_seqlens", cu_seqlens, x.shape[0])
        q, k, v, _ = self._project(x, rope)
        gates = sigmoid(self.branch_gates(x).unflatten(-1, (self.heads, 3)))  # [B, S, H, 3]
        if cache is not None and step is not None and not step.fresh:
            return self.o_proj(self._cached(q, k, v, gates, rope, cache, step).flatten(-2))
        starts = self._starts(k, cu_seqlens)  # [Tc] first tokens of the compressed blocks
        turn = None
        if rope is not None:
            last = starts + self.compress_block - 1
            turn = rope[0].index_select(-2, last), rope[1].index_select(-2, last)
        kc, vc = self._compress(self._windows(k, starts), self._windows(v, starts), turn)
        if cache is not None and step is not None:
            append_rows(cache[0], k, step)
            append_rows(cache[1], v, step)
            cache[2][:, : kc.shape[1]], cache[3][:, : vc.shape[1]] = kc.detach(), vc.detach()
        out = native_sparse_attention(q, k, v, kc, vc, gates, **self.sizes, cu_seqlens=cu_seqlens)  # [B, S, H, Dv]
        return self.o_proj(out.flatten(-2))

    def _starts(self, k: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The first token of each whole block, among all tokens."""
        if cu_seqlens is None:
            return torch.arange(compressed_length(k.shape[1], self.compress_block, self.stride), device=k.device) * self.stride
        cuts = cu_seqlens.tolist()
        counts = [compressed_length(b - a, self.compress_block, self.stride) for a, b in zip(cuts, cuts[1:])]
        parts = [a + torch.arange(n, device=k.device) * self.stride for a, n in zip(cuts, counts)]
        return torch.cat([torch.zeros(0, dtype=torch.long, device=k.device), *parts])

    def _windows(self, x: Tensor, starts: Tensor) -> Tensor:
        """[..., S, Hkv, ·] -> the blocks of tokens from `starts` on [..., Tc, Hkv, l, ·]."""
        tokens = starts[:, None] + torch.arange(self.compress_block, device=x.device)  # [Tc, l]
        found = x.index_select(-3, tokens.flatten()).unflatten(-3, (len(starts), self.compress_block))
        return found.transpose(-3, -2)

    def _compress(self, k: Tensor, v: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Blocks of keys and values [..., Tc, Hkv, l, ·], cos and sin [..., Tc, R/2] of their last tokens -> [..., Tc, Hkv, ·]."""
        if turn is not None:
            cos, sin = turn
            size = cos.square() + sin.square()  # of a rotation that also scales (YaRN)
            cos, sin = ((t / size).unsqueeze(-2).expand(*k.shape[:-2], -1) for t in (cos, -sin))  # [..., Tc, Hkv, R/2]
            k = rotate_front(k, (cos, sin), interleaved=self.rope_interleaved)
        kc, vc = self.compress_k(k), self.compress_v(v)
        if turn is not None:
            kc = rotate_front(kc, turn, interleaved=self.rope_interleaved)
        return kc, vc

    def _cached(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, rope: tuple[Tensor, Tensor] | None, cache: tuple[Tensor, ...],
        step: CacheStep,
    ) -> Tensor:
        """Appends the new tokens, compresses the blocks that they complete, and attends to all -> [B, S, H, Dv]."""
        append_rows(cache[0], k, step)
        append_rows(cache[1], v, step)
        S, length = q.shape[1], self.compress_block
        end = step.seqlens.long()[:, None]  # [B, 1]
        first = (end - S - length + self.stride).div(self.stride, rounding_mode="floor").clamp_min(0)  # whose end is new
        blocks = first + torch.arange(-(-S // self.stride), device=q.device)  # [B, U]
        last = blocks * self.stride + length - 1
        row, place = torch.nonzero(last < end, as_tuple=True)
        if len(row):
            number, last = blocks[row, place], last[row, place]  # [n]
            tokens = last[:, None] + torch.arange(1 - length, 1, device=q.device)  # [n, l]
            keys, values = (t[row[:, None], tokens].transpose(1, 2).to(k.dtype) for t in cache[:2])  # [n, Hkv, l, ·]
            turn = None
            if rope is not None:
                new = last - (end[row, 0] - S)
                cos, sin = (t.expand(len(q), -1, -1)[row, new] for t in rope)  # [n, R/2]
                turn = cos, sin
            for held, found in zip(cache[2:], self._compress(keys, values, turn), strict=True):
                held[row, number] = found.detach().to(held.dtype)
        dtype, visible = cache[0].dtype, compressed_length(step.extent, length, self.stride)
        k, v, kc, vc = (t[:, :size] for t, size in zip(cache, (step.extent, step.extent, visible, visible), strict=True))
        return native_sparse_attention(q.to(dtype), k, v, kc, vc, gates, **self.sizes, seqlens=step.seqlens).to(q.dtype)
