"""Multi-head latent attention ops: absorbed decode over the latent cache, append and gather. Formulas: reference/mla.py.

Shapes: B batch, Sq new queries, H heads, T cached tokens, P pages, L value dim (latent, 512), R rope (64), D = L + R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkernel.ops import checks, mla_cpu, mla_gpu
from thinkernel.ops.library import Op, reference_op
from thinkernel.reference import mla as reference

FP8_BYTES = reference.FP8_BYTES
_CACHE = (*checks.FLOATS, torch.uint8)


def _mla_decode(
    q: Tensor, kv_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, prefix_kv: Tensor | None,
    prefix_table: Tensor | None, prefix_length: int, value_dim: int, scale: float,
) -> tuple[Tensor, Tensor]:
    prefix = None
    if prefix_kv is not None:
        prefix = (prefix_kv, prefix_length) if prefix_table is None else (prefix_kv, prefix_length, prefix_table)
    return reference.mla_decode(
        q, kv_cache, seqlens=seqlens, block_table=block_table, value_dim=value_dim, scale=scale, prefix=prefix
    )


mla_decode_op = reference_op(
    "mla_decode",
    "(Tensor q, Tensor kv_cache, Tensor seqlens, Tensor? block_table, Tensor? prefix_kv, Tensor? prefix_table, "
    "int prefix_length, int value_dim, float scale) -> (Tensor, Tensor)",
    lambda q, kv, seqlens, table, pkv, pt, pl, value_dim, scale: (
        q.new_empty(*q.shape[:-1], value_dim),
        q.new_empty(q.shape[:-1], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32),
    ),
    _mla_decode,
)
mla_decode_op.refuse_gradient("it serves decoding; train through attention on the expanded heads")

append_latent_op = Op(
    "append_latent",
    "(Tensor(a!) kv_cache, Tensor latent, Tensor rope, Tensor seqlens, Tensor? block_table) -> ()",
    lambda *args: None,
)
gather_latent_op = reference_op(
    "gather_latent",
    "(Tensor kv_cache, Tensor seqlens, Tensor? block_table) -> Tensor",
    lambda kv, seqlens, table: kv.new_empty(
        seqlens.shape[0], kv.shape[1] * (1 if table is None else table.shape[1]),
        reference.FP8_WIDTH if kv.dtype == torch.uint8 else kv.shape[-1],
        dtype=torch.bfloat16 if kv.dtype == torch.uint8 else kv.dtype,
    ),
    lambda kv, seqlens, table: reference.gather_latent(kv, seqlens=seqlens, block_table=table),
)


def _append(kv_cache: Tensor, latent: Tensor, rope: Tensor, seqlens: Tensor, block_table: Tensor | None) -> None:
    """Plain indexed copies."""
    reference.append_latent(kv_cache, latent, rope, seqlens=seqlens, block_table=block_table)


append_latent_op.kernel("reference")(_append)
gather_latent_op.refuse_gradient("a cache holds numbers alone; train through attention on the latents themselves")

mla_decode_op.kernel("cpu", mla_cpu.decode_covers)(mla_cpu.decode)
append_latent_op.kernel("cpu", mla_cpu.append_covers)(mla_cpu.append)
gather_latent_op.kernel("cpu", mla_cpu.gather_covers)(mla_cpu.gather)
mla_decode_op.kernel("triton", mla_gpu.decode_covers)(mla_gpu.decode)
append_latent_op.kernel("triton", mla_gpu.append_covers)(mla_gpu.append)
gather_latent_op.kernel("triton", mla_gpu.gather_covers)(mla_gpu.gather)


@mla_decode_op.check
def _check_decode(
    q: Tensor, kv_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, prefix_kv: Tensor | None,
    prefix_table: Tensor | None, prefix_length: int, *options: Any,
) -> None:
    checks.lengths_and_pages(seqlens, block_table, kv_cache, "kv_cache")
    if prefix_kv is not None and prefix_table is not None and prefix_length > 0:
        used = prefix_table[: -(-prefix_length // prefix_kv.shape[1])]
        checks.within("prefix block_table", used, 0, prefix_kv.shape[0] - 1, f"prefix kv has {prefix_kv.shape[0]} pages")


@append_latent_op.check
def _check_append(kv_cache: Tensor, latent: Tensor, rope: Tensor, seqlens: Tensor, block_table: Tensor | None) -> None:
    checks.lengths_and_pages(seqlens, block_table, kv_cache, "kv_cache")


@gather_latent_op.check
def _check_gather(kv_cache: Tensor, seqlens: Tensor, block_table: Tensor | None) -> None:
    checks.lengths_and_pages(seqlens, block_table, kv_cache, "kv_cache")


def check_latent_cache(kv_cache: Tensor, seqlens: Tensor, block_table: Tensor | None, batch: int) -> None:
    """Shapes and dtypes of a latent cache with its lengths and pages."""
    checks.tensor("kv_cache", kv_cache, 3, "[B, T, D] or pages [P, page, D]", _CACHE)
    if kv_cache.dtype == torch.uint8:
        checks.size("kv_cache", kv_cache, 2, FP8_BYTES, "bytes of an FP8 token")
    checks.cache_rows("kv_cache", kv_cache, seqlens, block_table, batch, "B")
    checks.same_device("kv_cache", kv_cache, seqlens=seqlens, block_table=block_table)


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    *,
    seqlens: Tensor,
    block_table: Tensor | None = None,
    value_dim: int = 512,
    scale: float,
    prefix: tuple[Any, ...] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Absorbed MLA decode: causal attention of Sq new queries over cached latents, used as key and as value.

    Args:
        q: [B, Sq, H, D] absorbed queries [W_UKᵀ q_nope | q_rope]; any H. float32, bfloat16, float16.
        kv_cache: [B, T, D] or pages [P, page, D] of [latent | rope], or FP8 bytes [.., 656] (uint8).
        seqlens: [B] int32, cached tokens counting the Sq new ones. block_table: [B, max_pages] int32.
        value_dim: how many of a token's values are its value, L. scale: of the scores, e.g. 192^-0.5 (not D^-0.5).
        prefix: latents shared by all sequences, before their own: (kv [Tp, D], length) or (pages, length, table).

    Returns [B, Sq, H, value_dim] (and lse float32 [B, Sq, H]). Not differentiable. Source: DeepSeek-V2 (2405.04434).
    Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("q", q, 4, "[B, Sq, H, D]")
    check_latent_cache(kv_cache, seqlens, block_table, q.shape[0])
    width = reference.FP8_WIDTH if kv_cache.dtype == torch.uint8 else kv_cache.shape[-1]
    checks.size("q", q, 3, width, "D of kv_cache")
    if kv_cache.dtype != torch.uint8:
        checks.same_dtype("kv_cache", kv_cache, "q", q)
    checks.same_device("q", q, kv_cache=kv_cache)
    checks.number("scale", scale)
    checks.integer("value_dim", value_dim, 1)
    if value_dim > width:
        raise ValueError(f"value_dim: got {value_dim}, takes at most D = {width}")
    kv, length, table = _check_prefix(prefix, kv_cache)
    out, lse = mla_decode_op(q, kv_cache, seqlens, block_table, kv, table, length, value_dim, float(scale))
    return (out, lse) if return_lse else out


def _check_prefix(prefix: Any, kv_cache: Tensor) -> tuple[Tensor | None, int, Tensor | None]:
    if prefix is None:
        return None, 0, None
    if not isinstance(prefix, (tuple, list)) or len(prefix) not in (2, 3):
        outline = f"{len(prefix)} values" if isinstance(prefix, (tuple, list)) else type(prefix).__name__
        raise TypeError(f"prefix: got {outline}, takes (kv, length) or (kv pages, length, block_table)")
    kv, length, table = (*prefix, None)[:3]
    checks.tensor("prefix kv", kv, 2 if table is None else 3, "[Tp, D] or pages [P, page, D]", _CACHE)
    checks.size("prefix kv", kv, -1, kv_cache.shape[-1], "D of kv_cache")
    checks.same_dtype("prefix kv", kv, "kv_cache", kv_cache)
    checks.integer("prefix length", length, 0)
    room = kv.shape[0]
    if table is not None:
        checks.tensor("prefix block_table", table, 1, "[max_pages]", checks.INTEGERS)
        if kv.shape[1] == 0:
            raise ValueError("prefix kv: got pages of 0 positions, takes at least 1")
        room = table.shape[0] * kv.shape[1]
    if length > room:
        raise ValueError(f"prefix length: got {length}, takes at most the {room} positions given")
    checks.same_device("kv_cache", kv_cache, **{"prefix kv": kv, "prefix block_table": table})
    return kv, length, table


def append_latent(
    kv_cache: Tensor, latent: Tensor, rope: Tensor, *, seqlens: Tensor, block_table: Tensor | None = None
) -> None:
    """Write latent [B, Sq, L] and rope [B, Sq, R] at the end of each sequence of the cache, in place.

    seqlens [B] int32 **already counts the Sq new tokens**. A uint8 cache [.., 656] is quantised to FP8 (L 512, R 64). No gradient
    goes into the cache.
    Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("latent", latent, 3, "[B, Sq, L]")
    checks.tensor("rope", rope, 3, "[B, Sq, R]")
    checks.shape("rope", rope, (*latent.shape[:2], rope.shape[-1]), "[B, Sq, R] of latent")
    check_latent_cache(kv_cache, seqlens, block_table, latent.shape[0])
    if kv_cache.dtype == torch.uint8:
        checks.size("latent", latent, 2, reference.LATENT, "values of an FP8 token's latent")
        checks.size("rope", rope, 2, reference.ROPE, "values of an FP8 token's rope")
    elif latent.shape[-1] + rope.shape[-1] != kv_cache.shape[-1]:
        together = f"takes {kv_cache.shape[-1]} together (kv_cache)"
        raise ValueError(f"rope: got {rope.shape[-1]} values beside {latent.shape[-1]}, {together}")
    checks.writable("kv_cache", kv_cache)
    checks.same_device("kv_cache", kv_cache, latent=latent, rope=rope)
    append_latent_op(kv_cache, latent, rope, seqlens, block_table)


def gather_latent(kv_cache: Tensor, *, seqlens: Tensor, block_table: Tensor | None = None) -> Tensor:
    """The cached tokens as a dense [B, T, D] tensor, zeros past each sequence's end; FP8 comes out as bfloat16.

    seqlens [B] int32. Not differentiable. Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("seqlens", seqlens, 1, "[B]", checks.INTEGERS)
    check_latent_cache(kv_cache, seqlens, block_table, len(seqlens))
    return gather_latent_op(kv_cache, seqlens, block_table)
