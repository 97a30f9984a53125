"""What the attention modules and a decoder agree on about a cache of past tokens.

Shapes: B batch, S new tokens, T_max capacity. A cache is a plain preallocated tensor [B, T_max, ...]; row b holds its
tokens at 0 … seqlens[b]−1, whatever its neighbours hold, and what lies behind is never read. Grouped-query and
multi-head latent attention also take pages [P, page, ...], of which block_table [B, max_pages] says which are whose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CacheStep(NamedTuple):
    """One call's place in the cache, the same for all layers.

    seqlens [B] int32 counts the S new tokens; extent is a number on the host that no row's length exceeds, so that a
    kernel sees cache[:, :extent] and nothing needs a synchronisation; fresh says that the cache was empty before.
    block_table [B, max_pages] int32: the cache's tensors are pages.
    """

    seqlens: Tensor
    extent: int
    fresh: bool
    block_table: Tensor | None = None


def check_step(cache: tuple[Tensor, ...] | None, step: CacheStep | None) -> None:
    """A cache and a place in it come together."""
    if (cache is None) != (step is None):
        name, other = ("step", "cache") if step is None else ("cache", "step")
        raise ValueError(f"{name}: got None, takes a value where {other} is given")


def append_rows(cache: Tensor, new: Tensor, step: CacheStep) -> None:
    """Write new [B, S, ...] to each row's last S positions of cache [B, T_max, ...], in place and without gradient."""
    if step.block_table is not None:
        raise ValueError("step: got a block_table, which sparse attention does not take; pass a plain cache")
    size, new = new.shape[1], new.detach()
    if cache.shape[0] != new.shape[0] or cache.shape[1] < size:
        wanted = f"{new.shape[0]} rows of at least {size} positions"
        raise ValueError(f"cache: got {cache.shape[0]} rows of {cache.shape[1]} positions, takes {wanted}")
    if step.fresh:
        cache[:, :size] = new
        return
    rows = torch.arange(cache.shape[0], device=cache.device)[:, None]  # [B, 1]
    slots = step.seqlens[:, None].long() - size + torch.arange(size, device=cache.device)  # [B, S]
    cache[rows, slots] = new.to(cache.dtype)
