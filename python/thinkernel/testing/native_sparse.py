"""Cases of NSA and MoBA (rows of testing/cases.py), and both as torch computes them: each branch by the fused formulas with a mask.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, D head dim, Dv value dim, Tc compressed keys, N packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import thinkernel as tk
from thinkernel.reference import native_sparse as reference
from thinkernel.testing.attention import FusedAttention
from thinkernel.testing.inputs import Draw

Inputs = dict[str, Any]
SMALL = dict(block=8, compress_block=4, stride=2, top_n=4, window=6)
REAL = dict(block=64, compress_block=32, stride=16, top_n=4, window=128)


def nsa_inputs(
    draw: Draw, B: int, S: int, T: int, H: int, Hkv: int, D: int, Dv: int, sizes: dict[str, int], lengths: tuple[int, ...] = ()
) -> Inputs:
    """Packed sequences of `lengths` where these are given, else B of S queries and T keys."""
    rows, keys = ((sum(lengths),), (sum(lengths),)) if lengths else ((B, S), (B, T))
    counts = [reference.compressed_length(n, sizes["compress_block"], sizes["stride"]) for n in lengths or (T,)]
    blocks = (sum(counts),) if lengths else (B, counts[0])
    inputs = dict(
        q=draw.normal(*rows, H, D, scale=2.0), k=draw.normal(*keys, Hkv, D), v=draw.normal(*keys, Hkv, Dv),
        k_compressed=draw.normal(*blocks, Hkv, D), v_compressed=draw.normal(*blocks, Hkv, Dv), gates=draw.normal(*rows, H, 3).sigmoid(),
    )
    cuts = torch.tensor([0, *lengths]).cumsum(0).int()
    return inputs | ({"cu_seqlens": cuts} if lengths else {})


def _fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [B,S,H,D], k [B,T,Hkv,D], visible [B|1, H|1, S, T] -> [B,S,H,Dv], in q's dtype."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    out, _ = FusedAttention.apply(q, k, v, q.new_full((q.shape[1],), -torch.inf), visible, q.shape[-1] ** -0.5, 0.0)
    return out.transpose(1, 2)


def _by_sequence(form: Callable[..., Tensor], cu_seqlens: Tensor, compressed: tuple[int, int] | None, **tensors: Tensor) -> Tensor:
    """compressed: length and stride of the compressed blocks, whose tensors are cut by their own counts."""
    cuts, at, parts = cu_seqlens.tolist(), 0, []
    for a, b in zip(cuts, cuts[1:], strict=False):
        end = at + (reference.compressed_length(b - a, *compressed) if compressed else 0)
        parts.append(form(**{name: x[None, at:end] if "compressed" in name else x[None, a:b] for name, x in tensors.items()})[0])
        at = end
    return torch.cat(parts)


def torch_nsa(*, cu_seqlens: Tensor | None = None, sizes: dict[str, int], **tensors: Tensor) -> Tensor:
    """tk.native_sparse_attention; the blocks are those that the reference chooses in this dtype."""
    if cu_seqlens is not None:
        compressed = sizes["compress_block"], sizes["stride"]
        return _by_sequence(lambda **x: torch_nsa(sizes=sizes, **x), cu_seqlens, compressed, **tensors)
    q, k, v, kc, vc, gates = tensors.values()
    S, T = q.shape[1], k.shape[1]
    with torch.no_grad():
        indices = reference.native_sparse_attention(*tensors.values(), **sizes)[3]  # type: ignore[arg-type]
    positions = torch.arange(T - S, T)[None]  # [1, S]
    ends, keys, p = torch.arange(kc.shape[1]) * sizes["stride"] + sizes["compress_block"] - 1, torch.arange(T), positions[..., None]
    chosen = reference._chosen_keys(indices, positions, T, sizes["block"]).repeat_interleave(q.shape[2] // k.shape[2], 1)
    near = ((keys <= p) & (keys > p - sizes["window"]))[:, None]
    branches = (_fused(q, kc, vc, (ends <= p)[:, None]), _fused(q, k, v, chosen), _fused(q, k, v, near))
    return sum(gates[..., c, None].float() * x.float() for c, x in enumerate(branches)).to(q.dtype)  # type: ignore[union-attr]


def torch_moba(q: Tensor, k: Tensor, v: Tensor, *, block: int, top_k: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """tk.block_attention; the blocks are those that the reference chooses in this dtype."""
    if cu_seqlens is not None:
        return _by_sequence(lambda **x: torch_moba(**x, block=block, top_k=top_k), cu_seqlens, None, q=q, k=k, v=v)
    with torch.no_grad():
        indices = reference.block_attention(q, k, v, block=block, top_k=top_k)[2]
    positions = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[None]
    return _fused(q, k, v, reference._chosen_keys(indices, positions, k.shape[1], block))


def _qkv(draw: Draw, B: int, S: int, T: int, H: int, Hkv: int, D: int, Dv: int, lengths: tuple[int, ...] = ()) -> Inputs:
    found = nsa_inputs(draw, B, S, T, H, Hkv, D, Dv, SMALL, lengths)
    return {name: found[name] for name in ("q", "k", "v", "cu_seqlens") if name in found}


def _cache(draw: Draw) -> Inputs:
    """Three new tokens of each sequence; what lies behind its end is NaN."""
    inputs, lengths = nsa_inputs(draw, 2, 3, 40, 4, 2, 16, 24, SMALL), [40, 23]
    for b, n in enumerate(lengths):
        inputs["k"][b, n:] = inputs["v"][b, n:] = torch.nan
        blocks = reference.compressed_length(n, SMALL["compress_block"], SMALL["stride"])
        inputs["k_compressed"][b, blocks:] = inputs["v_compressed"][b, blocks:] = torch.nan
    return inputs | {"seqlens": torch.tensor(lengths, dtype=torch.int32)}


def _row(
    name: str, inputs: Callable[[Draw], Inputs], op: Callable[..., Tensor], baseline: Callable[..., Tensor], gradients: tuple[str, ...], *,
    small: bool = True,
) -> dict[str, Any]:
    return dict(name=f"sparse/{name}", inputs=inputs, run=op, gradients=gradients, baseline=baseline, small=small)


def _nsa_row(name: str, inputs: Callable[[Draw], Inputs], sizes: dict[str, int], **options: Any) -> dict[str, Any]:
    gradients = ("q", "k", "v", "k_compressed", "v_compressed", "gates")
    return _row(name, inputs, lambda **x: tk.native_sparse_attention(**x, **sizes),  # type: ignore[arg-type]
                lambda **x: torch_nsa(**x, sizes=sizes), gradients, **options)  # fmt: skip


def _moba_row(name: str, inputs: Callable[[Draw], Inputs], block: int, top_k: int, **options: Any) -> dict[str, Any]:
    return _row(name, inputs, lambda **x: tk.block_attention(**x, block=block, top_k=top_k),
                lambda **x: torch_moba(**x, block=block, top_k=top_k), ("q", "k", "v"), **options)  # fmt: skip


LENGTHS = (19, 0, 3, 33, 1)
ROWS = [
    _nsa_row("nsa", lambda draw: nsa_inputs(draw, 2, 50, 50, 4, 2, 16, 24, SMALL), SMALL),
    _nsa_row("nsa-last-queries", lambda draw: nsa_inputs(draw, 2, 9, 45, 4, 1, 16, 16, SMALL), SMALL),
    _nsa_row("nsa-packed", lambda draw: nsa_inputs(draw, 1, 0, 0, 4, 2, 16, 16, SMALL, LENGTHS), SMALL),
    dict(name="sparse/nsa-cache", inputs=_cache, run=lambda **x: tk.native_sparse_attention(**x, **SMALL)),  # type: ignore[arg-type]
    _nsa_row("nsa-400", lambda draw: nsa_inputs(draw, 1, 400, 400, 8, 2, 64, 64, REAL), REAL, small=False),
    _moba_row("moba", lambda draw: _qkv(draw, 2, 50, 50, 4, 2, 16, 24), 8, 3),
    _moba_row("moba-packed", lambda draw: _qkv(draw, 1, 0, 0, 4, 2, 16, 16, lengths=LENGTHS), 8, 2),
    _moba_row("moba-700", lambda draw: _qkv(draw, 1, 700, 700, 4, 2, 64, 64), 100, 3, small=False),
]


def near_ties(scores: Tensor, forced: Tensor, found: Tensor, exact: Tensor) -> Tensor:
    """Whether both choices are one, or their lowest float64 scores lie within 16 float32 ulps of the row's largest."""
    lowest = []
    for chosen in (found, exact):
        at = chosen.clamp_min(0).long()
        own = (chosen < 0) | forced.expand(scores.shape).gather(-1, at)
        lowest.append(scores.gather(-1, at).masked_fill(own, torch.inf).amin(-1))
    same = (found == exact).all(-1)
    return same | ((lowest[0] - lowest[1]).abs() <= 16 * 2**-23 * scores.abs().amax(-1))
