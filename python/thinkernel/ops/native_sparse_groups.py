"""NSA's compressed branch as attention's own kernels can run it: d neighbouring queries see the same compressed keys, so that they stand
side by side as d G heads of one query, and between such groups the mask is the ordinary causal one.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, G = H / Hkv, l, d: length and stride of compressed blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups:
    """Queries [B, S, H, ·] (packed [N, H, ·]) side by side: those of a group are heads of one row [B, groups, Hkv d G, ·].

    The last group of a sequence faces its last compressed key; what fills up the first and the last group is zero."""

    def __init__(
        self, q: Tensor, T: int, kv_heads: int, compress_block: int, stride: int, cu_seqlens: Tensor | None, seqlens: Tensor | None
    ):
        self.stride, self.kv_heads, self.S = stride, kv_heads, q.shape[-3]
        self.lead: tuple[int, ...] = ()  # of the grouped rows, where queries are placed by slots
        self.slots: Tensor | None = None  # [B S] rows among all
        self.cu_groups: Tensor | None = None
        self.cu_keys: Tensor | None = None
        self.key_counts: Tensor | None = None  # [B] of a cache

        def whole_blocks(lengths: Tensor) -> Tensor:
            return ((lengths - compress_block).div(stride, rounding_mode="floor") + 1).clamp_min(0)

        if cu_seqlens is not None:
            lengths = cu_seqlens.long().diff()
            front = (1 - compress_block) % stride
            groups = (front + lengths + stride - 1) // stride
            self.cu_groups, self.cu_keys = (F.pad(x.cumsum(0), (1, 0)).int() for x in (groups, whole_blocks(lengths)))
            # As many as there can be: how many there are a GPU would have to be asked.
            self.count = (self.S + len(lengths) * (front + stride - 1)) // stride
            query, shift = torch.arange(self.S, device=q.device), self.cu_groups[:-1] * stride + front - cu_seqlens[:-1]
            sequence = torch.searchsorted(cu_seqlens[1:].long(), query, right=True).clamp_max(len(lengths) - 1)
            self.slots = (query + shift[sequence]).clamp(0, self.count * stride - 1)
            self.lead = (self.count,)
        elif seqlens is not None:
            seqlens = seqlens.long()
            self.key_counts, self.count = whole_blocks(seqlens).int(), -(-(self.S + stride - 1) // stride)
            last = (self.count - 1) * stride + (seqlens - compress_block) % stride  # row of the last query
            rows = last[:, None] + torch.arange(1 - self.S, 1, device=q.device)  # [B, S]
            self.slots = (rows + torch.arange(len(q), device=q.device)[:, None] * self.count * stride).flatten()
            self.lead = (len(q), self.count)
        else:
            self.front = (T - self.S - compress_block + 1) % stride
            self.count = -(-(self.front + self.S) // stride)

    def join(self, x: Tensor) -> Tensor:
        """[B, S, H, ·] -> [B, groups, Hkv d G, ·]"""
        H = x.shape[-2]
        if self.slots is None:
            wide = F.pad(x, (0, 0, 0, 0, self.front, self.count * self.stride - self.front - self.S))
            wide = wide.unflatten(1, (self.count, self.stride))
        else:
            rows = x.new_zeros(math.prod(self.lead) * self.stride, *x.shape[-2:])
            wide = rows.index_copy_(0, self.slots, x.reshape(-1, *x.shape[-2:])).view(*self.lead, self.stride, *x.shape[-2:])
        return wide.unflatten(-2, (self.kv_heads, H // self.kv_heads)).transpose(-4, -3).flatten(-4, -2)

    def split(self, x: Tensor) -> Tensor:
        """[B, groups, Hkv d G, ·] -> [B, S, H, ·]"""
        G = x.shape[-2] // (self.kv_heads * self.stride)
        wide = x.unflatten(-2, (self.kv_heads, self.stride, G)).transpose(-4, -3).flatten(-3, -2)  # [B, groups, d, H, ·]
        if self.slots is None:
            return wide.flatten(1, 2)[:, self.front : self.front + self.S]
        found = wide.reshape(-1, *wide.shape[-2:])[self.slots]
        return found if len(self.lead) == 1 else found.unflatten(0, (self.lead[0], self.S))
