"""How attention's ops call the C++ and the Triton kernels: what each covers, result buffers, launch.

Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, D head dim, Dv value dim. Every function takes its op's
arguments in the op's order (ops/attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import DTYPE_CODES, empty, pointer, rows_contiguous, strides


def mask_keywords(window_left: int, window_right: int, chunk: int, softcap: float) -> dict[str, Any]:
    """The op's plain numbers as the keywords of the reference and the Triton kernels."""
    window = None if window_left < 0 and window_right < 0 else (window_left, window_right)
    return {"window": window, "chunk": chunk or None, "softcap": softcap or None}


def _contiguous(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, S, H, Dv], lse [B, S, H] float32."""
    return empty((*q.shape[:-1], v.shape[-1]), q), empty(tuple(q.shape[:-1]), q, torch.float32)


# ---- cpu -------------------------------------------------------------------------------------------------------


def _cpu_misses(q: Tensor, v: Tensor) -> str | None:
    if q.dtype not in DTYPE_CODES:
        return f"q: the C++ kernels take float32, bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] > 256 or v.shape[-1] > 256:
        return f"q: the C++ kernels take head dims up to 256, not {q.shape[-1]} and {v.shape[-1]}"
    return None


def cpu_covers(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_start: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, causal: bool, scale: float, *mask: Any,
) -> str | None:
    return _cpu_misses(q, v)


def _shape_fields(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float, *mask: Any
) -> dict[str, Any]:
    """Packed tensors count one row less of dimensions: sizes from the back."""
    window_left, window_right, chunk, softcap = mask
    return dict(
        dtype=DTYPE_CODES[q.dtype], batch=len(q) if cu_seqlens is None else len(cu_seqlens) - 1, q_len=q.shape[-3],
        k_len=k.shape[-3], heads=q.shape[-2], kv_heads=k.shape[-2], head_dim=q.shape[-1], value_dim=v.shape[-1],
        scale=scale, causal=int(causal),
        window_left=window_left, window_right=window_right, chunk=chunk, softcap=softcap,
        threads=torch.get_num_threads(),
    )


def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_start: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, causal: bool, scale: float, *mask: Any,
) -> tuple[Tensor, Tensor]:
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    out, lse = _results(q, v)
    key_start, cu_q, cu_k = (_contiguous(x, torch.int32) for x in (key_start, cu_seqlens_q, cu_seqlens_k))
    sinks = _contiguous(sinks, torch.float32)
    C.attention_forward(C.AttentionForwardParams(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), sinks=pointer(sinks), key_start=pointer(key_start),
        cu_seqlens_q=pointer(cu_q), cu_seqlens_k=pointer(cu_k), out=out.data_ptr(), lse=lse.data_ptr(),
        q_stride=strides(q), k_stride=strides(k), v_stride=strides(v),
        out_stride=strides(out), **_shape_fields(q, k, v, cu_q, causal, scale, *mask),
    ))
    return out, lse


def cpu_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None,
    key_start: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: bool, scale: float,
    *mask: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, dout, out = (rows_contiguous(x) for x in (q, k, v, dout.to(q.dtype), out))
    dq, dk, dv = (empty(tuple(x.shape), x) for x in (q, k, v))
    lse, dlse = lse.contiguous(), _contiguous(dlse, torch.float32)
    key_start, cu_q, cu_k = (_contiguous(x, torch.int32) for x in (key_start, cu_seqlens_q, cu_seqlens_k))
    wide_sinks = _contiguous(sinks, torch.float32)
    dsinks = None if wide_sinks is None else empty(tuple(wide_sinks.shape), wide_sinks)
    C.attention_backward(C.AttentionBackwardParams(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(), dout=dout.data_ptr(),
        dlse=pointer(dlse), sinks=pointer(wide_sinks), key_start=pointer(key_start),
        cu_seqlens_q=pointer(cu_q), cu_seqlens_k=pointer(cu_k), dq=dq.data_ptr(), dk=dk.data_ptr(), dv=dv.data_ptr(),
        dsinks=pointer(dsinks), q_stride=strides(q), k_stride=strides(k),
        v_stride=strides(v), out_stride=strides(out), dout_stride=strides(dout), dq_stride=strides(dq),
        dk_stride=strides(dk), dv_stride=strides(dv), **_shape_fields(q, k, v, cu_q, causal, scale, *mask),
    ))
    return dq, dk, dv, q.new_empty(0) if sinks is None or dsinks is None else dsinks.to(sinks.dtype)


def cpu_decode_covers(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, sinks: Tensor | None,
    prefix_k: Tensor | None, prefix_v: Tensor | None, prefix_table: Tensor | None, prefix_length: int, causal: bool,
    scale: float, *mask: Any,
) -> str | None:
    return _cpu_misses(q, v_cache)


def cpu_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, sinks: Tensor | None,
    prefix_k: Tensor | None, prefix_v: Tensor | None, prefix_table: Tensor | None, prefix_length: int, causal: bool,
    scale: float, *mask: Any,
) -> tuple[Tensor, Tensor]:
    q = rows_contiguous(q)
    out, lse = _results(q, v_cache)
    seqlens, block_table = seqlens.int().contiguous(), _contiguous(block_table, torch.int32)
    sinks, prefix_table = _contiguous(sinks, torch.float32), _contiguous(prefix_table, torch.int32)
    prefix_k, prefix_v = (None if x is None else rows_contiguous(x) for x in (prefix_k, prefix_v))
    C.attention_decode(C.AttentionDecodeParams(
        q=q.data_ptr(), k=k_cache.data_ptr(), v=v_cache.data_ptr(), seqlens=seqlens.data_ptr(),
        block_table=pointer(block_table), sinks=pointer(sinks), out=out.data_ptr(), lse=lse.data_ptr(),
        page_size=0 if block_table is None else k_cache.shape[1],
        max_pages=0 if block_table is None else block_table.shape[1], prefix_k=pointer(prefix_k), prefix_v=pointer(prefix_v),
        prefix_table=pointer(prefix_table), prefix_length=prefix_length,
        prefix_page_size=0 if prefix_table is None or prefix_k is None else prefix_k.shape[1],
        prefix_k_stride=strides(prefix_k), prefix_v_stride=strides(prefix_v), q_stride=strides(q), out_stride=strides(out),
        k_stride=strides(k_cache), v_stride=strides(v_cache),
        **_shape_fields(q, k_cache, v_cache, None, causal, scale, *mask),
    ))
    return out, lse


# ---- triton: imported at the first call, since importing triton takes half a second ------------------------------


def triton_covers(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_start: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, causal: bool, scale: float, *mask: Any,
) -> str | None:
    from thinkernel.kernels import attention as kernels

    return kernels.covers(rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), scale=scale)


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_start: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, causal: bool, scale: float, *mask: Any,
) -> tuple[Tensor, Tensor]:
    from thinkernel.kernels import attention as kernels

    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    out, lse = _results(q, v)
    kernels.attention_forward(
        q, k, v, out, lse, causal=causal, scale=scale, key_start=_contiguous(key_start, torch.int32),
        sinks=_contiguous(sinks, torch.float32), cu_seqlens_q=_contiguous(cu_seqlens_q, torch.int32),
        cu_seqlens_k=_contiguous(cu_seqlens_k, torch.int32), **mask_keywords(*mask),
    )
    return out, lse


def triton_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None,
    key_start: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: bool, scale: float,
    *mask: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from thinkernel.kernels import attention_backward as kernels

    q, k, v, dout, out = (rows_contiguous(x) for x in (q, k, v, dout.to(q.dtype), out))
    dq, dk, dv = (empty(tuple(x.shape), x) for x in (q, k, v))
    wide_sinks = _contiguous(sinks, torch.float32)
    dsinks = None if wide_sinks is None else empty(tuple(wide_sinks.shape), wide_sinks)
    kernels.attention_backward(
        q, k, v, out, lse.contiguous(), dout, dq, dk, dv, causal=causal, scale=scale,
        dlse=_contiguous(dlse, torch.float32), key_start=_contiguous(key_start, torch.int32), sinks=wide_sinks,
        dsinks=dsinks, cu_seqlens_q=_contiguous(cu_seqlens_q, torch.int32),
        cu_seqlens_k=_contiguous(cu_seqlens_k, torch.int32), **mask_keywords(*mask),
    )
    return dq, dk, dv, q.new_empty(0) if sinks is None or dsinks is None else dsinks.to(sinks.dtype)


def triton_decode_covers(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, sinks: Tensor | None,
    prefix_k: Tensor | None, prefix_v: Tensor | None, prefix_table: Tensor | None, prefix_length: int, causal: bool,
    scale: float, *mask: Any,
) -> str | None:
    from thinkernel.kernels import attention as kernels

    prefix = () if prefix_k is None or prefix_v is None else (rows_contiguous(prefix_k), rows_contiguous(prefix_v))
    return kernels.covers(rows_contiguous(q), k_cache, v_cache, scale=scale, prefix=prefix)


def triton_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, sinks: Tensor | None,
    prefix_k: Tensor | None, prefix_v: Tensor | None, prefix_table: Tensor | None, prefix_length: int, causal: bool,
    scale: float, *mask: Any,
) -> tuple[Tensor, Tensor]:
    from thinkernel.kernels import attention as kernels

    q = rows_contiguous(q)
    out, lse = _results(q, v_cache)
    prefix = None
    if prefix_k is not None and prefix_v is not None:
        prefix = (rows_contiguous(prefix_k), rows_contiguous(prefix_v), prefix_length, _contiguous(prefix_table, torch.int32))
    kernels.attention_decode(
        q, k_cache, v_cache, out, lse, seqlens=seqlens.int().contiguous(),
        block_table=_contiguous(block_table, torch.int32), causal=causal, scale=scale,
        sinks=_contiguous(sinks, torch.float32), prefix=prefix, **mask_keywords(*mask),
    )
    return out, lse
