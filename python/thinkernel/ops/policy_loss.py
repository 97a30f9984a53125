"""GRPO ops beside the head: policy loss and group advantages. Formulas: reference/policy_loss.py, reference/advantages.py.

Shapes: B sequences, S tokens of one, N packed tokens, R samples. policy_loss computes its gradients with the loss, in the
same passes; the backward scales them. old_logprob, rollout_logprob and advantages are constants: no gradient flows there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinkernel.ops import checks
from thinkernel.ops.dispatch import BACKENDS, C
from thinkernel.ops.library import Op, gradients
from thinkernel.ops.memory import empty, pointer, rows_contiguous
from thinkernel.reference.advantages import group_advantages as reference_advantages
from thinkernel.reference.policy_loss import CLIPPED, REDUCTION, check_arguments
from thinkernel.reference.policy_loss import policy_loss as reference_policy_loss

# ---- policy_loss -----------------------------------------------------------------------------------------------

# The enums of csrc/include/policy_math.h.
_FORM = {**dict.fromkeys(CLIPPED, 0), "cispo": 1, "sapo": 2, "vespo": 3, "reinforce": 4}
_REDUCTION = {"sequence_mean": 0, "sequence_sum": 1, "batch_mean": 2, "global": 2, "fixed": 2}
_KL = {"k1": 1, "k2": 2, "k3": 3}
_ROLLOUT = {None: 0, "token_truncate": 1, "token_mask": 2, "sequence_truncate": 3, "sequence_mask": 4}

# csrc/include/policy_loss.h, PolicyMetric: the order of the op's second result.
METRICS = (
    "policy_loss", "approx_kl", "ratio_mean", "ratio_min", "ratio_max", "clip_low", "clip_high", "clip_fraction", "tokens",
    "kl", "rollout_ratio", "off_policy_kept", "entropy",
)  # fmt: skip

class Numbers(NamedTuple):
    """The op's numeric options in the order of its `numbers`; NaN for None. epsilon_high is never None there."""

    epsilon: float
    epsilon_high: float
    delta: float
    beta: float
    rollout_low: float
    rollout_high: float
    off_policy_threshold: float
    entropy_coef: float
    top_entropy: float
    items: float  # num_items_in_batch, where it is a number and not a tensor
    max_completion_length: float
    log_ratio_clamp: float
    tau_positive: float
    tau_negative: float


# needs: whether to compute d loss / d logprob, entropy, ref_logprob. Results: loss [], metrics [13], and those gradients, of
# no elements where not needed. Arguments in lists since each costs twice on its way through the dispatcher.
policy_loss_op = Op(
    "policy_loss",
    "(Tensor logprob, Tensor? old_logprob, Tensor advantages, Tensor mask, Tensor? ref_logprob, Tensor? rollout_logprob, "
    "Tensor? entropy, Tensor? num_items_in_batch, Tensor? cu_seqlens, bool[] needs, str loss_type, str kl, "
    "str? rollout_correction, bool sequence_level, bool kl_correction, float[] numbers) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda logprob, *rest: (
        logprob.new_empty(()),
        logprob.new_empty(len(METRICS)),
        *(logprob.new_empty(logprob.shape if need else 0) for need in rest[8]),
    ),
)
_NEEDS, _ARGUMENTS = 9, 16
_DIFFERENTIABLE = (0, 6, 4)  # logprob, entropy, ref_logprob among the arguments
policy_loss_backward = Op(
    "policy_loss_backward",
    "(Tensor dloss, Tensor logprob, Tensor dlogprob, Tensor dentropy, Tensor dref) -> (Tensor, Tensor, Tensor)",
    lambda dloss, logprob, *gradients: tuple(torch.empty_like(g) for g in gradients),
)  # logprob is there so that differentiating the result is noticed


@policy_loss_op.check
def _check_contents(logprob: Tensor, *rest: Any) -> None:
    cu_seqlens = rest[7]
    if cu_seqlens is None:
        return
    checks.cumulative("cu_seqlens", cu_seqlens, logprob.shape[0])
    if cu_seqlens.numel() == logprob.shape[0] + 1 and checks.checks_contents(cu_seqlens) and (cu_seqlens.diff() != 1).any():
        raise ValueError(
            f"advantages: got {logprob.shape[0]} for as many sequences as tokens, some of them empty: one per token or one per "
            "sequence cannot be told apart; leave the empty sequences out"
        )


def reference_loss(
    logprob: Tensor, old_logprob: Tensor | None, advantages: Tensor, mask: Tensor, ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None, entropy: Tensor | None, num_items_in_batch: Tensor | None, cu_seqlens: Tensor | None,
    needs: list[bool], loss_type: str, kl: str, rollout_correction: str | None, sequence_level: bool, kl_correction: bool,
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """The op's arguments -> loss, metrics [13] (0 for those that do not apply), in plain torch."""
    n: dict[str, Any] = {name: None if math.isnan(x) else x for name, x in Numbers(*numbers)._asdict().items()}
    items, length = n.pop("items"), n.pop("max_completion_length")
    loss, found = reference_policy_loss(
        logprob, old_logprob, advantages, mask, loss_type=loss_type, kl=kl, ref_logprob=ref_logprob,
        kl_correction=kl_correction, importance_sampling_level="sequence" if sequence_level else "token",
        rollout_logprob=rollout_logprob, rollout_correction=rollout_correction,
        rollout_clip=(n.pop("rollout_low"), n.pop("rollout_high")), entropy=entropy,
        num_items_in_batch=items if num_items_in_batch is None else num_items_in_batch,
        max_completion_length=None if length is None else int(length), tau=(n.pop("tau_positive"), n.pop("tau_negative")),
        cu_seqlens=cu_seqlens, **n,
    )
    none = loss.new_zeros(())
    return loss, torch.stack([found.get(name, none).to(loss.dtype) for name in METRICS])


def _under_autograd(*args: Any) -> tuple[Tensor, ...]:
    """The reference as the op's results; its gradients are autograd's, so those slots stay empty."""
    return (*reference_loss(*args), *(args[0].new_empty(0) for _ in _DIFFERENTIABLE))


@policy_loss_op.kernel("reference")
def _reference(*args: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        loss, metrics = reference_loss(*args)
    positions = [i for i, need in zip(_DIFFERENTIABLE, args[_NEEDS], strict=True) if need and args[i] is not None]
    grads = gradients(lambda *a: reference_loss(*a)[0], args, positions, (torch.ones_like(loss),)) if positions else []
    found = dict(zip(positions, grads, strict=True))
    return loss, metrics, *(found[i] if i in found else args[0].new_empty(0) for i in _DIFFERENTIABLE)


def covers(logprob: Tensor, *rest: Any) -> str | None:
    """What the C++, Triton and CUDA kernels leave to the reference."""
    return None if logprob.dtype == torch.float32 else f"logprob: takes float32, bfloat16 and float16, not {logprob.dtype}"


def normaliser(reduction: str, num_items_in_batch: Tensor | None, n: Numbers, sequences: int) -> float:
    """What Reduction::total divides by (at least 1), or 0 for the active tokens of the batch."""
    if reduction == "fixed":
        return max(sequences, 1) * n.max_completion_length
    if reduction != "global" or (num_items_in_batch is None and math.isnan(n.items)):
        return 0.0
    return max(1.0, n.items if num_items_in_batch is None else float(num_items_in_batch))


def _or(x: float, default: float) -> float:
    return default if math.isnan(x) else x


def kernel_options(
    loss_type: str, kl: str | None, rollout_correction: str | None, sequence_level: bool, kl_correction: bool, n: Numbers
) -> dict[str, Any]:
    """The fields of policy::Options (csrc/include/policy_math.h), which every kernel takes. kl: None without ref_logprob."""
    return dict(
        form=_FORM[loss_type], level=2 if loss_type == "rloo" else int(sequence_level or loss_type in ("gspo", "luspo")),
        reduction=_REDUCTION[REDUCTION[loss_type]], kl=0 if kl is None else _KL[kl], rollout=_ROLLOUT[rollout_correction],
        kl_correction=int(kl_correction), off_policy=int(not math.isnan(n.off_policy_threshold)), ratio_low=1 - n.epsilon,
        ratio_high=n.epsilon_high if loss_type == "cispo" else 1 + n.epsilon_high, delta=_or(n.delta, math.inf),
        log_ratio_clamp=_or(n.log_ratio_clamp, math.inf), beta=n.beta, rollout_low=_or(n.rollout_low, -math.inf),
        rollout_high=_or(n.rollout_high, math.inf), off_policy_threshold=n.off_policy_threshold, tau_positive=n.tau_positive,
        tau_negative=n.tau_negative,
    )  # fmt: skip


@policy_loss_op.kernel("cpu", covers)
def _cpu(
    logprob: Tensor, old_logprob: Tensor | None, advantages: Tensor, mask: Tensor, ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None, entropy: Tensor | None, num_items_in_batch: Tensor | None, cu_seqlens: Tensor | None,
    needs: list[bool], loss_type: str, kl: str, rollout_correction: str | None, sequence_level: bool, kl_correction: bool,
    numbers: list[float],
) -> tuple[Tensor, ...]:
    shape, n = logprob.shape, Numbers(*numbers)
    per_token = advantages.shape == shape
    fields: dict[str, Any] = kernel_options(
        loss_type, None if ref_logprob is None else kl, rollout_correction, sequence_level, kl_correction, n
    )
    kept = []  # what is copied here must outlive the call
    for name, stride, x in (
        ("logprob", "logprob_stride", logprob), ("old_logprob", "old_logprob_stride", old_logprob),
        ("ref_logprob", "ref_logprob_stride", ref_logprob), ("rollout_logprob", "rollout_logprob_stride", rollout_logprob),
        ("entropy", "entropy_stride", entropy), ("mask", "mask_stride", mask),
        ("advantages", "advantages_stride", advantages),
    ):  # fmt: skip
        if x is not None:
            if x is not advantages or per_token:
                x = rows_contiguous(x)
            kept.append(x)
            fields[name], fields[stride] = x.data_ptr(), x.stride(0)
    sequences = shape[0]
    if cu_seqlens is not None:
        cu_seqlens, sequences = cu_seqlens.long().contiguous(), cu_seqlens.shape[0] - 1
        fields["cu_seqlens"] = cu_seqlens.data_ptr()
    loss, metrics = empty((), logprob), empty((len(METRICS),), logprob)
    results = [empty(shape, logprob) if need else logprob.new_empty(0) for need in needs]
    for name, need, result in zip(("dlogprob", "dentropy", "dref_logprob"), needs, results, strict=True):
        if need:
            fields[name] = result.data_ptr()
    C.policy_loss(C.PolicyLossParams(
        **fields, sequences=sequences, length=shape[-1], advantage_per_token=int(per_token), mask_bytes=mask.element_size(),
        mask_is_float=int(mask.is_floating_point()), total=normaliser(REDUCTION[loss_type], num_items_in_batch, n, sequences),
        top_entropy=_or(n.top_entropy, 0.0), entropy_coef=n.entropy_coef, loss=loss.data_ptr(), metrics=metrics.data_ptr(),
        threads=torch.get_num_threads(),
    ))  # fmt: skip
    return loss, metrics, *results


for _backend in BACKENDS:

    @policy_loss_backward.kernel(_backend)
    def _scale(dloss: Tensor, logprob: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g * dloss for g in gradients)


def _setup(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*args[:_NEEDS])
    ctx.options = args[_NEEDS:]
    ctx.gradients = list(outputs[2:])
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, *others: None) -> tuple[Any, ...]:
    """The forward's gradients times dloss, in place: a fresh [B, S] costs more (page faults) than its contents."""
    needs, *options = ctx.options
    wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    result: list[Any] = [None] * _ARGUMENTS
    if dloss is None:
        return tuple(result)
    found, ctx.gradients = ctx.gradients, None
    if found is None or any(want and not need for want, need in zip(wanted, needs, strict=True)):
        with torch.no_grad():  # a second backward through a retained graph, or a raw call that asked for no gradients
            found, needs = list(policy_loss_op(*ctx.saved_tensors, wanted, *options)[2:]), wanted
    as_it_is = type(dloss) is Tensor and dloss.device.type == "cpu" and dloss.item() == 1  # most often it is 1
    if torch.is_grad_enabled():
        found = policy_loss_backward(dloss, ctx.saved_tensors[0], *found)  # which refuses to be differentiated
        as_it_is = True
    for position, need, gradient in zip(_DIFFERENTIABLE, needs, found, strict=True):
        if need:
            result[position] = gradient if as_it_is else gradient.mul_(dloss)
    return tuple(result)


policy_loss_op.differentiate(_setup, _backward, reference=_under_autograd)
policy_loss_backward.refuse_gradient("double backward is not supported")


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    ref_logprob: Tensor | None = None,
    kl_correction: bool = False,
    importance_sampling_level: str = "token",
    rollout_logprob: Tensor | None = None,
    rollout_correction: str | None = None,
    rollout_clip: tuple[float | None, float | None] = (None, 3.0),
    off_policy_threshold: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    top_entropy: float | None = None,
    num_items_in_batch: Tensor | float | None = None,
    max_completion_length: int | None = None,
    log_ratio_clamp: float | None = 20.0,
    tau: tuple[float, float] = (1.0, 1.05),
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy objective over token log-probabilities -> loss (scalar), metrics (detached scalars).

    logprob, old_logprob, mask and the other per-token tensors: [B, S] (packed with cu_seqlens [B + 1]: [N]); advantages
    [B] or per token. loss_type: grpo, bnpo, dr_grpo, dapo (default), gspo, cispo, sapo, luspo, vespo, ppo, reinforce,
    rloo; every rule, normaliser and option is written down in reference/policy_loss.py, and the peers' conventions in
    docs/grpo.md. dapo divides by num_items_in_batch, the **global** batch's tokens; by the active tokens where it is None.

    Differentiable in logprob, entropy and ref_logprob; old_logprob, rollout_logprob and advantages are constants. The
    gradients are computed with the loss, in the same passes, where one of the three requires a gradient.
    What masked positions hold, NaN included, never matters. Raises ValueError or TypeError naming the argument.
    """
    dims, shape = (1, "[N]") if cu_seqlens is not None else (2, "[B, S] (packed: [N] with cu_seqlens)")
    checks.tensor("logprob", logprob, dims, shape)
    tensors = {"old_logprob": old_logprob, "ref_logprob": ref_logprob, "rollout_logprob": rollout_logprob, "entropy": entropy}
    for name, x in tensors.items():
        if x is not None:
            checks.tensor(name, x, dims, "logprob's shape")
            checks.shape(name, x, logprob.shape, "logprob's shape")
    checks.tensor("mask", mask, dims, "logprob's shape", MASKS)
    checks.shape("mask", mask, logprob.shape, "logprob's shape")
    checks.tensor("advantages", advantages, (1, dims), "[B] or logprob's shape")
    sequences = logprob.shape[0]
    if cu_seqlens is not None:
        checks.tensor("cu_seqlens", cu_seqlens, 1, "[B + 1]", checks.INTEGERS)
        if cu_seqlens.shape[0] == 0:
            raise ValueError("cu_seqlens: got no elements, takes [B + 1] offsets from 0 to N")
        sequences = cu_seqlens.shape[0] - 1
    if tuple(advantages.shape) not in ((sequences,), tuple(logprob.shape)):
        raise ValueError(f"advantages: got shape {list(advantages.shape)}, takes [B] = [{sequences}] or logprob's {list(logprob.shape)}")
    items = num_items_in_batch if isinstance(num_items_in_batch, Tensor) else None
    if items is not None and items.numel() != 1:
        raise ValueError(f"num_items_in_batch: got shape {list(items.shape)}, takes one number")
    checks.same_device("logprob", logprob, advantages=advantages, mask=mask, cu_seqlens=cu_seqlens, **tensors)
    check_arguments(
        loss_type=loss_type, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta, kl=kl, beta=beta, ref_logprob=ref_logprob,
        importance_sampling_level=importance_sampling_level, rollout_logprob=rollout_logprob,
        rollout_correction=rollout_correction, rollout_clip=rollout_clip, off_policy_threshold=off_policy_threshold,
        entropy=entropy, entropy_coef=entropy_coef, top_entropy=top_entropy, num_items_in_batch=num_items_in_batch,
        max_completion_length=max_completion_length, log_ratio_clamp=log_ratio_clamp, tau=tau,
    )
    wide = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    grad = torch.is_grad_enabled()
    if not (beta != 0 and ref_logprob is not None):
        ref_logprob = None  # not read: nothing to convert or to differentiate
    if rollout_correction is None and off_policy_threshold is None:
        rollout_logprob = None
    needs = [grad and logprob.requires_grad, grad and entropy is not None and entropy_coef != 0 and entropy.requires_grad,
             grad and ref_logprob is not None and ref_logprob.requires_grad]  # fmt: skip
    if entropy is not None and not needs[1]:
        entropy = entropy.detach()
    nan = math.nan
    number = nan if num_items_in_batch is None or isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    loss, values, *_ = policy_loss_op(
        _as(logprob, wide), _constant(old_logprob, wide), _constant(advantages, wide), mask, _as(ref_logprob, wide),
        _constant(rollout_logprob, wide), _as(entropy, wide), items, cu_seqlens, needs, loss_type, kl, rollout_correction,
        importance_sampling_level == "sequence", kl_correction,
        Numbers(
            epsilon, epsilon if epsilon_high is None else epsilon_high, nan if delta is None else delta, beta,
            nan if rollout_clip[0] is None else rollout_clip[0], nan if rollout_clip[1] is None else rollout_clip[1],
            nan if off_policy_threshold is None else off_policy_threshold, entropy_coef,
            nan if top_entropy is None else top_entropy, number,
            nan if max_completion_length is None else max_completion_length,
            nan if log_ratio_clamp is None else log_ratio_clamp, tau[0], tau[1],
        ),
    )
    applies = {
        "clip_low": loss_type in CLIPPED, "clip_high": loss_type in CLIPPED or loss_type == "cispo",
        "clip_fraction": loss_type in CLIPPED or loss_type == "cispo", "kl": ref_logprob is not None,
        "rollout_ratio": rollout_correction is not None, "off_policy_kept": off_policy_threshold is not None,
        "entropy": entropy is not None,
    }  # fmt: skip
    return loss, {name: values[i] for i, name in enumerate(METRICS) if applies.get(name, True)}  # unbind makes all of them, at 0.5 us


MASKS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float16,
    torch.float64,
)  # fmt: skip


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype == dtype else x.to(dtype)


def _constant(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return _as(x if x is None or not x.requires_grad else x.detach(), dtype)


# ---- group_advantages ------------------------------------------------------------------------------------------

NORMALIZE = ("group", "none", "batch", "rloo", "maxrl", "whiten")  # csrc/cpu/advantages.cpp

advantages_op = Op(
    "group_advantages",
    "(Tensor rewards, int group_size, Tensor? group_ids, Tensor? weights, Tensor? token_counts, str normalize, "
    "str aggregation, float eps, int correction) -> (Tensor, Tensor)",
    lambda rewards, *rest: (rewards.new_empty(rewards.shape[0]), rewards.new_empty(rewards.shape[0], dtype=torch.bool)),
)


@advantages_op.check
def _check_advantages(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, weights: Tensor | None, token_counts: Tensor | None, *rest: Any
) -> None:
    if token_counts is not None and checks.checks_contents(token_counts) and not (token_counts >= 0).all():
        raise ValueError(f"token_counts: got {token_counts.min().item()}, takes counts of at least 0")


@advantages_op.kernel("reference")
def _reference_advantages(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, weights: Tensor | None, token_counts: Tensor | None,
    normalize: str, aggregation: str, eps: float, correction: int,
) -> tuple[Tensor, Tensor]:
    return reference_advantages(
        rewards, group_size or None, group_ids=group_ids, normalize=normalize, aggregation=aggregation, weights=weights,
        whiten_over="samples" if token_counts is None else "tokens", token_counts=token_counts, eps=eps, correction=correction,
    )


def covers_rewards(rewards: Tensor, *rest: Any) -> str | None:
    return None if rewards.dtype == torch.float32 else f"rewards: takes float32, not {rewards.dtype}"


def advantage_buffers(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The op's results: advantages [R], zero_variance [R]."""
    return empty((rewards.shape[0],), rewards), empty((rewards.shape[0],), rewards, torch.bool)


def floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


@advantages_op.kernel("cpu", covers_rewards)
def _cpu_advantages(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, weights: Tensor | None, token_counts: Tensor | None,
    normalize: str, aggregation: str, eps: float, correction: int,
) -> tuple[Tensor, Tensor]:
    rewards = rewards.contiguous()
    group_ids = None if group_ids is None else group_ids.long().contiguous()
    weights, token_counts = floats(weights), floats(token_counts)
    advantages, zero = advantage_buffers(rewards)
    C.group_advantages(C.GroupAdvantagesParams(
        samples=rewards.shape[0], rewards_each=rewards.shape[1], rewards=rewards.data_ptr(), group_size=group_size,
        group_ids=pointer(group_ids), weights=pointer(weights), token_counts=pointer(token_counts),
        normalize=NORMALIZE.index(normalize), normalize_then_sum=int(aggregation == "normalize_then_sum"), eps=eps,
        correction=correction, advantages=advantages.data_ptr(), zero_variance=zero.data_ptr(),
    ))
    return advantages, zero


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    normalize: str = "group",
    aggregation: str = "sum_then_normalize",
    whiten_over: str = "samples",
    weights: Tensor | None = None,
    eps: float = 1e-6,
    correction: int = 1,
    return_zero_variance: bool = False,
    token_counts: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Advantages of sampled completions within their groups: rewards [R] or [R, n_rewards] -> [R], a constant.

    Groups are group_size neighbours or the samples of equal group_ids [R] (any sizes, any order). normalize: "group"
    (r − m) / (std + eps) (GRPO, arXiv 2402.03300), "none" r − m (Dr. GRPO, 2503.20783), "batch", "rloo", "maxrl", "whiten";
    aggregation: "sum_then_normalize" or "normalize_then_sum" (GDPO); the table is in reference/advantages.py.
    NaN rewards are unscorable and left out; a group of equal rewards gives exactly 0. weights [n_rewards] sums several
    rewards. correction: 1 for the Bessel-corrected std, 0 for the population's. whiten_over: what the statistics over the
    batch (GDPO's last step, "whiten") count, "samples" or "tokens", which takes each sample's token_counts [R].
    return_zero_variance: also return bool [R], True where the sample's group teaches nothing.
    Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("rewards", rewards, (1, 2), "[R] or [R, n_rewards]", REWARDS)
    R = rewards.shape[0]
    if (group_size is None) == (group_ids is None):
        raise ValueError("group_size: got both it and group_ids or neither, takes exactly one of them")
    if group_size is not None:
        checks.integer("group_size", group_size, 1)
        if R % group_size:
            raise ValueError(f"group_size: got {group_size}, takes a divisor of the {R} rewards")
    if group_ids is not None:
        checks.tensor("group_ids", group_ids, 1, "[R]", checks.INTEGERS)
        checks.shape("group_ids", group_ids, (R,), "[R]")
    checks.one_of("normalize", normalize, NORMALIZE)
    checks.one_of("aggregation", aggregation, ("sum_then_normalize", "normalize_then_sum"))
    checks.one_of("whiten_over", whiten_over, ("samples", "tokens"))
    if (whiten_over == "tokens") != (token_counts is not None):
        raise ValueError("token_counts: takes the tokens of each sample [R] with whiten_over='tokens', and with that alone")
    if token_counts is not None:
        checks.tensor("token_counts", token_counts, 1, "[R]", (*checks.INTEGERS, *checks.FLOATS))
        checks.shape("token_counts", token_counts, (R,), "[R]")
    if weights is not None:
        checks.tensor("weights", weights, 1, "[n_rewards]")
        checks.shape("weights", weights, (rewards.shape[1] if rewards.dim() == 2 else 1,), "[n_rewards]")
    if checks.number("eps", eps) < 0:
        raise ValueError(f"eps: got {eps}, takes a number of at least 0")
    checks.integer("correction", correction, 0)
    checks.same_device("rewards", rewards, group_ids=group_ids, weights=weights, token_counts=token_counts)
    r = rewards.detach()
    r = r if r.dtype in (torch.float32, torch.float64) else r.float()
    advantages, zero_variance = advantages_op(
        r.unsqueeze(-1) if r.dim() == 1 else r, group_size or 0, group_ids, weights, token_counts, normalize, aggregation,
        float(eps), correction,
    )
    return (advantages, zero_variance) if return_zero_variance else advantages


REWARDS = (*checks.FLOATS, *checks.INTEGERS, torch.bool)
