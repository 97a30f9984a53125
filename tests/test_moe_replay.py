"""Routing replay: recorded expert choices, of a module, of generation and in training, with and without checkpointing.

Shapes: B rows, S tokens, L layers of experts, E experts, K experts a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from thinkernel import nn
from thinkernel.models import Transformer, generate
from thinkernel.reference import moe as reference
from thinkernel.rl import tokenizer
from thinkernel.rl import trainer as trainer_module
from thinkernel.rl.models import MODELS
from thinkernel.rl.rollout import Sampler, make_batch
from thinkernel.rl.tasks import arithmetic
from thinkernel.rl.trainer import TrainConfig, Trainer
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

pytestmark = pytest.mark.filterwarnings("ignore:thinkernel:RuntimeWarning")


def shake(module: torch.nn.Module, seed: int = 1) -> None:
    """Move every router far enough that many a token would choose otherwise."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("router"):
                p.add_(torch.randn(p.shape, generator=g) * p.std())


# ---- the module


@pytest.mark.parametrize("experts, dtype", [(8, torch.uint8), (256, torch.uint8), (257, torch.int16), (40000, torch.int32)], ids=str)
def test_choices_are_kept_in_few_bytes(experts: int, dtype: torch.dtype) -> None:
    assert nn.expert_dtype(experts) == dtype and torch.iinfo(dtype).max >= experts - 1


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("size", [8, 300])
def test_replay_is_the_recorded_choice_with_live_weights(score: str, size: int) -> None:
    torch.manual_seed(1)
    module = nn.MixtureOfExperts(20, 12, size, 3, score=score, expert_bias=True)
    module.expert_bias.normal_(std=0.1)
    x, valid = torch.randn(3, 11, 20), torch.rand(3, 11) < 0.7
    y, (_, _, _, chosen) = module(x, valid=valid, return_experts=True)
    assert chosen.shape == (3, 11, 3) and chosen.dtype == nn.expert_dtype(size) and not chosen[~valid].any()
    assert_bitwise(module(x, valid=valid, experts=chosen), y)

    shake(module)
    live = module(x, valid=valid, return_experts=True)[1].experts
    assert (live != chosen)[valid].any()
    x.requires_grad_()
    dy = torch.randn(3, 11, 20)
    got, losses = module(x, valid=valid, experts=chosen, return_experts=True, return_losses=True)
    assert torch.equal(losses.experts, chosen)
    assert torch.equal(losses.counts.long(), torch.bincount(chosen[valid].flatten().long(), minlength=size))
    names = ["x", "router", "w_gate_up", "w_down"]
    ours = [got, *torch.autograd.grad(got, [x, module.router, module.w_gate_up, module.w_down], dy)]

    def expected(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, module.router, module.w_gate_up, module.w_down)]
        rows = leaves[0][valid]
        routing = reference.route(rows @ leaves[1].T, 3, score=score, experts=chosen[valid].long())
        part = reference.moe(rows, leaves[2], leaves[3], routing.weights, routing.experts)
        out = torch.zeros(3, 11, 20, dtype=dtype).masked_scatter(valid[..., None].expand(3, 11, 20), part)
        return [out, *torch.autograd.grad(out, leaves, dy.to(dtype))]

    for name, a, b, c in zip(["y", *names], ours, expected(torch.float64), expected(torch.float32), strict=True):
        assert b.any(), name
        check(a, b, c, name=name)


def test_bad_choices_are_named() -> None:
    module = nn.MixtureOfExperts(20, 12, 8, 3)
    x = torch.randn(5, 20)
    byte = torch.zeros(5, 3, dtype=torch.uint8)
    for wrong in (byte[:, :2], byte.float(), byte + 8, byte.long() - 1, byte.long() + 2**32, byte.bool()):
        with pytest.raises(ValueError, match="^experts: got"):
            module(x, experts=wrong)
    with pytest.raises(ValueError, match="^tokens: got None"):
        nn.MixtureOfExperts(20, 12, 8, 3, hash_vocab=30)(x)
    for tokens in (torch.full((5,), -1), torch.full((5,), 30)):
        with pytest.raises(ValueError, match="^tokens: got"):
            nn.MixtureOfExperts(20, 12, 8, 3, hash_vocab=30)(x, tokens=tokens)
    with pytest.raises(TypeError, match="^tokens: got"):
        nn.MixtureOfExperts(20, 12, 8, 3, hash_vocab=30)(x, tokens=torch.ones(5))
    for valid, error in ((torch.ones(4, dtype=torch.bool), ValueError), (torch.ones(5), TypeError), ([True] * 5, TypeError)):
        with pytest.raises(error, match="^valid: got"):
            module(x, valid=valid)
    with pytest.raises(ValueError, match="^experts: got shape"):
        tiny_model()(torch.ones(2, 4, dtype=torch.int64), experts=torch.zeros(2, 4, 1, 2, dtype=torch.uint8))


# ---- generation and the model


def tiny_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    changes: dict[str, Any] = dict(hidden=32, heads=2, ff_dim=48, kv_latent=16, q_latent=24, nope_dim=8, rope_dim=8, value_dim=8)
    changes |= dict(expert_dim=16, experts=8, experts_per_token=2, indexer_heads=2, indexer_dim=16, top_k=12)
    model = Transformer(dataclasses.replace(MODELS["deepseek_v32"], **changes))
    with torch.no_grad():  # far from uniform: no near ties
        for block in model.blocks:
            if isinstance(block.feed_forward, nn.MixtureOfExperts):
                block.feed_forward.router.normal_(std=0.5)
    return model


def sampled(model: Transformer, **options: Any) -> tuple[Any, list[list[int]], list[int]]:
    prompts = [[tokenizer.BOS, *tokenizer.encode(p.prompt)] for p in arithmetic.make_problems(4, seed=6, held_out=False)]
    stop = list(range(10))  # many tokens, so that sequences end early and the batch is compacted
    out = generate(model, prompts, max_new_tokens=9, samples=3, seeds=5, stop_tokens=stop, pad_token=tokenizer.PAD, **options)
    return out, [prompt for prompt in prompts for _ in range(3)], stop


def test_generation_records_what_a_forward_over_its_tokens_chooses() -> None:
    model = tiny_model()
    out, prompts, _ = sampled(model, return_experts=True)
    plain, _, _ = sampled(model)
    assert plain.experts is None and torch.equal(plain.tokens, out.tokens) and torch.equal(plain.logprob, out.logprob)
    assert out.lengths.min() < 6 and out.lengths.max() == 9
    layers = sum(model.config.is_moe(layer) for layer in range(model.config.layers))
    assert out.experts.dtype == torch.uint8
    assert out.experts.shape == (12, max(map(len, prompts)) + 8, layers, 2)
    batch = make_batch(prompts, [row[:n].tolist() for row, n in zip(out.tokens, out.lengths)])
    with torch.no_grad():
        chosen = model(batch.tokens, lengths=batch.lengths, return_experts=True).experts
    assert torch.equal(out.experts[:, : chosen.shape[1]], chosen)  # padding is 0 in both
    assert not out.experts[:, chosen.shape[1] :].any()


def replay_inputs(model: Transformer) -> Any:
    rollout = Sampler(model, max_new_tokens=12, record_experts=True).sample(["3+4=", "12+30-7=", "5="], samples=2, seed=3)
    assert [len(e) for e in rollout.experts] == [len(p) + len(c) - 1 for p, c in zip(rollout.prompts, rollout.completions)]
    return make_batch(rollout.prompts, rollout.completions, rollout.logprobs, rollout.experts)


def gradients(model: Transformer, batch: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    out = model(batch.tokens, targets=batch.targets, lengths=batch.lengths, return_experts=True, **options)
    (out.logprob * batch.mask).sum().backward()
    return out, {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def moved() -> tuple[Transformer, Any]:
    """A model whose routers have moved since its rollout, and that rollout."""
    model = tiny_model()
    batch = replay_inputs(model)
    shake(model)
    return model, batch


def test_replay_holds_the_choices_while_the_router_learns(moved: tuple[Transformer, Any]) -> None:
    model, batch = moved
    live, _ = gradients(model, batch)
    out, grads = gradients(model, batch, experts=batch.experts)
    assert torch.equal(out.experts, batch.experts)
    assert (live.experts != batch.experts).any() and not torch.equal(live.logprob, out.logprob)
    routers = [n for n in grads if n.endswith("router")]
    assert len(routers) == batch.experts.shape[2]
    for name in routers:
        assert grads[name].isfinite().all() and grads[name].any(-1).all()


@pytest.mark.parametrize("mode", CheckpointImpl, ids=str)
def test_checkpointed_gradients_are_the_plain_ones(mode: CheckpointImpl, moved: tuple[Transformer, Any]) -> None:
    model, batch = moved
    plain, want = gradients(model, batch, experts=batch.experts)
    twin = tiny_model(seed=9)
    twin.load_state_dict(model.state_dict())
    twin.blocks = torch.nn.ModuleList(checkpoint_wrapper(block, mode) for block in twin.blocks)
    out, grads = gradients(twin, batch, experts=batch.experts)
    assert_bitwise(out.logprob, plain.logprob)
    assert torch.equal(out.experts, batch.experts)
    assert grads.keys() == want.keys()
    for name, g in grads.items():
        assert_bitwise(g, want[name], name)


# ---- training


def test_a_grpo_step_replays_its_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers that move between sampling and update: the update's tokens go where they went."""
    monkeypatch.setattr(trainer_module, "reward", lambda problem, text, *, finished: (len(text) % 2, float(finished)))
    seen: list[Tensor] = []
    plain = trainer_module.update_routing_bias
    monkeypatch.setattr(trainer_module, "update_routing_bias", lambda model, counts: seen.append(counts) or plain(model, counts))
    config = TrainConfig(steps=1, prompts=4, group=4, max_new_tokens=16, learning_rate=1e-3, replay=True)

    trainer = Trainer(tiny_model(), config)
    rollout, _ = trainer.rollout()
    batch = make_batch(rollout.prompts, rollout.completions, rollout.logprobs, rollout.experts)
    shake(trainer.model)
    before = {n: t.clone() for n, t in trainer.model.state_dict().items()}
    trainer.update(batch, torch.linspace(-1, 1, len(batch.tokens)))
    recorded = torch.stack([e for e in torch.cat(rollout.experts).unbind(1)])  # [L, all tokens, K]
    want = torch.stack([torch.bincount(layer.flatten().long(), minlength=8) for layer in recorded])
    assert torch.equal(seen[0].long(), want)
    after = trainer.model.state_dict()
    assert all((after[n] != before[n]).any() for n in before if n.endswith("router"))

    whole = Trainer(tiny_model(), config)
    record = whole.train_step()
    assert record["active_share"] > 0 and record["grad_norm"] > 0 and record["logprob_gap_max"] < 2e-4
    assert Trainer(tiny_model(), dataclasses.replace(config, replay=False)).rollout()[0].experts is None


def test_replay_is_part_of_a_runs_settings_and_old_checkpoints_have_it_off(tmp_path: Any) -> None:
    trainer = Trainer(tiny_model(), TrainConfig(), folder=tmp_path)
    trainer.save()
    state = torch.load(trainer.checkpoint_path, weights_only=False)
    del state["config"]["replay"]
    trainer_module.checkpoint.save(trainer.checkpoint_path, state)
    Trainer(tiny_model(), TrainConfig(), folder=tmp_path).resume()
    with pytest.raises(ValueError, match="replay: False there, True here"):
        Trainer(tiny_model(), TrainConfig(replay=True), folder=tmp_path).resume()
