"""How mla's ops call the Triton kernels: what they cover, result buffers, launch. Each function takes its op's arguments.

Shapes: B batch, Sq new queries, H heads, T cached tokens, P pages, D = latent + rope.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinkernel.ops.memory import empty, rows_contiguous


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.int().contiguous()


def decode_covers(
    q: Tensor, kv_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, prefix_kv: Tensor | None,
    prefix_table: Tensor | None, prefix_length: int, value_dim: int, scale: float,
) -> str | None:
    from thinkernel.kernels import mla as kernels

    return kernels.covers(q, kv_cache, None if prefix_kv is None else rows_contiguous(prefix_kv), value_dim, scale)


def decode(
    q: Tensor, kv_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, prefix_kv: Tensor | None,
    prefix_table: Tensor | None, prefix_length: int, value_dim: int, scale: float,
) -> tuple[Tensor, Tensor]:
    from thinkernel.kernels import mla as kernels

    q = rows_contiguous(q)
    out, lse = empty((*q.shape[:-1], value_dim), q), empty(tuple(q.shape[:-1]), q, torch.float32)
    prefix = None if prefix_kv is None else (rows_contiguous(prefix_kv), prefix_length, _int32(prefix_table))
    kernels.mla_decode(
        q, kv_cache, out, lse, seqlens=seqlens.int().contiguous(), block_table=_int32(block_table), scale=scale, prefix=prefix
    )
    return out, lse


def append_covers(
    kv_cache: Tensor, latent: Tensor, rope: Tensor, seqlens: Tensor, block_table: Tensor | None
) -> str | None:
    from thinkernel.kernels import mla as kernels

    return kernels.covers_cache(kv_cache)


def append(kv_cache: Tensor, latent: Tensor, rope: Tensor, seqlens: Tensor, block_table: Tensor | None) -> None:
    from thinkernel.kernels import mla as kernels

    kernels.append_latent(
        kv_cache, rows_contiguous(latent), rows_contiguous(rope), seqlens=seqlens.int().contiguous(),
        block_table=_int32(block_table),
    )


def gather_covers(kv_cache: Tensor, seqlens: Tensor, block_table: Tensor | None) -> str | None:
    from thinkernel.kernels import mla as kernels

    return kernels.covers_cache(kv_cache)


def gather(kv_cache: Tensor, seqlens: Tensor, block_table: Tensor | None) -> Tensor:
    from thinkernel.kernels import mla as kernels

    fp8 = kv_cache.dtype == torch.uint8
    capacity = kv_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    shape = (len(seqlens), capacity, kernels.LATENT + kernels.ROPE if fp8 else kv_cache.shape[-1])
    out = empty(shape, kv_cache, torch.bfloat16 if fp8 else None)
    kernels.gather_latent(kv_cache, out, seqlens=seqlens.int().contiguous(), block_table=_int32(block_table))
    return out
