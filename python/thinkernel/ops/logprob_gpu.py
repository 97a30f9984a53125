"""logprob's Triton and CUDA kernels: what each covers, result buffers, launch. ops/grpo.py imports this file to register them.

Shapes: logits [N, V] or [B, S, V], target and everything per row [N] or [B, S]. Arguments in the op's order (ops/logprob.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkernel.ops.dispatch import C
from thinkernel.ops.logprob import (
    backward_covers,
    backward_inputs,
    covers,
    fields,
    logprob_backward,
    logprob_forward,
    row_buffers,
)
from thinkernel.ops.memory import empty, pointer, rows_contiguous


@logprob_forward.kernel("triton", covers)
def triton_forward(
    logits: Tensor, target: Tensor, temperature: float, softcap: float, ignore_index: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from thinkernel.kernels import grpo_logits as kernels

    lp, ent, lse = row_buffers(tuple(target.shape), logits, entropy)
    kernels.logprob_forward(
        rows_contiguous(logits), target.contiguous(), lp, ent if entropy else None, lse, temperature=temperature,
        softcap=softcap or None, ignore_index=ignore_index,
    )
    return lp, ent, lse


@logprob_backward.kernel("triton", backward_covers)
def triton_backward(
    dlogprob: Tensor, dentropy: Tensor | None, logits: Tensor, target: Tensor, lse: Tensor, ent: Tensor, temperature: float,
    softcap: float, ignore_index: int, entropy: bool,
) -> Tensor:
    from thinkernel.kernels import grpo_logits as kernels

    dlogprob, dentropy, logits, target, lse, ent = backward_inputs(dlogprob, dentropy, logits, target, lse, ent, entropy)
    dlogits = empty(tuple(logits.shape), logits)
    kernels.logprob_backward(
        logits, target, lse, ent, dlogprob, dentropy, dlogits, temperature=temperature, softcap=softcap or None,
        ignore_index=ignore_index,
    )
    return dlogits


@logprob_forward.kernel("cuda", covers)
def cuda_forward(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """csrc/cuda/logprob_kernel.cuh."""
    logits, target, entropy = rows_contiguous(logits), target.long().contiguous(), options[-1]
    lp, ent, lse = row_buffers(tuple(target.shape), logits, entropy)
    if target.numel():
        with torch.cuda.device(logits.device):
            C.logprob_forward_cuda(C.LogprobForwardParams(
                **fields(logits, target, *options), logprob=lp.data_ptr(), entropy=ent.data_ptr() if entropy else 0, lse=lse.data_ptr(),
            ), torch.cuda.current_stream().cuda_stream)  # fmt: skip
    return lp, ent, lse


@logprob_backward.kernel("cuda", backward_covers)
def cuda_backward(
    dlogprob: Tensor, dentropy: Tensor | None, logits: Tensor, target: Tensor, lse: Tensor, ent: Tensor, *options: Any
) -> Tensor:
    dlogprob, dentropy, logits, target, lse, ent = backward_inputs(dlogprob, dentropy, logits, target.long(), lse, ent, options[-1])
    dlogits = empty(tuple(logits.shape), logits)
    if target.numel():
        with torch.cuda.device(logits.device):
            C.logprob_backward_cuda(C.LogprobBackwardParams(
                **fields(logits, target, *options), dlogprob=dlogprob.data_ptr(), dentropy=pointer(dentropy), lse=lse.data_ptr(),
                entropy=ent.data_ptr(), dlogits=dlogits.data_ptr(),
            ), torch.cuda.current_stream().cuda_stream)  # fmt: skip
    return dlogits
