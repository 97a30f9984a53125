"""Held-out accuracy and self-consistency.

One set of samples answers all questions: with n completions per problem, majority@k is the share of right majority
votes over the n/k disjoint blocks of k completions, so majority@1 is the plain accuracy of a sampled completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from thinkernel.rl.rewards import is_worked, majority_vote, parse_answer
from thinkernel.rl.rollout import Sampler
from thinkernel.rl.tasks.arithmetic import Problem, is_held_out

VOTES = (1, 4, 16)


@dataclass(frozen=True)
class Evaluation:
    """Shares over problems × samples; `majority[k]` as above; tokens per second count sampled tokens."""

    problems: int
    samples: int
    accuracy: float
    majority: dict[str, float]
    well_formed: float
    worked: float
    accuracy_when_worked: float
    mean_tokens: float
    seconds: float
    tokens_per_second: float

    def as_dict(self) -> dict:
        return asdict(self)


def majority_at(answers: Sequence[Sequence[int | None]], truths: Sequence[int], k: int) -> float:
    """answers[problem][sample]; the share of right votes over all disjoint blocks of k samples."""
    right = blocks = 0
    for given, truth in zip(answers, truths, strict=True):
        for start in range(0, len(given) - k + 1, k):
            right += majority_vote(given[start : start + k]) == truth
            blocks += 1
    if blocks == 0:
        raise ValueError(f"k: got {k}, takes at most the number of samples of a problem")
    return right / blocks


def evaluate(sampler: Sampler, problems: Sequence[Problem], *, samples: int, seed: int, label: str) -> Evaluation:
    """Samples `samples` completions of every held-out problem at the sampler's temperature."""
    if not all(is_held_out(problem) for problem in problems):
        raise ValueError("problems: got one that training may have seen, takes held-out problems only")
    repeated = [problem for problem in problems for _ in range(samples)]
    rollout = sampler.sample([problem.prompt for problem in problems], samples=samples, seed=seed, label=label)
    answers = [parse_answer(text, finished=done) for text, done in zip(rollout.texts, rollout.finished)]
    right = [answer == problem.answer for answer, problem in zip(answers, repeated)]
    worked = [is_worked(text) for text in rollout.texts]
    by_problem = [answers[i : i + samples] for i in range(0, len(answers), samples)]
    truths = [problem.answer for problem in problems]
    return Evaluation(
        problems=len(problems),
        samples=samples,
        accuracy=sum(right) / len(right),
        majority={str(k): majority_at(by_problem, truths, k) for k in VOTES if k <= samples},
        well_formed=sum(answer is not None for answer in answers) / len(answers),
        worked=sum(worked) / len(worked),
        accuracy_when_worked=sum(r and w for r, w in zip(right, worked)) / max(sum(worked), 1),
        mean_tokens=rollout.tokens / len(answers),
        seconds=rollout.seconds,
        tokens_per_second=rollout.tokens / max(rollout.seconds, 1e-9),
    )
