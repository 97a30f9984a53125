"""Ready configurations: miniatures that train on two CPU cores, and the true shapes of published models."""

from __future__ import annotations

import dataclasses

from thinkernel.models.config import ModelConfig
from thinkernel.nn.rope import Llama3Rope, Yarn

PRESETS: dict[str, ModelConfig] = {
    # DeepSeek-V3.2 in miniature: MLA, indexer + sparse attention, routed and shared experts.
    "deepseek_v32_mini": ModelConfig(
        vocab_size=64,
        layers=4,
        hidden=128,
        heads=4,
        ff_dim=320,
        attention="dsa",
        rope_interleaved=True,
        kv_latent=64,
        q_latent=96,
        nope_dim=32,
        rope_dim=16,
        value_dim=32,
        top_k=32,
        indexer_heads=4,
        indexer_dim=32,
        experts=8,
        experts_per_token=2,
        expert_dim=64,
        shared_experts=1,
        first_dense=1,
        score="sigmoid",
        expert_bias=True,
        n_group=2,
        topk_group=1,
        routed_scaling=1.5,
        tie_embeddings=True,
        max_positions=512,
        init_std=0.06,
    ),
    "qwen3_mini": ModelConfig(
        vocab_size=64,
        layers=4,
        hidden=128,
        heads=4,
        kv_heads=2,
        head_dim=32,
        ff_dim=384,
        qk_norm=True,
        tie_embeddings=True,
        max_positions=512,
        init_std=0.06,
    ),
    "qwen3_0_6b": ModelConfig(
        vocab_size=151936,
        layers=28,
        hidden=1024,
        heads=16,
        kv_heads=8,
        head_dim=128,
        ff_dim=3072,
        qk_norm=True,
        rope_theta=1e6,
        tie_embeddings=True,
        max_positions=40960,
    ),
    "llama3_2_1b": ModelConfig(
        vocab_size=128256,
        layers=16,
        hidden=2048,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ff_dim=8192,
        norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=Llama3Rope(
            factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
        ),
        tie_embeddings=True,
        max_positions=131072,
    ),
    "deepseek_v3": ModelConfig(
        vocab_size=129280,
        layers=61,
        hidden=7168,
        heads=128,
        ff_dim=18432,
        attention="mla",
        rope_interleaved=True,
        rope_scaling=Yarn(factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0),
        kv_latent=512,
        q_latent=1536,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        experts=256,
        experts_per_token=8,
        expert_dim=2048,
        shared_experts=1,
        first_dense=3,
        score="sigmoid",
        expert_bias=True,
        n_group=8,
        topk_group=4,
        routed_scaling=2.5,
        max_positions=163840,
    ),
}
PRESETS["deepseek_v3_mini"] = dataclasses.replace(PRESETS["deepseek_v32_mini"], attention="mla")
PRESETS["deepseek_v2"] = dataclasses.replace(
    PRESETS["deepseek_v3"],
    vocab_size=102400,
    layers=60,
    hidden=5120,
    ff_dim=12288,
    rope_scaling=Yarn(factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.707),
    experts=160,
    experts_per_token=6,
    expert_dim=1536,
    shared_experts=2,
    first_dense=1,
    score="softmax",
    expert_bias=False,
    topk_group=3,
    group_score="max",
    renormalize=False,
    routed_scaling=16.0,
)
PRESETS["deepseek_v2_lite"] = dataclasses.replace(
    PRESETS["deepseek_v2"],
    layers=27,
    hidden=2048,
    heads=16,
    ff_dim=10944,
    q_latent=None,
    experts=64,
    expert_dim=1408,
    n_group=1,
    topk_group=1,
    routed_scaling=1.0,
)
PRESETS["kimi_k2"] = dataclasses.replace(
    PRESETS["deepseek_v3"],
    vocab_size=163840,
    heads=64,
    rope_theta=50000.0,
    rope_scaling=Yarn(
        factor=32.0, original_max_positions=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
    ),
    experts=384,
    first_dense=1,
    n_group=1,
    topk_group=1,
    routed_scaling=2.827,
    max_positions=131072,
)
PRESETS["glm_4_7_flash"] = dataclasses.replace(  # MLA with GLM-5's head dims
    PRESETS["deepseek_v3"],
    vocab_size=154880,
    layers=47,
    hidden=2048,
    heads=20,
    ff_dim=10240,
    norm_eps=1e-5,
    rope_theta=1e6,
    rope_scaling=None,
    q_latent=768,
    nope_dim=192,
    value_dim=256,
    experts=64,
    experts_per_token=4,
    expert_dim=1536,
    first_dense=1,
    n_group=1,
    topk_group=1,
    routed_scaling=1.8,
    max_positions=202752,
)
PRESETS["deepseek_v32"] = dataclasses.replace(
    PRESETS["deepseek_v3"], attention="dsa", top_k=2048, indexer_heads=64, indexer_dim=128
)
PRESETS["glm_5"] = dataclasses.replace(
    PRESETS["glm_4_7_flash"],
    layers=78,
    hidden=6144,
    heads=64,
    ff_dim=12288,
    attention="dsa",
    q_latent=2048,
    top_k=2048,
    indexer_heads=32,
    indexer_dim=128,
    indexer_rope_interleaved=True,
    experts=256,
    experts_per_token=8,
    expert_dim=2048,
    first_dense=3,
    routed_scaling=2.5,
)


def preset(name: str, **changes) -> ModelConfig:
    """The configuration of that name, with some fields changed: preset("qwen3_mini", layers=6)."""
    if name not in PRESETS:
        raise ValueError(f"name: got {name!r}, takes one of {', '.join(sorted(PRESETS))}")
    return dataclasses.replace(PRESETS[name], **changes)
