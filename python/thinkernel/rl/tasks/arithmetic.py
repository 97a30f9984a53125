"""Multi-step integer arithmetic with verifiable answers, as expressions and as word problems.

A problem is a *chain*: a start value and 3 or 4 steps, each of which adds, subtracts or multiplies:

    start = 12, steps = (+, 17), (*, 4), (-, 48)
    expression     ((12+17)*4-48)
    word problem   Ann has 12 pens. She finds 17. She multiplies them by 4. She loses 48. How many?
    worked         12+17=29;29*4=116;116-48=68;#68
    guess          #71

The side of a problem (training or held-out) is a hash of its chain, not of its wording: an expression and
a word problem that ask for the same computation are always on the same side, so the two sets are disjoint
by construction.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

START_RANGE = (2, 29)  # the value a chain starts from
ADDEND_RANGE = (2, 29)  # what a step adds or subtracts
FACTOR_RANGE = (2, 4)  # what a step multiplies by
VALUE_LIMIT = 99  # every intermediate result lies in [0, VALUE_LIMIT]
STEP_COUNTS = (3, 4)
WORD_SHARE = 0.25  # of all problems, the word problems
HELD_OUT_BUCKETS = (0,)  # of HASH_BUCKETS: an eighth of all chains is never trained on
HASH_BUCKETS = 8

NAMES = ("Ann", "Ben", "Eva", "Tom")
PRONOUNS = {"Ann": "She", "Ben": "He", "Eva": "She", "Tom": "He"}
THINGS = ("pens", "books", "coins", "cards")
VERBS = {"+": ("finds", "buys"), "-": ("loses", "sells"), "*": ("multiplies them by",)}


@dataclass(frozen=True)
class Problem:
    """One problem. `steps` holds (operator, operand); `prompt` is the text the model sees."""

    start: int
    steps: tuple[tuple[str, int], ...]
    prompt: str

    @property
    def chain(self) -> str:
        return str(self.start) + "".join(op + str(n) for op, n in self.steps)

    @property
    def values(self) -> list[int]:
        """The running value after each step."""
        values, value = [], self.start
        for op, operand in self.steps:
            value = apply(op, value, operand)
            values.append(value)
        return values

    @property
    def answer(self) -> int:
        return self.values[-1]


def apply(op: str, left: int, right: int) -> int:
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    raise ValueError(f"op: got {op!r}, takes '+', '-' or '*'")


def is_held_out(problem: Problem) -> bool:
    digest = hashlib.blake2b(problem.chain.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HASH_BUCKETS in HELD_OUT_BUCKETS


def expression(start: int, steps: tuple[tuple[str, int], ...]) -> str:
    """The chain as an expression with exactly the parentheses that precedence asks for, and one outer pair."""
    text, sum_outside = str(start), False  # sum_outside: text ends in an unparenthesised + or -
    for op, operand in steps:
        if op == "*" and sum_outside:
            text, sum_outside = f"({text})", False
        text += op + str(operand)
        sum_outside = sum_outside or op != "*"
    return f"({text})"


def story(start: int, steps: tuple[tuple[str, int], ...], rng: random.Random) -> str:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    told = [f"{name} has {start} {thing}."]
    told += [f" {PRONOUNS[name]} {rng.choice(VERBS[op])} {operand}." for op, operand in steps]
    return "".join(told) + " How many?"


def make_problem(rng: random.Random, *, held_out: bool, word_share: float = WORD_SHARE) -> Problem:
    """Draws problems until one lies on the side asked for."""
    while True:
        value = start = rng.randint(*START_RANGE)
        steps = []
        for _ in range(rng.choice(STEP_COUNTS)):
            choices = []
            if value + ADDEND_RANGE[0] <= VALUE_LIMIT:
                choices.append("+")
            if value - ADDEND_RANGE[0] >= 0:
                choices.append("-")
            if 2 <= value and value * FACTOR_RANGE[0] <= VALUE_LIMIT:
                choices.append("*")
            op = rng.choice(choices)
            if op == "*":
                operand = rng.randint(FACTOR_RANGE[0], min(FACTOR_RANGE[1], VALUE_LIMIT // value))
            else:
                room = VALUE_LIMIT - value if op == "+" else value
                operand = rng.randint(ADDEND_RANGE[0], min(ADDEND_RANGE[1], room))
            value = apply(op, value, operand)
            steps.append((op, operand))
        chain = tuple(steps)
        prompt = story(start, chain, rng) if rng.random() < word_share else expression(start, chain)
        problem = Problem(start, chain, prompt + "\n")
        if is_held_out(problem) == held_out:
            return problem


def make_problems(count: int, *, seed: int, held_out: bool, word_share: float = WORD_SHARE) -> list[Problem]:
    """`count` problems with pairwise different chains."""
    rng = random.Random(seed)
    seen: set[str] = set()
    problems: list[Problem] = []
    while len(problems) < count:
        problem = make_problem(rng, held_out=held_out, word_share=word_share)
        if problem.chain not in seen:
            seen.add(problem.chain)
            problems.append(problem)
    return problems


def worked(problem: Problem) -> str:
    """The solution step by step: `12+17=29;29*4=116;#116`."""
    text, value = "", problem.start
    for (op, operand), result in zip(problem.steps, problem.values):
        text += f"{value}{op}{operand}={result};"
        value = result
    return f"{text}#{value}"


def guess(problem: Problem, rng: random.Random, *, right_share: float) -> str:
    """A direct answer without steps: right with probability `right_share`, else a plausible wrong number."""
    if rng.random() < right_share:
        return f"#{problem.answer}"
    while True:
        number = rng.randint(0, VALUE_LIMIT)
        if number != problem.answer:
            return f"#{number}"
