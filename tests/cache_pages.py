"""Caches whose unused slots are poisoned, for tests of decode."""

from __future__ import annotations

import torch
from thinkernel.testing.inputs import Draw
from torch import Tensor

NOBODYS = 2**31 - 1  # a page number that is nobody's


def paged(rows: Tensor, counts: list[int], page: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """The first counts[b] positions of rows [B, T, ...] in shuffled pages -> pages [P, page, ...], block table [B, max_pages].
    The rest is NaN (bytes of 0x7f), unused table entries are no pages."""
    B, most = len(rows), -(-max(rows.shape[1], 1) // page)
    order = draw.pages(B, most)
    poison = 0x7F if rows.dtype == torch.uint8 else float("nan")
    pages = torch.full((B * most + 3, page, *rows.shape[2:]), poison, dtype=rows.dtype)
    table = torch.full((B, most), NOBODYS, dtype=torch.int32)
    table[:, 1::2] = -7
    for b, count in enumerate(counts):
        for i in range(-(-count // page)):
            n = min(page, count - i * page)
            table[b, i] = order[b, i]
            pages[order[b, i].item(), :n] = rows[b, i * page : i * page + n]
    return pages, table
