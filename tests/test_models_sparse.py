"""Sparse models against transformers on the same random weights, with top_k below and above the length: DeepSeek-V3.2 and GLM-5.

Their keys are chosen by computed scores, so the choices are compared too: where they differ, the scores of the keys exchanged must
be nearly equal. Shapes: B batch, S tokens, K top-k. Logits must agree to 1e-4 of their scale in float32.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_models import DEEPSEEK, SPARSE, YARN, assert_close, randomize
from thinkernel.models import ModelConfig, Transformer, config_from_hf, from_hf, hf_weights, load, load_hf_weights, preset, save
from thinkernel.nn import CacheStep, RotaryEmbedding, SparseLatentAttention
from thinkernel.ops.sparse import indexer_scores, indexer_topk
from torch import Tensor

transformers = pytest.importorskip("transformers")

V32 = {**DEEPSEEK, **SPARSE}
# GLM-5: one group of experts, values wider than keys, RoPE's pairs interleaved in the indexer too
GLM = {k: v for k, v in V32.items() if k not in ("n_group", "topk_group")} | dict(v_head_dim=32, rms_norm_eps=1e-5, num_hidden_layers=4)
CASES = {
    "v3.2": ("DeepseekV32Config", V32),
    "v3.2-yarn-k1": ("DeepseekV32Config", {**V32, "index_topk": 1, "rope_parameters": YARN}),
    "v3.2-all-keys": ("DeepseekV32Config", {**V32, "index_topk": 64}),
    "glm-5": ("GlmMoeDsaConfig", GLM),
    "glm-5-all-keys": ("GlmMoeDsaConfig", {**GLM, "index_topk": 48}),
    "glm-5-shared": ("GlmMoeDsaConfig", {**GLM, "indexer_types": ["full", "shared", "shared", "full"]}),
    "glm-5-every-second": ("GlmMoeDsaConfig", {**GLM, "index_topk": 5, "index_topk_freq": 2, "index_skip_topk_offset": 1}),
}  # fmt: skip


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest):
    """A transformers model with random weights, and ours with the same."""
    name, arguments = CASES[request.param]
    config = getattr(transformers, name)(**arguments)
    torch.manual_seed(len(request.param))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomize(theirs)
    return theirs, load_hf_weights(Transformer(config_from_hf(config)), theirs.state_dict()).eval()


@torch.no_grad()
def test_logits_equal_transformers(pair) -> None:
    """And the choice of keys matters: with another one, or with all keys, the logits would be others."""
    theirs, ours = pair
    tokens = torch.randint(97, (3, 41))
    expected = theirs(tokens, use_cache=False).logits
    assert_close(ours(tokens).logits, expected)
    dense, scale = ours(tokens, sparse=False).logits, expected.abs().max()
    moved = ((dense - expected).abs().amax(-1) > 0.01 * scale).float().mean()
    K = ours.config.top_k
    assert_close(dense[:, :K], expected[:, :K])  # no more keys than are chosen
    assert moved == 0 if K >= 41 else moved > 0.4, f"{float(moved):.2f} of the rows differ from dense attention"


@torch.no_grad()
@pytest.mark.parametrize("prefill", [0, 17])
def test_steps_over_a_cache_equal_transformers(pair, prefill: int) -> None:
    """Token by token from an empty and from a prefilled cache, then the rest in one go; theirs in one go and in steps too."""
    theirs, ours = pair
    tokens = torch.randint(97, (2, 38))
    expected = theirs(tokens, use_cache=False).logits
    cache = ours.new_cache(2, 40)
    parts = [ours(tokens[:, :prefill], cache=cache).logits] if prefill else []
    parts += [ours(tokens[:, i : i + 1], cache=cache).logits for i in range(prefill, 33)]
    parts.append(ours(tokens[:, 33:], cache=cache).logits)
    assert_close(torch.cat(parts, dim=1), expected)
    if prefill:
        first = theirs(tokens[:, :prefill], use_cache=True)
        step = theirs(tokens[:, prefill : prefill + 1], past_key_values=first.past_key_values, use_cache=True).logits
        assert_close(parts[1], step)


@torch.no_grad()
def test_choices_equal_transformers(pair) -> None:
    """On what each of their indexers reads: the same keys but where float64 scores say that two are nearly equal."""
    theirs, ours = pair
    tokens, chosen = torch.randint(97, (2, 41)), []
    hooks = [
        layer.self_attn.indexer.register_forward_hook(lambda module, args, out, number=number: chosen.append((number, args, out)))
        for number, layer in enumerate(theirs.model.layers)
        if layer.self_attn.indexer is not None
    ]
    theirs(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    own = [i for i, block in enumerate(ours.blocks) if block.attention.indexer is not None]
    assert [number for number, _, _ in chosen] == own
    positions = torch.arange(41).expand(2, 41)
    for number, (x, q_latent, *_), their_choice in chosen:
        indexer = ours.blocks[number].attention.indexer
        rope = ours.rope(positions)
        found = indexer_topk(*indexer(x, q_latent, rope), top_k=ours.config.top_k).long()  # [B, S, K]
        exact = indexer.double()(x.double(), q_latent.double(), tuple(t.double() for t in rope))
        scores = indexer_scores(*exact)  # [B, S, T] float64, −inf ahead of the query
        indexer.float()
        both = []
        for choice in (found, their_choice.long()):
            mask = torch.zeros(2, 41, 42, dtype=torch.bool).scatter_(-1, choice.masked_fill(choice < 0, 41), True)[..., :41]
            both.append(mask & scores.isfinite())
        ours_only, theirs_only = both[0] & ~both[1], both[1] & ~both[0]
        assert (ours_only.sum(-1) == theirs_only.sum(-1)).all()
        worst = torch.where(theirs_only, scores, -torch.inf).amax(-1) - torch.where(ours_only, scores, torch.inf).amin(-1)
        assert (worst[ours_only.any(-1)].abs() < 1e-5 * scores[scores.isfinite()].abs().max()).all()
        assert ours_only.any(-1).float().mean() < 0.02


@torch.no_grad()
def test_weights_and_checkpoints_go_both_ways(pair, tmp_path) -> None:
    theirs, ours = pair
    expected, exported = theirs.state_dict(), hf_weights(ours)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    theirs.save_pretrained(tmp_path)
    again = from_hf(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    save(ours, tmp_path / "own.safetensors")
    assert load(tmp_path / "own.safetensors").config == ours.config


def shared_model(**changes) -> Transformer:
    torch.manual_seed(3)
    options = dict(layers=4, dense_attention=1, shared_indexers=(2, 3), top_k=6) | changes
    return Transformer(preset("deepseek_v32_mini", **options))


def test_layers_that_share_train_and_warm_up() -> None:
    """One indexer learns, from its own layer's loss; the layers that share it attend to its choice."""
    model, tokens = shared_model(), torch.randint(64, (2, 20))
    output = model(tokens, targets=tokens, return_losses=True)
    (output.indexer_loss - output.logprob.mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without and output.indexer_loss > 0
    indexers = [block.attention.indexer for block in model.blocks[1:]]
    assert indexers[0] is not None and indexers[1:] == [None, None]
    warm = model(tokens, targets=tokens, sparse=False, return_losses=True)
    assert warm.indexer_loss > 0 and not torch.equal(warm.logprob, output.logprob)


def test_the_shared_choice_is_the_one_attended_to() -> None:
    model, tokens = shared_model(), torch.randint(64, (2, 20))
    seen: list[Tensor] = []
    for block in model.blocks[1:]:
        block.attention.register_forward_hook(lambda module, args, kwargs, out: seen.append((kwargs["indices"], out[-1])), with_kwargs=True)
    model(tokens)
    (given, first), *rest = seen
    assert given is None and first.shape == (2, 20, 6) and first.dtype == torch.int32
    assert all(given is first and out is first for given, out in rest)


def test_what_sharing_cannot_be_is_named() -> None:
    for changes in (dict(shared_indexers=(1,)), dict(shared_indexers=(4,)), dict(shared_indexers=(0,), dense_attention=0)):
        with pytest.raises(ValueError, match="^shared_indexers: got"):
            shared_model(**changes)
    options = dict(top_k=2, indexer_heads=2, indexer_dim=8, q_latent=12, kv_latent=16, nope_dim=8, rope_dim=4, value_dim=8)
    shared, full = (SparseLatentAttention(24, 2, shared_indexer=flag, **options) for flag in (True, False))
    x, rope, indices = torch.randn(1, 5, 24), (torch.ones(1, 5, 2), torch.zeros(1, 5, 2)), torch.zeros(1, 5, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="^indices: got None"):
        shared(x, rope)
    with pytest.raises(ValueError, match="^return_indexer_loss: this layer has no indexer"):
        shared(x, rope, indices=indices, return_indexer_loss=True)
    with pytest.raises(ValueError, match="^indices: this layer has an indexer"):
        full(x, rope, indices=indices)
    assert shared(x, rope, sparse=False).shape == x.shape
    wrong = {**GLM, "indexer_types": ["full", "shared", "shared", "full"]} | dict(model_type="glm_moe_dsa")
    values = transformers.GlmMoeDsaConfig(**{k: v for k, v in wrong.items() if k != "model_type"}).to_dict()
    with pytest.raises(ValueError, match="^config: got indexer_types"):
        config_from_hf({**values, "indexer_types": ["full", "half", "shared", "full"]})
    assert config_from_hf({**values, "indexer_types": None, "index_topk_pattern": "FSSF"}).shared_indexers == (1, 2)


def test_published_shape_of_glm_5() -> None:
    theirs = config_from_hf(transformers.GlmMoeDsaConfig())
    ours: ModelConfig = preset("glm_5")
    assert dataclasses.replace(ours, rope_theta=theirs.rope_theta) == theirs


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_cache_of_a_sparse_layer(cache_dtype: torch.dtype) -> None:
    """Steps give what the prefill of all tokens does, to the bit: every token is seen as the cache holds it."""
    torch.manual_seed(3)
    sizes = dict(q_latent=36, kv_latent=32, nope_dim=24, rope_dim=8, value_dim=20)
    layer = SparseLatentAttention(48, 4, top_k=4, indexer_heads=2, indexer_dim=16, **sizes).requires_grad_(False)
    x, turn = torch.randn(1, 9, 48), RotaryEmbedding(8)
    found = []
    for parts in ([9], [6, 1, 2]):
        cache, pieces, start = layer.new_cache(1, 12, dtype=cache_dtype, device="cpu"), [], 0
        for size in parts:
            end = start + size
            step = CacheStep(torch.tensor([end], dtype=torch.int32), end, fresh=start == 0)
            pieces.append(layer(x[:, start:end], turn(torch.arange(start, end)[None]), cache=cache, step=step))
            start = end
        found.append(torch.cat(pieces, 1))
    assert torch.equal(*found)
    if cache_dtype != torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            whole = layer(x, turn(torch.arange(9)[None]))
        assert (found[0] - whole).norm() < 0.3 * whole.norm()  # another key here and there


def test_what_a_sparse_layer_refuses() -> None:
    sizes = dict(q_latent=36, kv_latent=32, nope_dim=24, rope_dim=8, value_dim=20)
    bad = (dict(indexer_heads=0), ValueError, "heads"), (dict(top_k=1.5), TypeError, "top_k"), (dict(top_k=0), ValueError, "top_k")
    for changes, error, name in bad:
        with pytest.raises(error, match=f"^{name}: got"):
            SparseLatentAttention(48, 4, **{**dict(top_k=4, indexer_heads=2, indexer_dim=16), **sizes, **changes})
    layer = SparseLatentAttention(48, 4, top_k=4, indexer_heads=2, indexer_dim=16, **sizes)
    with pytest.raises(ValueError, match="^x: got shape"):
        layer(torch.randn(9, 48), RotaryEmbedding(8)(torch.arange(9)[None]))
