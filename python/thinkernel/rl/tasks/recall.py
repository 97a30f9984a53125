"""Recall over a distance: facts among noise in the first half of a sequence, questions about them in the second.

Shapes: B sequences of S tokens, F facts each. A fact is one token that says "key k has value v", a question is a token "which value
has k?", the rest is noise. Every sequence draws keys and values anew and mentions each of its facts once, so that a question can be
answered from one place alone, S / 2 tokens back on average: recent tokens do not help, and nothing can be learnt by heart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KEYS, VALUES, NOISE = 16, 16, 32
# values 0 … V−1 (answers, never in a sequence), questions, noise, facts
QUESTION, FIRST_NOISE, FACT = VALUES, VALUES + KEYS, VALUES + KEYS + NOISE
VOCAB_SIZE = FACT + KEYS * VALUES


class RecallBatch(NamedTuple):
    tokens: Tensor  # [B, S] int64
    targets: Tensor  # [B, S] int64: the value asked for, −100 where nothing is asked


def make_batch(batch: int, length: int, facts: int, seed: int) -> RecallBatch:
    """`facts` of the keys are mentioned in each sequence of `length` tokens; the same seed gives the same sequences."""
    half = length // 2
    if not 1 <= facts <= min(KEYS, half):
        raise ValueError(f"facts: got {facts}, takes 1 to {min(KEYS, half)} (there are {KEYS} keys, and length // 2 = {half} places)")
    random = torch.Generator().manual_seed(seed)
    tokens = FIRST_NOISE + torch.randint(NOISE, (batch, length), generator=random)  # [B, S]
    targets = torch.full_like(tokens, -100)
    keys = torch.rand(batch, KEYS, generator=random).argsort(-1)[:, :facts]  # [B, F]
    values = torch.randint(VALUES, (batch, facts), generator=random)  # [B, F]
    places = torch.rand(batch, half, generator=random).argsort(-1)[:, :facts]  # [B, F]
    tokens.scatter_(1, places, FACT + keys * VALUES + values)
    asked = torch.randint(facts, (batch, length - half), generator=random)  # [B, S − half] which fact
    is_question = torch.rand(batch, length - half, generator=random) < 0.5
    tokens[:, half:] = torch.where(is_question, QUESTION + keys.gather(1, asked), tokens[:, half:])
    targets[:, half:] = values.gather(1, asked).masked_fill(~is_question, -100)
    return RecallBatch(tokens, targets)
