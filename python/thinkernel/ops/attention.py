"""Attention ops: checks, torch.library ops, autograd. Formulas: MATH in reference/attention.py.

Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, D head dim, Dv value dim, N packed tokens, P pages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkernel.ops import attention_backends as backends
from thinkernel.ops import checks
from thinkernel.ops.attention_backends import mask_keywords
from thinkernel.ops.library import Op, gradients
from thinkernel.ops.memory import rows_contiguous
from thinkernel.reference import attention as reference

Window = tuple[int, int]
UNLIMITED = 2**31 - 1


# ---- the raw ops -----------------------------------------------------------------------------------------------

_OPTIONS = (
    "Tensor? sinks, Tensor? key_start, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, float scale, "
    "int window_left, int window_right, int chunk, float softcap"
)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_lse_dtype(q))


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _decode_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _forward_fake(q, k_cache, v_cache)


attention_forward = Op(
    "attention_forward", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", _forward_fake
)
attention_backward = Op(
    "attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
attention_decode_op = Op(
    "attention_decode",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqlens, Tensor? block_table, Tensor? sinks, Tensor? prefix_k, "
    "Tensor? prefix_v, Tensor? prefix_table, int prefix_length, bool causal, float scale, int window_left, "
    "int window_right, int chunk, float softcap) -> (Tensor, Tensor)",
    _decode_fake,
)
append_kv_op = Op(
    "append_kv",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_new, Tensor v_new, Tensor seqlens, Tensor? block_table) -> ()",
    lambda *args: None,
)


def _reference_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_start: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, causal: bool, scale: float, window_left: int, window_right: int, chunk: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    return reference.attention(
        q, k, v, causal=causal, scale=scale, sinks=sinks, key_start=key_start, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, **mask_keywords(window_left, window_right, chunk, softcap),
    )


@attention_forward.check
def _check_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_start: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, *options: Any,
) -> None:
    if cu_seqlens_q is not None:
        checks.cumulative("cu_seqlens_q", cu_seqlens_q, q.shape[0])
        checks.cumulative("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    else:
        checks.within("key_start", key_start, 0, k.shape[1], "T keys")


@attention_decode_op.check
def _check_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, sinks: Tensor | None,
    prefix_k: Tensor | None, prefix_v: Tensor | None, prefix_table: Tensor | None, prefix_length: int, *options: Any,
) -> None:
    checks.lengths_and_pages(seqlens, block_table, k_cache, "k_cache")
    if prefix_k is not None and prefix_table is not None and prefix_length > 0:
        used = prefix_table[: -(-prefix_length // prefix_k.shape[1])]
        checks.within("prefix block_table", used, 0, prefix_k.shape[0] - 1, f"prefix k has {prefix_k.shape[0]} pages")


@append_kv_op.check
def _check_append(
    k_cache: Tensor, v_cache: Tensor, k_new: Tensor, v_new: Tensor, seqlens: Tensor, block_table: Tensor | None
) -> None:
    checks.lengths_and_pages(seqlens, block_table, k_cache, "k_cache")


# ---- reference -------------------------------------------------------------------------------------------------

attention_forward.kernel("reference")(_reference_forward)


@attention_backward.kernel("reference")
def _reference_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = [0, 1, 2] if sinks is None else [0, 1, 2, 3]
    grads = gradients(_reference_forward, (q, k, v, sinks, *options), positions, (dout, dlse))
    dsinks = q.new_empty(0) if sinks is None else grads[3]
    return grads[0], grads[1], grads[2], dsinks


@attention_decode_op.kernel("reference")
def _reference_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, sinks: Tensor | None,
    prefix_k: Tensor | None, prefix_v: Tensor | None, prefix_table: Tensor | None, prefix_length: int, causal: bool,
    scale: float, window_left: int, window_right: int, chunk: int, softcap: float,
) -> tuple[Tensor, Tensor]:
    prefix = None if prefix_k is None else (prefix_k, prefix_v, prefix_length, prefix_table)
    return reference.attention_decode(
        q, k_cache, v_cache, seqlens=seqlens, block_table=block_table, causal=causal, scale=scale, sinks=sinks,
        prefix=prefix, **mask_keywords(window_left, window_right, chunk, softcap),
    )


@append_kv_op.kernel("cpu")
@append_kv_op.kernel("reference")
def _append(
    k_cache: Tensor, v_cache: Tensor, k_new: Tensor, v_new: Tensor, seqlens: Tensor, block_table: Tensor | None
) -> None:
    """Plain indexed copies on every device: nothing to fuse."""
    reference.append_kv(k_cache, v_cache, k_new, v_new, seqlens=seqlens, block_table=block_table)


append_kv_op.kernel("triton")(_append)


# ---- cpu and triton --------------------------------------------------------------------------------------------

attention_forward.kernel("cpu", backends.cpu_covers)(backends.cpu_forward)
attention_backward.kernel("cpu", lambda dout, dlse, q, k, v, out, lse, *rest: backends.cpu_covers(q, k, v, *rest))(
    backends.cpu_backward
)
attention_decode_op.kernel("cpu", backends.cpu_decode_covers)(backends.cpu_decode)
attention_forward.kernel("triton", backends.triton_covers)(backends.triton_forward)
attention_backward.kernel("triton", lambda dout, dlse, q, k, v, out, lse, *rest: backends.triton_covers(q, k, v, *rest))(
    backends.triton_backward
)
attention_decode_op.kernel("triton", backends.triton_decode_covers)(backends.triton_decode)


# ---- autograd --------------------------------------------------------------------------------------------------


def _setup(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*args[:7], *outputs)  # q, k, v, sinks, key_start, cu_seqlens_q, cu_seqlens_k, out, lse
    ctx.options = args[7:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, sinks, key_start, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 13
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = attention_backward(
        dout, dlse, q, k, v, out, lse, sinks, key_start, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    return dq, dk, dv, None if sinks is None else dsinks, *(None,) * 9


attention_forward.differentiate(_setup, _backward, reference=_reference_forward)
attention_forward.autocast("q", "k", "v")
attention_backward.refuse_gradient("double backward is not supported")
attention_decode_op.refuse_gradient("it serves decoding; attention is the differentiable form")
attention_decode_op.autocast("q", "k_cache", "v_cache", "prefix_k", "prefix_v")


# ---- public ----------------------------------------------------------------------------------------------------


def _check_heads(q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str) -> None:
    checks.same_dtype(k_name, k, "q", q)
    checks.same_dtype(v_name, v, "q", q)
    checks.shape(v_name, v, (*k.shape[:-1], v.shape[-1]), f"{k_name}'s shape up to the last dimension")
    checks.size(k_name, k, -1, q.shape[-1], "q's head dim")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads == 0:
        raise ValueError(f"q: got 0 heads, takes at least 1; its shape is {list(q.shape)}")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"{k_name}: got {kv_heads} heads, takes a divisor of q's {heads} heads")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"{'q' if q.shape[-1] == 0 else v_name}: got head dim 0, takes at least 1")


def _check_options(
    q: Tensor, causal: bool, scale: float | None, window: Window | None, chunk: int | None, sinks: Tensor | None,
    softcap: float | None,
) -> tuple[bool, float, int, int, int, float]:
    """-> causal, scale, window_left, window_right, chunk (0: none), softcap (0: none)."""
    checks.boolean("causal", causal)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        checks.number("scale", scale)
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"window: got {window!r}, takes (left, right), −1 for unlimited")
        for side in window:
            checks.integer("window", side, -1)
    if chunk is not None:
        checks.integer("chunk", chunk, 1)
    checks.positive("softcap", softcap)
    if sinks is not None:
        checks.tensor("sinks", sinks, 1, "[H]")
        checks.shape("sinks", sinks, (q.shape[-2],), "[H]")
        checks.same_device("q", q, sinks=sinks)
    # Positions fit in 32 bits: a window or a chunk past that hides no key, and inside the kernels it could overflow.
    left, right = (-1 if side >= UNLIMITED else side for side in window or (-1, -1))
    return causal, float(scale), left, right, 0 if chunk is None or chunk >= UNLIMITED else chunk, float(softcap or 0.0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_start: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of grouped, multi- or single-query heads, differentiable.

    Args:
        q: [B, S, H, D], or packed [N, H, D] with cu_seqlens. float32, bfloat16, float16 (float64: reference).
        k: [B, T, Hkv, D]; H is a multiple of Hkv, query head h reads key head h // (H / Hkv).
        v: [B, T, Hkv, Dv].
        causal: query i sees keys up to i + T − S (aligned to the bottom right).
        scale: factor on the scores, default D^-0.5.
        window: (left, right) keys around the query's position, −1 for unlimited; sliding_window W is (W − 1, 0).
        chunk: keys only of the query's own chunk of this many positions (Llama 4).
        sinks: [H] one more logit per head in the softmax, with value 0 (gpt-oss); neither scaled nor capped.
        softcap: scores become c·tanh(s / c) before the mask.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32 offsets of packed sequences; keys default to the queries'.
        key_start: [B] int32, first valid key of each row (left padding).
        return_lse: also return the log-sum-exp of the scores, float32 [B, S, H]; it never includes the sink.

    Returns [B, S, H, Dv] in q's dtype (with lse if asked). A query that sees no key gives 0 and lse −inf.
    Bits of a row depend on that row alone: not on the batch, the padding or the thread count.
    Raises ValueError or TypeError naming the argument. Source: FlashAttention-2 (arXiv 2307.08691), GQA (2305.13245).
    """
    dims, row = (3, "[N, H, D] with cu_seqlens_q") if cu_seqlens_q is not None else (4, "[B, S, H, D]")
    checks.tensor("q", q, dims, row)
    checks.tensor("k", k, dims, row.replace("S", "T").replace("H", "Hkv"))
    checks.tensor("v", v, dims, row.replace("S", "T").replace("H", "Hkv").replace("D", "Dv"))
    _check_heads(q, k, v, "k", "v")
    cu_seqlens_k = checks.packed(cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_q is not None:
        if key_start is not None:
            raise ValueError("key_start: packed sequences (cu_seqlens_q) have no padding, so it must be None")
    else:
        checks.size("k", k, 0, q.shape[0], "B of q")
        if key_start is not None:
            checks.tensor("key_start", key_start, 1, "[B]", checks.INTEGERS)
            checks.shape("key_start", key_start, (q.shape[0],), "[B]")
    checks.same_device("q", q, k=k, v=v, key_start=key_start, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    causal, scale, left, right, chunk, softcap = _check_options(q, causal, scale, window, chunk, sinks, softcap)
    out, lse = attention_forward(
        q, k, v, sinks, key_start, cu_seqlens_q, cu_seqlens_k, causal, scale, left, right, chunk, softcap
    )
    return (out, lse) if return_lse else out


def _check_cache(name: str, x: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, block_table: Tensor | None) -> None:
    """The caches against each other and against the rows of x, the argument called `name`."""
    where = "[B, T, Hkv, D]" if block_table is None else "pages [P, page, Hkv, D]"
    checks.tensor("k_cache", k, 4, where)
    checks.tensor("v_cache", v, 4, where.replace("D", "Dv"))
    checks.cache_rows("k_cache", k, seqlens, block_table, x.shape[0], f"B of {name}")
    checks.shape("v_cache", v, (*k.shape[:-1], v.shape[-1]), "k_cache's shape up to the last dimension")
    checks.same_device(name, x, k_cache=k, v_cache=v, seqlens=seqlens, block_table=block_table)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqlens: Tensor,
    block_table: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: Window | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    prefix: tuple[Any, ...] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest Sq tokens of each sequence over its cache; the same bits as those rows of a prefill.

    Args:
        q: [B, Sq, H, D], Sq ≥ 1 new tokens a sequence.
        k_cache, v_cache: [B, T, Hkv, D] and [B, T, Hkv, Dv], or pages [P, page, Hkv, ·] with block_table.
        seqlens: [B] int32, keys of each sequence **counting the Sq new ones** (see append_kv).
        block_table: [B, max_pages] int32 page numbers; entries past a sequence's end are never read.
        causal, scale, window, chunk, sinks, softcap: as in attention.
        prefix: keys that all B sequences share and that stand before their own: (k [Tp, Hkv, D], v [Tp, Hkv, Dv],
            length) or (k pages, v pages, length, block_table [max_pages]); seqlens does not count them.
        return_lse: also return lse, float32 [B, Sq, H].

    Returns [B, Sq, H, Dv]. Not differentiable. Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("q", q, 4, "[B, Sq, H, D]")
    _check_cache("q", q, k_cache, v_cache, seqlens, block_table)
    _check_heads(q, k_cache, v_cache, "k_cache", "v_cache")
    causal, scale, left, right, chunk, softcap = _check_options(q, causal, scale, window, chunk, sinks, softcap)
    prefix_k, prefix_v, prefix_length, prefix_table = _check_prefix(prefix, k_cache, v_cache)
    out, lse = attention_decode_op(
        q, rows_contiguous(k_cache), rows_contiguous(v_cache), seqlens, block_table, sinks, prefix_k, prefix_v,
        prefix_table, prefix_length, causal, scale, left, right, chunk, softcap,
    )
    return (out, lse) if return_lse else out


def _check_prefix(prefix: Any, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor | None, Tensor | None, int, Tensor | None]:
    if prefix is None:
        return None, None, 0, None
    if not isinstance(prefix, (tuple, list)) or len(prefix) not in (3, 4):
        raise TypeError(f"prefix: got {_outline(prefix)}, takes (k, v, length) or (k pages, v pages, length, block_table)")
    k, v, length = prefix[:3]
    table = prefix[3] if len(prefix) == 4 else None
    dims, where = (3, "[Tp, Hkv, D]") if table is None else (4, "[P, page, Hkv, D]")
    for name, x, cache in (("prefix k", k, k_cache), ("prefix v", v, v_cache)):
        checks.tensor(name, x, dims, where)
        checks.shape(name, x, (*k.shape[:-2], *cache.shape[-2:]), "prefix k's positions, the cache's heads and head dim")
        checks.same_dtype(name, x, "k_cache", k_cache)
    checks.integer("prefix length", length, 0)
    room = k.shape[0]
    if table is not None:
        checks.tensor("prefix block_table", table, 1, "[max_pages]", checks.INTEGERS)
        if k.shape[1] == 0:
            raise ValueError("prefix k: got pages of 0 positions, takes at least 1")
        room = table.shape[0] * k.shape[1]
    if length > room:
        raise ValueError(f"prefix length: got {length}, takes at most the {room} positions given")
    checks.same_device("k_cache", k_cache, **{"prefix k": k, "prefix v": v, "prefix block_table": table})
    return k, v, length, table


def _outline(x: Any) -> str:
    return f"{len(x)} values" if isinstance(x, (tuple, list)) else type(x).__name__


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    *,
    seqlens: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Write k_new [B, Sq, Hkv, D] and v_new [B, Sq, Hkv, Dv] into the caches in place, at the end of each sequence.

    seqlens [B] int32 **already counts the Sq new keys**: they land at positions seqlens − Sq … seqlens − 1.
    A position before 0 takes nothing, so that a sequence of length 0 takes no part. Caches as in attention_decode; the values
    are converted to their dtype; no gradient goes into a cache. Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("k_new", k_new, 4, "[B, Sq, Hkv, D]")
    checks.tensor("v_new", v_new, 4, "[B, Sq, Hkv, Dv]")
    _check_cache("k_new", k_new, k_cache, v_cache, seqlens, block_table)
    checks.same_device("k_new", k_new, v_new=v_new)
    checks.writable("k_cache", k_cache)
    checks.writable("v_cache", v_cache)
    checks.shape("k_new", k_new, (*k_new.shape[:2], *k_cache.shape[2:]), "[B, Sq, Hkv, D] of k_cache")
    checks.shape("v_new", v_new, (*k_new.shape[:2], *v_cache.shape[2:]), "[B, Sq, Hkv, Dv] of v_cache")
    append_kv_op(k_cache, v_cache, k_new, v_new, seqlens, block_table)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the results over each: out [..., H, Dv], lse [..., H].

    lse = logaddexp(lse_a, lse_b), out = e^(lse_a − lse)·out_a + e^(lse_b − lse)·out_b; where both are −inf: 0 and −inf.
    Differentiable. Apply sinks once, after merging. Plain torch: it reads and writes each value once.
    """
    checks.tensor("out_a", out_a, range(1, 9), "[..., H, Dv]")
    checks.tensor("out_b", out_b, range(1, 9), "[..., H, Dv]")
    checks.shape("out_b", out_b, out_a.shape, "out_a's shape")
    checks.same_dtype("out_b", out_b, "out_a", out_a)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        checks.tensor(name, lse, range(0, 8), "[..., H]")
        checks.shape(name, lse, out_a.shape[:-1], "out_a's shape without its last dimension")
    checks.same_device("out_a", out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    return reference.merge_attention(out_a, lse_a, out_b, lse_b)
