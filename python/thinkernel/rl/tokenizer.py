"""A small tokenizer: every digit and sign is one token, every word of the word problems is one token.

`encode` takes the longest piece that matches, `decode` joins the pieces, so any text that encodes at all
comes back unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")
CHARACTERS = tuple("0123456789+-*()=;#.?\n ")
WORDS = (
    "Ann",
    "Ben",
    "Eva",
    "Tom",
    " She",
    " He",
    " has ",
    " pens",
    " books",
    " coins",
    " cards",
    " finds ",
    " buys ",
    " loses ",
    " sells ",
    " multiplies them by ",
    " How many",
)
PIECES = SPECIAL + CHARACTERS + WORDS
VOCAB_SIZE = 48  # a little room: unused ids are never a target

_IDS = {piece: index for index, piece in enumerate(PIECES)}
_PATTERN = re.compile("|".join(re.escape(piece) for piece in sorted(CHARACTERS + WORDS, key=len, reverse=True)))


def encode(text: str) -> list[int]:
    """Text to token ids, without <bos> and <eos>. ValueError names the first character that no piece covers."""
    ids, position = [], 0
    while position < len(text):
        match = _PATTERN.match(text, position)
        if match is None:
            raise ValueError(
                f"text: got {text[position]!r} at position {position}, takes digits, + - * ( ) = ; # and the words of "
                f"the word problems ({', '.join(word.strip() for word in WORDS)})"
            )
        ids.append(_IDS[match.group()])
        position = match.end()
    return ids


def decode(ids: Iterable[int]) -> str:
    """Token ids to text; special and unused ids are left out."""
    return "".join(PIECES[index] for index in ids if len(SPECIAL) <= index < len(PIECES))
