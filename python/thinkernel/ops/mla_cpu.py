"""How the MLA ops call the C++ kernels: what they cover, result buffers, launch.

Shapes: B batch, Sq new queries, H heads, T cached tokens, P pages, L value dim, R rope, D = L + R. Every function takes its op's
arguments in the op's order (ops/mla.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import DTYPE_CODES, empty, pointer, rows_contiguous
from thinkernel.reference.mla import FP8_WIDTH


def _misses(name: str, x: Tensor) -> str | None:
    return None if x.dtype in DTYPE_CODES else f"{name}: the C++ kernels take float32, bfloat16 and float16, not {x.dtype}"


def _cache_fields(kv: Tensor, seqlens: Tensor, block_table: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """dtype: of the queries and results."""
    return dict(
        dtype=DTYPE_CODES[dtype], quantised=int(kv.dtype == torch.uint8), batch=len(seqlens), seqlens=seqlens.data_ptr(),
        block_table=pointer(block_table), page_size=0 if block_table is None else kv.shape[1],
        max_pages=0 if block_table is None else block_table.shape[1], kv=kv.data_ptr(), kv_stride=kv.stride()[:2],
        threads=torch.get_num_threads(),
    )


def _indices(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def decode_covers(q: Tensor, *rest: Any) -> str | None:
    return _misses("q", q)


def decode(
    q: Tensor, kv_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, prefix_kv: Tensor | None,
    prefix_table: Tensor | None, prefix_length: int, value_dim: int, scale: float,
) -> tuple[Tensor, Tensor]:
    q, kv_cache = q.contiguous(), rows_contiguous(kv_cache)
    out, lse = empty((*q.shape[:-1], value_dim), q), empty(tuple(q.shape[:-1]), q, torch.float32)
    seqlens, block_table, prefix_table = seqlens.int().contiguous(), _indices(block_table), _indices(prefix_table)
    prefix = None if prefix_kv is None or prefix_length == 0 else rows_contiguous(prefix_kv)
    strides = (0, 0) if prefix is None else (0, prefix.stride(0)) if prefix_table is None else prefix.stride()[:2]
    C.mla_decode(C.MlaDecodeParams(
        q=q.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(), q_len=q.shape[1], heads=q.shape[2], head_dim=q.shape[3],
        value_dim=value_dim, scale=scale, prefix=pointer(prefix), prefix_table=pointer(prefix_table),
        prefix_length=0 if prefix is None else prefix_length, prefix_stride=strides,
        prefix_page_size=0 if prefix is None or prefix_table is None else prefix.shape[1],
        **_cache_fields(kv_cache, seqlens, block_table, q.dtype),
    ))
    return out, lse


def append_covers(kv_cache: Tensor, latent: Tensor, rope: Tensor, *rest: Any) -> str | None:
    if kv_cache.dtype != torch.uint8 and (reason := _misses("kv_cache", kv_cache)):
        return reason
    if kv_cache.stride(-1) != 1 and kv_cache.shape[-1] > 1:
        return f"kv_cache: the C++ kernels write tokens with neighbouring values, not of strides {list(kv_cache.stride())}"
    return _misses("latent", latent) or _misses("rope", rope)


def append(kv_cache: Tensor, latent: Tensor, rope: Tensor, seqlens: Tensor, block_table: Tensor | None) -> None:
    dtype = torch.promote_types(latent.dtype, rope.dtype)
    latent, rope = rows_contiguous(latent.to(dtype)), rows_contiguous(rope.to(dtype))
    seqlens, block_table = seqlens.int().contiguous(), _indices(block_table)
    C.append_latent(C.LatentAppendParams(
        latent=latent.data_ptr(), rope=rope.data_ptr(), source=DTYPE_CODES[dtype], q_len=latent.shape[1],
        latent_dim=latent.shape[2], rope_dim=rope.shape[2], latent_stride=latent.stride()[:2], rope_stride=rope.stride()[:2],
        **_cache_fields(kv_cache, seqlens, block_table, dtype if kv_cache.dtype == torch.uint8 else kv_cache.dtype),
    ))


def gather_covers(kv_cache: Tensor, *rest: Any) -> str | None:
    return None if kv_cache.dtype == torch.uint8 else _misses("kv_cache", kv_cache)


def gather(kv_cache: Tensor, seqlens: Tensor, block_table: Tensor | None) -> Tensor:
    kv_cache, quantised = rows_contiguous(kv_cache), kv_cache.dtype == torch.uint8
    width = FP8_WIDTH if quantised else kv_cache.shape[-1]
    length = kv_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    out = empty((len(seqlens), length, width), kv_cache, torch.bfloat16 if quantised else kv_cache.dtype)
    seqlens, block_table = seqlens.int().contiguous(), _indices(block_table)
    C.gather_latent(C.LatentGatherParams(
        out=out.data_ptr(), length=length, head_dim=width, **_cache_fields(kv_cache, seqlens, block_table, out.dtype)
    ))
    return out
