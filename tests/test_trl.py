"""TRL's GRPOTrainer on thinkernel's log-probabilities and loss: real runs on tiny random models on the CPU.

A run and TRL's own start from the same weights and seeds and sample the same completions. Both are compared with a third
run in float64 that replays those completions (reference backend, TRL's loss), by the rule of testing/compare.py with TRL's
float32 run as the baseline. The rule sets the largest error of one against the largest of the other; where both runs do the
same float32 work on inputs that differ in their last bit, that is a toss between few numbers, hence the forms:
- losses: rounding counted at the size of the log-probabilities (ln V) that the loss's terms are made of;
- gradients, all steps of a parameter together: the head's as it stands, a miss judged again over seven further runs with it
  (over 16 models the largest error is 0.6 to 2.2 times TRL's, the norm of all errors 3 % larger); the others' in the Euclidean norm;
- parameters after the run: all of them as one vector.
Shapes: B sequences, C completion tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import thinkernel as tk
import torch
from thinkernel.testing.compare import check, compare

pytest.importorskip("trl", reason="trl is an optional extra")

import transformers  # noqa: E402
from thinkernel.integrations.hf_head import add_logprob_head  # noqa: E402
from trl_run import TINY, Ours, Stock, load, run, save_tiny, trainer  # noqa: E402

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    config = transformers.Qwen2Config(**TINY, tie_word_embeddings=False)
    return save_tiny(tmp_path_factory.mktemp("untied"), config, seed=3)


# ---- whole runs


def stock_and_truth(path: Path, **config) -> tuple:
    """TRL's run, and the run in float64 that replays its completions."""
    stock = run(Stock, path, **config)
    with tk.use_backend("reference"):
        return stock, run(Ours, path, dtype=torch.float64, options={"replay": stock.generations}, **config)


def steps_of(name: str, *runs) -> list[torch.Tensor]:
    """A parameter's gradients in all steps of each run."""
    return [torch.stack([step[name] for step in r.gradients]) for r in runs]


def check_head(runs: tuple, path: Path, loss: str, name: str, **config) -> None:
    """The rule for the head's gradients; runs: ours, float64, TRL's. A miss is judged once more, seven further seeds beside it."""
    judged = steps_of(name, *runs)
    if compare(*judged).message:
        for seed in range(2, 9):
            stock, truth = stock_and_truth(path, seed=seed, **config)
            more = steps_of(name, run(Ours, path, options={"loss": loss}, seed=seed, **config), truth, stock)
            judged = [torch.cat(pair, dim=-1) for pair in zip(judged, more)]  # rows grow, so that each is judged on more numbers too
    check(*judged, name=f"{loss}: gradient of {name}")


def same_run(path: Path, losses: tuple[str, ...] = ("trl", "thinkernel"), **config) -> None:
    """Trains with TRL's trainer, with ours and in float64, and compares."""
    stock, truth = stock_and_truth(path, **config)
    want = dict(truth.model.named_parameters())
    assert any(float((p - q).abs().max()) > 1e-3 for p, q in zip(load(path, torch.float64).parameters(), want.values()))
    for loss in losses:
        ours = run(Ours, path, options={"loss": loss}, **config)
        assert [made for made, _ in ours.generations] == [made for made, _ in stock.generations]
        assert len(ours.generations) == len(truth.generations) and len(ours.losses) == len(truth.losses)
        got, exact, baseline = (torch.stack(r.losses).double() for r in (ours, truth, stock))
        rounding = 2.0**-24 * math.log(TINY["vocab_size"])
        assert (got - exact).abs().max() <= 2 * (baseline - exact).abs().max() + 2 * rounding, f"{loss}: losses"
        head = "lm_head.weight" if "lm_head.weight" in want else "model.embed_tokens.weight"
        for name in truth.gradients[0]:
            if name == head:
                check_head((ours, truth, stock), path, loss, name, **config)
            ours_g, exact, stock_g = steps_of(name, ours, truth, stock)
            error, baseline, rounding = ((x.double() - exact).norm().item() for x in (ours_g, stock_g, exact.float()))
            assert error <= 2 * baseline + 2 * rounding, f"{loss}: gradient of {name}: {error:.3g}, TRL's {baseline:.3g}"
        vectors = (torch.nn.utils.parameters_to_vector(r.model.parameters()).detach() for r in (ours, truth, stock))
        check(*vectors, name=f"{loss}: parameters after the run")
        same_log(ours.state.log_history, stock.state.log_history)


def same_log(ours: list[dict], stock: list[dict]) -> None:
    """TRL's metrics under TRL's names, step by step; times aside."""
    for a, b in zip(ours, stock, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if a[name] is None or b[name] is None:  # NaN: a mean over no tokens
                assert a[name] is b[name], name
            elif "time" not in name and "per_second" not in name:
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=2e-6, nan_ok=True), name


def test_run_dapo_with_reference_model_and_old_logprobs(tiny: Path) -> None:
    """Completions used for two steps, two slices each: old and reference log-probs are ours too."""
    same_run(tiny, beta=0.04, steps_per_generation=2, num_iterations=2, max_steps=4, epsilon_high=0.28)


def test_run_grpo_accumulating_without_checkpointing(untied: Path) -> None:
    same_run(
        untied, loss_type="grpo", gradient_accumulation_steps=2, temperature=0.7, gradient_checkpointing=False,
        mask_truncated_completions=True, entropy_coef=0.01,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [
        dict(loss_type="grpo", importance_sampling_level="sequence"), dict(loss_type="bnpo", delta=1.5), dict(loss_type="dr_grpo"),
        dict(loss_type="dapo", top_entropy_quantile=0.5), dict(loss_type="cispo", epsilon_high=5.0), dict(loss_type="sapo"),
        dict(loss_type="luspo", importance_sampling_level="sequence"), dict(loss_type="luspo"), dict(loss_type="vespo"),
        dict(loss_type="dapo", off_policy_mask_threshold=0.01, use_bias_correction_kl=True),
    ],
    ids=str,
)  # fmt: skip
def test_run_every_loss_type(tiny: Path, options: dict, beta: float) -> None:
    # top_entropy_quantile keeps tokens at a threshold that is one of the entropies: that token may fall either way.
    same_run(tiny, beta=beta, num_iterations=2, gradient_accumulation_steps=2, max_steps=3, **options)


@pytest.mark.slow
def test_run_of_experts(tmp_path: Path) -> None:
    """A mixture of experts with its balance loss."""
    config = transformers.Qwen3MoeConfig(
        **TINY, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, router_aux_loss_coef=0.1,
    )  # fmt: skip
    same_run(save_tiny(tmp_path, config), num_iterations=2)


@pytest.mark.parametrize("loss", ["trl", "thinkernel"])
def test_run_of_adapters(tiny: Path, loss: str) -> None:
    """LoRA through PEFT: only the adapters learn, the reference model is the policy without them."""
    peft = pytest.importorskip("peft")
    made = []
    for kind, options in ((Stock, {}), (Ours, {"loss": loss})):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        made.append(run(kind, tiny, options={"peft_config": config, **options}, beta=0.04, num_iterations=2))
    stock, ours = made
    assert [g for g, _ in ours.generations] == [g for g, _ in stock.generations]
    assert ours.gradients[0].keys() == stock.gradients[0].keys() and all("lora" in name for name in ours.gradients[0])
    for a, b in zip(ours.gradients, stock.gradients):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5 * float(b[name].abs().max()))
    same_log(ours.state.log_history, stock.state.log_history)


def two_processes(path: Path, out: Path, kind: str) -> None:
    """tests/trl_run.py as a script, twice, over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / "tests" / "trl_run.py"), str(path), str(out), kind]
    ranks = [subprocess.Popen(command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    try:
        assert [process.wait(timeout=400) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
def test_run_in_two_processes(tiny: Path, tmp_path: Path) -> None:
    """DistributedDataParallel over gloo: same completions, losses, metrics and parameters as TRL's, on both ranks."""
    for kind in ("stock", "trl", "thinkernel"):
        two_processes(tiny, tmp_path, kind)
    for rank, kind in itertools.product((0, 1), ("trl", "thinkernel")):
        stock, ours = (torch.load(tmp_path / f"{k}.{rank}.pt", weights_only=False) for k in ("stock", kind))
        assert ours["generations"] == stock["generations"]
        torch.testing.assert_close(ours["losses"], stock["losses"], rtol=1e-5, atol=2e-6)
        for name, value in stock["parameters"].items():
            torch.testing.assert_close(ours["parameters"][name], value, rtol=1e-5, atol=1e-6)
        same_log(ours["log"], stock["log"])


# ---- the head of every kind of model


def config_of(kind: str) -> transformers.PretrainedConfig:
    configs = transformers
    return {
        "qwen2": lambda: configs.Qwen2Config(**TINY, tie_word_embeddings=False),
        "llama": lambda: configs.LlamaConfig(**TINY, tie_word_embeddings=True),
        "gemma2": lambda: configs.Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=3.0),
        "granite": lambda: configs.GraniteConfig(**TINY, logits_scaling=0.3),
        "cohere": lambda: configs.CohereConfig(**TINY, logit_scale=0.7),
        "phi": lambda: configs.PhiConfig(**TINY),  # a bias in the head
        "experts": lambda: configs.Qwen3MoeConfig(**TINY, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    }[kind]()  # fmt: skip


def head_scores(model, ids, mask, targets, temperature):
    """By the model's own logits: log-probs and entropies [B, C] of its last C tokens, 0 where the target is −100."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -targets.shape[1] - 1 : -1]
    log_p = (logits / temperature).log_softmax(-1)  # [B, C, V]
    lp = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (x * (targets != -100) for x in (lp, -(log_p.exp() * log_p).sum(-1)))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma2", "granite", "cohere", "phi", "experts"])
def test_head_is_the_models_own(kind: str, tmp_path: Path) -> None:
    """Log-probs, entropies and the gradients of both against log_softmax of the model's own logits, left and right padding."""
    path, temperature = save_tiny(tmp_path, config_of(kind), seed=5), 0.8
    with torch.no_grad():
        model = load(path)
        head = model.get_output_embeddings()
        head.weight.mul_(3)
        if head.bias is not None:
            head.bias.normal_()
        model.save_pretrained(path)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, TINY["vocab_size"], (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    if kind != "gemma2":  # transformers' eager attention, its only one, gives NaN there in float64
        mask[0, :3] = 0
    targets = ids.masked_fill(mask == 0, -100)[:, -7:]
    weights = torch.randn(2, 3, 7, generator=generator)
    results = []
    for dtype, ours in ((torch.float32, True), (torch.float64, False), (torch.float32, False)):
        model = load(path, dtype).train()
        if ours:
            add_logprob_head(model)
            lp, ent, _ = model(input_ids=ids, attention_mask=mask, completion_targets=targets, head_options={"temperature": temperature})
        else:
            lp, ent = head_scores(model, ids, mask, targets, temperature)
        ((lp * weights[0]) + (ent * weights[1])).sum().backward()
        results.append((lp, ent, model.get_output_embeddings().weight.grad))
    for name, out, ref64, baseline in zip(("log-prob", "entropy", "head's gradient"), *results):
        check(out, ref64, baseline, name=name)
        if name != "head's gradient":
            assert not out[targets == -100].any()


def test_head_leaves_the_forward_alone(untied: Path) -> None:
    model = load(untied)
    ids = torch.arange(3, 15).view(2, 6)
    before = model(input_ids=ids).logits
    sampled = model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
    add_logprob_head(model)
    forward = model.forward
    add_logprob_head(model)
    assert model.forward is forward  # a second time changes nothing
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids)), sampled)


def test_head_refuses_other_logits(untied: Path) -> None:
    """A model that does something more to its logits, its hidden state, or caps them under another name, is refused."""
    for change in ("logits", "hidden", "cap"):
        model = load(untied)

        def forward(self, *args, change=change, inner=model.forward, **kwargs):
            out = inner(*args, **kwargs)
            out.logits = out.logits * 1.2 if change == "logits" else 30 * torch.tanh(out.logits / 30) if change == "cap" else out.logits
            return out

        model.forward = types.MethodType(forward, model)
        if change == "hidden":
            model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 4,))
        with pytest.raises(NotImplementedError, match=r"Qwen2ForCausalLM's logits are not HeadFormula\(scale=1.0"):
            add_logprob_head(model)
    model = load(untied)
    model.config.logit_scale = -1.0
    with pytest.raises(NotImplementedError, match="logit_scale: got -1.0"):
        add_logprob_head(model)
    with pytest.raises(NotImplementedError, match="Qwen2Model has no backbone"):
        add_logprob_head(load(untied).model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "fsdp, head"])
def test_head_of_a_sharded_model(untied: Path, tmp_path: Path, kind: str) -> None:
    """FSDP2 over two processes, the head's weight gathered with the root or sharded on its own: the whole model's values."""
    two_processes(untied, tmp_path, kind)
    model = load(untied)
    add_logprob_head(model)
    ids = torch.randint(3, TINY["vocab_size"], (4, 9), generator=torch.Generator().manual_seed(2))
    lp, ent, _ = model(input_ids=ids, completion_targets=ids[:, -5:], head_options={"temperature": 0.9})
    ((lp + ent).sum() / 2).backward()  # FSDP averages over processes
    ranks = [torch.load(tmp_path / f"fsdp.{rank}.pt") for rank in (0, 1)]
    for i, whole in enumerate((lp, ent)):
        torch.testing.assert_close(torch.cat([rank["scores"][i] for rank in ranks]), whole.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        for rank in ranks:
            atol = 1e-5 * float(parameter.grad.abs().max())
            torch.testing.assert_close(rank["gradients"][name], parameter.grad, rtol=1e-4, atol=atol)


def test_nothing_of_the_size_of_the_logits(untied: Path) -> None:
    """No tensor of B·C·V elements in forward or backward; stock TRL's trainer makes them (so the test can fail)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.shape[-1:] == (TINY["vocab_size"],):
                    self.found = max(self.found, x.numel())
            return out

    ids = torch.randint(3, TINY["vocab_size"], (4, 40))
    for kind in (Stock, Ours):
        made = trainer(kind, untied, gradient_checkpointing=False)
        with Largest() as largest:
            lp, ent, _ = made._get_per_token_logps_and_entropies(made.model, ids, torch.ones_like(ids), 30, compute_entropy=True)
            (lp + ent).sum().backward()
        assert lp.shape == ent.shape == (4, 30)
        assert (largest.found >= 4 * 30 * TINY["vocab_size"]) == (kind is Stock)


@pytest.mark.parametrize("precision", ["autocast", "float32 head"])
def test_bfloat16(untied: Path, precision: str) -> None:
    """Under bfloat16 autocast, with the head in bfloat16 or (cast_lm_head_to_fp32) in float32: the rule, TRL's the baseline."""
    ids = torch.randint(3, TINY["vocab_size"], (4, 20), generator=torch.Generator().manual_seed(1))
    outputs = {}
    for kind in (Stock, Ours):
        made = trainer(kind, untied, bf16=True, cast_lm_head_to_fp32=precision != "autocast", temperature=0.9)
        with torch.no_grad():
            scores = made._get_per_token_logps_and_entropies
            outputs[kind] = scores(made.model, ids, torch.ones_like(ids), 12, batch_size=3, compute_entropy=True)
            with made.accelerator.autocast():
                hidden = made.model.model(input_ids=ids).last_hidden_state[:, -13:-1]
            rounded = (lambda x: x) if precision != "autocast" else lambda x: x.bfloat16()
            weight = rounded(made.model.lm_head.weight)
    truth = tk.linear_logprob(rounded(hidden).double(), weight.double(), ids[:, -12:], temperature=0.9)
    for name, out, ref64, baseline in zip(("log-prob", "entropy"), outputs[Ours], truth, outputs[Stock]):
        assert out.dtype == torch.float32
        check(out, ref64, baseline, name=name)


# ---- the loss, setting by setting, on given log-probs


@pytest.fixture(scope="module")
def pair(tiny: Path) -> tuple:
    return trainer(Stock, tiny), trainer(Ours, tiny, options={"loss": "thinkernel"})


SETTINGS = {
    "grpo": dict(loss_type="grpo"),
    "grpo, sequence ratio": dict(loss_type="grpo", importance_sampling_level="sequence"),
    "bnpo": dict(loss_type="bnpo"),
    "dr_grpo": dict(loss_type="dr_grpo"),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28),
    "dapo, global tokens": dict(loss_type="dapo", steps_per_generation=4, accumulation=2),
    "dapo, sequence ratio": dict(loss_type="dapo", importance_sampling_level="sequence"),
    "luspo, token ratio": dict(loss_type="luspo"),
    "luspo, sequence ratio": dict(loss_type="luspo", importance_sampling_level="sequence"),
    "cispo": dict(loss_type="cispo", epsilon_high=1.5, accumulation=3),
    "sapo": dict(loss_type="sapo", sapo_temperature_pos=0.9, sapo_temperature_neg=1.3),
    "vespo": dict(loss_type="vespo"),
    "accumulation": dict(loss_type="grpo", accumulation=4, beta=0.1, entropy_coef=0.02),
    "two-sided": dict(loss_type="grpo", delta=1.4),
    "kl": dict(loss_type="dapo", beta=0.1),
    "kl, corrected": dict(loss_type="bnpo", beta=0.1, use_bias_correction_kl=True, importance_sampling_level="sequence"),
    "entropy bonus": dict(loss_type="dapo", entropy_coef=0.05, accumulation=2, steps_per_generation=2),
    "top entropy": dict(loss_type="grpo", top_entropy_quantile=0.37, entropy_coef=0.05),
    "off-policy mask": dict(loss_type="grpo", off_policy_mask_threshold=0.02),
    "off-policy mask, sampler": dict(loss_type="grpo", off_policy_mask_threshold=0.02, sampler=True),
    "token_truncate": dict(loss_type="dapo", vllm="token_truncate"),
    "token_mask": dict(loss_type="grpo", vllm="token_mask", beta=0.1),
    "sequence_truncate": dict(loss_type="grpo", vllm="sequence_truncate", off_policy_mask_threshold=0.02),
    "sequence_mask": dict(loss_type="sapo", vllm="sequence_mask"),
    "vespo, token_truncate": dict(loss_type="vespo", vllm="token_truncate"),
    "no old log-probs": dict(loss_type="dapo", on_policy=True, beta=0.1),
    "tool mask": dict(loss_type="bnpo", tools=True),
    "advantages per token": dict(loss_type="grpo", per_token=True),
    "balance loss": dict(loss_type="grpo", balance=0.3, accumulation=2),
    "evaluation": dict(loss_type="dapo", evaluate=True, accumulation=2, steps_per_generation=4, entropy_coef=0.1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_is_trls(pair: tuple, name: str, dtype: torch.dtype, monkeypatch) -> None:
    """Loss and gradients equal TRL's to 1e-6 in float32 (of the largest gradient; 1e-12 in float64), metrics too."""
    o = {"accumulation": 1, "steps_per_generation": 1, "entropy_coef": 0.0, "beta": 0.0, **SETTINGS[name]}
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    b, c = 6, 9
    real = lambda *shape, scale=1.0: (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)
    mask = (torch.arange(c) < torch.tensor([9, 4, 1, 7, 9, 5]).unsqueeze(1)).long()
    old = -real(b, c).abs()
    inputs = {
        "prompt_ids": torch.ones(b, 3, dtype=torch.long), "prompt_mask": torch.ones(b, 3, dtype=torch.long),
        "completion_ids": torch.ones(b, c, dtype=torch.long), "completion_mask": mask,
        "advantages": real(b, c) if o.get("per_token") else real(b), "num_items_in_batch": mask.sum() * 2.5,
        "old_per_token_logps": old, "ref_per_token_logps": old + real(b, c, scale=0.3),
    }  # fmt: skip
    if o.get("on_policy"):
        del inputs["old_per_token_logps"]
    if o.get("tools"):
        inputs["tool_mask"] = (torch.rand(b, c, generator=g) < 0.7).long()
    sampled = old + real(b, c, scale=0.2)
    if o.get("sampler"):
        sampled[0, 1] = sampled[4] = float("nan")
        inputs["sampling_per_token_logps"] = sampled
    clip = (0.8, 1.3)
    if "vllm" in o:
        if "off_policy_mask_threshold" not in o:
            sampled[0, 1] = float("nan")  # a token the sampler could not score
        inputs["sampling_per_token_logps"] = sampled
        level, how = o["vllm"].split("_")
        difference = ((old - sampled) * mask).nan_to_num(nan=0.0)
        ratio = (difference.sum(-1, keepdim=True) if level == "sequence" else difference).exp()
        outside = (ratio < clip[0]) | (ratio > clip[1])
        inputs["importance_sampling_ratio"] = ratio.clamp(*clip) if how == "truncate" else ratio.masked_fill(outside, 0.0)
    new, entropy = (old + real(b, c, scale=0.3)) * mask, real(b, c).abs()
    results = []
    for made in pair:
        lp, ent = new.clone().requires_grad_(), entropy.clone().requires_grad_()
        balance = torch.tensor(1.7) if "balance" in o else None
        scores = lambda *args, lp=lp, ent=ent, balance=balance, **kwargs: (lp, ent, balance)
        monkeypatch.setattr(made, "_get_per_token_logps_and_entropies", scores)
        for attribute, value in {
            "loss_type": o["loss_type"], "epsilon_high": o.get("epsilon_high", 0.2), "beta": o["beta"], "entropy_coef": o["entropy_coef"],
            "importance_sampling_level": o.get("importance_sampling_level", "token"), "_entropy_bonus_enabled": o["entropy_coef"] != 0,
            "off_policy_mask_threshold": o.get("off_policy_mask_threshold"), "current_gradient_accumulation_steps": o["accumulation"],
            "top_entropy_quantile": o.get("top_entropy_quantile", 1.0), "use_vllm": "vllm" in o, "max_completion_length": 11,
            "vllm_importance_sampling_mode": o.get("vllm", "token_mask"), "vllm_importance_sampling_clip_min": clip[0],
            "vllm_importance_sampling_clip_max": clip[1], "aux_loss_enabled": "balance" in o, "router_aux_loss_coef": o.get("balance", 0.0),
        }.items():  # fmt: skip
            monkeypatch.setattr(made, attribute, value, raising=False)
        for argument in ("steps_per_generation", "delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg"):
            if argument in o:
                monkeypatch.setattr(made.args, argument, o[argument])
        monkeypatch.setattr(made.args, "steps_per_generation", o["steps_per_generation"])
        for metrics in made._metrics.values():
            metrics.clear()
        made.model.train(not o.get("evaluate"))
        loss = made._compute_loss(made.model, {k: v.clone() for k, v in inputs.items()})
        loss.backward()
        results.append((loss.detach(), lp.grad, ent.grad, {mode: dict(values) for mode, values in made._metrics.items()}))
    (want, want_lp, want_ent, want_metrics), (got, got_lp, got_ent, got_metrics) = results
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    assert got.dtype == dtype and abs(float(got - want)) <= bound * max(1.0, abs(float(want)))
    assert want_lp.any()
    for a, w in ((got_lp, want_lp), (got_ent, want_ent)):
        assert (a is None or not a.any()) if w is None else float((a - w).abs().max()) <= bound * float(w.abs().max())
    for mode, values in want_metrics.items():
        assert got_metrics[mode].keys() == values.keys()
        for key in values:
            assert got_metrics[mode][key] == pytest.approx(values[key], rel=1e-5, abs=1e-7, nan_ok=True), key


@pytest.mark.parametrize("loss_type", ["gspo", "ppo", "reinforce", "rloo"])
def test_loss_types_trl_has_not(tiny: Path, loss_type: str) -> None:
    """They train too, and log finite numbers."""
    done = run(Ours, tiny, options={"loss": "thinkernel"}, loss_type=loss_type, num_iterations=2, beta=0.04)
    record = done.state.log_history[1]
    assert record["grad_norm"] > 0 and all(v == v for k, v in record.items() if k in ("loss", "kl", "entropy"))


# ---- what is refused, and how


def test_refusals(tiny: Path) -> None:
    refused = lambda **config: trainer(Ours, tiny, options={"loss": "thinkernel"}, **config)
    with pytest.raises(ValueError, match="loss: got 'liger'"):
        trainer(Ours, tiny, options={"loss": "liger"})
    with pytest.raises(NotImplementedError, match="use_adaptive_entropy"):
        refused(use_adaptive_entropy=True)
    with pytest.raises(NotImplementedError, match="vespo_k_pos: got 1.5"):
        refused(loss_type="vespo", vespo_k_pos=1.5)
    with pytest.raises(NotImplementedError, match="importance_sampling_level: vespo"):
        refused(loss_type="vespo", importance_sampling_level="sequence")
    with pytest.raises(ValueError, match="loss_type: got 'nothing'"):
        refused(loss_type="nothing")
    made = refused()
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="pixel_values: multimodal"):
        made._get_per_token_logps_and_entropies(made.model, ids, ids, 2, pixel_values=torch.zeros(1))
    with pytest.raises(NotImplementedError, match="image_grid_thw: loss='thinkernel'"):
        made._compute_loss(made.model, {"completion_mask": ids, "image_grid_thw": ids})


def test_without_trl() -> None:
    """thinkernel imports without trl; the integration says what is missing."""
    code = "import sys; sys.modules['trl'] = None; import thinkernel, thinkernel.integrations.trl"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode != 0
    assert "ImportError: thinkernel.integrations.trl needs trl >= 1.16: pip install 'thinkernel[trl]'" in found.stderr


def test_documentation_example_runs(tmp_path: Path, monkeypatch) -> None:
    """Every python block of docs/trl.md, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trl.md").read_text(), re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), "docs/trl.md", "exec"), {"__name__": "example"})
