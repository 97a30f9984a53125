"""The reference decoder against transformers on the same random weights, its cache, its losses, its files.

Shapes: B batch, S tokens, V vocabulary. Logits must agree to 1e-4 of the logits' scale in float32.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from thinkernel.models import (
    PRESETS,
    ModelConfig,
    Transformer,
    config_from_hf,
    from_hf,
    hf_weights,
    load,
    load_hf_weights,
    preset,
    save,
)
from thinkernel.models.hf import from_hf_name, to_hf_name
from thinkernel.nn.rope import inverse_frequencies
from thinkernel.ops.dispatch import unavailable, use_backend

transformers = pytest.importorskip("transformers")

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 8,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DEEPSEEK = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=2,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.7,
    first_k_dense_replace=1,
    kv_lora_rank=40,
    q_lora_rank=36,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    v_head_dim=20,
    max_position_embeddings=64,
)
QWEN3 = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    max_position_embeddings=64,
)
SPARSE = dict(index_topk=11, index_head_dim=24, index_n_heads=16)

# (the configuration's class, its arguments): every branch of the mapping once
CASES = {
    "qwen3": ("Qwen3Config", {**QWEN3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3-tied-bias": ("Qwen3Config", {**QWEN3, "tie_word_embeddings": True, "attention_bias": True}),
    "llama": ("LlamaConfig", {**QWEN3, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {**QWEN3, "rope_parameters": {"rope_type": "linear", "factor": 3.0}, "attention_bias": True}),
    "mistral": ("MistralConfig", {**QWEN3, "sliding_window": 7}),
    "mistral-yarn": ("MistralConfig", {**QWEN3, "sliding_window": None, "rope_parameters": YARN}),
    "qwen2": ("Qwen2Config", {**QWEN3, "head_dim": 8, "num_key_value_heads": 3}),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
    "deepseek_v3-yarn": ("DeepseekV3Config", {**DEEPSEEK, "rope_parameters": YARN, "rms_norm_eps": 1e-5}),
    "deepseek_v3-plain-query": ("DeepseekV3Config", {**DEEPSEEK, "q_lora_rank": None, "rope_interleave": False}),
    "deepseek_v3-unnormed": ("DeepseekV3Config", {**DEEPSEEK, "norm_topk_prob": False, "attention_bias": True}),
    "deepseek_v32": ("DeepseekV32Config", {**DEEPSEEK, **SPARSE}),
    "deepseek_v32-yarn": ("DeepseekV32Config", {**DEEPSEEK, **SPARSE, "rope_parameters": YARN}),
}


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest):
    """A transformers model with random weights, and ours with the same."""
    name, arguments = CASES[request.param]
    config = getattr(transformers, name)(**arguments)
    torch.manual_seed(len(request.param))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomize(theirs)
    ours = load_hf_weights(Transformer(config_from_hf(config)), theirs.state_dict()).eval()
    return theirs, ours


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights at a scale where attention is far from uniform, norms far from one, router biases that decide."""
    for name, tensor in model.state_dict().items():
        if tensor.ndim >= 2:
            gain = 2.0 if any(part in name for part in ("q_proj", "q_b_proj", "k_proj", "kv_b_proj")) else 1.0
            tensor.normal_(std=gain * tensor.shape[-1] ** -0.5)
        elif name.endswith("norm.weight") or "norm" in name and name.endswith("weight"):
            tensor.normal_(mean=1.0, std=0.3)
        elif name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.3)
        else:
            tensor.normal_(std=0.2)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= 1e-4 * scale, f"max difference {error:.3e} at logit scale {scale:.3e}"


@torch.no_grad()
def test_logits_equal_transformers(pair) -> None:
    theirs, ours = pair
    tokens = torch.randint(97, (3, 41))
    expected = theirs(tokens, use_cache=False).logits
    assert_close(ours(tokens).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("prefill", [0, 17])
def test_cached_logits_equal_transformers(pair, prefill: int) -> None:
    """Token by token from an empty and from a prefilled cache, then the rest in one go of several tokens."""
    theirs, ours = pair
    tokens = torch.randint(97, (2, 38))
    expected = theirs(tokens, use_cache=False).logits
    cache = ours.new_cache(2, 40)
    parts = [ours(tokens[:, :prefill], cache=cache).logits] if prefill else []
    parts += [ours(tokens[:, i : i + 1], cache=cache).logits for i in range(prefill, 33)]
    parts.append(ours(tokens[:, 33:], cache=cache).logits)
    assert_close(torch.cat(parts, dim=1), expected)
    assert cache.lengths.tolist() == [38, 38]


@torch.no_grad()
def test_attention_of_the_parity_cases_is_not_uniform() -> None:
    """The comparison says something only where attention matters: permuting the past must move the logits a lot."""
    for name, (kind, arguments) in CASES.items():
        config = getattr(transformers, kind)(**arguments)
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        randomize(theirs)
        tokens = torch.randint(97, (1, 41))
        other = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)
        a, b = theirs(tokens).logits[:, -1], theirs(other).logits[:, -1]
        assert (a - b).abs().max() > 0.05 * a.abs().max(), name


@torch.no_grad()
def test_names_map_one_to_one_and_back(pair) -> None:
    theirs, ours = pair
    expected, exported = theirs.state_dict(), hf_weights(ours)
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(exported[name], tensor), name
        assert to_hf_name(from_hf_name(name)) == name


@torch.no_grad()
def test_checkpoint_written_by_transformers_is_read(pair, tmp_path) -> None:
    """transformers writes every expert apart."""
    theirs, ours = pair
    theirs.save_pretrained(tmp_path)
    again = from_hf(tmp_path)
    assert again.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_config_of_an_older_file() -> None:
    """config.json before transformers 5: rope_theta and rope_scaling on the top level."""
    values = transformers.DeepseekV3Config(**DEEPSEEK).to_dict()
    values.pop("rope_parameters")
    scaling = {"type": "yarn", **{k: v for k, v in YARN.items() if k not in ("rope_type", "rope_theta")}}
    values |= {"rope_theta": 5000.0, "rope_scaling": scaling}
    config = config_from_hf(json.loads(json.dumps(values)))
    assert config.rope_theta == 5000.0
    assert config.rope_scaling.factor == 4.0 and config.rope_scaling.mscale == 0.7


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32},
        {"truncate": False},
        {"beta_fast": 2, "beta_slow": 1.9},
        {"mscale": None},
        {"mscale_all_dim": 0},
        {"attention_factor": 0.8},
        {"factor": 0.5},
    ],
)
def test_yarn_frequencies_equal_transformers(changes: dict) -> None:
    config = transformers.DeepseekV3Config(**{**DEEPSEEK, "qk_rope_head_dim": 64, "rope_parameters": YARN | changes})
    expected, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config)
    ours = config_from_hf(config)
    torch.testing.assert_close(inverse_frequencies(64, ours.rope_theta, ours.rope_scaling), expected, rtol=1e-6, atol=0)
    assert ours.rope_scaling.cos_sin_factor == pytest.approx(factor, rel=1e-12)
    scale = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention(config, 0).scaling
    assert (24 + 64) ** -0.5 * ours.rope_scaling.softmax_factor == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("Qwen3Config", "qwen3_0_6b"),
        ("LlamaConfig", "llama3_2_1b"),
        ("DeepseekV3Config", "deepseek_v3"),
        ("DeepseekV32Config", "deepseek_v32"),
    ],
)
def test_published_shapes(kind: str, name: str) -> None:
    """Presets have the sizes of transformers' defaults (qwen3: of the published 0.6B, llama: of 3.2 1B)."""
    ours = preset(name)
    published = {"qwen3_0_6b": 596_049_920, "llama3_2_1b": 1_235_814_400}
    if name in published:
        with torch.device("meta"):
            assert sum(p.numel() for p in Transformer(ours).parameters()) == published[name]
        return
    theirs = config_from_hf(getattr(transformers, kind)())
    same = {field: getattr(theirs, field) for field in ("rope_scaling", "max_positions", "rope_theta")}
    assert dataclasses.replace(ours, **same) == theirs
    if name == "deepseek_v3":  # 671 billion: weights and the routers' biases, without the extra prediction layer
        with torch.device("meta"):
            model = Transformer(ours)
        assert sum(t.numel() for t in (*model.parameters(), *model.buffers())) == 671_026_419_200


# ---- without transformers' model


def tiny(attention: str, **changes) -> ModelConfig:
    name = "qwen3_mini" if attention == "gqa" else "deepseek_v32_mini"
    small = dict(layers=2, hidden=32, heads=4, ff_dim=48, attention=attention, vocab_size=33, init_std=0.2)
    if attention == "gqa":
        small |= dict(kv_heads=2, head_dim=10)
    else:
        small |= dict(kv_latent=24, q_latent=20, nope_dim=12, rope_dim=8, value_dim=10, expert_dim=16, top_k=9)
        small |= dict(indexer_heads=4, indexer_dim=12)
    return preset(name, **(small | changes))


@pytest.fixture(params=["gqa", "mla", "dsa"])
def model(request: pytest.FixtureRequest) -> Transformer:
    torch.manual_seed(7)
    return Transformer(tiny(request.param))


def test_targets_give_the_logits_log_probabilities(model: Transformer) -> None:
    tokens, targets = torch.randint(33, (2, 3, 25)).unbind(0)
    targets[0, :4] = -100
    out = model(tokens, targets=targets, temperature=0.7)
    assert out.logits is None
    log_probs = (model(tokens).logits.double() / 0.7).log_softmax(-1)
    keep = targets != -100
    expected = log_probs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(out.logprob[keep].double(), expected[keep], rtol=1e-5, atol=1e-5)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(out.entropy[keep].double(), entropy[keep], rtol=1e-5, atol=1e-5)
    assert not out.logprob[~keep].any() and not out.entropy[~keep].any()


@torch.no_grad()
def test_right_padding_changes_nothing(model: Transformer) -> None:
    lengths = torch.tensor([5, 23, 1, 14])
    tokens = torch.randint(33, (4, 23))
    out = model(tokens, lengths=lengths, return_losses=True)
    for row, length in enumerate(lengths.tolist()):
        alone = model(tokens[row : row + 1, :length]).logits[0]
        batched = model(tokens, lengths=lengths).logits[row, :length]
        torch.testing.assert_close(batched, alone, rtol=1e-5, atol=1e-5)
    if model.config.experts:  # padding is not counted
        expected = int(lengths.sum()) * model.config.experts_per_token
        assert out.expert_counts.sum(-1).tolist() == [expected] * out.expert_counts.shape[0]


@torch.no_grad()
def test_losses_do_not_see_padding(model: Transformer) -> None:
    lengths = torch.tensor([9, 20])
    tokens = torch.randint(33, (2, 20))
    other = tokens.clone()
    other[0, 9:] = torch.randint(33, (11,))
    a, b = (model(t, lengths=lengths, return_losses=True) for t in (tokens, other))
    for name in ("indexer_loss", "balance_loss"):
        if getattr(a, name) is not None:
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_left_padding_changes_nothing(attention: str) -> None:
    torch.manual_seed(3)
    model = Transformer(tiny(attention))
    tokens, start = torch.randint(33, (3, 19)), torch.tensor([0, 7, 18], dtype=torch.int32)
    out = model(tokens, key_start=start).logits
    for row, first in enumerate(start.tolist()):
        alone = model(tokens[row : row + 1, first:]).logits[0]
        torch.testing.assert_close(out[row, first:], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_of_different_lengths_share_a_cache(model: Transformer) -> None:
    """Prompts padded on the right, then appended each at its own length, in chunks with padding of their own."""
    sequences = [torch.randint(33, (n,)) for n in (21, 30, 17)]
    whole = [model(s[None]).logits[0] for s in sequences]
    cache, seen = model.new_cache(3, 64), [0, 0, 0]
    for chunk in ([4, 11, 1], [1, 1, 1], [3, 6, 5], [1, 1, 1]):
        tokens = torch.zeros(3, max(chunk), dtype=torch.int64)
        for row, n in enumerate(chunk):
            tokens[row, :n] = sequences[row][seen[row] : seen[row] + n]
        logits = model(tokens, cache=cache, lengths=torch.tensor(chunk)).logits
        for row, n in enumerate(chunk):
            expected = whole[row][seen[row] : seen[row] + n]
            torch.testing.assert_close(logits[row, :n], expected, rtol=1e-4, atol=1e-4)
            seen[row] += n
    assert cache.lengths.tolist() == seen


@torch.no_grad()
@pytest.mark.skipif(unavailable("cpu", torch.device("cpu")) is not None, reason="needs the built extension")
def test_tokens_have_the_same_bits_alone_in_a_batch_and_decoded() -> None:
    """Every op of a dense grouped-query model is batch-invariant on the CPU, and decode shares prefill's blocks."""
    torch.manual_seed(17)
    model = Transformer(tiny("gqa", hidden=36, head_dim=12))
    tokens = torch.randint(33, (3, 600))  # more than one block of keys
    with use_backend("cpu"):
        whole = model(tokens).logits
        for row in range(3):
            assert torch.equal(model(tokens[row : row + 1]).logits[0], whole[row])
        assert torch.equal(model(tokens[:, :531]).logits, whole[:, :531])
        cache = model.new_cache(3, 620)
        parts = [model(tokens[:, :570], cache=cache).logits]
        parts += [model(tokens[:, i : i + 1], cache=cache).logits for i in range(570, 594)]
        parts.append(model(tokens[:, 594:], cache=cache).logits)
        assert torch.equal(torch.cat(parts, 1), whole)


@torch.no_grad()
def test_a_sparse_model_may_begin_with_dense_layers() -> None:
    torch.manual_seed(18)
    model = Transformer(tiny("dsa", layers=3, dense_attention=1))
    assert [hasattr(block.attention, "indexer") for block in model.blocks] == [False, True, True]
    tokens = torch.randint(33, (2, 24))
    cache = model.new_cache(2, 24)
    parts = [model(tokens[:, :11], cache=cache).logits, model(tokens[:, 11:], cache=cache).logits]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sparse_is_dense_while_everything_is_selected() -> None:
    torch.manual_seed(5)
    model = Transformer(tiny("dsa", top_k=30))
    tokens = torch.randint(33, (2, 30))
    torch.testing.assert_close(model(tokens).logits, model(tokens, sparse=False).logits, rtol=1e-5, atol=1e-5)
    tokens = torch.randint(33, (2, 45))
    difference = (model(tokens).logits - model(tokens, sparse=False).logits).abs().amax((0, 2))
    assert difference[:30].max() < 1e-4 < difference[30:].max()


@pytest.mark.parametrize("sparse", [True, False])
def test_language_loss_and_indexer_loss_do_not_meet(sparse: bool) -> None:
    torch.manual_seed(11)
    model = Transformer(tiny("dsa"))
    tokens = torch.randint(33, (2, 26))
    out = model(tokens[:, :-1], targets=tokens[:, 1:], sparse=sparse, return_losses=True)
    parameters = dict(model.named_parameters())
    language = torch.autograd.grad(out.logprob.sum(), parameters.values(), retain_graph=True, allow_unused=True)
    indexer = torch.autograd.grad(out.indexer_loss, parameters.values(), retain_graph=True, allow_unused=True)
    balance = torch.autograd.grad(out.balance_loss, parameters.values(), allow_unused=True)
    assert any(g is not None and g.any() for g in balance)
    for name, a, b in zip(parameters, language, indexer, strict=True):
        if "indexer" in name:
            assert a is None and b is not None and b.abs().max() > 0, name
        else:
            assert b is None and a is not None and a.abs().max() > 0, name


def test_every_parameter_learns(model: Transformer) -> None:
    tokens = torch.randint(33, (8, 26))
    out = model(tokens[:, :-1], targets=tokens[:, 1:], return_losses=True)
    loss = -out.logprob.mean() + (out.indexer_loss if model.config.attention == "dsa" else 0)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_a_few_steps_learn_a_sequence(model: Transformer) -> None:
    tokens = torch.randint(33, (4, 20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = -model(tokens[:, :-1], targets=tokens[:, 1:]).logprob.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


@torch.no_grad()
def test_bfloat16_follows_float32(model: Transformer) -> None:
    tokens = torch.randint(33, (2, 20))
    # Selections may differ between the dtypes, so compare where everything is selected.
    wide = Transformer(dataclasses.replace(model.config, top_k=64, experts=0)).eval()
    narrow = Transformer(wide.config)
    narrow.load_state_dict(wide.state_dict())
    narrow = narrow.to(torch.bfloat16)
    expected, got = wide(tokens).logits, narrow(tokens).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()
    cache = narrow.new_cache(2, 20)
    step = [narrow(tokens[:, :12], cache=cache).logits, narrow(tokens[:, 12:13], cache=cache).logits]
    assert (torch.cat(step, 1).float() - expected[:, :13]).abs().max() < 0.05 * expected.abs().max()


def test_autocast_follows_float32(model: Transformer) -> None:
    tokens = torch.randint(33, (2, 20))
    wide = Transformer(dataclasses.replace(model.config, top_k=64, experts=0))
    expected = wide(tokens[:, :-1], targets=tokens[:, 1:], return_losses=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = wide(tokens[:, :-1], targets=tokens[:, 1:], return_losses=True)
    assert out.logprob.dtype == torch.float32
    assert (out.logprob - expected.logprob).abs().max() < 0.05 * expected.logprob.abs().max()
    out.logprob.sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in wide.named_parameters() if "indexer" not in n)
    with torch.autocast("cpu", torch.bfloat16):  # with experts: routing stays float32, the rest must run
        out = model(tokens[:, :-1], targets=tokens[:, 1:], return_losses=True)
    out.logprob.sum().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "indexer" not in n)


def test_casting_keeps_frequencies_and_selection_bias_in_float32() -> None:
    model = Transformer(tiny("dsa"))
    model.blocks[1].feed_forward.expert_bias.fill_(0.1234567)
    model = model.to(torch.bfloat16)
    assert model.rope.inv_freq.dtype == torch.float32
    bias = model.blocks[1].feed_forward.expert_bias
    assert bias.dtype == torch.float32 and bias[0] == torch.tensor(0.1234567)
    assert model.double().float().blocks[1].feed_forward.expert_bias.dtype == torch.float32


def test_safetensors_round_trip(model: Transformer, tmp_path) -> None:
    for buffer in model.buffers():
        buffer.normal_()
    save(model, tmp_path / "model.safetensors", metadata={"step": "12"})
    again = load(tmp_path / "model.safetensors")
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    tokens = torch.randint(33, (2, 12))
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert (again.head.weight is again.embedding.weight) == model.config.tie_embeddings
    assert load(tmp_path / "model.safetensors", dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_configs_survive_json() -> None:
    for config in PRESETS.values():
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    old = PRESETS["deepseek_v3"].to_dict()  # before there were other kinds of scaling
    yarn = old.pop("rope_scaling")
    del yarn["rope_type"]
    assert ModelConfig.from_dict({**old, "yarn": yarn}) == PRESETS["deepseek_v3"]
    assert ModelConfig.from_dict({**old, "yarn": None}).rope_scaling is None


def test_bad_weights_are_named(tmp_path) -> None:
    model = Transformer(tiny("gqa"))
    weights = dict(hf_weights(model))
    with pytest.raises(ValueError, match="no rule for the name 'transformer.h.0'"):
        load_hf_weights(model, {**weights, "transformer.h.0": torch.zeros(1)})
    with pytest.raises(ValueError, match="wrong shape: norm.weight"):
        load_hf_weights(model, {**weights, "model.norm.weight": torch.zeros(5)})
    with pytest.raises(ValueError, match="FP8"):
        load_hf_weights(model, {**weights, "model.layers.0.mlp.down_proj.weight_scale_inv": torch.zeros(1)})
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match="missing norm.weight"):
        load_hf_weights(model, weights)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="path"):
        load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "changes, name",
    [
        (dict(layers=0), "layers"),
        (dict(head_dim=None, hidden=30), "heads"),
        (dict(head_dim=7), "head_dim"),
        (dict(kv_heads=3), "kv_heads"),
        (dict(experts=4, expert_dim=0), "expert_dim"),
        (dict(experts=4, expert_dim=8, experts_per_token=5), "top_k"),
        (dict(experts=4, expert_dim=8, experts_per_token=2, n_group=3), "n_group"),
    ],
)
def test_bad_configurations_are_named(changes: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        Transformer(tiny("gqa", **changes))


def test_bad_calls_are_named() -> None:
    model = Transformer(tiny("dsa"))
    tokens, start = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    cases = [
        (dict(tokens=tokens.float()), "tokens"),
        (dict(tokens=tokens[0]), "tokens"),
        (dict(tokens=tokens, targets=tokens[:, 1:]), "targets"),
        (dict(tokens=tokens, lengths=torch.ones(3)), "lengths"),
        (dict(tokens=tokens, key_start=start), "key_start"),
        (dict(tokens=tokens, cache=model.new_cache(2, 4)), "cache"),
        (dict(tokens=tokens, cache=model.new_cache(3, 8)), "cache"),
        (dict(tokens=tokens, cache=model.new_cache(2, 8), return_losses=True), "return_losses"),
        (dict(tokens=tokens, cache=model.new_cache(2, 8), sparse=False), "sparse"),
    ]
    for arguments, name in cases:
        with pytest.raises(ValueError, match=f"^{name}: "):
            model(arguments.pop("tokens"), **arguments)
    with pytest.raises(ValueError, match="^attention: got 'linear'"):
        preset("qwen3_mini", attention="linear")
    with pytest.raises(ValueError, match="^name: .*qwen3_mini"):
        preset("gpt5")
