"""Runs cases on backends and dtypes and applies the comparator: what `thinkernel validate` prints and the tests assert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinkernel.ops import dispatch
from thinkernel.ops.memory import poisoned_results
from thinkernel.testing.cases import Case, Inputs
from thinkernel.testing.compare import Comparison, compare
from thinkernel.testing.inputs import Draw

# Chosen indices may differ from the float64 choice only where the two candidates' float64 scores lie this close, in
# units of the float32 epsilon times the largest score of the row.
SELECTION_ULPS = 16

# How many draws of a case are stacked: three, and of float32 results as many as fill this many elements, up to 48. Two
# implementations of equal root-mean-square error differ by 2 in the largest error of a few hundred elements one time in
# ten; 16-bit results need no more than three, their errors are those of the last rounding.
DRAWS, MOST_DRAWS, ENOUGH_ELEMENTS = 3, 48, 1 << 17


@dataclass(frozen=True)
class Result:
    """One output or gradient of one case on one backend in one dtype; `skipped` says why it did not run."""

    case: Case
    backend: str
    dtype: torch.dtype
    comparison: Comparison | None
    skipped: str = ""


def _outputs(case: Case, inputs: Inputs, seed: int, run: Any) -> list[Tensor]:
    """Outputs of one call, then the gradients for random cotangents that depend on the seed alone."""
    inputs = dict(inputs)
    for name in case.gradients:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
    found = run(**inputs)
    outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    if not case.gradients:
        return outputs
    draw = Draw(seed + 1)
    pairs = []
    for x in outputs:
        cotangent = draw.normal(*x.shape) if x.is_floating_point() else None
        if cotangent is not None and x.requires_grad:
            pairs.append((x, cotangent.to(x.dtype).to(x.device)))
    wanted = [inputs[name] for name in case.gradients]
    grads = torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    return outputs + [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]


def _to(inputs: Inputs, dtype: torch.dtype | None, device: str) -> Inputs:
    return {
        name: x if not isinstance(x, Tensor) else x.to(device, dtype if x.is_floating_point() and dtype else x.dtype)
        for name, x in inputs.items()
    }


def evaluate(
    case: Case, backend: str, dtype: torch.dtype, *, seed: int = 0, draws: int | None = None, device: str = "cpu"
) -> Iterator[Result]:
    """Every output and gradient of `case` against the rule; one Result with `skipped` where the backend lacks it.

    The rule is applied once to `draws` draws stacked (None: as many as the case's size and dtype call for): the largest
    error of one small tensor is itself a noisy number.
    """
    stacked: list[list[list[Tensor]]] = []  # [draw][out | ref | base][output or gradient]
    scores: list[Tensor] = []
    elements = 0
    fine = dtype == torch.float32
    for draw in range(draws or MOST_DRAWS):
        if draws is None and draw >= DRAWS and (not fine or elements >= ENOUGH_ELEMENTS):
            break
        here = seed + 1000 * draw
        inputs = case.inputs(Draw(here, dtype))
        try:
            with dispatch.use_backend(backend), poisoned_results():
                found = _outputs(case, _to(inputs, None, device), here, case.run)
        except NotImplementedError as error:
            yield Result(case, backend, dtype, None, str(error))
            return
        elements += max(x.numel() for x in found)
        fine = not any(x.is_floating_point() and x.itemsize == 2 for x in found)  # losses are float32 whatever the dtype
        wide = _to(inputs, torch.float64, "cpu")
        with dispatch.use_backend("reference"):
            truth = _outputs(case, wide, here, case.run)
            base = _outputs(case, _to(inputs, None, "cpu"), here, case.baseline or case.run)
            if case.selection:
                scores.append(case.selection(**wide))
        stacked.append([[x.detach().cpu() for x in found], [x.detach() for x in truth], [x.detach() for x in base]])

    outs, refs, bases = ([_join(xs) for xs in zip(*(draw[i] for draw in stacked), strict=True)] for i in range(3))
    count = len(outs) - len(case.gradients)
    names = [case.name if count == 1 else f"{case.name}[{i}]" for i in range(count)]
    names += [f"{case.name} d{name}" for name in case.gradients]
    for name, out, ref, baseline in zip(names, outs, refs, bases, strict=True):
        if out.is_floating_point():
            comparison = compare(out, ref.double(), baseline, name=name)
        else:
            comparison = _compare_indices(out, ref, torch.stack(scores) if scores else None, name)
        yield Result(case, backend, dtype, comparison)


def judge(
    case: Case, backend: str, dtype: torch.dtype, *, draws: int | None = None, seed: int = 0, device: str = "cpu"
) -> list[Result]:
    """`evaluate`, for many calls or few draws. The rule compares two maxima, and the baseline's may be a lucky one (by a factor of 2
    once in 300 calls, over 200 numbers): what breaks it is judged again over eight times as many, the first ones among them."""
    results = list(evaluate(case, backend, dtype, seed=seed, draws=draws, device=device))
    if any(r.comparison is not None and r.comparison.message for r in results):
        results = list(evaluate(case, backend, dtype, seed=seed, draws=8 * (draws or MOST_DRAWS), device=device))
    return results


def messages(results: Sequence[Result]) -> list[str]:
    """What each result says that did not run or breaks the rule."""
    return [r.skipped if r.comparison is None else r.comparison.message for r in results if r.comparison is None or r.comparison.message]


def _join(draws: tuple[Tensor, ...]) -> Tensor:
    """[draws, ...]; a vector (a bias's gradient, say) is one row, whatever the number of draws."""
    return torch.stack(draws) if draws[0].dim() > 1 else torch.stack(draws).flatten()


def _compare_indices(out: Tensor, ref: Tensor, scores: Tensor | None, name: str) -> Comparison:
    """Equal, or (where `scores` [..., T] are given) different only between candidates of nearly equal score."""
    fine = Comparison(name, 0.0, 0.0, 0.0, 0.0, "")
    if out.shape == ref.shape and torch.equal(out.long(), ref.long()):
        return fine
    wrong = Comparison(name, float("inf"), 0.0, 0.0, float("inf"), f"{name}: indices differ from the reference's")
    if scores is None or out.shape != ref.shape:
        return wrong
    finite = scores.masked_fill(~scores.isfinite(), 0.0)
    slack = SELECTION_ULPS * torch.finfo(torch.float32).eps * finite.abs().amax(-1)  # [...]
    lowest = torch.where(ref < 0, torch.inf, finite.gather(-1, ref.clamp_min(0).long())).amin(-1)  # [...]
    chosen = torch.where(out < 0, torch.inf, scores.gather(-1, out.clamp_min(0).long())).amin(-1)
    same_count = ((out >= 0).sum(-1) == (ref >= 0).sum(-1)).all()
    distinct = (out.sort(-1).values.diff(dim=-1) != 0) | (out.sort(-1).values[..., 1:] < 0)
    return fine if bool(same_count and distinct.all() and (chosen >= lowest - slack).all()) else wrong


def sweep(
    cases: Sequence[Case], backends: Sequence[str], dtypes: Sequence[torch.dtype], *, seed: int = 0, device: str = "cpu"
) -> Iterator[Result]:
    for case in cases:
        for backend in backends:
            for dtype in dtypes:
                yield from evaluate(case, backend, dtype, seed=seed, device=device)
