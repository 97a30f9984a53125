"""The one comparator: errors against float64, measured beside the error PyTorch makes in the same dtype.

Rule: max|out − ref64| ≤ 2·max|baseline − ref64| + 2·max|ref64 rounded through the dtype − ref64|,
over the whole tensor and over each row (the last dimension), so that one big row cannot hide small ones.
In the row form both errors are taken relative to the row's size (its largest element, or the median row's where that is
more, since a sum that cancels keeps the absolute error of its terms), and the baseline's is that of its worst row: a row
that torch happens to hit exactly proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """error, baseline_error: largest absolute differences from float64; allowed: the rule's bound on `error`;
    row_ratio: the worst row's error over its bound; message: empty when the rule holds."""

    name: str
    error: float
    baseline_error: float
    allowed: float
    row_ratio: float
    message: str

    @property
    def ratio(self) -> float:
        """The worse of error / allowed over the tensor and over its rows; at most 1 within the rule."""
        whole = self.error / self.allowed if self.allowed > 0 else (0.0 if self.error == 0 else float("inf"))
        return max(whole, self.row_ratio)


def compare(
    out: Tensor, ref64: Tensor, baseline: Tensor, *, dtype: torch.dtype | None = None, name: str = "result"
) -> Comparison:
    """Applies the rule. out: what is judged; ref64: the float64 truth; baseline: torch's own result in the dtype.

    dtype: the dtype the result is rounded through (default: out's).
    """
    dtype = out.dtype if dtype is None else dtype
    if out.shape != ref64.shape or baseline.shape != ref64.shape:
        shapes = f"out {tuple(out.shape)}, reference {tuple(ref64.shape)}, baseline {tuple(baseline.shape)}"
        return Comparison(name, float("inf"), 0.0, 0.0, float("inf"), f"{name}: shapes differ: {shapes}")
    if ref64.dtype != torch.float64:
        raise TypeError(f"compare: ref64 is {ref64.dtype}; it takes float64")
    out64, base64 = out.detach().cpu().double(), baseline.detach().cpu().double()
    ref64 = ref64.detach().cpu()
    if out64.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0, 0.0, "")

    rounded = ref64.to(dtype).double()
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(out64) != test(rounded)
        if wrong.any():
            at = _coordinates(int(wrong.flatten().nonzero()[0]), wrong.shape)
            message = f"{name}: {kind} differs in {int(wrong.sum())} elements, first at {at}: got {out64[at]}, want {ref64[at]}"
            return Comparison(name, float("inf"), 0.0, 0.0, float("inf"), message)

    finite = torch.isfinite(rounded)
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (out64 - ref64).abs(), zero)
    base_error = torch.where(finite & torch.isfinite(base64), (base64 - ref64).abs(), zero)
    rounding = torch.where(finite, (rounded - ref64).abs(), zero)
    magnitude = torch.where(finite, ref64.abs(), zero)
    allowed = (2 * base_error.max() + 2 * rounding.max()).item()

    rows = [x.reshape(-1, x.shape[-1] if x.dim() else 1).amax(-1) for x in (error, base_error, rounding, magnitude)]
    row_error, row_base, row_rounding, row_magnitude = rows
    median = row_magnitude[row_magnitude > 0].median() if row_magnitude.any() else zero
    size = row_magnitude.clamp_min(median)
    row_allowed = 2 * (row_base / size.clamp_min(1e-300)).max() * size + 2 * row_rounding
    row_ratio = torch.where(row_error > 0, row_error / row_allowed, zero)

    worst, message = error.max().item(), ""
    if worst > allowed:
        at = _coordinates(int(error.argmax()), error.shape)
        message = f"{name}: error {worst:.3e} > {allowed:.3e} (baseline {base_error.max().item():.3e})"
    elif row_ratio.max().item() > 1:
        row = int(row_ratio.argmax())
        width = error.shape[-1] if error.dim() else 1
        at = _coordinates(row * width + int(error.reshape(-1, width)[row].argmax()), error.shape)
        message = f"{name}: row error {row_error[row].item():.3e} > {row_allowed[row].item():.3e} (baseline {row_base[row].item():.3e})"
    if message:
        message += f", worst at {at}: got {out64[at].item():.9g}, want {ref64[at].item():.9g}, torch {base64[at].item():.9g}"
    return Comparison(name, worst, base_error.max().item(), allowed, row_ratio.max().item(), message)


def check(
    out: Tensor, ref64: Tensor, baseline: Tensor, *, dtype: torch.dtype | None = None, name: str = "result"
) -> Comparison:
    """`compare`, raising AssertionError with the worst element's coordinates when the rule does not hold."""
    found = compare(out, ref64, baseline, dtype=dtype, name=name)
    if found.message:
        raise AssertionError(found.message)
    return found


def assert_bitwise(a: Tensor, b: Tensor, name: str = "result") -> None:
    """Same shape, dtype and bits (so NaN equals the same NaN, and −0.0 differs from 0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise AssertionError(f"{name}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}")
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differs = a.detach().cpu().contiguous().view(integer) != b.detach().cpu().contiguous().view(integer)
    if differs.any():
        at = _coordinates(int(differs.flatten().nonzero()[0]), differs.shape)
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {differs.numel()} elements differ in their bits, "
            f"first at {at}: {a[at].item()!r} against {b[at].item()!r}"
        )


def _coordinates(flat: int, shape: torch.Size) -> tuple[int, ...]:
    at = []
    for size in reversed(shape):
        at.append(flat % size)
        flat //= size
    return tuple(reversed(at))
