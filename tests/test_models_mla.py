"""MLA models against transformers on the same random weights: DeepSeek-V2 and V2-Lite, V3, Kimi-K2, GLM-4.7-Flash; paged and FP8 caches.

Shapes: B batch, S tokens, V vocabulary. Logits must agree to 1e-4 of the logits' scale in float32, as in test_models.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_models import DEEPSEEK, YARN, assert_close, randomize
from thinkernel.models import Transformer, config_from_hf, from_hf, hf_weights, load_hf_weights, preset
from thinkernel.models.cache import Cache
from thinkernel.nn import CacheStep, Yarn
from thinkernel.ops.dispatch import use_backend
from torch import Tensor

transformers = pytest.importorskip("transformers")

V2 = {k: v for k, v in DEEPSEEK.items() if k not in ("n_group", "topk_group")} | {"routed_scaling_factor": 1.0}
GROUPS = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=2.5)
KIMI_ROPE = YARN | {"rope_theta": 5e4, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
V2_ROPE = YARN | {"factor": 40.0, "original_max_position_embeddings": 16, "beta_fast": 32, "mscale": 0.707, "mscale_all_dim": 0.707}
GLM = {k: v for k, v in DEEPSEEK.items() if k != "first_k_dense_replace"} | dict(v_head_dim=32, n_group=1, topk_group=1, rms_norm_eps=1e-5)

CASES = {
    "v2": ("DeepseekV2Config", {**V2, **GROUPS}),
    "v2-yarn": ("DeepseekV2Config", {**V2, **GROUPS, "rope_parameters": V2_ROPE}),
    "v2-lite": ("DeepseekV2Config", {**V2, "q_lora_rank": None, "rope_parameters": V2_ROPE, "rms_norm_eps": 1e-5}),
    "v2-mscales-differ": ("DeepseekV2Config", {**V2, "rope_parameters": V2_ROPE | {"mscale": 0.5}, "attention_bias": True}),
    "v2-no-mscale": ("DeepseekV2Config", {**V2, "rope_parameters": V2_ROPE | {"mscale": None, "mscale_all_dim": None}}),
    "v3-yarn": ("DeepseekV3Config", {**DEEPSEEK, "rope_parameters": V2_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "v3-one-head": ("DeepseekV3Config", {**DEEPSEEK, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "kimi-k2": ("DeepseekV3Config", {**DEEPSEEK, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "rope_parameters": KIMI_ROPE}),
    "glm-4.7-flash": ("Glm4MoeLiteConfig", GLM),
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
    theirs, ours = pair
    tokens = torch.randint(97, (3, 41))
    expected = theirs(tokens, use_cache=False).logits
    assert_close(ours(tokens).logits, expected)
    other = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)  # what came before must matter to the last token
    assert (theirs(other).logits[:, -1] - expected[:, -1]).abs().max() > 0.05 * expected.abs().max()


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


@torch.no_grad()
def test_names_map_one_to_one_and_checkpoints_are_read(pair, tmp_path) -> None:
    theirs, ours = pair
    expected, exported = theirs.state_dict(), hf_weights(ours)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    theirs.save_pretrained(tmp_path)
    again = from_hf(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


def test_softmax_scale_is_transformers(pair) -> None:
    theirs, ours = pair
    assert ours.blocks[0].attention.scale == pytest.approx(theirs.model.layers[0].self_attn.scaling, rel=1e-12)


@pytest.mark.parametrize("change", [dict(topk_method="noaux"), dict(norm_topk_prob=True), dict(mlp_bias=True)], ids=str)
def test_what_v2_cannot_be_is_named(change: dict) -> None:
    with pytest.raises(ValueError, match=f"^config: got {next(iter(change))} "):
        config_from_hf({**transformers.DeepseekV2Config(**V2).to_dict(), **change})


def test_published_shapes() -> None:
    """Parameters of the published weights; head dims and scale of MATH."""
    parameters = {
        "deepseek_v2_lite": 15_706_484_224,
        "deepseek_v2": 235_741_434_880,
        "kimi_k2": 1_026_408_232_448,
    }
    for name, published in parameters.items():
        with torch.device("meta"):
            model = Transformer(preset(name))
        assert sum(t.numel() for t in (*model.parameters(), *model.buffers())) == published, name
    for name, (nope, value, q_latent) in {
        "deepseek_v2_lite": (128, 128, None), "deepseek_v2": (128, 128, 1536), "deepseek_v3": (128, 128, 1536),
        "kimi_k2": (128, 128, 1536), "glm_4_7_flash": (192, 256, 768),
    }.items():  # fmt: skip
        config = preset(name)
        assert (config.nope_dim, config.value_dim, config.q_latent) == (nope, value, q_latent)
        assert (config.kv_latent, config.rope_dim, config.rope_interleaved) == (512, 64, True)
    theirs = config_from_hf(transformers.Glm4MoeLiteConfig())
    assert dataclasses.replace(preset("glm_4_7_flash"), rope_theta=theirs.rope_theta) == theirs
    lite = preset("deepseek_v2_lite")
    assert lite.softmax_factor == pytest.approx((0.1 * 0.707 * 3.6888794541139363 + 1) ** 2)
    assert isinstance(lite.rope_scaling, Yarn) and lite.rope_scaling.cos_sin_factor == 1.0


# ---- caches of other layouts in a whole model


def wide_latents(**changes) -> Transformer:
    torch.manual_seed(5)
    model = Transformer(preset("deepseek_v3_mini", kv_latent=512, rope_dim=64, layers=2, init_std=0.1, **changes))
    return model.eval()


@torch.no_grad()
def decode_logits(model: Transformer, tokens: Tensor, layers: list, table: Tensor | None, start: int) -> Tensor:
    """Logits of `tokens` [B, S] in one prefill of `start` tokens and single steps, over these layers' caches."""
    parts, done, rope = [], 0, model.rope
    for size in [start, *[1] * (tokens.shape[1] - start)]:
        end = done + size
        step = CacheStep(torch.full((len(tokens),), end, dtype=torch.int32), end, fresh=done == 0, block_table=table)
        h = model.embedding(tokens[:, done:end])
        for block, cache in zip(model.blocks, layers, strict=True):
            h, _ = block(h, rope(torch.arange(done, end).expand(len(tokens), size)), cache=cache, step=step)
        parts.append(model.head(model.norm(h)))
        done = end
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_pages_and_fp8_under_a_whole_model(dtype: torch.dtype) -> None:
    """Pages move no bit; FP8 latents cost what e4m3 costs, and less than a wrong cache would."""
    model, tokens = wide_latents(), torch.randint(64, (3, 30))
    attentions = [block.attention for block in model.blocks]
    expected = model(tokens).logits
    plain = [a.new_cache(3, 30, dtype=dtype, device="cpu") for a in attentions]
    got = decode_logits(model, tokens, plain, None, 12)
    table = torch.randperm(3 * 8).view(3, 8).int()
    pages = [a.new_cache(24, 4, dtype=dtype, device="cpu") for a in attentions]
    assert torch.equal(decode_logits(model, tokens, pages, table, 12), got)
    error = (got - expected).square().mean().sqrt() / expected.std()
    assert error < (0.12 if dtype == torch.uint8 else 1e-5), error


@torch.no_grad()
def test_a_step_on_the_cpu_equals_the_reference_backend() -> None:
    model, tokens = wide_latents(), torch.randint(64, (4, 21))
    found = []
    for backend in ("reference", "auto"):
        cache: Cache = model.new_cache(4, 21)
        with use_backend(backend):
            model(tokens[:, :20], cache=cache)
            found.append(model(tokens[:, 20:], cache=cache).logits)
    assert_close(found[1], found[0])
