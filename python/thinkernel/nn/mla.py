"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) as a module.

Shapes: B batch, S tokens, T cached tokens, H heads, N nope dims, R rope dims, Dv value dims, C latent, Q query latent.

    c = RMSNorm(W_DKV x) [C], k_rope [R] one shared head;  k_nope, v = W_UK c, W_UV c per head
    q = [q_nope | q_rope] = W_UQ RMSNorm(W_DQ x);  scores = (q_nope·k_nope + q_rope·k_rope) · scale

Prefill and training expand the latents into heads; decode moves W_UK to the query's side and W_UV behind the softmax
("absorbed"), so that one head of C + R values a token is all that is cached and read.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from thinkernel.nn.cache import CacheStep, check_step
from thinkernel.nn.linear import Linear, linear_per_head
from thinkernel.nn.rope import rotate
from thinkernel.ops import checks
from thinkernel.ops.attention import attention, attention_decode
from thinkernel.ops.memory import zeros_cache
from thinkernel.ops.mla import FP8_BYTES, append_latent, gather_latent, mla_decode

MODES = ("auto", "expanded", "absorbed")
LATENT, ROPE = 512, 64  # values of a token in the FP8 layout
SAMPLES = 256  # weights looked at to see that they changed


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
        self.hidden = hidden
        self._absorbed: tuple[tuple[int, int, torch.dtype], Tensor, Tensor] | None = None  # see _up_weights
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
        """The latents and the shared rotary key of every token, [B, T_max, C + R]; new_cache(P, page size, …) makes pages.
        dtype torch.uint8: the FP8 layout [B, T_max, 656], which is that of 512 latents and 64 rotary dims."""
        width = self.kv_latent + self.rope_dim
        if dtype == torch.uint8:
            if (self.kv_latent, self.rope_dim) != (LATENT, ROPE):
                raise ValueError(
                    f"dtype: got uint8, the FP8 cache of {LATENT} + {ROPE} values, with kv_latent = {self.kv_latent} and "
                    f"rope_dim = {self.rope_dim}"
                )
            width = FP8_BYTES
        return (zeros_cache((batch, capacity, width), dtype, device),)

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
        """W_UKᵀ [H, C, N] and W_UV [H, Dv, C], the two halves of every head of kv_b_proj, W_UK turned for the query's side.

        The C++ products want its rows contiguous, so without autograd the turned half is prepared once and kept until the
        weights change: by an optimiser or load_state_dict (the version), a move (the address), or behind autograd's back
        through `.data` (a sample of values: an update of few of them may go unnoticed, one through the parameter itself does not).
        """
        weight = self.kv_b_proj.weight
        heads = weight.view(self.heads, self.nope_dim + self.value_dim, self.kv_latent)
        up_k, up_v = heads[:, : self.nope_dim].transpose(1, 2), heads[:, self.nope_dim :]
        differentiated = torch.is_grad_enabled() and weight.requires_grad
        if differentiated or weight.device.type != "cpu" or torch.compiler.is_compiling() or type(weight) is not nn.Parameter:
            return up_k, up_v
        sample = weight.detach().view(-1)[:: weight.numel() // SAMPLES | 1]  # odd: from every column
        key = weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype
        if self._absorbed is None or self._absorbed[0] != key or not torch.equal(self._absorbed[1], sample):
            with torch.inference_mode(False):  # whoever asks next may want to differentiate
                self._absorbed = key, sample.clone(), up_k.detach().contiguous()
        return self._absorbed[2], up_v

    def _expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        key_start: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attention over full heads, [B, S, H, Dv]; with seqlens the queries are the last of each row's seqlens[b] keys."""
        q, k, v = self._full_heads(q_nope, q_rope, latent, k_rope)
        if seqlens is not None:
            return cast(Tensor, attention_decode(q, k, v, seqlens=seqlens, scale=self.scale))
        options: dict[str, Any] = dict(key_start=key_start, cu_seqlens_q=cu_seqlens)
        return cast(Tensor, attention(q, k, v, causal=True, scale=self.scale, **options))

    def _full_heads(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, H, N + R], k [B, T, H, N + R], v [B, T, H, Dv]"""
        kv = self.kv_b_proj(latent).view(*latent.shape[:-1], self.heads, self.nope_dim + self.value_dim)
        k_nope, v = kv.split((self.nope_dim, self.value_dim), dim=-1)  # [B, T, H, N], [B, T, H, Dv]
        k = torch.cat((k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], self.rope_dim)), dim=-1)
        return torch.cat((q_nope, q_rope), dim=-1), k, v

    def _absorb(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """Queries that score latents directly, [B, S, H, C + R]."""
        up_k, _ = self._up_weights()
        return torch.cat((linear_per_head(q_nope, up_k), q_rope), dim=-1)

    def _emit(self, attended: Tensor) -> Tensor:
        """Values [B, S, H, Dv] of attended latents [B, S, H, C]."""
        _, up_v = self._up_weights()
        return linear_per_head(attended, up_v)

    def _attend_latents(
        self, q_nope: Tensor, q_rope: Tensor, kv_cache: Tensor, seqlens: Tensor, block_table: Tensor | None = None,
        prefix: tuple[Any, ...] | None = None,
    ) -> Tensor:
        """Absorbed attention over latents [B, T, C + R], pages of them or FP8, [B, S, H, Dv]."""
        q = self._absorb(q_nope, q_rope)
        attended = mla_decode(
            q if kv_cache.dtype == torch.uint8 else q.to(kv_cache.dtype), kv_cache, seqlens=seqlens, block_table=block_table,
            value_dim=self.kv_latent, scale=self.scale, prefix=prefix,
        )  # [B, S, H, C]
        return self._emit(cast(Tensor, attended).to(q.dtype))

    @property
    def absorb_up_to(self) -> int:
        """How many new tokens over a cache make the expanded heads cheaper than the absorbed ones (V3: 170).

        A pair of query and key costs C + R and C multiplications a head absorbed, N + R and Dv expanded, and expanding a
        latent C·(N + Dv) once for all queries. mode="expanded" or "absorbed" overrules it.
        """
        saved = 2 * self.kv_latent - self.nope_dim - self.value_dim
        return max(1, self.kv_latent * (self.nope_dim + self.value_dim) // saved) if saved > 0 else 1

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        *,
        key_start: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: tuple[Tensor, ...] | None = None,
        step: CacheStep | None = None,
        prefix: tuple[Any, ...] | None = None,
        mode: str = "auto",
    ) -> Tensor:
        """x [B, S, hidden] -> [B, S, hidden], every token over itself and what came before it.

        rope: cos and sin [B, S, R/2] (packed [N, R/2]).
        key_start: [B] int32, the first real token of rows padded on the left.
        cu_seqlens: [sequences + 1] int32 offsets: x is packed sequences [N, hidden].
        cache, step: the S tokens are appended to the cache (new_cache: plain, pages with step.block_table, or FP8) and see all
            that is in it, as the cache holds it: with a cache of another dtype than x, the new tokens too are read back, so
            that a token's result does not depend on how many came with it. There is a backward for an empty cache of x's dtype alone;
            decoding belongs under torch.no_grad(), and has to be there to be compiled.
        prefix: with a cache, latents before every row's own, as tk.mla_decode takes them; the rows' positions go on from it.
        mode: "expanded" attends over full heads (the one that trains), "absorbed" over the latents themselves, by
            tk.mla_decode; "auto" takes expanded heads without a cache or for an empty one, and for more than `absorb_up_to`
            new tokens. The two agree to rounding.
        """
        self._check(x, key_start, cu_seqlens, cache, step, prefix, mode)
        q_nope, q_rope, _ = self._queries(x, rope)
        latent, k_rope = self._latents(x, rope)
        if cache is None or step is None:
            if mode == "absorbed":
                lengths = torch.full(x.shape[:1], x.shape[1], dtype=torch.int32, device=x.device)
                out = self._attend_latents(q_nope, q_rope, torch.cat((latent, k_rope), dim=-1), lengths)
            else:
                out = self._expanded(q_nope, q_rope, latent, k_rope, key_start, cu_seqlens=cu_seqlens)
            return self.o_proj(out.flatten(-2))

        kv_cache, table = cache[0], step.block_table
        append_latent(kv_cache, latent.detach(), k_rope.detach(), seqlens=step.seqlens, block_table=table)
        if table is None:
            kv_cache = kv_cache[:, : step.extent]  # [B, T, C + R]
        else:
            table = table[:, : -(-step.extent // kv_cache.shape[1])]  # the pages in use
        few = x.shape[1] <= self.absorb_up_to and not step.fresh
        if mode == "absorbed" or prefix is not None or (mode == "auto" and few):
            out = self._attend_latents(q_nope, q_rope, kv_cache, step.seqlens, table, prefix)
        elif step.fresh and kv_cache.dtype == latent.dtype:
            out = self._expanded(q_nope, q_rope, latent, k_rope)
        else:
            held = gather_latent(kv_cache, seqlens=step.seqlens, block_table=table).to(latent.dtype)  # [B, T, C + R]
            out = self._expanded(q_nope, q_rope, *held.split((self.kv_latent, self.rope_dim), dim=-1), seqlens=step.seqlens)
        return self.o_proj(out.to(x.dtype).flatten(-2))

    def _check(
        self,
        x: Tensor,
        key_start: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: tuple[Tensor, ...] | None,
        step: CacheStep | None,
        prefix: tuple[Any, ...] | None,
        mode: str,
    ) -> None:
        dims, where = (3, "[B, S, hidden]") if cu_seqlens is None else (2, "[N, hidden] with cu_seqlens")
        checks.tensor("x", x, dims, where)
        checks.size("x", x, -1, self.hidden, "hidden")
        checks.one_of("mode", mode, MODES)
        check_step(cache, step)
        absorbed = "absorbed mode" if mode == "absorbed" else None
        for name, given in (("key_start", key_start), ("cu_seqlens", cu_seqlens)):
            beside = "cache" if cache is not None else absorbed
            if given is not None and beside is not None:
                raise ValueError(f"{name}: takes no {beside} beside it")
        if prefix is not None:
            if cache is None:
                raise ValueError("prefix: takes a cache beside it")
            if mode == "expanded":
                raise ValueError("prefix: takes mode 'auto' or 'absorbed'")
