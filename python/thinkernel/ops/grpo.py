"""GRPO ops: log-probabilities without logits (advantages, policy loss: ops/policy_loss.py). Formulas: reference/grpo.py.

Shapes: N rows (tokens), D hidden, V vocabulary, B sequences, S tokens of a sequence, R rewards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkernel.ops import checks
from thinkernel.ops import logprob_gpu as logprob_gpu  # registers logprob's Triton and CUDA kernels
from thinkernel.ops import policy_loss_gpu as policy_loss_gpu  # and those of policy_loss and group_advantages
from thinkernel.ops.dispatch import C
from thinkernel.ops.library import Op, gradients
from thinkernel.ops.logprob import HEAD, check_target, row_buffers, wide
from thinkernel.ops.memory import DTYPE_CODES, empty, pointer, rows_contiguous
from thinkernel.ops.policy_loss import group_advantages as group_advantages
from thinkernel.ops.policy_loss import policy_loss as policy_loss
from thinkernel.ops.preference import dpo_loss as dpo_loss
from thinkernel.ops.preference import ppo_value_loss as ppo_value_loss
from thinkernel.reference import grpo as reference

# ---- linear_logprob --------------------------------------------------------------------------------------------

KEPT_BLOCK, KEPT_ROW = 384, 400  # words of a block of kept logits, elements of its rows: csrc/cpu/grpo.cpp
KEPT_BYTES = 1 << 30  # what keep_logits=True may take

linear_logprob_forward = Op(
    "linear_logprob_forward",
    f"(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, {HEAD}, SymInt keep=0) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda hidden, weight, target, bias, t, s, i, e, keep=0: (
        *(hidden.new_empty(hidden.shape[0], dtype=dtype) for dtype in (wide(hidden), wide(hidden), torch.float64)),
        hidden.new_empty((keep, hidden.shape[0], KEPT_ROW)),
    ),
)
_BACKWARD = (
    "Tensor dlogprob, Tensor? dentropy, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor lse, "
    f"Tensor ent, Tensor kept, {HEAD}, bool need_hidden, bool need_weight, bool need_bias"
)
linear_logprob_backward = Op(
    "linear_logprob_backward",
    f"({_BACKWARD}) -> (Tensor, Tensor, Tensor)",
    lambda dlp, dent, hidden, weight, target, bias, lse, ent, kept, t, s, i, e, need_hidden, need_weight, need_bias: (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    ),
)
# The same with the weight's gradient added to main_grad [V, D] float32; its place in the result stays empty.
linear_logprob_backward_into = Op(
    "linear_logprob_backward_into",
    f"({_BACKWARD}, Tensor(a!) main_grad) -> (Tensor, Tensor, Tensor)",
    lambda dlp, dent, hidden, weight, target, bias, lse, ent, kept, t, s, i, e, need_hidden, need_weight, need_bias, main_grad: (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    ),
)


@linear_logprob_forward.check
def _check_linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float, softcap: float,
    ignore_index: int, entropy: bool, keep: int = 0,
) -> None:
    check_target("target", target, ignore_index, weight.shape[0])


def _reference_head(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float, softcap: float,
    ignore_index: int, entropy: bool,
) -> tuple[Tensor, Tensor]:
    lp, ent = reference.linear_logprob(
        hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap or None, ignore_index=ignore_index,
        entropy=entropy,
    )
    return lp, torch.zeros_like(lp) if ent is None else ent


@linear_logprob_forward.kernel("reference")
def _reference_forward(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lp, ent = _reference_head(hidden, *args[:7])
    # the reference's backward needs no lse and keeps nothing
    return lp, ent, torch.zeros_like(lp, dtype=torch.float64), _kept(hidden, args[-1]).zero_()


def _kept(hidden: Tensor, keep: int) -> Tensor:
    """Room for the logits of `keep` blocks of words."""
    return empty((keep, hidden.shape[0], KEPT_ROW), hidden)


@linear_logprob_backward.kernel("reference")
def _reference_backward(
    dlogprob: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    lse: Tensor, ent: Tensor, kept: Tensor, temperature: float, softcap: float, ignore_index: int, entropy: bool,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    args = (hidden, weight, target, bias, temperature, softcap, ignore_index, entropy)
    positions = [i for i, need in ((0, need_hidden), (1, need_weight), (3, need_bias)) if need]
    found = dict(zip(positions, gradients(_reference_head, args, positions, (dlogprob, dentropy)), strict=True))
    none = hidden.new_empty(0)
    return found.get(0, none), found.get(1, weight.new_empty(0)), found.get(3, weight.new_empty(0))


def _kernel_covers(hidden: Tensor, *rest: Any) -> str | None:
    return None if hidden.dtype in DTYPE_CODES else f"hidden: takes float32, bfloat16 and float16, not {hidden.dtype}"


def _gradient_buffers(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden [N, D], dweight [V, D], dbias [V]; empty where not needed."""
    dh = empty(tuple(hidden.shape) if need_hidden else (0,), hidden)
    dw = empty(tuple(weight.shape) if need_weight else (0,), weight)
    return dh, dw, empty((weight.shape[0] if need_bias else 0,), weight)


@linear_logprob_forward.kernel("cpu", _kernel_covers)
def _cpu_forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float, softcap: float,
    ignore_index: int, entropy: bool, keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, target = rows_contiguous(hidden), rows_contiguous(weight), target.long().contiguous()
    bias = None if bias is None else bias.contiguous()
    lp, ent, lse = row_buffers((hidden.shape[0],), hidden, entropy)
    kept = _kept(hidden, keep)
    C.linear_logprob_forward(C.LinearLogprobForwardParams(
        **_head_fields(hidden, weight, target, bias, kept, temperature, softcap, ignore_index), logprob=lp.data_ptr(),
        entropy=ent.data_ptr() if entropy else 0, lse=lse.data_ptr(),
    ))
    return lp, ent, lse, kept


def _head_fields(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, kept: Tensor, temperature: float, softcap: float,
    ignore_index: int,
) -> dict[str, Any]:
    return dict(
        dtype=DTYPE_CODES[hidden.dtype], n=hidden.shape[0], d=hidden.shape[1], v=weight.shape[0],
        hidden=hidden.data_ptr(), hidden_stride=hidden.stride(0), weight=weight.data_ptr(),
        weight_stride=weight.stride(0), bias=pointer(bias), target=target.data_ptr(), ignore_index=ignore_index,
        temperature=temperature, softcap=softcap, kept=kept.data_ptr(), kept_blocks=kept.shape[0],
        threads=torch.get_num_threads(),
    )


@linear_logprob_backward.kernel("cpu", lambda dlp, dent, hidden, *rest: _kernel_covers(hidden))
@linear_logprob_backward_into.kernel("cpu", lambda dlp, dent, hidden, *rest: _kernel_covers(hidden))
def _cpu_backward(
    dlogprob: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    lse: Tensor, ent: Tensor, kept: Tensor, temperature: float, softcap: float, ignore_index: int, entropy: bool,
    need_hidden: bool, need_weight: bool, need_bias: bool, main_grad: Tensor | None = None, float_hidden: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """float_hidden: dhidden in float32, for a sum over shards."""
    hidden, weight, target = rows_contiguous(hidden), rows_contiguous(weight), target.long().contiguous()
    bias = None if bias is None else bias.contiguous()
    dlogprob, lse, ent = dlogprob.float().contiguous(), lse.contiguous(), ent.contiguous()
    dentropy = None if dentropy is None or not entropy else dentropy.float().contiguous()
    dh, dw, db = _gradient_buffers(hidden, weight, need_hidden, need_weight and main_grad is None, need_bias)
    if float_hidden:
        dh = empty(tuple(dh.shape), dh, torch.float32)
    into = (dw if main_grad is None else main_grad) if need_weight else None
    C.linear_logprob_backward(C.LinearLogprobBackwardParams(
        **_head_fields(hidden, weight, target, bias, kept, temperature, softcap, ignore_index), dlogprob=dlogprob.data_ptr(),
        dentropy=pointer(dentropy), lse=lse.data_ptr(), entropy=ent.data_ptr(), dhidden=pointer(dh) if need_hidden else 0,
        dhidden_float=float_hidden, dweight=pointer(into), dweight_add=main_grad is not None,
        dbias=pointer(db) if need_bias else 0,
    ))
    return dh, dw, db


@linear_logprob_forward.kernel("triton", _kernel_covers)
def _triton_forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float, softcap: float,
    ignore_index: int, entropy: bool, keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from thinkernel.kernels import grpo as kernels

    hidden, weight = rows_contiguous(hidden), rows_contiguous(weight)
    lp, ent, lse = row_buffers((hidden.shape[0],), hidden, entropy)
    kernels.linear_logprob_forward(
        hidden, weight, target, bias, lp, ent if entropy else None, lse, temperature=temperature,
        softcap=softcap or None, ignore_index=ignore_index,
    )
    return lp, ent, lse, _kept(hidden, keep).zero_()


@linear_logprob_backward.kernel("triton", lambda dlp, dent, hidden, *rest: _kernel_covers(hidden))
def _triton_backward(
    dlogprob: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    lse: Tensor, ent: Tensor, kept: Tensor, temperature: float, softcap: float, ignore_index: int, entropy: bool,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from thinkernel.kernels import grpo as kernels

    hidden, weight = rows_contiguous(hidden), rows_contiguous(weight)
    dentropy = None if dentropy is None or not entropy else dentropy.float().contiguous()
    dh, dw, db = _gradient_buffers(hidden, weight, need_hidden, need_weight, need_bias)
    kernels.linear_logprob_backward(
        hidden, weight, target, bias, lse.contiguous(), ent.contiguous(), dlogprob.float().contiguous(), dentropy,
        dh if need_hidden else None, dw if need_weight else None, db if need_bias else None, temperature=temperature,
        softcap=softcap or None,
        ignore_index=ignore_index,
    )
    return dh, dw, db


def _setup(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    hidden, weight, target, bias = args[:4]
    _, ent, lse, kept = outputs
    ctx.save_for_backward(hidden, weight, target, bias, lse, ent, kept)
    ctx.options = args[4:8]
    ctx.mark_non_differentiable(lse, kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None, dlse: None, dkept: None) -> tuple[Any, ...]:
    hidden, weight, target, bias, lse, ent, kept = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    if dlogprob is None and dentropy is None:
        return (None,) * 9
    dlogprob = torch.zeros_like(ent) if dlogprob is None else dlogprob
    need_bias = need_bias and bias is not None
    args = (
        dlogprob, dentropy, hidden, weight, target, bias, lse, ent, kept, *ctx.options, need_hidden, need_weight, need_bias,
    )
    main_grad = gradient_buffer(weight) if need_weight else None
    if main_grad is not None and hidden.device.type == "cpu":
        dh, dw, db = linear_logprob_backward_into(*args, main_grad)
    else:
        dh, dw, db = linear_logprob_backward(*args)
        if main_grad is not None:
            main_grad.add_(dw)
    return (
        dh if need_hidden else None, dw if need_weight and main_grad is None else None, None, db if need_bias else None,
        *(None,) * 5,
    )


def gradient_buffer(weight: Tensor) -> Tensor | None:
    """weight.main_grad, Megatron's float32 buffer that gradients are added to, where there is one."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return None
    if not isinstance(main_grad, Tensor) or main_grad.device != weight.device:
        got = main_grad.device if isinstance(main_grad, Tensor) else type(main_grad).__name__
        raise ValueError(f"weight.main_grad: got {got}, takes a tensor on weight's device, {weight.device}")
    if main_grad.shape != weight.shape or main_grad.dtype != torch.float32 or not main_grad.is_contiguous():
        raise ValueError(
            f"weight.main_grad: got {main_grad.dtype} {list(main_grad.shape)} with strides {list(main_grad.stride())}, "
            f"takes a contiguous float32 tensor of weight's shape {list(weight.shape)}"
        )
    return main_grad


linear_logprob_forward.differentiate(_setup, _backward, reference=_reference_forward)
linear_logprob_forward.autocast("hidden", "weight", "bias")
linear_logprob_backward.refuse_gradient("double backward is not supported")
linear_logprob_backward_into.refuse_gradient("double backward is not supported")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
    keep_logits: bool | int = False,
    group: object | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target token and entropy of its distribution, without a [N, V] buffer.

    y = hidden·weightᵀ + bias, z = c·tanh(y / c) / temperature (no softcap: y / temperature), both of softmax(z).

    Args:
        hidden: [N, D] or [B, S, D]; float32, bfloat16, float16 (float64: reference).
        weight: [V, D] in hidden's dtype; any V.
        target: [N] or [B, S] integers in 0..V − 1, or ignore_index: such a row gives 0, 0, gradient 0 and no work.
        bias: [V]. temperature: > 0. softcap: c > 0 or None. entropy: False returns None for it and saves its work.
        keep_logits: True keeps the logits of the first blocks of 384 words, as many as 1 GiB holds (an integer: that many
            bytes), so that the backward skips their recomputation, one GEMM of four. They are kept in hidden's dtype:
            float32 gives the gradients of the default mode bit for bit; in bfloat16 and float16 each block is kept centered
            on its mean, so that p errs by 2⁻⁹ (2⁻¹²) of a word's distance from it, less than with torch's logits of that
            dtype; the results of the forward stay as they are. CPU alone; elsewhere it changes nothing.
        group: a torch.distributed group over which the vocabulary is sharded: weight [V/world, D] and bias hold this rank's
            words (any number of them), in rank order; hidden and target, global token numbers, are the same on all ranks,
            and so are the results. Their gradients must be the same too. dhidden is summed over the ranks here, in rank
            order. Eager mode and the cpu kernels alone; torch.compile breaks the graph at it.

    Where weight has a `main_grad` (Megatron's convention: contiguous float32 [V, D]), the backward adds the weight's
    gradient to it in float32 and returns none: the cpu kernels the unrounded sums, other kernels the gradient in weight's
    dtype. In eager mode without autocast (a compiled graph or a cast copy does not see it), and not on the reference.

    Returns logprob, entropy: float32, of target's shape. Both are differentiable in hidden, weight and bias; the sums
    are accumulated in float32 in one fixed order, so a row's bits depend on that row alone.
    Raises ValueError or TypeError naming the argument. Cost: forward 2NDV FLOPs, with backward four times that (three
    with all logits kept). Extra memory of the backward beside the gradients: the [N, D] sums in float32, two packed
    copies of hidden, a d(logits) buffer of 12 MiB, or of 1536 elements a row where that is more, and the logits kept (a float32 takes
    six bytes in packed copies and buffer on CPUs with AMX).
    """
    checks.tensor("hidden", hidden, (2, 3), "[N, D] or [B, S, D]")
    checks.tensor("weight", weight, 2, "[V, D]")
    checks.size("weight", weight, 1, hidden.shape[-1], "D of hidden")
    if weight.shape[0] == 0:
        raise ValueError("weight: got a vocabulary of 0, takes at least 1")
    checks.tensor("target", target, hidden.dim() - 1, "[N] or [B, S]", checks.INTEGERS)
    checks.shape("target", target, hidden.shape[:-1], "hidden's shape without D")
    if bias is not None:
        checks.tensor("bias", bias, 1, "[V]")
        checks.shape("bias", bias, weight.shape[:1], "[V]")
    checks.cast_together("weight", weight, "hidden", hidden)
    if bias is not None:
        checks.cast_together("bias", bias, "hidden", hidden)
    checks.positive("temperature", temperature, none_is_fine=False)
    checks.positive("softcap", softcap)
    checks.same_device("hidden", hidden, weight=weight, target=target, bias=bias)
    if not isinstance(keep_logits, bool):
        checks.integer("keep_logits", keep_logits, 0)
    rows, target_rows = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    keep = _kept_blocks(rows, weight, KEPT_BYTES if keep_logits is True else int(keep_logits))
    options = (float(temperature), float(softcap or 0.0), ignore_index, bool(entropy), keep)
    if group is None:
        lp, ent, _, _ = linear_logprob_forward(rows, weight, target_rows, bias, *options)
    else:
        from thinkernel.ops.grpo_parallel import vocabulary_parallel

        lp, ent = vocabulary_parallel(rows, weight, target_rows, bias, *options, group)
    return lp.view(target.shape), ent.view(target.shape) if entropy else None


def _kept_blocks(hidden: Tensor, weight: Tensor, budget: int) -> int:
    """How many blocks of words' logits fit; there are kernels that keep them on the CPU alone."""
    if budget == 0 or hidden.shape[0] == 0 or hidden.device.type != "cpu" or hidden.dtype not in DTYPE_CODES:
        return 0
    size = hidden.shape[0] * KEPT_ROW * hidden.element_size()
    return min(budget // size, (weight.shape[0] + KEPT_BLOCK - 1) // KEPT_BLOCK)


# ---- the composition -------------------------------------------------------------------------------------------


def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
    keep_logits: bool | int = False,
    group: object | None = None,
    **policy: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """linear_logprob, then policy_loss with its keyword arguments `policy`: hidden [B, S, D] -> loss, metrics.

    target and mask [B, S]; masked tokens are skipped like ignored ones. Exactly the two calls, in one.
    """
    checks.tensor("target", target, (1, 2), "[N] or [B, S]", checks.INTEGERS)
    checks.shape("mask", mask, target.shape, "target's shape")
    lp, ent = linear_logprob(
        hidden, weight, target.masked_fill(mask == 0, ignore_index), bias=bias, temperature=temperature,
        softcap=softcap, ignore_index=ignore_index, entropy=entropy, keep_logits=keep_logits, group=group,
    )
    return policy_loss(lp, old_logprob, advantages, mask, entropy=ent, **policy)
