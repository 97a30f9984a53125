"""What the kernels over chosen blocks share: tiles of rows, the union of a tile's blocks, and the walk over them.

Shapes: S queries, T keys, U choosing heads, R = H / U heads that share a choice, n blocks of a choice, M and N the rows and keys of a tile,
Q queries of a tile. A tile's rows are (query, head): row i is query i // R, head i % R. Where R is over M a query has several tiles.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import floor_divide, tiles
from .native_sparse_choose import locate
from .primitives import launch

_BIG = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["S", "T", "n_tiles", "n_sequences", "capacity"])
def _unions_kernel(indices_ptr, list_ptr, named_ptr, count_ptr, cu_ptr, seqlens_ptr, S, T, U, n_tiles, n_sequences, capacity,
                   SLOTS: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                   PACKED: tl.constexpr, CACHE: tl.constexpr):
    """One program: the blocks that QUERIES queries of one choosing head named, ascending, and bit i of each: whether query i did."""
    S_all = S
    pid = tl.program_id(0)
    u = pid % U
    b, _, first, q0, S, T = locate(pid // U, n_tiles, cu_ptr, seqlens_ptr, S, T, n_sequences, QUERIES, PACKED, CACHE)
    i = tl.arange(0, ROWS)
    slot = tl.arange(0, PADDED)
    live = (i < QUERIES) & (q0 + i < S)
    at = indices_ptr + ((b * S_all + first + q0 + i) * U + u) * SLOTS
    block = tl.load(at[:, None] + slot[None, :], mask=live[:, None] & (slot < SLOTS)[None, :], other=-1)
    own = floor_divide(q0 + i + T - S, BLOCK)
    block = tl.where((block >= 0) & (block <= own[:, None]), block, _BIG)  # [ROWS, PADDED]
    bit = tl.full([ROWS], 1, tl.int64) << i.to(tl.int64)
    to = pid.to(tl.int64) * capacity
    count = 0
    current = tl.min(tl.min(block, 1), 0)
    while current < _BIG:
        named = tl.max((block == current).to(tl.int32), 1)
        tl.store(list_ptr + to + count, current)
        tl.store(named_ptr + to + count, tl.sum(tl.where(named > 0, bit, 0), 0))
        count += 1
        current = tl.min(tl.min(tl.where(block > current, block, _BIG), 1), 0)
    tl.store(count_ptr + pid, count)


@triton.jit
def steps_of(list_ptr, count, p_last, N: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """Tiles of N keys that a walk visits: of the last block those up to p_last."""
    steps = count * PIECES
    if PIECES > 1:
        if count > 0:
            last = tl.load(list_ptr + count - 1)
            steps = (count - 1) * PIECES + tl.minimum((p_last - last * BLOCK) // N + 1, PIECES)
    return steps


@triton.jit
def step_keys(list_ptr, named_ptr, step, i, p, N: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """-> the first key of tile `step`, how many of its N are of the block, which each row (query i of the tile, at p) sees [M, N]."""
    entry = step // PIECES
    piece = (step % PIECES) * N
    n0 = tl.load(list_ptr + entry) * BLOCK + piece
    named = (tl.load(named_ptr + entry) >> i.to(tl.int64)) & 1
    lane = tl.arange(0, N)
    limit = tl.where(named > 0, p - n0, -1)  # [M]
    return n0, BLOCK - piece, lane[None, :] <= tl.minimum(limit, BLOCK - piece - 1)[:, None]


class Walk(NamedTuple):
    """Unions of all tiles, and how the kernels are launched over them."""

    blocks: Tensor  # [tiles, capacity] int32
    named: Tensor  # [tiles, capacity] int64
    counts: Tensor  # [tiles] int32
    n_tiles: int  # of a row of the batch
    capacity: int
    programs: int
    queries: int
    parts: int  # tiles of a query and choosing head: over 1 where the heads that share a choice are more than M

    def constants(self, n: int, block: int) -> dict[str, Any]:
        keys = keys_of_tile(n, block)
        return dict(QUERIES=self.queries, PARTS=self.parts, N=keys, BLOCK=block, PIECES=triton.cdiv(block, keys))


def keys_of_tile(n: int, block: int) -> int:
    return min(n, max(16, triton.next_power_of_2(block)))


def walk(indices: Tensor, T: int, H: int, m: int, block: int, cu_seqlens: Tensor | None, seqlens: Tensor | None) -> Walk:
    """indices [B, S, U, n] int32 -> the unions of tiles of m rows."""
    B, S, U, slots = indices.shape
    shared = H // U
    padded = triton.next_power_of_2(max(slots, 2))
    queries = min(max(m // shared, 1), 64, max(1, 8192 // padded))  # 64 bits; what registers hold
    n_tiles = tiles(S, queries, cu_seqlens)
    lists, capacity = B * n_tiles * U, max(1, min(queries * slots, triton.cdiv(T, block)))
    found = torch.empty((lists, capacity), dtype=torch.int32, device=indices.device)
    named = torch.empty((lists, capacity), dtype=torch.int64, device=indices.device)
    counts = torch.empty(lists, dtype=torch.int32, device=indices.device)
    launch(
        _unions_kernel, (lists,), indices, found, named, counts, cu_seqlens, seqlens, S, T, U, n_tiles,
        0 if cu_seqlens is None else len(cu_seqlens) - 1, capacity, SLOTS=slots, PADDED=padded, QUERIES=queries,
        ROWS=max(2, triton.next_power_of_2(queries)), BLOCK=block, PACKED=cu_seqlens is not None, CACHE=seqlens is not None,
        warps=1 if padded * queries <= 512 else 4, stages=1, device=indices.device)
    parts = triton.cdiv(shared, m) if shared > m else 1
    return Walk(found, named, counts, n_tiles, capacity, lists * parts, queries, parts)
