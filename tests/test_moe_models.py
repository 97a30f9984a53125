"""nn.MixtureOfExperts as published models: against transformers' own blocks on the same random weights, forward and gradients.

The rule: our error against their block in float64, beside their block's own error in the dtype. Shapes: N tokens, H hidden.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import thinkernel as tk
import torch
from thinkernel import nn
from thinkernel.ops.dispatch import C
from thinkernel.testing.compare import check
from thinkernel.testing.inputs import Draw
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not hasattr(C, "moe_forward"), reason="the C++ core is not built")
H, INNER, N = 40, 36, 67
EXPERTS = {"router": "gate.weight", "w_gate_up": "experts.gate_up_proj", "w_down": "experts.down_proj"}
BIAS = {"expert_bias": "gate.e_score_correction_bias"}
SHARED = {f"shared.{part}_proj.weight": f"shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")}
SIGMOID: dict[str, Any] = dict(score="sigmoid", expert_bias=True)


@dataclass
class Model:
    """config and block: transformers' classes; values: of the config; ours: MixtureOfExperts' options; names: ours to theirs."""

    config: str
    block: str
    values: dict[str, Any]
    ours: dict[str, Any]
    names: dict[str, str] = field(default_factory=lambda: EXPERTS)
    layer: tuple[int, ...] = ()  # what the block takes beside its config
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)  # bfloat16 where their router is float32, as ours is


BOTH = (torch.float32, torch.bfloat16)
SHARED_ONE = {ours: theirs.replace("shared_experts", "shared_expert") for ours, theirs in SHARED.items()}
LOCAL = dict(intermediate_size=INNER)
DEEPSEEK = dict(
    n_routed_experts=24, num_local_experts=24, num_experts_per_tok=5, moe_intermediate_size=INNER, n_shared_experts=2, n_group=1,
    topk_group=1, norm_topk_prob=True,
)  # fmt: skip
V4 = dict(
    n_routed_experts=12, num_local_experts=12, num_experts_per_tok=4, moe_intermediate_size=INNER, swiglu_limit=1.5,
    routed_scaling_factor=1.5, num_hidden_layers=2, mlp_layer_types=["hash_moe", "moe"], vocab_size=50,
)  # fmt: skip
OUR_V4 = dict(experts=12, top_k=4, score="sqrtsoftplus", scaling=1.5, limit=1.5, shared_experts=1)
MODELS = {
    "mixtral": Model(
        "MixtralConfig", "MixtralSparseMoeBlock", dict(num_local_experts=8, num_experts_per_tok=2, **LOCAL), dict(experts=8, top_k=2)
    ),
    "qwen3_moe": Model(
        "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock",
        dict(num_experts=20, num_experts_per_tok=4, moe_intermediate_size=INNER, norm_topk_prob=True), dict(experts=20, top_k=4),
    ),
    "qwen2_moe": Model(
        "Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock",
        dict(
            num_experts=12, num_experts_per_tok=4, moe_intermediate_size=INNER, shared_expert_intermediate_size=52, norm_topk_prob=False
        ),
        dict(experts=12, top_k=4, renormalize=False, shared_experts=1, shared_dim=52, shared_gate=True),
        EXPERTS | SHARED_ONE | {"shared_gate.weight": "shared_expert_gate.weight"},
    ),
    "deepseek_v3": Model(
        "DeepseekV3Config", "DeepseekV3MoE", DEEPSEEK | dict(n_group=4, topk_group=2, routed_scaling_factor=2.5),
        dict(experts=24, top_k=5, n_group=4, topk_group=2, scaling=2.5, shared_experts=2, **SIGMOID), EXPERTS | BIAS | SHARED, dtypes=BOTH,
    ),
    "kimi_k2": Model(  # DeepSeek-V3's code with one group
        "DeepseekV3Config", "DeepseekV3MoE", DEEPSEEK | dict(routed_scaling_factor=2.827, n_shared_experts=1),
        dict(experts=24, top_k=5, scaling=2.827, shared_experts=1, **SIGMOID), EXPERTS | BIAS | SHARED, dtypes=BOTH,
    ),
    "glm4_moe": Model(
        "Glm4MoeConfig", "Glm4MoeMoE", DEEPSEEK | dict(routed_scaling_factor=1.5),
        dict(experts=24, top_k=5, scaling=1.5, shared_experts=2, **SIGMOID), EXPERTS | BIAS | SHARED, dtypes=BOTH,
    ),
    "deepseek_v2": Model(
        "DeepseekV2Config", "DeepseekV2Moe",
        DEEPSEEK
        | dict(n_group=4, topk_group=2, topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=16.0)
        | dict(num_attention_heads=4),
        dict(experts=24, top_k=5, n_group=4, topk_group=2, group_score="max", renormalize=False, scaling=16.0, shared_experts=2),
        EXPERTS | SHARED, dtypes=BOTH,
    ),
    "qwen3_next": Model(
        "Qwen3NextConfig", "Qwen3NextSparseMoeBlock",
        dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=INNER, shared_expert_intermediate_size=44, norm_topk_prob=True),
        dict(experts=16, top_k=4, shared_experts=1, shared_dim=44, shared_gate=True),
        EXPERTS | SHARED_ONE | {"shared_gate.weight": "shared_expert_gate.weight"},
    ),
    "ernie4_5_moe": Model(
        "Ernie4_5_MoeConfig", "Ernie4_5_MoeSparseMoeBlock",
        dict(moe_num_experts=16, moe_k=4, moe_intermediate_size=INNER, moe_num_shared_experts=2),
        dict(experts=16, top_k=4, expert_bias=True, shared_experts=2),
        EXPERTS | SHARED | {"expert_bias": "gate.moe_statics.e_score_correction_bias"},
    ),
    "nemotron_h": Model(
        "NemotronHConfig", "NemotronHMoE",
        DEEPSEEK | dict(routed_scaling_factor=2.5, moe_shared_expert_intermediate_size=52, mlp_hidden_act="relu2", mlp_bias=False),
        dict(experts=24, top_k=5, scaling=2.5, activation="relu2", shared_experts=1, shared_dim=52, **SIGMOID),
        {"router": "gate.weight", "w_gate_up": "experts.up_proj", "w_down": "experts.down_proj"} | BIAS
        | {f"shared.{part}_proj.weight": f"shared_experts.{part}_proj.weight" for part in ("up", "down")},
    ),
    "minimax": Model(
        "MiniMaxConfig", "MiniMaxSparseMoeBlock", dict(num_local_experts=8, num_experts_per_tok=2, **LOCAL), dict(experts=8, top_k=2)
    ),
    "minimax_m2": Model(
        "MiniMaxM2Config", "MiniMaxM2SparseMoeBlock", dict(num_local_experts=24, num_experts_per_tok=5, **LOCAL),
        dict(experts=24, top_k=5, **SIGMOID), EXPERTS | {"expert_bias": "e_score_correction_bias"},
    ),
    "gpt_oss": Model(
        "GptOssConfig", "GptOssMLP", dict(num_local_experts=12, num_experts_per_tok=4, **LOCAL),
        dict(experts=12, top_k=4, score="softmax_topk", router_bias=True, bias=True, activation="gpt_oss", layout="in_out"),
        {
            "router": "router.weight", "router_bias": "router.bias", "w_gate_up": "experts.gate_up_proj", "w_down": "experts.down_proj",
            "b_gate_up": "experts.gate_up_proj_bias", "b_down": "experts.down_proj_bias",
        },
    ),
    "llama4": Model(
        "Llama4TextConfig", "Llama4TextMoe", dict(num_local_experts=6, num_experts_per_tok=1, intermediate_size_mlp=INNER, **LOCAL),
        dict(experts=6, top_k=1, score="sigmoid_topk", renormalize=False, weight_on="input", layout="in_out", shared_experts=1),
        {"router": "router.weight", "w_gate_up": "experts.gate_up_proj", "w_down": "experts.down_proj"} | SHARED_ONE,
    ),
    "deepseek_v4": Model(
        "DeepseekV4Config", "DeepseekV4SparseMoeBlock", V4, OUR_V4 | dict(expert_bias=True), EXPERTS | BIAS | SHARED, layer=(1,)
    ),
    "deepseek_v4 hash": Model(
        "DeepseekV4Config", "DeepseekV4SparseMoeBlock", V4, OUR_V4 | dict(hash_vocab=50),
        EXPERTS | {"token_experts": "gate.tid2eid"} | SHARED, layer=(0,),
    ),
}  # fmt: skip


def their_block(model: Model) -> torch.nn.Module:
    config = getattr(transformers, model.config)(hidden_size=H, **model.values)
    config._experts_implementation = "eager"
    kind = config.model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    block = getattr(module, model.block)(config, *model.layer).eval()
    draw = Draw(3)
    with torch.no_grad():
        for name, t in [*block.named_parameters(), *block.named_buffers()]:
            if not t.is_floating_point():
                t.copy_(torch.stack([draw.permutation(12)[: t.shape[1]] for _ in t]))
                continue
            turned = name.startswith("experts.") and model.ours.get("layout") == "in_out"
            fan_in = 25 if t.dim() == 1 else t.shape[-2 if turned else -1]
            spread = 2.0 if "gate_up" in name or "up_proj" in name else 1.0  # so that the clamps act
            t.copy_(draw.normal(*t.shape, scale=spread * fan_in**-0.5))
    return block


def our_module(model: Model, block: torch.nn.Module) -> nn.MixtureOfExperts:
    module = nn.MixtureOfExperts(H, INNER, **model.ours)
    theirs = dict(block.state_dict())
    module.load_state_dict({ours: theirs[name].flatten() if ours == "expert_bias" else theirs[name] for ours, name in model.names.items()})
    return module


@contextmanager
def in_float64() -> Iterator[None]:
    """Their blocks ask for float32 by name here and there: in here that is float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def gradients(call: Callable[[Tensor], Any], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = call(x)
    y = y[0] if isinstance(y, tuple) else y
    dy = Draw(8, torch.float32).normal(N, H).to(y.dtype).view(x.shape)
    return [y.detach().view(x.shape), *torch.autograd.grad(y.view(x.shape), [x, *parameters], dy)]


@pytest.mark.parametrize("name, dtype", [(name, dtype) for name, model in MODELS.items() for dtype in model.dtypes], ids=str)
def test_equals_transformers(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]
    block = their_block(model).to(dtype)
    if dtype != torch.float32 and "expert_bias" in model.names:  # float32 in both
        block.gate.e_score_correction_bias = their_block(model).gate.e_score_correction_bias
    module = our_module(model, block).to(dtype)
    learned = [n for n in model.names if n in dict(module.named_parameters())]
    assert set(learned) == set(dict(module.named_parameters()))
    parameters = dict(block.named_parameters())
    assert sum(p.requires_grad for p in parameters.values()) == len(learned)

    x = Draw(4, dtype).normal(1, N, H)
    tokens = Draw(5).integers(0, 50, 1, N, dtype=torch.int64)
    theirs = (lambda b: lambda x: b(x, tokens)) if "hash" in name else (lambda b: b)
    more = dict(tokens=tokens) if "hash" in name else {}
    with tk.use_backend("cpu"):
        ours = gradients(lambda x: module(x, **more), x, [dict(module.named_parameters())[n] for n in learned])
    base = gradients(theirs(block), x, [parameters[model.names[n]] for n in learned])
    block = block.double()
    doubles = dict(block.named_parameters())
    with in_float64():
        ref64 = gradients(theirs(block), x.double(), [doubles[model.names[n]] for n in learned])
    for part, a, b, c in zip(["y", "dx", *learned], ours, ref64, base, strict=True):
        assert b.any(), part
        check(a, b, c.to(a.dtype), name=f"{name} {part}")
