"""A TRL run on a tiny random model, no network: what test_trl.py trains with TRL's own trainer and with ours.

Run as a script under torchrun's environment variables it is one process of a data-parallel run (see main).
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from thinkernel.integrations.hf_head import add_logprob_head
from thinkernel.integrations.trl import GRPOTrainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config, TrainerCallback

SYMBOLS = "0123456789+-*/=abcdefghijklmnop "
TINY = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    initializer_range=0.2, vocab_size=len(SYMBOLS) + 3, pad_token_id=0, eos_token_id=1, bos_token_id=1,
)  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *SYMBOLS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="left")


def save_tiny(path: Path, config: PretrainedConfig | None = None, seed: int = 0) -> Path:
    """A random model's folder: TRL loads the reference model from the policy's path."""
    torch.manual_seed(seed)
    config = Qwen2Config(**TINY, tie_word_embeddings=True) if config is None else config
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")  # the others take no float64


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [sum(map(ord, text)) % 7 / 7 + ("a" in text) for text in completions]


class Recorded:
    """Keeps a run's generations, losses, gradients and logs. replay: another run's generations instead of sampling."""

    def __init__(self, *args: Any, replay: list[Any] | None = None, **kwargs: Any) -> None:
        self.replay = replay
        self.generations: list[Any] = []  # (what _generate returned, the random state after it)
        self.losses: list[torch.Tensor] = []  # one a micro-batch
        self.gradients: list[dict[str, torch.Tensor]] = []  # one a step, clipped
        super().__init__(*args, **kwargs)
        run = self

        class KeepGradients(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **others):
                run.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        self.add_callback(KeepGradients())

    def _generate(self, prompts: list[Any]) -> Any:
        if self.replay is None:
            made = super()._generate(prompts)
        else:
            made, state = copy.deepcopy(self.replay[len(self.generations)])
            torch.set_rng_state(state)  # the batch is shuffled after it
        self.generations.append((copy.deepcopy(made), torch.get_rng_state()))
        return made

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class Stock(Recorded, trl.GRPOTrainer):
    pass


class Ours(Recorded, GRPOTrainer):
    pass


def trainer(kind: type, path: Path, *, dtype: torch.dtype = torch.float32, model: Any = None, options: dict[str, Any] | None = None,
            **config: Any) -> Any:  # fmt: skip
    """A trainer with quiet, quick settings; options go to the trainer, config to GRPOConfig.

    Plain SGD: Adam would blow the rounding noise of gradients that are zero in truth up to whole steps."""
    settings: dict[str, Any] = dict(
        output_dir=str(path / "out"), per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=2, seed=1,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, use_cpu=True, optim="sgd", learning_rate=0.1, bf16=False,
        log_level="error",
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(4) for b in range(5, 15)]})
    with contextlib.redirect_stdout(io.StringIO()):
        return kind(
            model=load(path, dtype) if model is None else model, reward_funcs=reward, args=trl.GRPOConfig(**(settings | config)),
            train_dataset=prompts, processing_class=tokenizer(), **(options or {}),
        )  # fmt: skip


def run(kind: type, path: Path, **settings: Any) -> Any:
    made = trainer(kind, path, **settings)
    with contextlib.redirect_stdout(io.StringIO()):
        made.train()
    return made


def fsdp(path: Path, out: Path, shard_head: bool) -> None:
    """The head of a model sharded by FSDP2 over two processes: log-probs and whole gradients, to OUT/fsdp.RANK.pt."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    model = load(path)
    add_logprob_head(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if shard_head:  # on its own: its weight is still sharded when the model's forward reaches it
        fully_shard(model.lm_head)
    fully_shard(model)
    ids = torch.randint(3, TINY["vocab_size"], (4, 9), generator=torch.Generator().manual_seed(2)).chunk(2)[dist.get_rank()]
    lp, ent, _ = model(input_ids=ids, completion_targets=ids[:, -5:], head_options={"temperature": 0.9})
    (lp + ent).sum().backward()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    torch.save({"scores": (lp.detach(), ent.detach()), "gradients": gradients}, out / f"fsdp.{dist.get_rank()}.pt")
    dist.destroy_process_group()


def main() -> None:
    """One process of a data-parallel run; writes what it ends with to OUT/KIND.RANK.pt."""
    path, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if kind.startswith("fsdp"):
        return fsdp(path, out, kind == "fsdp, head")
    options = {"stock": {}, "trl": {}, "thinkernel": {"loss": "thinkernel"}}[kind]
    done = run(Stock if kind == "stock" else Ours, path, options=options, num_iterations=2, beta=0.04, loss_type="dapo", max_steps=2)
    assert done.accelerator.num_processes == 2 and isinstance(done.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    torch.save(
        {"generations": [made for made, _ in done.generations], "parameters": {n: p.detach() for n, p in done.model.named_parameters()},
         "losses": torch.stack(done.losses), "log": done.state.log_history},
        out / f"{kind}.{os.environ['RANK']}.pt",
    )  # fmt: skip
    done.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
