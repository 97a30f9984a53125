"""Multi-head latent attention over a latent cache, the specification (DeepSeek-V2/V3, Kimi K2, GLM-5).

Shapes: B batch, Sq new queries, T cached tokens, H heads, P pages, D = 576 = value_dim 512 + rope 64.

A cached token is one row [latent 512 | rotated key 64], shared by every head: all of it is the key, its first
`value_dim` entries are the value. The query comes absorbed, [W_UK^T q_nope | q_rope], and the output latent is still
to be multiplied by W_UV:
    s_j = scale * q . kv_j,   o = sum_j softmax(s)_j kv_j[:value_dim]
with `scale` that of the expanded heads, (d_nope + d_rope)^-0.5 * mscale^2, never 576^-0.5.

An FP8 cache holds 656 bytes a token: 512 float8_e4m3, 4 float32 scales (one per 128 values), 64 bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import append_cache, attention_decode, gather_cache

LATENT, ROPE, GROUP = 512, 64, 128  # values of the FP8 layout: quantised, kept in bfloat16, sharing one scale
FP8_WIDTH, FP8_BYTES = LATENT + ROPE, LATENT + 4 * (LATENT // GROUP) + 2 * ROPE  # values and bytes of a token
E4M3_MAX, SMALLEST_SCALE = 448.0, 1e-4


def quantize_latent(latent: Tensor, rope: Tensor) -> Tensor:
    """latent [..., 512], rope [..., 64] -> bytes [..., 656].

    value = e4m3 * scale, scale = 2^ceil(log2(max(amax / 448, 1e-4))) for each 128 values.
    """
    groups = latent.float().unflatten(-1, (LATENT // GROUP, GROUP))  # [..., 4, 128]
    mantissa, exponent = torch.frexp((groups.abs().amax(-1) / E4M3_MAX).clamp_min(SMALLEST_SCALE))
    exponent = exponent - (mantissa == 0.5).int()  # mantissa in [0.5, 1): 0.5 is a power of two
    scale = torch.ldexp(torch.ones_like(mantissa), exponent)  # [..., 4]
    values = (groups / scale[..., None]).flatten(-2).to(torch.float8_e4m3fn)
    parts = values, scale, rope.to(torch.bfloat16).contiguous()
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1)


def dequantize_latent(cache: Tensor) -> Tensor:
    """bytes [..., 656] -> [..., 576] bfloat16, exact: three mantissa bits times a power of two."""
    if cache.shape[-1] != FP8_BYTES:
        raise ValueError(f"kv_cache: an FP8 cache has {FP8_BYTES} bytes a token, got {cache.shape[-1]}")
    values, scale, rope = cache.split([LATENT, 4 * (LATENT // GROUP), 2 * ROPE], dim=-1)
    values = values.contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (LATENT // GROUP, GROUP))
    latent = (values * scale.contiguous().view(torch.float32)[..., None]).flatten(-2)
    return torch.cat([latent.to(torch.bfloat16), rope.contiguous().view(torch.bfloat16)], dim=-1)


def append_latent(
    kv_cache: Tensor, latent: Tensor, rope: Tensor, *, seqlens: Tensor, block_table: Tensor | None = None
) -> None:
    """Write latent [B, Sq, 512] and rope [B, Sq, 64] at the end of each sequence, in place.

    kv_cache [B, T, D] or pages [P, page, D]; uint8 [..., 656] is quantised. `seqlens` [B] counts them already.
    """
    new = quantize_latent(latent, rope) if kv_cache.dtype == torch.uint8 else torch.cat([latent, rope], dim=-1)
    append_cache(kv_cache, new, seqlens, block_table)


def gather_latent(kv_cache: Tensor, *, seqlens: Tensor, block_table: Tensor | None = None) -> Tensor:
    """The cached tokens as a dense [B, T, D] tensor, zeros past each sequence's end; FP8 comes out as bfloat16.

    Contiguous cache: T as given; pages [P, page, D] with block_table [B, max_pages]: T = max_pages * page.
    """
    dense = gather_cache(kv_cache, seqlens, block_table)
    return dequantize_latent(dense) if kv_cache.dtype == torch.uint8 else dense


def mla_decode(
    q: Tensor,  # [B, Sq, H, D], absorbed
    kv_cache: Tensor,  # [B, T, D] or pages [P, page, D], or FP8 bytes [..., 656]
    *,
    seqlens: Tensor,  # [B] int32, the Sq new tokens included
    block_table: Tensor | None = None,  # [B, max_pages] int32
    value_dim: int = LATENT,
    scale: float,
    prefix: tuple | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of Sq new queries over the latents -> out [B, Sq, H, value_dim], lse [B, Sq, H].

    `prefix`: latents that stand before every row's own, (kv [Tp, D], length), or pages with their table:
    (kv_pages, length, block_table [max_pages]). `seqlens` does not count them.
    """
    kv = gather_latent(kv_cache, seqlens=seqlens, block_table=block_table)[:, :, None]  # [B, T, 1, D]
    if prefix is not None:
        shared, length, *table = prefix
        shared = dequantize_latent(shared) if shared.dtype == torch.uint8 else shared
        prefix = (shared[..., None, :], shared[..., None, :value_dim], length, *table)
    return attention_decode(q, kv, kv[..., :value_dim], seqlens=seqlens, scale=scale, prefix=prefix)
