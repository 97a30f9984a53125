"""logprob from given logits, and what it shares with linear_logprob (ops/grpo.py).

Shapes: N rows (tokens) or B sequences of S, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkernel.ops import checks
from thinkernel.ops.dispatch import C
from thinkernel.ops.library import Op, gradients
from thinkernel.ops.memory import DTYPE_CODES, empty, pointer, rows_contiguous
from thinkernel.reference import grpo as reference

HEAD = "float temperature, float softcap, int ignore_index, bool entropy"


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_target(name: str, target: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Each target is a token number or ignore_index; for use inside ops."""
    if checks.checks_contents(target):
        wrong = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
        if wrong.any():
            value = int(target[wrong][0])
            raise ValueError(f"{name}: got {value}, takes values in 0..{vocabulary - 1} or ignore_index {ignore_index}")


def row_buffers(shape: tuple[int, ...], like: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, entropy (zeros where it is not asked for): float32; lse: float64.

    An lse rounded to float32 would tilt every probability of its row by up to 5e-7 (at lse = 10) in the backward.
    """
    lp, ent, lse = (empty(shape, like, dtype) for dtype in (torch.float32, torch.float32, torch.float64))
    return lp, ent if entropy else ent.zero_(), lse


logprob_forward = Op(
    "logprob_forward",
    f"(Tensor logits, Tensor target, {HEAD}) -> (Tensor, Tensor, Tensor)",
    lambda logits, target, *rest: tuple(
        logits.new_empty(target.shape, dtype=dtype) for dtype in (wide(logits), wide(logits), torch.float64)
    ),
)
logprob_backward = Op(
    "logprob_backward",
    f"(Tensor dlogprob, Tensor? dentropy, Tensor logits, Tensor target, Tensor lse, Tensor ent, {HEAD}) -> Tensor",
    lambda dlogprob, dentropy, logits, *rest: logits.new_empty(logits.shape),
)


@logprob_forward.check
def _check(logits: Tensor, target: Tensor, temperature: float, softcap: float, ignore_index: int, entropy: bool) -> None:
    check_target("target", target, ignore_index, logits.shape[-1])


def _reference(
    logits: Tensor, target: Tensor, temperature: float, softcap: float, ignore_index: int, entropy: bool
) -> tuple[Tensor, Tensor]:
    lp, ent = reference.logprob(
        logits, target, temperature=temperature, softcap=softcap or None, ignore_index=ignore_index, entropy=entropy
    )
    return lp, torch.zeros_like(lp) if ent is None else ent


@logprob_forward.kernel("reference")
def _reference_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    lp, ent = _reference(*args)
    return lp, ent, torch.zeros_like(lp, dtype=torch.float64)  # the reference's backward needs no lse


@logprob_backward.kernel("reference")
def _reference_backward(
    dlogprob: Tensor, dentropy: Tensor | None, logits: Tensor, target: Tensor, lse: Tensor, ent: Tensor, *options: Any
) -> Tensor:
    return gradients(_reference, (logits, target, *options), (0,), (dlogprob, dentropy))[0]


def covers(logits: Tensor, *rest: Any) -> str | None:
    """What the C++, Triton and CUDA kernels leave to the reference."""
    return None if logits.dtype in DTYPE_CODES else f"logits: takes float32, bfloat16 and float16, not {logits.dtype}"


def backward_covers(dlogprob: Tensor, dentropy: Tensor | None, logits: Tensor, *rest: Any) -> str | None:
    return covers(logits)


def backward_inputs(
    dlogprob: Tensor, dentropy: Tensor | None, logits: Tensor, target: Tensor, lse: Tensor, ent: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """dlogprob, dentropy (None where it is not wanted), logits, target, lse, ent as the kernels take them."""
    wanted = None if dentropy is None or not entropy else dentropy.float().contiguous()
    return dlogprob.float().contiguous(), wanted, rows_contiguous(logits), target.contiguous(), lse.contiguous(), ent.contiguous()


def fields(
    logits: Tensor, target: Tensor, temperature: float, softcap: float, ignore_index: int, entropy: bool
) -> dict[str, Any]:
    """logits [B, S, V] or [N, V], contiguous in V; its other strides are taken as they are."""
    strides = (0 if logits.dim() == 2 else logits.stride(0), logits.stride(-2))
    return dict(
        dtype=DTYPE_CODES[logits.dtype], b=logits.shape[0] if logits.dim() == 3 else 1, s=logits.shape[-2], v=logits.shape[-1],
        logits=logits.data_ptr(), stride=strides, target=target.data_ptr(), ignore_index=ignore_index,
        temperature=temperature, softcap=softcap, threads=torch.get_num_threads(),
    )


@logprob_forward.kernel("cpu", covers)
def _cpu_forward(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits, target, entropy = rows_contiguous(logits), target.long().contiguous(), options[-1]
    lp, ent, lse = row_buffers(tuple(target.shape), logits, entropy)
    C.logprob_forward(C.LogprobForwardParams(
        **fields(logits, target, *options), logprob=lp.data_ptr(), entropy=ent.data_ptr() if entropy else 0, lse=lse.data_ptr(),
    ))
    return lp, ent, lse


@logprob_backward.kernel("cpu", backward_covers)
def _cpu_backward(
    dlogprob: Tensor, dentropy: Tensor | None, logits: Tensor, target: Tensor, lse: Tensor, ent: Tensor, *options: Any
) -> Tensor:
    dlogprob, dentropy, logits, target, lse, ent = backward_inputs(dlogprob, dentropy, logits, target.long(), lse, ent, options[-1])
    dlogits = empty(tuple(logits.shape), logits)
    C.logprob_backward(C.LogprobBackwardParams(
        **fields(logits, target, *options), dlogprob=dlogprob.data_ptr(), dentropy=pointer(dentropy), lse=lse.data_ptr(),
        entropy=ent.data_ptr(), dlogits=dlogits.data_ptr(),
    ))
    return dlogits


def _setup(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target = args[:2]
    _, ent, lse = outputs
    ctx.save_for_backward(logits, target, lse, ent)
    ctx.options = args[2:]
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None, dlse: None) -> tuple[Any, ...]:
    logits, target, lse, ent = ctx.saved_tensors
    if dlogprob is None and dentropy is None:
        return (None,) * 6
    dlogprob = torch.zeros_like(ent) if dlogprob is None else dlogprob
    return logprob_backward(dlogprob, dentropy, logits, target, lse, ent, *ctx.options), *(None,) * 5


logprob_forward.differentiate(_setup, _backward, reference=_reference_forward)
logprob_backward.refuse_gradient("double backward is not supported")


def logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """linear_logprob from given logits: the log-probability of each target token and the entropy of its distribution.

    z = c·tanh(y / c) / temperature (no softcap: y / temperature), both of softmax(z); logits are read once, and once more
    in the backward, which writes their gradient. float32 accumulation whatever their dtype.

    Args:
        logits: [N, V] or [B, S, V]; float32, bfloat16, float16 (float64: reference). Any strides with a contiguous last
            dimension cost nothing: `logits[:, :-1]` is read where it lies.
        target: [N] or [B, S] integers in 0..V − 1, or ignore_index: such a row gives 0, 0, gradient 0 and is not read.
        temperature: > 0. softcap: c > 0 or None. entropy: False returns None for it and saves its work.

    Returns logprob, entropy: float32, of target's shape, both differentiable in logits; a row's bits depend on that row
    alone. Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("logits", logits, (2, 3), "[N, V] or [B, S, V]")
    if logits.shape[-1] == 0:
        raise ValueError("logits: got a vocabulary of 0, takes at least 1")
    checks.tensor("target", target, logits.dim() - 1, "[N] or [B, S]", checks.INTEGERS)
    checks.shape("target", target, logits.shape[:-1], "logits' shape without V")
    checks.positive("temperature", temperature, none_is_fine=False)
    checks.positive("softcap", softcap)
    checks.same_device("logits", logits, target=target)
    lp, ent, _ = logprob_forward(logits, target, float(temperature), float(softcap or 0.0), ignore_index, bool(entropy))
    return lp, ent if entropy else None
