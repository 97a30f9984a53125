"""Weights in and out: our safetensors files, and Hugging Face's weights of llama, mistral, qwen2, qwen3, deepseek_v2,
deepseek_v3, deepseek_v32, glm4_moe_lite and glm_moe_dsa.

Every Hugging Face tensor has one of ours under another name with the same layout, except that checkpoints on disk store
each expert apart: experts.{e}.gate_proj, up_proj [I, hidden] and down_proj [hidden, I]; we hold w_gate_up
[E, 2I, hidden] and w_down [E, hidden, I], as transformers does in memory. Both forms are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from thinkernel.models.config import ModelConfig
from thinkernel.models.transformer import Transformer
from thinkernel.nn.rope_scaling import scaling_from_hf

FORMAT = "thinkernel-1"
DENSE = ("llama", "mistral", "qwen2", "qwen3")
DEEPSEEK = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa")

# Ours, theirs; the first that matches a name decides. {} is the layer's number.
RENAMES = (
    ("embedding.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
    ("blocks.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight"),
    ("blocks.{}.feed_forward_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    ("blocks.{}.attention.q_a_norm.", "model.layers.{}.self_attn.q_a_layernorm."),
    ("blocks.{}.attention.kv_a_proj.", "model.layers.{}.self_attn.kv_a_proj_with_mqa."),
    ("blocks.{}.attention.kv_a_norm.", "model.layers.{}.self_attn.kv_a_layernorm."),
    ("blocks.{}.attention.indexer.q_proj.", "model.layers.{}.self_attn.indexer.wq_b."),
    ("blocks.{}.attention.indexer.k_proj.", "model.layers.{}.self_attn.indexer.wk."),
    ("blocks.{}.attention.indexer.k_norm.", "model.layers.{}.self_attn.indexer.k_norm."),
    ("blocks.{}.attention.indexer.weight_proj.", "model.layers.{}.self_attn.indexer.weights_proj."),
    ("blocks.{}.attention.", "model.layers.{}.self_attn."),
    ("blocks.{}.feed_forward.router", "model.layers.{}.mlp.gate.weight"),
    ("blocks.{}.feed_forward.expert_bias", "model.layers.{}.mlp.gate.e_score_correction_bias"),
    ("blocks.{}.feed_forward.w_gate_up", "model.layers.{}.mlp.experts.gate_up_proj"),
    ("blocks.{}.feed_forward.w_down", "model.layers.{}.mlp.experts.down_proj"),
    ("blocks.{}.feed_forward.shared.", "model.layers.{}.mlp.shared_experts."),
    ("blocks.{}.feed_forward.", "model.layers.{}.mlp."),
)
EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for source, target in pairs:
        match = re.match(re.escape(source).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return target.format(*match.groups()) + name[match.end() :]
    raise ValueError(f"weights: no rule for the name {name!r}")


def to_hf_name(name: str) -> str:
    return _rename(name, RENAMES)


def from_hf_name(name: str) -> str:
    return _rename(name, ((theirs, ours) for ours, theirs in RENAMES))


# ---- configurations


def config_from_hf(config) -> ModelConfig:
    """A transformers configuration (object, or the dictionary of a config.json) as ours."""
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    kind = values.get("model_type")
    if kind not in DENSE + DEEPSEEK:
        raise ValueError(f"config: got model_type {kind!r}, takes one of {', '.join(DENSE + DEEPSEEK)}")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config: got hidden_act {values['hidden_act']!r}, takes 'silu'")
    # transformers 5 keeps everything in rope_parameters; older files have rope_theta and rope_scaling.
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    common = dict(
        vocab_size=values["vocab_size"],
        layers=values["num_hidden_layers"],
        hidden=values["hidden_size"],
        heads=values["num_attention_heads"],
        ff_dim=values["intermediate_size"],
        norm_eps=values.get("rms_norm_eps", 1e-6),
        tie_embeddings=values.get("tie_word_embeddings", False),
        attention_bias=values.get("attention_bias", False),
        max_positions=values["max_position_embeddings"],
        init_std=values.get("initializer_range", 0.02),
        rope_theta=rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        rope_scaling=scaling_from_hf(rope, values["max_position_embeddings"]),
    )
    if kind in DENSE:
        for name in ("use_sliding_window", "mlp_bias"):
            if values.get(name):
                raise ValueError(f"config: got {name} = True, takes False")
        if kind == "qwen2":
            common |= dict(attention_bias=True, attention_out_bias=False)
        window = values.get("sliding_window", 4096) if kind == "mistral" else None
        return ModelConfig(
            **common,
            kv_heads=values.get("num_key_value_heads"),
            head_dim=values["head_dim"] if kind == "qwen3" else values.get("head_dim"),
            qk_norm=kind == "qwen3",
            window=None if window is None else (window - 1, 0),
        )
    layers = values["num_hidden_layers"]
    sparse = {}
    if kind in ("deepseek_v32", "glm_moe_dsa"):
        sparse = dict(
            attention="dsa",
            top_k=values["index_topk"],
            indexer_heads=values["index_n_heads"],
            indexer_dim=values["index_head_dim"],
            indexer_rope_interleaved=kind == "glm_moe_dsa",
            shared_indexers=_shared_indexers(values) if kind == "glm_moe_dsa" else (),
        )
    first_dense = values.get("first_k_dense_replace", {"glm4_moe_lite": 1, "glm_moe_dsa": 3}.get(kind, 0))
    expected = ["dense"] * min(first_dense, layers) + ["sparse"] * max(layers - first_dense, 0)
    if values.get("mlp_layer_types") not in (None, expected):
        raise ValueError(f"config: got mlp_layer_types {values['mlp_layer_types']}, takes {expected}")
    routing = dict(
        score="sigmoid",
        expert_bias=True,
        n_group=values["n_group"],
        topk_group=values["topk_group"],
        renormalize=values["norm_topk_prob"],
    )
    if kind == "deepseek_v2":
        for name in ("mlp_bias", "norm_topk_prob"):
            if values.get(name):
                raise ValueError(f"config: got {name} = True, takes False")
        routing = dict(score="softmax", group_score="max", renormalize=False)
        if values["topk_method"] == "group_limited_greedy":
            routing |= dict(n_group=values["n_group"], topk_group=values["topk_group"])
        elif values["topk_method"] != "greedy":
            raise ValueError(f"config: got topk_method {values['topk_method']!r}, takes 'greedy' or 'group_limited_greedy'")
    return ModelConfig(
        **common,
        **({"attention": "mla"} | sparse),
        **routing,
        rope_interleaved=values.get("rope_interleave", True),
        kv_latent=values["kv_lora_rank"],
        q_latent=values["q_lora_rank"],
        nope_dim=values["qk_nope_head_dim"],
        rope_dim=values["qk_rope_head_dim"],
        value_dim=values["v_head_dim"],
        experts=values["n_routed_experts"],
        experts_per_token=values["num_experts_per_tok"],
        expert_dim=values["moe_intermediate_size"],
        shared_experts=values["n_shared_experts"],
        first_dense=first_dense,
        routed_scaling=values["routed_scaling_factor"],
    )


def _shared_indexers(values: Mapping) -> tuple[int, ...]:
    """The layers that reuse the choice of an earlier one: listed, or by a pattern "FSSF…", or by a period and an offset."""
    layers = values["num_hidden_layers"]
    types = values.get("indexer_types") or values.get("index_topk_pattern")
    if types is not None:
        known = {"full": False, "F": False, "shared": True, "S": True}
        if len(types) != layers or any(kind not in known for kind in types):
            raise ValueError(f"config: got indexer_types {types}, takes 'full' or 'shared' for each of {layers} layers")
        return tuple(layer for layer, kind in enumerate(types) if known[kind])
    period, offset = max(values.get("index_topk_freq", 1), 1), values.get("index_skip_topk_offset", 2)
    return tuple(layer for layer in range(layers) if max(layer - offset + 1, 0) % period)


# ---- weights


def _merge_experts(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts stored one by one become gate_up_proj [E, 2I, hidden] and down_proj [E, hidden, I]."""
    merged: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in weights.items():
        match = EXPERT.fullmatch(name)
        if match:
            prefix, number, part = match.groups()
            experts.setdefault(prefix, {})[int(number), part] = tensor
        else:
            merged[name] = tensor
    for prefix, parts in experts.items():
        numbers = range(1 + max(number for number, _ in parts))
        wanted = [(number, part) for number in numbers for part in ("gate_proj", "up_proj", "down_proj")]
        missing = [f"{prefix}.{number}.{part}.weight" for number, part in wanted if (number, part) not in parts]
        if missing:
            raise ValueError(f"weights: missing {', '.join(missing[:5])}")
        merged[f"{prefix}.gate_up_proj"] = torch.stack(
            [torch.cat((parts[n, "gate_proj"], parts[n, "up_proj"])) for n in numbers]
        )
        merged[f"{prefix}.down_proj"] = torch.stack([parts[n, "down_proj"] for n in numbers])
    return merged


def load_hf_weights(model: Transformer, weights: Mapping[str, Tensor]) -> Transformer:
    """Copy Hugging Face weights (a state_dict, or a checkpoint's tensors) into model. Every tensor of the model must be
    given and every tensor given must have its place, but for multi-token-prediction layers past the last."""
    if any(name.endswith("weight_scale_inv") for name in weights):
        raise ValueError("weights: got FP8 weights with scales, takes bfloat16, float16 or float32 ones")
    state = {}
    for name, tensor in _merge_experts(weights).items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer.group(1)) >= model.config.layers:
            continue
        state[from_hf_name(name)] = tensor
    if model.config.tie_embeddings and "embedding.weight" in state:
        state.setdefault("head.weight", state["embedding.weight"])
    _load(model, state)
    return model


def hf_weights(model: Transformer) -> dict[str, Tensor]:
    """The model's weights under the names transformers uses in memory; the tensors are shared, not copied."""
    return {to_hf_name(name): tensor for name, tensor in model.state_dict().items()}


def _load(model: Transformer, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = [
        f"{name} is {tuple(state[name].shape)}, takes {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape:", wrong)):
        if names:
            raise ValueError(f"weights: {title} {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
    model.load_state_dict(state)


def from_hf(folder: str | Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """A model from a Hugging Face checkpoint on disk: config.json and *.safetensors."""
    folder = Path(folder)
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"folder: got {folder}, which holds no .safetensors file")
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys()}
    model = Transformer(config)
    if dtype is not None:
        model = model.to(dtype)
    return load_hf_weights(model, weights)


# ---- our own files


def save(model: Transformer, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """One .safetensors file: the weights, with the configuration in its header. A tied head is stored once."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["head.weight"]
    header = {**(metadata or {}), "format": FORMAT, "config": json.dumps(model.config.to_dict())}
    save_file(state, str(path), metadata=header)


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """The model that `save` wrote, in its own dtype or in the one given."""
    with safe_open(str(path), framework="pt") as opened:
        header = opened.metadata() or {}
        if header.get("format") != FORMAT:
            raise ValueError(f"path: got {path}, which `save` did not write (from_hf reads Hugging Face's files)")
        state = {name: opened.get_tensor(name) for name in opened.keys()}
    model = Transformer(ModelConfig.from_dict(json.loads(header["config"])))
    model = model.to(dtype or state["embedding.weight"].dtype)
    if model.config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    _load(model, state)
    return model
