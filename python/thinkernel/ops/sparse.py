"""Sparse attention ops: top-k, indexer, attention over selected keys, indexer loss. Formulas: reference/sparse.py.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, D head dim, Hi index heads, Di index dim, K selected keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinkernel.ops import checks, indexer_cpu, indexer_gpu, sparse_attention_gpu
from thinkernel.ops import sparse_backends as backends
from thinkernel.ops.library import OPS, Op, gradients, reference_op
from thinkernel.reference import sparse as reference
from thinkernel.reference.mla import FP8_BYTES, FP8_WIDTH

KV = Tensor | tuple[Tensor, Tensor]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- the raw ops -----------------------------------------------------------------------------------------------

topk_op = reference_op(
    "topk",
    "(Tensor scores, int k, Tensor? lengths) -> (Tensor, Tensor)",
    lambda scores, k, lengths: (
        scores.new_empty(*scores.shape[:-1], k), scores.new_empty(*scores.shape[:-1], k, dtype=torch.int32)
    ),
    lambda scores, k, lengths: reference.topk(scores, k, lengths=lengths),
    differentiable=("scores",),
)
indexer_scores_op = reference_op(
    "indexer_scores",
    "(Tensor q, Tensor k, Tensor w, bool causal) -> Tensor",
    lambda q, k, w, causal: q.new_empty(*q.shape[:2], k.shape[1], dtype=_wide(q)),
    lambda q, k, w, causal: reference.indexer_scores(q, k, w, causal=causal),
    differentiable=("q", "k", "w"),
)
indexer_topk_op = reference_op(
    "indexer_topk",
    "(Tensor q, Tensor k, Tensor w, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqlens, Tensor? block_table, "
    "Tensor? k_scale, int top_k, bool causal) -> Tensor",
    lambda q, k, w, cu_q, cu_k, seqlens, table, k_scale, top_k, causal: q.new_empty(
        *q.shape[:-2], top_k, dtype=torch.int32
    ),
    lambda q, k, w, cu_q, cu_k, seqlens, table, k_scale, top_k, causal: reference.indexer_topk(
        q, k, w, top_k=top_k, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqlens=seqlens, block_table=table,
        k_scale=k_scale,
    ),
)


def _sparse_attention(
    q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor, sinks: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, seqlens: Tensor | None, block_table: Tensor | None, value_dim: int, scale: float,
) -> tuple[Tensor, Tensor]:
    return reference.sparse_attention(
        q, kv if v is None else (kv, v), indices, value_dim=value_dim if v is None else None, scale=scale, sinks=sinks,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqlens=seqlens, block_table=block_table,
    )


_ATTENTION = (
    "Tensor q, Tensor kv, Tensor? v, Tensor indices, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqlens, Tensor? block_table, int value_dim, float scale"
)
_DIFFERENTIABLE = (0, 1, 2, 4)  # q, kv, v, sinks
sparse_attention_op = Op(
    "sparse_attention",
    f"({_ATTENTION}) -> (Tensor, Tensor)",
    lambda q, kv, v, indices, sinks, cu_q, cu_k, seqlens, table, value_dim, scale: (
        q.new_empty(*q.shape[:-1], value_dim), q.new_empty(q.shape[:-1], dtype=_wide(q))
    ),
)
# -> the gradients of those of q, kv, v and sinks that are there
sparse_attention_backward_op = Op(
    "sparse_attention_backward",
    f"(Tensor?[] grads, Tensor out, Tensor lse, {_ATTENTION}) -> Tensor[]",
    lambda grads, out, lse, *args: [torch.empty_like(args[i], memory_format=torch.contiguous_format)
                                    for i in _DIFFERENTIABLE if args[i] is not None],
)


@sparse_attention_op.kernel("reference")
def _reference_attention(*args: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return _sparse_attention(*args)


@sparse_attention_backward_op.kernel("reference")
def _reference_attention_backward(grads: Sequence[Tensor | None], out: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    return gradients(_sparse_attention, args, _DIFFERENTIABLE, grads)


def _setup_attention(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*args[:9], *outputs)
    ctx.options = args[9:]


def _attention_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    if not tensors[1].is_floating_point():  # FP8 bytes
        raise NotImplementedError("kv: sparse_attention over quantised latents has no gradient")
    found = iter(sparse_attention_backward_op(list(grads), out, lse, *tensors, *ctx.options))
    return (*(next(found) if i in _DIFFERENTIABLE and x is not None else None for i, x in enumerate(tensors)), None, None)


sparse_attention_op.differentiate(_setup_attention, _attention_backward, reference=_sparse_attention)
sparse_attention_backward_op.refuse_gradient("double backward is not supported")
sparse_attention_op.autocast("q", "kv", "v")


def _indexer_loss(*args: Any) -> tuple[Tensor, Tensor]:
    *given, reduction = args
    loss, kept = reference.indexer_loss_kept(*given)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum(), kept


_LOSS = (
    "Tensor q, Tensor k, Tensor w, Tensor target_q, Tensor target_kv, Tensor? indices, float scale, Tensor? target_lse, "
    "str reduction"
)
# -> the loss, and what its backward needs: [B, S, K], or over all keys [B, S, 3 + 2H] (csrc/include/indexer.h)
indexer_loss_op = Op(
    "indexer_loss",
    f"({_LOSS}) -> (Tensor, Tensor)",
    lambda q, k, w, target_q, target_kv, indices, scale, lse, reduction: (
        q.new_empty(q.shape[:2] if reduction == "none" else (), dtype=_wide(q)),
        q.new_empty(*q.shape[:2], 3 + 2 * target_q.shape[2] if indices is None else indices.shape[2], dtype=_wide(q)),
    ),
)
indexer_loss_backward_op = Op(  # -> [dq, dk, dw]
    "indexer_loss_backward",
    f"(Tensor dloss, Tensor kept, {_LOSS}) -> Tensor[]",
    lambda dloss, kept, *args: [torch.empty_like(x, memory_format=torch.contiguous_format) for x in args[:3]],
)


@indexer_loss_op.kernel("reference")
def _reference_indexer_loss(*args: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return _indexer_loss(*args)


@indexer_loss_backward_op.kernel("reference")
def _reference_indexer_loss_backward(dloss: Tensor, kept: Tensor, *args: Any) -> list[Tensor]:
    return gradients(_indexer_loss, args, (0, 1, 2), (dloss, None))


def _setup_indexer_loss(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(*args[:6], args[7], outputs[1])
    ctx.options = args[6], args[8]


def _indexer_loss_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    *tensors, lse, kept = ctx.saved_tensors
    scale, reduction = ctx.options
    if grads[0] is None:
        return (None,) * 9
    return (*indexer_loss_backward_op(grads[0], kept, *tensors, scale, lse, reduction), *(None,) * 6)


indexer_loss_op.differentiate(_setup_indexer_loss, _indexer_loss_backward, reference=_indexer_loss)
indexer_loss_backward_op.refuse_gradient("double backward is not supported")
indexer_loss_op.autocast("q", "k", "target_q", "target_kv")

topk_op.kernel("cpu", backends.topk_covers)(backends.cpu_topk)
topk_op.kernel("cuda", backends.topk_covers)(backends.cuda_topk)
indexer_topk_op.kernel("cpu", backends.indexer_covers)(backends.cpu_indexer_topk)
indexer_scores_op.kernel("cpu", indexer_cpu.scores_covers)(indexer_cpu.scores)
OPS["indexer_scores_backward"].kernel("cpu", lambda grads, *args: indexer_cpu.scores_covers(*args))(indexer_cpu.scores_backward)
indexer_loss_op.kernel("cpu", indexer_cpu.loss_covers)(indexer_cpu.loss)
indexer_loss_backward_op.kernel("cpu", lambda dloss, kept, *args: indexer_cpu.loss_covers(*args))(indexer_cpu.loss_backward)
sparse_attention_op.kernel("cpu", backends.attention_covers)(backends.cpu_attention)
sparse_attention_backward_op.kernel("cpu", backends.attention_backward_covers)(backends.cpu_attention_backward)
sparse_attention_op.kernel("triton", sparse_attention_gpu.covers)(sparse_attention_gpu.attention)
sparse_attention_backward_op.kernel("triton", sparse_attention_gpu.backward_covers)(sparse_attention_gpu.backward)
topk_op.kernel("triton", indexer_gpu.topk_covers)(indexer_gpu.topk)
indexer_loss_op.kernel("triton", indexer_gpu.loss_covers)(indexer_gpu.loss)
indexer_loss_backward_op.kernel("triton", lambda dloss, kept, *args: indexer_gpu.loss_covers(*args))(indexer_gpu.loss_backward)
indexer_topk_op.kernel("triton", indexer_gpu.indexer_covers)(indexer_gpu.indexer_topk)
indexer_scores_op.kernel("triton", indexer_gpu.scores_covers)(indexer_gpu.scores)
OPS["indexer_scores_backward"].kernel("triton", lambda grads, *args: indexer_gpu.scores_covers(*args))(indexer_gpu.scores_backward)
OPS["topk_backward"].kernel("triton", lambda grads, *args: indexer_gpu.topk_covers(*args))(indexer_gpu.topk_backward)
OPS["topk_backward"].kernel("cpu", lambda grads, *args: backends.topk_covers(*args))(backends.cpu_topk_backward)
OPS["topk_backward"].kernel("cuda", lambda grads, *args: backends.topk_covers(*args))(backends.cuda_topk_backward)


@topk_op.check
def _check_topk(scores: Tensor, k: int, lengths: Tensor | None) -> None:
    checks.within("lengths", lengths, 0, scores.shape[-1], "the scores of a row")


@indexer_topk_op.check
def _check_indexer_topk(
    q: Tensor, k: Tensor, w: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, seqlens: Tensor | None,
    block_table: Tensor | None, *options: Any,
) -> None:
    checks.cumulative("cu_seqlens_q", cu_q, q.shape[0])
    checks.cumulative("cu_seqlens_k", cu_k, k.shape[0])
    if seqlens is not None:
        checks.lengths_and_pages(seqlens, block_table, k, "index cache k")


@sparse_attention_op.check
def _check_sparse_attention(
    q: Tensor, kv: Tensor, v: Tensor | None, indices: Tensor, sinks: Tensor | None, cu_q: Tensor | None,
    cu_k: Tensor | None, seqlens: Tensor | None, block_table: Tensor | None, *options: Any,
) -> None:
    checks.cumulative("cu_seqlens_q", cu_q, q.shape[0])
    checks.cumulative("cu_seqlens_k", cu_k, kv.shape[0])
    if seqlens is not None:
        checks.lengths_and_pages(seqlens, block_table, kv, "cache kv")
    positions = kv.shape[0] if cu_q is not None else kv.shape[1] * (1 if block_table is None else block_table.shape[1])
    checks.within("indices", indices, -1, positions - 1, "key positions, −1 for an empty slot")


@indexer_loss_op.check
def _check_indexer_loss(
    q: Tensor, k: Tensor, w: Tensor, target_q: Tensor, target_kv: Tensor, indices: Tensor | None, *options: Any
) -> None:
    checks.within("indices", indices, -1, k.shape[1] - 1, "key positions, −1 for an empty slot")


# ---- public ----------------------------------------------------------------------------------------------------


def topk(scores: Tensor, k: int, *, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row -> values [..., k], indices int32 [..., k] in ascending index order.

    scores: [..., T]; lengths: [...] int32, how many scores of a row count (default T). Deterministic: ties go to the
    lower index, −0.0 equals +0.0; −inf is a score like any other and NaN ranks below it. A row with fewer than k scores
    ends in index −1, value −inf. Differentiable in scores through the values. Raises ValueError naming the argument.
    """
    checks.tensor("scores", scores, range(1, 9), "[..., T]")
    checks.integer("k", k, 1)
    if lengths is not None:
        checks.tensor("lengths", lengths, scores.dim() - 1, "[...]", checks.INTEGERS)
        checks.shape("lengths", lengths, scores.shape[:-1], "scores' shape without T")
        checks.same_device("scores", scores, lengths=lengths)
    return topk_op(scores, k, lengths)


def _check_some_heads(name: str, x: Tensor) -> None:
    if x.shape[-2] == 0:
        raise ValueError(f"{name}: got 0 heads, takes at least 1; its shape is {list(x.shape)}")


def _check_sequences(
    q: Tensor, name: str, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seqlens: Tensor | None,
    block_table: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """The sequences of q and of its keys k, the argument called `name`: packed, or rows of a batch or cache -> cu_seqlens_k."""
    cu_seqlens_k = checks.packed(cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_q is not None:
        for option, given in (("seqlens", seqlens), ("block_table", block_table)):
            if given is not None:
                raise ValueError(f"{option}: packed sequences (cu_seqlens_q) have no cache, so it must be None")
    elif seqlens is not None:
        checks.cache_rows(name, k, seqlens, block_table, q.shape[0], "B of q")
    elif block_table is not None:
        raise ValueError("seqlens: got None, needed with block_table")
    else:
        checks.size(name, k, 0, q.shape[0], "B of q")
    checks.same_device("q", q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqlens=seqlens, block_table=block_table)
    return cu_seqlens_k


def _check_indexer(q: Tensor, k: Tensor, w: Tensor, packed: bool) -> None:
    checks.tensor("q", q, 3 if packed else 4, "[B, S, Hi, Di] (packed: [N, Hi, Di])")
    checks.tensor("k", k, 2 if packed else 3, "[B, T, Di] (packed: [N, Di])", (*checks.FLOATS, torch.float8_e4m3fn))
    checks.tensor("w", w, q.dim() - 1, "[B, S, Hi] (packed: [N, Hi])")
    _check_some_heads("q", q)
    checks.size("k", k, -1, q.shape[-1], "Di of q")
    checks.shape("w", w, q.shape[:-1], "q's shape without Di")
    checks.same_device("q", q, k=k, w=w)


def indexer_scores(q: Tensor, k: Tensor, w: Tensor, *, causal: bool = True) -> Tensor:
    """The lightning indexer's dense scores I[t, s] = Σ_j w[t, j]·ReLU(q[t, j]·k[s]), −inf where s is not visible.

    q [B, S, Hi, Di], k [B, T, Di], w [B, S, Hi] -> float32 [B, S, T]; for inspection and warm-up. Differentiable.
    Source: DeepSeek-V3.2-Exp. Raises ValueError or TypeError naming the argument.
    """
    _check_indexer(q, k, w, packed=False)
    checks.size("k", k, 0, q.shape[0], "B of q")
    return indexer_scores_op(q, k, w, bool(causal))


def indexer_topk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    *,
    top_k: int,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """The top_k keys of each query by indexer_scores -> int32 [B, S, top_k], ascending, −1 padded at the end.

    q [B, S, Hi, Di], k [B, T, Di], w [B, S, Hi]; packed with cu_seqlens; decode: k is a cache [B, T, Di] or pages
    [P, page, Di] with seqlens [B] (counting the S new keys) and block_table. k_scale: float32, k's shape without Di,
    the scale of FP8 keys. Ties go to the lower index. No gradient. Raises ValueError or TypeError naming the argument.
    """
    _check_indexer(q, k, w, packed=cu_seqlens_q is not None)
    checks.integer("top_k", top_k, 1)
    if k_scale is not None:
        checks.tensor("k_scale", k_scale, k.dim() - 1, "[B, T] (packed: [N])")
        checks.shape("k_scale", k_scale, k.shape[:-1], "k's shape without Di")
        checks.same_device("q", q, k_scale=k_scale)
    cu_seqlens_k = _check_sequences(q, "k", k, cu_seqlens_q, cu_seqlens_k, seqlens, block_table)
    return indexer_topk_op(
        q.detach(), k.detach(), w.detach(), cu_seqlens_q, cu_seqlens_k, seqlens, block_table, k_scale, top_k, bool(causal)
    )


def sparse_attention(
    q: Tensor,
    kv: KV,
    indices: Tensor,
    *,
    value_dim: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the selected keys alone, differentiable in q, kv and sinks.

    Latents: q [B, S, H, D], kv [B, T, D] (packed [N, D], pages [P, page, D], FP8 bytes [.., 656]), indices [B, S, K];
    the value is the first value_dim of a latent. GQA: kv = (k [B, T, Hkv, D], v [B, T, Hkv, Dv]), indices
    [B, S, Hkv, K]. indices: key positions, −1 for an empty slot; a row of −1 gives 0 and lse −inf. With seqlens [B]
    (and block_table [B, max_pages]) kv is a cache and slots past a sequence's end count as empty.
    Packed sequences have no cache. scale defaults to D^-0.5. sinks [H] as in attention; lse (float32 [B, S, H]) never includes them.

    Returns [B, S, H, Dv]. Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("q", q, 3 if cu_seqlens_q is not None else 4, "[B, S, H, D] (packed: [N, H, D])")
    _check_some_heads("q", q)
    if isinstance(kv, (tuple, list)):
        if len(kv) != 2:
            raise ValueError(f"kv: got {len(kv)} tensors, takes one tensor of latents or (k, v)")
        k, v = kv
        checks.tensor("kv", k, q.dim(), "k [B, T, Hkv, D]")
        checks.tensor("kv", v, q.dim(), "v [B, T, Hkv, Dv]")
        checks.shape("kv", v, (*k.shape[:-1], v.shape[-1]), "v's sizes like k's up to Dv")
        checks.size("kv", k, -1, q.shape[-1], "D of q")
        if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
            raise ValueError(f"kv: got {k.shape[-2]} heads, takes a divisor of q's {q.shape[-2]} heads")
        if q.shape[-1] == 0 or v.shape[-1] == 0:
            raise ValueError(f"{'q' if q.shape[-1] == 0 else 'kv'}: got head dim 0, takes at least 1")
        checks.cast_together("kv", v, "q", q)
        checks.same_device("q", q, kv=v)
        if value_dim is not None and value_dim != v.shape[-1]:
            raise ValueError(f"value_dim: got {value_dim}, takes None or Dv = {v.shape[-1]} where kv is (k, v)")
        value_dim, rows = v.shape[-1], (*q.shape[:-2], k.shape[-2])
    else:
        k, v = kv, None
        checks.tensor("kv", k, q.dim() - 1, "[B, T, D] (packed: [N, D])", (*checks.FLOATS, torch.uint8))
        width = k.shape[-1]
        if k.dtype == torch.uint8:
            checks.size("kv", k, -1, FP8_BYTES, "bytes of an FP8 token")
            width = FP8_WIDTH
        checks.size("q", q, -1, width, "D of kv")
        value_dim = width if value_dim is None else value_dim
        checks.integer("value_dim", value_dim, 1)
        if value_dim > width:
            raise ValueError(f"value_dim: got {value_dim}, takes at most D = {width}")
        rows = q.shape[:-2]
    if k.dtype != torch.uint8:
        checks.cast_together("kv", k, "q", q)
    checks.tensor("indices", indices, len(rows) + 1, "[B, S, K], for (k, v) [B, S, Hkv, K]", checks.INTEGERS)
    checks.shape("indices", indices, (*rows, indices.shape[-1]), "q's rows (and Hkv) and K")
    if sinks is not None:
        checks.tensor("sinks", sinks, 1, "[H]")
        checks.shape("sinks", sinks, (q.shape[-2],), "[H]")
    cu_seqlens_k = _check_sequences(q, "kv", k, cu_seqlens_q, cu_seqlens_k, seqlens, block_table)
    checks.same_device("q", q, kv=k, indices=indices, sinks=sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale)
    out, lse = sparse_attention_op(
        q, k, v, indices, sinks, cu_seqlens_q, cu_seqlens_k, seqlens, block_table, value_dim, scale
    )
    return (out, lse) if return_lse else out


def indexer_loss(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    target_q: Tensor,
    target_kv: Tensor,
    *,
    indices: Tensor | None = None,
    scale: float,
    target_lse: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """KL(p_t ‖ softmax(I_t)) that trains the indexer: p_t sums the main attention's heads over the selected keys.

    q [B, S, Hi, Di], k [B, T, Di], w [B, S, Hi] of the indexer; target_q [B, S, H, D], target_kv [B, T, D] (latents) or
    [B, T, Hkv, D] of the main attention, detached here; scale: the main attention's; target_lse [B, S, H] spares its
    recomputation. indices [B, S, K]: the sparse stage; None: the dense warm-up stage over all visible keys.
    reduction: "mean" over the B·S queries, "sum" or "none" ([B, S]). Differentiable in q, k and w. float32.
    Source: DeepSeek-V3.2-Exp. Raises ValueError or TypeError naming the argument.
    """
    _check_indexer(q, k, w, packed=False)
    checks.size("k", k, 0, q.shape[0], "B of q")
    checks.tensor("target_q", target_q, 4, "[B, S, H, D]")
    checks.shape("target_q", target_q, (*q.shape[:2], *target_q.shape[2:]), "[B, S, H, D] of q")
    _check_some_heads("target_q", target_q)
    checks.tensor("target_kv", target_kv, (3, 4), "[B, T, D] or [B, T, Hkv, D]")
    checks.shape("target_kv", target_kv, (*k.shape[:2], *target_kv.shape[2:-1], target_q.shape[-1]), "[B, T, …, D]")
    if target_kv.dim() == 4 and (target_kv.shape[2] == 0 or target_q.shape[2] % target_kv.shape[2]):
        raise ValueError(f"target_kv: got {target_kv.shape[2]} heads, takes a divisor of target_q's {target_q.shape[2]} heads")
    if indices is not None:
        checks.tensor("indices", indices, 3, "[B, S, K]", checks.INTEGERS)
        checks.shape("indices", indices, (*q.shape[:2], indices.shape[-1]), "[B, S, K]")
    if target_lse is not None:
        checks.tensor("target_lse", target_lse, 3, "[B, S, H]")
        checks.shape("target_lse", target_lse, target_q.shape[:-1], "[B, S, H]")
    checks.number("scale", scale)
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    checks.same_device("q", q, target_q=target_q, target_kv=target_kv, indices=indices, target_lse=target_lse)
    target_lse = None if target_lse is None else target_lse.detach()
    return indexer_loss_op(
        q, k, w, target_q.detach(), target_kv.detach(), indices, float(scale), target_lse, reduction
    )[0]
