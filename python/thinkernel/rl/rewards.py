"""The programmatic verifier: what a completion earns.

A completion is well formed when it ended by itself and reads `step;step;…;#answer`, with no step at all for a
direct answer. Steps are free text: only the outcome is verified, so nothing rewards reasoning as such. Two reward
functions, combined by `tk.group_advantages(rewards [R, 2], weights=REWARD_WEIGHTS)`:

    accuracy  1 when the completion is well formed and its answer is the right integer, else 0
    format    1 when the completion is well formed, else 0
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from thinkernel.rl.tasks.arithmetic import Problem

REWARD_NAMES = ("accuracy", "format")
REWARD_WEIGHTS = (1.0, 0.1)

_WELL_FORMED = re.compile(r"(?:[^#;\n]+;)*#(0|-?[1-9][0-9]{0,5})", re.ASCII)


def parse_answer(text: str, *, finished: bool) -> int | None:
    """The answer of a well-formed completion, else None. finished: the model itself ended it."""
    if not finished:
        return None
    match = _WELL_FORMED.fullmatch(text)
    return int(match.group(1)) if match else None


def is_worked(text: str) -> bool:
    """Whether the completion writes steps before its answer."""
    return ";" in text


def reward(problem: Problem, text: str, *, finished: bool) -> tuple[float, float]:
    """(accuracy, format), each 0 or 1."""
    answer = parse_answer(text, finished=finished)
    return float(answer is not None and answer == problem.answer), float(answer is not None)


def majority_vote(answers: Sequence[int | None]) -> int | None:
    """The most frequent answer; None does not vote; a tie goes to the answer given first; no votes give None."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None
