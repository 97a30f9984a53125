"""TRL's GRPOTrainer on thinkernel's log-probabilities and, if wanted, thinkernel's loss.

    from thinkernel.integrations.trl import GRPOTrainer     # in place of trl's; every other line stays
    trainer = GRPOTrainer(model=…, reward_funcs=…, args=GRPOConfig(…), train_dataset=…, loss="trl")

Shapes: B sequences, S tokens (prompt and completion), C completion tokens.

Two of TRL's own override points: `_get_per_token_logps_and_entropies` (policy, old policy and reference model) takes the
backbone's hidden states through tk.linear_logprob, so there is no [B, C, V] tensor; `_compute_loss` is TRL's, or with
loss="thinkernel" tk.policy_loss under TRL's settings, normalisers and metric names. docs/trl.md has the whole story.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thinkernel.integrations.hf_head import HeadOutput, add_logprob_head
from thinkernel.ops.grpo import policy_loss
from thinkernel.reference.policy_loss import LOSS_TYPES

try:
    from trl import GRPOTrainer as TRLGRPOTrainer
except ImportError as error:
    raise ImportError("thinkernel.integrations.trl needs trl >= 1.16: pip install 'thinkernel[trl]'") from error

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo", "ppo", "rloo")  # those with TRL's clip_ratio metrics
_GLOBAL = ("dapo", "cispo", "vespo")  # divided by the tokens of the global batch; the others by accumulation steps
_INPUTS = frozenset((
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages", "num_items_in_batch",
    "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio",
))
_VESPO = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}

# A mixin's base is only known to its user; for the type checker it is TRL's trainer.
_Base: Any = TRLGRPOTrainer if TYPE_CHECKING else object


class ThinkernelGRPO(_Base):
    """Over any subclass of trl.GRPOTrainer: `class Mine(ThinkernelGRPO, TheirTrainer)`.

    loss: "trl", or "thinkernel" for tk.policy_loss, which also takes the loss types gspo, ppo, reinforce and rloo.
    keep_logits: linear_logprob's, a block budget of logits kept for the backward.
    Raises NotImplementedError naming what is not covered: images and other multimodal inputs, a head whose logits are not
    softcap(scale·(h·Wᵀ + b)), DeepSpeed ZeRO-3, and with loss="thinkernel" the settings in `policy_options`.
    """

    def __init__(self, *args: Any, loss: str = "trl", keep_logits: bool | int = False, **kwargs: Any) -> None:
        if loss not in ("trl", "thinkernel"):
            raise ValueError(f"loss: got {loss!r}, takes 'trl' or 'thinkernel'")
        self.loss, self.keep_logits = loss, keep_logits
        super().__init__(*args, **kwargs)
        if loss == "thinkernel":
            self.policy_options()
        for model in (self.model, self.ref_model):
            if model is not None:
                model = self.accelerator.unwrap_model(model)
                add_logprob_head(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def _get_per_token_logps_and_entropies(
        self, model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
        compute_entropy: bool = False, compute_aux_loss: bool = False, **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """input_ids, attention_mask [B, S] -> logprob, entropy (or None) [B, C], balance loss (or None); C = logits_to_keep.

        As TRL's: of softmax(logits / temperature), 0 at padding, in chunks of batch_size sequences."""
        for name, value in multimodal.items():
            if value is not None:
                raise NotImplementedError(f"{name}: multimodal inputs are not covered; takes text, or trl's own GRPOTrainer")
        targets = input_ids.masked_fill(attention_mask == 0, -100)[:, -logits_to_keep:]  # [B, C]
        options = {
            "temperature": self.temperature, "entropy": compute_entropy, "aux_loss": compute_aux_loss,
            "float32": self.args.cast_lm_head_to_fp32, "keep_logits": self.keep_logits,
        }
        parts: list[HeadOutput] = []
        batch_size = batch_size or len(input_ids)
        for start in range(0, len(input_ids), batch_size):
            b = slice(start, start + batch_size)
            with self.accelerator.autocast():
                parts.append(model(
                    input_ids=input_ids[b], attention_mask=attention_mask[b], completion_targets=targets[b], head_options=options,
                ))
        logprob, entropy, balance = zip(*parts)
        return (
            torch.cat(logprob), torch.cat(entropy) if compute_entropy else None,
            torch.stack(balance).mean() if compute_aux_loss else None,
        )

    # ---- loss="thinkernel"

    def policy_options(self) -> dict[str, Any]:
        """tk.policy_loss's arguments for this trainer's settings; NotImplementedError naming a setting it does not map."""
        args, loss_type, level = self.args, self.loss_type, self.importance_sampling_level
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type: got {loss_type!r}, takes one of {LOSS_TYPES}")
        if self.use_adaptive_entropy:
            raise NotImplementedError("use_adaptive_entropy: loss='thinkernel' takes a fixed entropy_coef")
        if self.top_entropy_quantile < 1 and self.accelerator.num_processes > 1:
            raise NotImplementedError("top_entropy_quantile: loss='thinkernel' finds the quantile in one process")
        if loss_type == "vespo" and level == "sequence":
            raise NotImplementedError("importance_sampling_level: vespo forms its sequence weight itself, takes 'token'")
        for name, value in _VESPO.items():
            if loss_type == "vespo" and getattr(args, name) != value:
                raise NotImplementedError(f"{name}: got {getattr(args, name)}, loss='thinkernel' takes the paper's {value}")
        options = {
            "loss_type": loss_type, "epsilon": self.epsilon_low, "epsilon_high": self.epsilon_high, "delta": args.delta,
            "beta": self.beta, "kl": "k3", "kl_correction": args.use_bias_correction_kl, "importance_sampling_level": level,
            "off_policy_threshold": self.off_policy_mask_threshold,
            "top_entropy": self.top_entropy_quantile if self.top_entropy_quantile < 1 else None,
            "max_completion_length": self.max_completion_length, "log_ratio_clamp": None,
            "tau": (args.sapo_temperature_pos, args.sapo_temperature_neg),
        }
        if loss_type == "luspo" and level == "token":
            # TRL's luspo then has token ratios: mean_B Σ_S, which is dr_grpo's Σ / (B·length) with length 1.
            options |= {"loss_type": "dr_grpo", "max_completion_length": 1}
        if self.use_vllm and self.vllm_importance_sampling_correction:
            options["rollout_correction"] = self.vllm_importance_sampling_mode
            options["rollout_clip"] = (self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max)
        return options

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.loss == "trl":
            return super()._compute_loss(model, inputs)
        for name in sorted(set(inputs) - _INPUTS):
            raise NotImplementedError(f"{name}: loss='thinkernel' does not know this input; multimodal ones are not covered")
        completion_mask = inputs["completion_mask"]  # [B, C]
        mask = completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask
        logprob, entropy, balance = self._get_per_token_logps_and_entropies(
            model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1), torch.cat([inputs["prompt_mask"], completion_mask], 1),
            completion_mask.shape[1], compute_entropy=True, compute_aux_loss=self.aux_loss_enabled,
        )
        mode = "train" if self.model.training else "eval"
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        options, scale = self.policy_options(), 1 / accumulation
        if options["loss_type"] in _GLOBAL:
            # TRL counts the tokens of the generation batch over all processes; gradients are averaged over processes
            # and the batch lasts for steps_per_generation micro-batches, `accumulation` of which make one step.
            share = accumulation / self.args.steps_per_generation if mode == "train" else 1.0
            items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes * share
            options["num_items_in_batch"], scale = items, 1.0
        # The bonus is a mean whatever the loss is divided by, and scaled for accumulation alone.
        bonus = self.entropy_coef / accumulation / scale
        rollout = inputs.get("sampling_per_token_logps")
        if rollout is not None and "rollout_correction" not in options:
            # NaN, a token the sampler could not score, is no evidence of drift. policy_loss takes it as the old policy's.
            rollout = torch.where(rollout.isnan(), logprob.detach(), rollout)
        loss, metrics = policy_loss(
            logprob, inputs.get("old_per_token_logps"), inputs["advantages"], mask, ref_logprob=inputs.get("ref_per_token_logps"),
            rollout_logprob=rollout, entropy=entropy, entropy_coef=bonus, **options,
        )
        loss = loss * scale
        if balance is not None:
            loss = loss + self.router_aux_loss_coef * balance / accumulation
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(balance.detach()).mean().item())
        with torch.no_grad():
            self._log_policy(mode, inputs, mask, logprob, metrics)
        return loss

    def _log_policy(self, mode: str, inputs: dict[str, Any], mask: Tensor, logprob: Tensor, metrics: dict[str, Tensor]) -> None:
        """TRL's metric names and means: over all processes' tokens, or sequences where one value stands for a sequence."""
        log = self._metrics[mode]

        def mean(total: Tensor, count: Tensor) -> float:
            totals = self.accelerator.reduce(torch.stack([total.float(), count.float()]), reduction="sum")
            return (totals[0] / totals[1].clamp(min=1.0)).item()

        def over_tokens(x: Tensor) -> float:  # x [B, C] or [B, 1]
            every = torch.ones_like(x) if x.shape[1] == 1 else mask
            return mean((x * every).sum(), every.sum())

        def per_sequence(x: Tensor) -> Tensor:  # of all processes; NaN where a sequence has no token
            x = x.squeeze(1) if x.shape[1] == 1 else (x * mask).sum(-1) / mask.sum(-1)
            return self.accelerator.gather(x)

        if self._entropy_bonus_enabled:
            log["policy_loss"].append(self.accelerator.gather(metrics["policy_loss"]).nanmean().item())
            if mode == "train" and self.accelerator.sync_gradients:
                log["entropy_coef"].append(self.entropy_coef)
        for name in ("kl", "entropy") if self.beta != 0 else ("entropy",):
            log[name].append(mean(metrics[name] * metrics["tokens"], metrics["tokens"]))

        old = inputs.get("old_per_token_logps")
        log_ratio = logprob - (logprob if old is None else old)  # [B, C]
        advantages = inputs["advantages"]
        a = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        if self.loss_type == "vespo":
            phi = self.get_gamma_weights(a, log_ratio, mask, inputs.get("importance_sampling_ratio"))
            log["vespo/phi_seq_mean"].append(over_tokens(phi))
            return
        if self.importance_sampling_level == "sequence" or self.loss_type in ("gspo", "rloo"):
            log_ratio = (log_ratio * mask).sum(-1, keepdim=True)  # [B, 1]
            if self.loss_type != "rloo":
                log_ratio = log_ratio / mask.sum(-1, keepdim=True).clamp(min=1.0)
        ratio = log_ratio.exp()
        if self.loss_type == "cispo":
            log["cispo_clip_ratio"].append(over_tokens(((ratio > self.epsilon_high) & (a > 0)).float()))
        elif self.loss_type in _CLIPPED:
            if self.args.delta is not None:
                ratio = ratio.clamp(max=self.args.delta)
            low = ((ratio < 1 - self.epsilon_low) & (a < 0)).float()
            high = ((ratio > 1 + self.epsilon_high) & (a > 0)).float()
            for name, clipped in (("low", low), ("high", high), ("region", low + high)):
                log[f"clip_ratio/{name}_mean"].append(over_tokens(clipped))
            lowest, highest = per_sequence(low), per_sequence(high)
            log["clip_ratio/low_min"].append(lowest[~lowest.isnan()].amin().item() if (~lowest.isnan()).any() else float("nan"))
            log["clip_ratio/high_max"].append(highest[~highest.isnan()].amax().item() if (~highest.isnan()).any() else float("nan"))


class GRPOTrainer(ThinkernelGRPO, TRLGRPOTrainer):
    """trl.GRPOTrainer on thinkernel's log-probabilities: trl's arguments, and `loss`, `keep_logits` (see ThinkernelGRPO)."""
