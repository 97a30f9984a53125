"""Grouped-query attention, the forward (attention_backward.py, attention_decode.py: the rest of the family).

Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, G = H / Hkv, D head dim, Dv value dim, N packed tokens,
M and N the rows and keys of a tile.

    s = scale·q·k (softcap: c·tanh(s/c)),  lse = log Σ_j exp(s_j) over visible keys,  o = Σ_j exp(s_j − lse)·v_j,
    with a sink σ: o ← o·sigmoid(lse − σ). Rows that see nothing: o = 0, lse = −inf.

FlashAttention-2's loop (arXiv 2307.08691), with the key order made canonical: blocks of N keys and splits of
KEY_SPLIT keys count from the first valid key. Prefill walks the splits in order in one program; decode gives each
split a program and merges the results in the same order with the same operations.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .attention_backward import attention_backward
from .attention_decode import attention_decode
from .attention_tiles import attend, blocks, finish, has_options, key_blocks, mask_arguments, packed_rows, packed_tile, tiles
from .primitives import is_wide, launch, load_tile, store_tile

__all__ = ["attention_backward", "attention_decode", "attention_forward", "covers"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


@triton.jit(do_not_specialize=["S", "T", "n_tiles", "n_sequences", "left", "right", "chunk"])
def _forward_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, key_start_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
                    S, T, H, G, n_tiles, n_sequences,
                    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
                    stride_ob, stride_os, stride_oh, stride_lb, stride_ls, stride_lh,
                    scale, softcap, left, right, chunk,
                    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                    M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
                    LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
                    KEY_START: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr):
    """One program: M queries of one head against all the keys they see."""
    # Which tile. Heads vary fastest and late query blocks (the longest under a causal mask) come first.
    pid = tl.program_id(0)
    b = (pid // (H * n_tiles)).to(tl.int64)
    h = pid % H
    tile = n_tiles - 1 - (pid // H) % n_tiles
    m0 = tile * M
    if PACKED:
        sequence, m0 = packed_tile(tile, cu_q_ptr, n_sequences, M)
        q_first, S = packed_rows(sequence, cu_q_ptr, S)
        k_first, T = packed_rows(sequence, cu_k_ptr, T)
        T = tl.where(m0 < S, T, 0)  # an idle tile sees no key
        q_ptr += q_first.to(tl.int64) * stride_qs
        k_ptr += k_first.to(tl.int64) * stride_ks
        v_ptr += k_first.to(tl.int64) * stride_vs
        out_ptr += q_first.to(tl.int64) * stride_os
        lse_ptr += q_first.to(tl.int64) * stride_ls
    row = m0 + tl.arange(0, M)  # [M]
    p = row + T - S
    key_start = 0
    if KEY_START:
        key_start = tl.minimum(tl.maximum(tl.load(key_start_ptr + b), 0), T)

    # Load the queries.
    q_base = q_ptr + b * stride_qb + h.to(tl.int64) * stride_qh + m0.to(tl.int64) * stride_qs
    q = load_tile(q_base, stride_qs, S - m0, M, 0, BLOCK_D, D, WIDE)  # [M, D]
    q_rest = q
    if REST_D > 0:
        q_rest = load_tile(q_base, stride_qs, S - m0, M, BLOCK_D, REST_D, D, WIDE)
    kv_head = (h // G).to(tl.int64)
    k_base = k_ptr + b * stride_kb + kv_head * stride_kh
    v_base = v_ptr + b * stride_vb + kv_head * stride_vh

    # Attend to the keys, split by split.
    first, last, whole_first, whole_last = key_blocks(
        m0 + T - S, tl.minimum(m0 + M, S) - 1 + T - S, key_start, T, left, right, chunk, N, LEFT, RIGHT, CHUNK)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    total = tl.zeros([M], tl.float32)
    peak = tl.full([M], float("-inf"), tl.float32)
    acc, total, peak = attend(
        acc, total, peak, q, q_rest, p, first, last, whole_first, whole_last, key_start, T,
        (k_base, v_base, stride_ks, stride_vs, k_base, 0, 0, 0), (), 0, scale, softcap, left, right, chunk,
        N, D, DV, BLOCK_D, REST_D, BLOCK_DV, SPLIT // N if SPLITS else 0, 0, False, 0, LEFT, RIGHT, CHUNK, SOFTCAP, WIDE)

    # Normalise and write.
    sink = 0.0
    if SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32)
    out, lse = finish(acc, total, peak, sink, SINKS, q.dtype == tl.float32)
    o_base = out_ptr + b * stride_ob + h.to(tl.int64) * stride_oh + m0.to(tl.int64) * stride_os
    store_tile(o_base, out, stride_os, S - m0, M, 0, BLOCK_DV, DV, WIDE)
    tl.store(lse_ptr + b * stride_lb + row.to(tl.int64) * stride_ls + h * stride_lh, lse, mask=row < S)


def covers(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prefix: tuple[Tensor, ...] = ()) -> str | None:
    """Why attention_forward, attention_backward and attention_decode cannot take this call, naming the argument; None if they can.

    window, chunk, sinks, softcap, key_start and packed sequences are all covered.
    """
    for name, x in (("q", q), ("k", k), ("v", v), *(("prefix", x) for x in prefix)):
        if x.dtype not in DTYPES:
            return f"{name}: {x.dtype} is not one of {DTYPES}"
        if x.dtype != q.dtype:
            return f"{name}: {x.dtype} differs from q's {q.dtype}"
        if x.shape[-1] > MAX_HEAD_DIM:
            return f"{name}: head dim {x.shape[-1]} is over {MAX_HEAD_DIM}"
        if x.numel() and x.stride(-1) != 1 and x.shape[-1] > 1:
            return f"{name}: the last dimension has stride {x.stride(-1)}, not 1"
    if scale is not None and not scale > 0:
        return f"scale: {scale} is not positive"
    return None


def attention_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float | None = None,
                      key_start: Tensor | None = None, window: tuple[int, int] | None = None, chunk: int | None = None,
                      softcap: float | None = None, sinks: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
                      cu_seqlens_k: Tensor | None = None) -> None:
    """q [B,S,H,D], k [B,T,Hkv,D], v [B,T,Hkv,Dv] -> out [B,S,H,Dv] and lse [B,S,H] float32 (without the sink), both given.

    key_start [B] int32: the first valid key of each row; window (left, right), −1 unlimited; sinks [H].
    Packed: [N,H,·] and lse [N,H] with cu_seqlens_q, cu_seqlens_k [sequences + 1] int32.
    """
    if cu_seqlens_q is not None:
        q, k, v, out, lse = q[None], k[None], v[None], out[None], lse[None]
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    B, S, H, D = q.shape
    T, Hkv, Dv = v.shape[1:]
    if B * S * H == 0:
        return
    scale = D**-0.5 if scale is None else scale
    (block_d, rest_d), block_dv = blocks(D), max(16, triton.next_power_of_2(Dv))
    options = has_options(key_start, window, chunk, softcap, sinks)
    tile = configs.tile("forward", q.device, q.dtype, block_d + rest_d, block_dv, options, cu_seqlens_q is not None)
    bounds, flags = mask_arguments(causal, window, chunk)
    n_tiles = tiles(S, tile.m, cu_seqlens_q)
    launch(
        _forward_kernel, (B * H * n_tiles,), q, k, v, out, lse, key_start, sinks, cu_seqlens_q, cu_seqlens_k, S, T, H, H // Hkv,
        n_tiles, 0 if cu_seqlens_q is None else len(cu_seqlens_q) - 1,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride(), float(scale), float(softcap or 0.0), *bounds,
        D=D, DV=Dv, BLOCK_D=block_d, REST_D=rest_d, BLOCK_DV=block_dv, M=tile.m, N=tile.n,
        SPLIT=configs.key_split(), SPLITS=T > configs.key_split(), **flags, SOFTCAP=bool(softcap), SINKS=sinks is not None,
        KEY_START=key_start is not None, PACKED=cu_seqlens_q is not None,
        WIDE=any(is_wide(x.stride(1), max(tile.m, tile.n)) for x in (q, k, v, out)),
        warps=tile.warps, stages=tile.stages, device=q.device)
