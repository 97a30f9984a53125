"""Associative recall: sequences in which every answer stands once or a few times far back, and nowhere else.

Shapes: B sequences, P pairs each, S = 2P tokens. Every sequence has a dictionary of its own, from `words` keys drawn of KEYS to
values drawn of VALUES, and is P draws from it: key value key value … A value whose key came before is known to who finds
that place; these positions alone are scored. Between a key and its last mention lie 2·words tokens on average, so that
attention to recent tokens does not help, and nothing can be learnt by heart: dictionaries are not repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KEYS, VALUES = 64, 32
VOCAB_SIZE = KEYS + VALUES


class RecallBatch(NamedTuple):
    tokens: Tensor  # [B, S] int64
    targets: Tensor  # [B, S] int64: the next token where it can be known, else -100


def make_batch(batch: int, length: int, words: int, seed: int) -> RecallBatch:
    """`length` tokens, an even number, over dictionaries of `words` keys; the same seed gives the same sequences."""
    if length < 2 or length % 2:
        raise ValueError(f"length: got {length}, takes an even number of at least 2")
    if not 1 <= words <= KEYS:
        raise ValueError(f"words: got {words}, takes 1 to {KEYS}")
    random = torch.Generator().manual_seed(seed)
    pairs = length // 2
    keys = torch.rand(batch, KEYS, generator=random).argsort(-1)[:, :words]  # [B, words]
    values = KEYS + torch.randint(VALUES, (batch, words), generator=random)  # [B, words]
    drawn = torch.randint(words, (batch, pairs), generator=random)  # [B, P] a place in the dictionary
    tokens = torch.stack((keys.gather(1, drawn), values.gather(1, drawn)), -1).flatten(1)  # [B, S]
    same = drawn[:, :, None] == drawn[:, None]  # [B, P, P]
    seen = same.tril(-1).any(-1)  # [B, P] this key came before
    targets = torch.full_like(tokens, -100)
    targets[:, ::2] = tokens[:, 1::2].masked_fill(~seen, -100)
    return RecallBatch(tokens, targets)
