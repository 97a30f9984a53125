"""A Hugging Face causal model's head on thinkernel's linear_logprob, inside the model's own forward.

Shapes: B sequences, S tokens, C scored tokens at the end of each sequence, D hidden, V vocabulary.

Inside the forward, because wrappers stand on it: DistributedDataParallel arms its gradient hooks there, FSDP2 gathers the
head's weight there, PEFT routes through it. Called as ever (generation, evaluation) the model does what it did before.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinkernel.ops.grpo import linear_logprob

# `model` below is a transformers.PreTrainedModel, a type that only its users have.
PROBE_LOGIT = 64.0  # how large the probe makes its largest logit: past every softcap in use (30, 50)


class HeadFormula(NamedTuple):
    """What lies between a model's last hidden state and its logits: softcap·tanh(scale·y / softcap), y = h·Wᵀ + b."""

    scale: float = 1.0
    softcap: float | None = None

    def arguments(self, temperature: float) -> dict[str, Any]:
        """linear_logprob's temperature and softcap for logits / temperature: it caps y itself, so both shrink by scale.

        c·tanh(s·y / c) / τ = (c/s)·tanh(y / (c/s)) / (τ/s): exact, where a scaled hidden would be rounded again."""
        return {"temperature": temperature / self.scale, "softcap": None if self.softcap is None else self.softcap / self.scale}


class HeadOutput(NamedTuple):
    """logprob, entropy [B, C] float32, 0 where the target is −100; aux_loss: the experts' balance loss."""

    logprob: Tensor
    entropy: Tensor | None
    aux_loss: Tensor | None


def head_formula(model: Any) -> HeadFormula:
    """Read from the model's configuration, under the names transformers uses."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise NotImplementedError(f"{name}: got {value!r} in {type(config).__name__}, takes a positive number")
        # Granite divides by its logits_scaling, HyperCLOVA X multiplies.
        scale = 1 / value if name == "logits_scaling" and config.model_type != "hyperclovax" else value
        break
    return HeadFormula(scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(model: Any, formula: HeadFormula) -> None:
    """NotImplementedError unless the model's own logits are the formula's, tried on one row of eight tokens.

    The head's input is blown up on the way, or a small model's logits would be too small for a softcap to show.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    name = type(model).__name__
    if head is None or not isinstance(getattr(head, "weight", None), Tensor) or backbone is model:
        raise NotImplementedError(f"model: {name} has no backbone with one linear head (get_output_embeddings) over it")
    if any(hasattr(p, "ds_id") for p in head.parameters()):
        raise NotImplementedError(f"model: {name} is partitioned by DeepSpeed ZeRO-3, which hides the head's weight; ZeRO-2 and FSDP2 work")
    if any(p.is_meta for p in model.parameters()):
        return  # another process holds the weights, and tries them
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(8, device=next(model.parameters()).device).unsqueeze(0) % vocabulary  # [1, 8]
    training, factor = model.training, 1.0
    model.eval()
    hook = head.register_forward_pre_hook(lambda module, args: (args[0] * factor, *args[1:]))
    try:
        hidden = backbone(input_ids=tokens, use_cache=False).last_hidden_state.to(head.weight.device)  # [1, 8, D]
        bias = getattr(head, "bias", None)
        y = hidden.float() @ head.weight.float().T * formula.scale  # [1, 8, V]
        factor = PROBE_LOGIT / max(float(y.abs().max()), 1e-6)
        y = y * factor if bias is None else y * factor + bias.float() * formula.scale
        want = y if formula.softcap is None else formula.softcap * torch.tanh(y / formula.softcap)
        got = model(input_ids=tokens, use_cache=False).logits.float().to(want.device)
    finally:
        hook.remove()
        model.train(training)
    gap = float((got - want).abs().max()) if got.shape == want.shape else float("inf")
    if not gap <= 0.03 * float(want.abs().max()):  # bfloat16 rounds at 0.4 %
        raise NotImplementedError(
            f"model: {name}'s logits are not {formula} of its last hidden state (largest difference {gap:.3g} at logits of "
            f"{float(want.abs().max()):.3g}); log-probabilities computed from it would be another model's"
        )


def add_logprob_head(model: Any) -> None:
    """Gives the model's forward two more arguments: with `completion_targets` [B, C] it returns a HeadOutput.

    completion_targets: the last C tokens, −100 where none is scored. head_options: a dict of temperature (1.0), entropy
    (True), aux_loss (False), float32 (False: the head in float32 whatever autocast says) and keep_logits (False).
    Without completion_targets the forward is the one it was. A second call changes nothing.
    """
    if getattr(model, "_thinkernel_head", None) is not None:
        return
    formula = head_formula(model)
    check_head(model, formula)
    previous = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(
        self: Any, *args: Any, completion_targets: Tensor | None = None, head_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        if completion_targets is None:
            return previous(*args, **kwargs)
        return _score(self, formula, args, kwargs, completion_targets, **(head_options or {}))

    model._thinkernel_head = formula
    model.forward = types.MethodType(forward, model)


def _score(
    model: Any, formula: HeadFormula, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Tensor, *,
    temperature: float = 1.0, entropy: bool = True, aux_loss: bool = False, float32: bool = False, keep_logits: bool = False,
) -> HeadOutput:
    """The backbone, then linear_logprob of the positions that predict the targets."""
    kwargs = {name: value for name, value in kwargs.items() if name != "labels"} | {"use_cache": False}  # PEFT hands labels=None on
    if aux_loss:
        kwargs["output_router_logits"] = True
    outputs = model.base_model(*args, **kwargs)
    # Looked up in each call: FSDP and PEFT replace the head after this forward was put in.
    head = model.get_output_embeddings()
    hidden = outputs.last_hidden_state[:, -targets.shape[1] - 1 : -1]  # [B, C, D]

    def score(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = head.weight, getattr(head, "bias", None)
        kind, hidden = weight.device.type, hidden.to(weight.device)
        if float32:
            hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
        elif not torch.is_autocast_enabled(kind):
            hidden = hidden.to(weight.dtype)
        with torch.autocast(kind, enabled=False) if float32 else nullcontext():
            return linear_logprob(
                hidden, weight, targets.to(weight.device), bias=bias, entropy=entropy, keep_logits=keep_logits,
                **formula.arguments(temperature),
            )

    logprob, ent = _call_as(head, score, hidden)  # each [B, C]
    balance: Any = None
    if aux_loss:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        config = model.config.get_text_config()
        balance = load_balancing_loss_func(
            outputs.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
        )
    return HeadOutput(logprob, ent, balance)


def _call_as(module: Any, function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """function(x) in place of module's forward, under the module's hooks: where FSDP2 shards the module on its own, it
    gathers the weight there and reduces its gradient."""
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        return module(x)
    finally:
        del module.forward
        if own is not None:
            module.forward = own
