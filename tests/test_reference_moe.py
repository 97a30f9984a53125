"""The MoE and linear references: against transformers' modules, against dense float64 oracles, and by gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkernel.reference import linear as linear_reference
from thinkernel.reference.moe import (
    Routing,
    activate,
    load_balancing_loss,
    moe,
    route,
    router_z_loss,
    sequence_balance_loss,
    update_expert_bias,
)
from torch.autograd import gradcheck

transformers = pytest.importorskip("transformers")

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fill(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter and buffer gets fresh random values; the modules themselves start from zeros or uninitialised."""
    g = generator(seed)
    with torch.no_grad():
        for t in [*module.parameters(), *module.buffers()]:
            t.copy_(torch.randn(t.shape, generator=g, dtype=t.dtype) * (0.5 if t.dim() == 1 else t.shape[-1] ** -0.5))
    return module


def sorted_by_expert(weights: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers leaves the order of the K choices open (sorted=False)."""
    experts, place = experts.long().sort(-1)
    return weights.gather(-1, place), experts


def assert_same_routing(ours: Routing, weights: torch.Tensor, experts: torch.Tensor) -> None:
    mine, theirs = sorted_by_expert(ours.weights, ours.experts), sorted_by_expert(weights, experts)
    assert torch.equal(mine[1], theirs[1])
    torch.testing.assert_close(mine[0], theirs[0].to(mine[0].dtype), rtol=2e-6, atol=1e-7)


# ---- routers of transformers: (config, module, our keyword arguments, the bias buffer's name)


def mixtral_router():
    from transformers.models.mixtral import modeling_mixtral as m

    config = transformers.MixtralConfig(hidden_size=20, num_local_experts=12, num_experts_per_tok=3)
    return m.MixtralTopKRouter(config), dict(top_k=3), None


def qwen3_router(renormalize: bool):
    from transformers.models.qwen3_moe import modeling_qwen3_moe as m

    config = transformers.Qwen3MoeConfig(
        hidden_size=20, num_experts=12, num_experts_per_tok=4, norm_topk_prob=renormalize
    )
    return m.Qwen3MoeTopKRouter(config), dict(top_k=4, renormalize=renormalize), None


def deepseek_v2_router():
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as m

    config = transformers.DeepseekV2Config(
        hidden_size=20, num_attention_heads=4, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2,
        topk_method="group_limited_greedy", routed_scaling_factor=16.0,
    )  # fmt: skip
    ours = dict(top_k=3, n_group=4, topk_group=2, group_score="max", renormalize=False, scaling=16.0)
    return m.DeepseekV2TopkRouter(config), ours, None


def deepseek_v3_router(renormalize: bool, n_group: int):
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m

    topk_group = max(n_group // 2, 1)
    config = transformers.DeepseekV3Config(
        hidden_size=20, n_routed_experts=24, num_experts_per_tok=5, n_group=n_group, topk_group=topk_group,
        norm_topk_prob=renormalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    ours = dict(top_k=5, score="sigmoid", n_group=n_group, topk_group=topk_group, renormalize=renormalize, scaling=2.5)
    return m.DeepseekV3TopkRouter(config), ours, "e_score_correction_bias"


def gpt_oss_router():
    from transformers.models.gpt_oss import modeling_gpt_oss as m

    config = transformers.GptOssConfig(hidden_size=20, num_local_experts=12, num_experts_per_tok=4)
    return m.GptOssTopKRouter(config), dict(top_k=4, score="softmax_topk"), None


def ernie_router():
    from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as m

    config = transformers.Ernie4_5_MoeConfig(hidden_size=20, moe_num_experts=12, moe_k=4)
    return m.Ernie4_5_MoeTopKRouter(config), dict(top_k=4), "moe_statics.e_score_correction_bias"


def deepseek_v4_router():
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as m

    config = transformers.DeepseekV4Config(
        hidden_size=20, n_routed_experts=12, num_local_experts=12, num_experts_per_tok=4, routed_scaling_factor=1.5
    )
    return m.DeepseekV4TopKRouter(config), dict(top_k=4, score="sqrtsoftplus", scaling=1.5), "e_score_correction_bias"


ROUTERS = {
    "mixtral": mixtral_router,
    "qwen3": lambda: qwen3_router(True),
    "qwen3-plain": lambda: qwen3_router(False),
    "deepseek_v2": deepseek_v2_router,
    "deepseek_v3": lambda: deepseek_v3_router(True, 4),
    "deepseek_v3-plain": lambda: deepseek_v3_router(False, 8),
    "one-group": lambda: deepseek_v3_router(True, 1),
    "gpt_oss": gpt_oss_router,
    "ernie": ernie_router,
    "deepseek_v4": deepseek_v4_router,
}


@pytest.mark.parametrize("name", ROUTERS)
def test_router_equals_transformers(name: str) -> None:
    router, ours, bias_name = ROUTERS[name]()
    router = fill(router, seed=1)
    x = torch.randn(157, 20, generator=generator(2))
    logits, weights, experts = router(x)
    logits = logits.detach().requires_grad_()
    bias = None if bias_name is None else router.state_dict()[bias_name]
    got = route(logits, bias=None if bias is None else bias.detach().flatten(), **ours)
    assert_same_routing(got, weights.detach(), experts)

    # The gradient to the router's weight, through their module and through our logits.
    dw = torch.randn(weights.shape, generator=generator(3))
    place = experts.long().argsort(-1)
    (weights.gather(-1, place) * dw).sum().backward()
    theirs = router.weight.grad
    (sorted_by_expert(got.weights, got.experts)[0] * dw).sum().backward()
    torch.testing.assert_close(logits.grad.T @ x, theirs, rtol=1e-4, atol=1e-5)


def test_llama4_router_and_experts() -> None:
    """top-1 of the logits, weight sigmoid on the expert's input, [in, out] weights."""
    from transformers.models.llama4 import modeling_llama4 as m

    config = transformers.Llama4TextConfig(
        hidden_size=20, intermediate_size=28, intermediate_size_mlp=28, num_local_experts=6, num_experts_per_tok=1
    )
    block = fill(m.Llama4TextMoe(config), seed=4)
    x = torch.randn(53, 20, generator=generator(5))
    want, _ = block(x)
    want = want - block.shared_expert(x)
    r = route(F.linear(x, block.router.weight), 1, score="sigmoid_topk", renormalize=False)
    got = moe(
        x, block.experts.gate_up_proj, block.experts.down_proj, r.weights, r.experts, layout="in_out", weight_on="input"
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def experts_of(name: str):
    """-> (module of transformers, our keyword arguments)"""
    if name == "mixtral":
        from transformers.models.mixtral import modeling_mixtral as m

        config = transformers.MixtralConfig(hidden_size=20, intermediate_size=28, num_local_experts=9)
        module, ours = m.MixtralExperts, {}
    elif name == "qwen3":
        from transformers.models.qwen3_moe import modeling_qwen3_moe as m

        config = transformers.Qwen3MoeConfig(hidden_size=20, moe_intermediate_size=28, num_experts=9)
        module, ours = m.Qwen3MoeExperts, {}
    elif name == "deepseek_v3":
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m

        config = transformers.DeepseekV3Config(hidden_size=20, moe_intermediate_size=28, n_routed_experts=9)
        module, ours = m.DeepseekV3Experts, {}
    elif name == "deepseek_v4":
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as m

        config = transformers.DeepseekV4Config(
            hidden_size=20, moe_intermediate_size=28, n_routed_experts=9, num_local_experts=9, swiglu_limit=0.4
        )
        module, ours = m.DeepseekV4Experts, dict(limit=0.4)
    else:
        from transformers.models.gpt_oss import modeling_gpt_oss as m

        config = transformers.GptOssConfig(hidden_size=20, intermediate_size=28, num_local_experts=9)
        module, ours = m.GptOssExperts, dict(activation="gpt_oss", layout="in_out")
    config._experts_implementation = "eager"
    return module(config), ours


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "deepseek_v3", "deepseek_v4", "gpt_oss"])
def test_experts_equal_transformers_forward_and_backward(name: str) -> None:
    module, ours = experts_of(name)
    module = fill(module, seed=6).double()
    g = generator(7)
    x = torch.randn(41, 20, generator=g, dtype=F64) * 3  # large enough that the clamps of gpt_oss and V4 act
    experts = torch.rand(41, 9, generator=g)[:, :8].topk(4).indices  # expert 8 gets nothing
    weights = torch.rand(41, 4, generator=g, dtype=F64)
    dy = torch.randn(41, 20, generator=g, dtype=F64)
    biases = {}
    if name == "gpt_oss":
        biases = dict(b_gate_up=module.gate_up_proj_bias, b_down=module.down_proj_bias)
    parameters = [module.gate_up_proj, module.down_proj, *biases.values()]

    def gradients(forward):
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = forward(*inputs)
        return [y.detach(), *torch.autograd.grad((y * dy).sum(), inputs + parameters)]

    want = gradients(lambda x, w: module(x, experts, w))
    got = gradients(lambda x, w: moe(x, parameters[0], parameters[1], w, experts.int(), **ours, **biases))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert got[3][8].abs().max() == 0  # no tokens: gradient exactly 0


def dense_moe(x, w_gate_up, w_down, weights, experts, *, weight_on="output", b_gate_up=None, b_down=None, act=None):
    """Every token through every expert, weighted by a dense [N, E] matrix that is 0 where not chosen; out_in layout."""
    n_expert = w_gate_up.shape[0]
    own = F.one_hot(experts.long().clamp(0, n_expert), n_expert + 1)[..., :n_expert].to(x.dtype)  # [N, K, E]
    out = 0
    for k in range(experts.shape[1]):
        w = own[:, k] * weights[:, k : k + 1]  # [N, E]
        inputs = x[:, None] * (w if weight_on == "input" else torch.ones_like(w))[..., None]  # [N, E, H]
        z = torch.einsum("neh,eih->nei", inputs, w_gate_up)
        z = z if b_gate_up is None else z + b_gate_up
        y = torch.einsum("nei,ehi->neh", act(z), w_down)
        y = y if b_down is None else y + b_down
        out = out + torch.einsum("neh,ne->nh", y, own[:, k] if weight_on == "input" else w)
    return out


def problem(seed: int, n: int, h: int, i: int, e: int, k: int, columns: int = 2, dtype=F64):
    g = generator(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=dtype)
    experts = torch.rand(n, e, generator=g).argsort(-1)[:, :k].int()
    return dict(
        x=draw(n, h), w_gate_up=draw(e, columns * i, h) * h**-0.5, w_down=draw(e, h, i) * i**-0.5,
        weights=torch.rand(n, k, generator=g, dtype=dtype), experts=experts,
        b_gate_up=draw(e, columns * i), b_down=draw(e, h),
    )  # fmt: skip


def gpt_oss_by_hand(z):
    g, u = z[..., 0::2].clip(max=7), z[..., 1::2].clip(-7, 7)
    return (u + 1) * g / (1 + (-1.702 * g).exp())


def halves(act):
    """act(gate) * up, on a [gate | up] pre-activation."""
    return lambda z: act(z[..., : z.shape[-1] // 2]) * z[..., z.shape[-1] // 2 :]


ORACLE_ACTIVATIONS = {
    "swiglu": halves(lambda g: g / (1 + (-g).exp())),
    "geglu": halves(lambda g: 0.5 * g * (1 + torch.erf(g / math.sqrt(2)))),
    "relu2": lambda z: torch.where(z > 0, z * z, 0),
    "gpt_oss": gpt_oss_by_hand,
}


@pytest.mark.parametrize("activation", ORACLE_ACTIVATIONS)
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_moe_equals_dense_oracle(activation: str, weight_on: str) -> None:
    p = problem(8, n=19, h=7, i=5, e=6, k=3, columns=1 if activation == "relu2" else 2)
    p["experts"][0] = torch.tensor([6, 9, 2])  # ids beyond E are another rank's
    p["experts"][1] = torch.tensor([-1, 6, 7])
    for_oracle = {**p, "experts": p["experts"].masked_fill(p["experts"] < 0, 6)}
    want = dense_moe(**for_oracle, act=ORACLE_ACTIVATIONS[activation], weight_on=weight_on)
    got = moe(**p, activation=activation, weight_on=weight_on)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert got[1].abs().max() == 0
    turned = {**p, "w_gate_up": p["w_gate_up"].transpose(1, 2), "w_down": p["w_down"].transpose(1, 2)}
    torch.testing.assert_close(moe(**turned, activation=activation, weight_on=weight_on, layout="in_out"), got)


def test_expert_parallel_shards_sum_to_the_whole() -> None:
    p = problem(9, n=23, h=6, i=4, e=8, k=3)
    whole = moe(**p)
    parts = 0
    for first in (0, 4):
        mine = slice(first, first + 4)
        shard = {k: p[k][mine] for k in ("w_gate_up", "w_down", "b_gate_up", "b_down")}
        parts = parts + moe(p["x"], weights=p["weights"], experts=p["experts"] - first, **shard)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["swiglu", "gpt_oss", "geglu_tanh", "relu2"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_moe_gradcheck(activation: str, weight_on: str) -> None:
    p = problem(10, n=5, h=3, i=2, e=4, k=2, columns=1 if activation == "relu2" else 2)
    p["experts"][0] = torch.tensor([4, 1])
    names = [n for n in p if n != "experts"]
    inputs = [p[n].requires_grad_() for n in names]
    call = lambda *t: moe(
        experts=p["experts"], activation=activation, weight_on=weight_on, limit=1.5 if activation == "swiglu" else None,
        **dict(zip(names, t)),
    )  # fmt: skip
    assert gradcheck(call, inputs)
    (call(*inputs)).sum().backward()
    assert p["weights"].grad[0, 0] == 0  # the foreign slot
    assert p["weights"].grad[0, 1] != 0


def test_clamped_entries_get_no_gradient() -> None:
    z = torch.tensor([[9.0, 2.0, 1.0, -12.0]], dtype=F64, requires_grad=True)  # gate 9, up 2; gate 1, up -12
    activate(z, "gpt_oss").sum().backward()
    assert z.grad[0, 0] == 0 and z.grad[0, 3] == 0 and z.grad[0, 1] != 0 and z.grad[0, 2] != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_float32_rounded_once(dtype: torch.dtype) -> None:
    p = problem(11, n=13, h=8, i=6, e=5, k=2, dtype=torch.float32)
    low = {k: v if k in ("experts", "weights") else v.to(dtype) for k, v in p.items()}
    got = moe(**low)
    assert got.dtype == dtype
    assert torch.equal(got, moe(**{k: v.float() if v.is_floating_point() else v for k, v in low.items()}).to(dtype))
    r = route(p["x"].to(dtype), 3)
    assert r.weights.dtype == torch.float32 and r.experts.dtype == r.counts.dtype == r.order.dtype == torch.int32
    assert torch.equal(r.weights, route(p["x"].to(dtype).float(), 3).weights)


def test_moe_row_bits_do_not_depend_on_dead_slots_or_run() -> None:
    p = problem(12, n=64, h=16, i=8, e=4, k=2, dtype=torch.float32)
    inputs = [p[n].requires_grad_() for n in ("x", "w_gate_up", "w_down", "weights")]
    runs = []
    for _ in range(2):
        y = moe(*inputs, p["experts"])
        runs.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for a, b in zip(*runs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0,), (2, 3)])
def test_moe_leading_dimensions_and_empty(shape: tuple[int, ...]) -> None:
    n = math.prod(shape)
    p = problem(13, n=n, h=4, i=3, e=5, k=2)
    w = [p[k].requires_grad_() for k in ("w_gate_up", "w_down")]
    y = moe(p["x"].view(*shape, 4), *w, p["weights"].view(*shape, 2), p["experts"].view(*shape, 2))
    assert y.shape == (*shape, 4)
    torch.testing.assert_close(y.reshape(-1, 4), moe(p["x"], *w, p["weights"], p["experts"]))
    y.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in w)


# ---- routing


def test_routing_tables() -> None:
    """counts, order, offsets describe the slots; order is stable."""
    z = torch.randn(50, 7, generator=generator(14))
    r = route(z, 3)
    flat = r.experts.flatten().tolist()
    assert r.counts.tolist() == [flat.count(e) for e in range(7)]
    assert r.offsets.tolist() == [sum(r.counts[:e].tolist()) for e in range(8)]
    assert r.order.tolist() == sorted(range(150), key=lambda slot: (flat[slot], slot))
    assert route(z[:0], 3).offsets.tolist() == [0] * 8
    assert (route(z, 7).counts == 50).all()


@given(seed=st.integers(0, 10**6), e=st.integers(1, 9), k=st.integers(1, 9), levels=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_ties_go_to_the_lower_index(seed: int, e: int, k: int, levels: int) -> None:
    k = min(k, e)
    z = torch.randint(levels, (5, e), generator=generator(seed)).float()
    z[z == 0] *= -1  # -0.0 and 0.0 are equal
    z[:, ::2] += 0.0
    for score in ("softmax", "softmax_topk", "sigmoid", "sigmoid_topk", "sqrtsoftplus"):
        got = route(z, k, score=score).experts.tolist()
        for row, choice in zip(z.tolist(), got):
            assert choice == sorted(range(e), key=lambda j: (-row[j], j))[:k]


def brute_force_choice(z, bias, top_k, n_group, topk_group, group_score):
    """DeepSeek's grouped selection with Python lists, on sigmoid scores."""
    rows = []
    for scores in (z.sigmoid() + bias).tolist():
        size = len(scores) // n_group
        groups = [scores[j * size : (j + 1) * size] for j in range(n_group)]
        rank = [max(g) if group_score == "max" else sum(sorted(g)[-2:]) for g in groups]
        kept = sorted(range(n_group), key=lambda j: (-rank[j], j))[:topk_group]
        allowed = [j for j in range(len(scores)) if j // size in kept]
        rows.append(sorted(allowed, key=lambda j: (-scores[j], j))[:top_k])
    return rows


@given(
    seed=st.integers(0, 10**6), n_group=st.integers(2, 4), size=st.integers(1, 4), kept=st.integers(1, 4),
    group_score=st.sampled_from(["max", "top2"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_groups_equal_brute_force_with_negative_biases(seed, n_group, size, kept, group_score) -> None:
    """With all biases far below 0 a dropped group filled with 0 would win: it must be -inf."""
    kept = min(kept, n_group)
    g = generator(seed)
    z = torch.randn(6, n_group * size, generator=g, dtype=F64)
    bias = torch.randn(n_group * size, generator=g, dtype=F64) - 5
    top_k = max(kept * size - 1, 1)
    r = route(
        z, top_k, score="sigmoid", bias=bias, n_group=n_group, topk_group=kept, group_score=group_score,
        renormalize=False,
    )  # fmt: skip
    assert r.experts.tolist() == brute_force_choice(z, bias, top_k, n_group, kept, group_score)
    assert torch.equal(r.weights, z.sigmoid().gather(-1, r.experts.long()))  # biases select, they never weigh


def test_bias_moves_the_choice_and_gets_no_gradient() -> None:
    z = torch.randn(20, 8, generator=generator(15), dtype=F64, requires_grad=True)
    bias = torch.zeros(8, dtype=F64, requires_grad=True)
    with torch.no_grad():
        bias[5] = 10
    r = route(z, 2, score="sigmoid", bias=bias)
    assert (r.experts[:, 0] == 5).all()
    r.weights[:, 0].sum().backward()
    assert bias.grad is None


ROUTE_RULES = [
    dict(score="softmax"), dict(score="softmax", renormalize=False), dict(score="softmax_topk"),
    dict(score="sigmoid", scaling=2.5), dict(score="sigmoid", renormalize=False),
    dict(score="sigmoid_topk", renormalize=False), dict(score="sqrtsoftplus", scaling=1.5),
    dict(score="sqrtsoftplus", renormalize=False),
]  # fmt: skip


@pytest.mark.parametrize("rule", ROUTE_RULES, ids=lambda r: "-".join(map(str, r.values())))
def test_route_gradcheck_and_replay(rule: dict) -> None:
    z = (torch.randn(4, 6, generator=generator(16), dtype=F64) * 3).requires_grad_()
    r = route(z, 3, **rule)
    assert gradcheck(lambda z: route(z, 3, experts=r.experts, **rule).weights, [z])
    # Replayed with other live scores: the given experts, the live weights.
    live = torch.randn(4, 6, generator=generator(17), dtype=F64)
    replay = route(live, 3, experts=r.experts, **rule)
    assert torch.equal(replay.experts, r.experts)
    full = route(live, 6, **rule)  # all experts of the live scores
    mine = torch.zeros_like(live).scatter(-1, full.experts.long(), full.weights).gather(-1, r.experts.long())
    if rule.get("renormalize", True):
        mine = mine / mine.sum(-1, keepdim=True) * rule.get("scaling", 1.0)
    torch.testing.assert_close(replay.weights, mine, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sqrtsoftplus_far_to_the_left(dtype: torch.dtype) -> None:
    """Below -104 float32's softplus is 0 and the plain derivative 0/0."""
    z = torch.tensor([[-150.0, -104.5, -36.0, -34.0, -16.0, -14.0, 0.0, 25.0]], dtype=dtype, requires_grad=True)
    r = route(z, 8, score="sqrtsoftplus", renormalize=False)
    value = r.weights.gather(-1, r.experts.long().argsort(-1))
    (grad,) = torch.autograd.grad(value.sum(), z)
    exact = z.detach().double()
    # log1p keeps what log(1 + e^z) loses; sigmoid(z) / (2 s) is finite in float64 at all of these.
    s = exact.exp().log1p().sqrt()
    tolerance = dict(rtol=1e-6, atol=0) if dtype == torch.float32 else dict(rtol=1e-14, atol=0)
    torch.testing.assert_close(value.double(), s, **tolerance)
    torch.testing.assert_close(grad.double(), exact.sigmoid() / (2 * s), **tolerance)


def test_renormalised_softmax_survives_underflow_in_replay() -> None:
    """Replayed experts whose probability underflows: p/Σp would be 0/0."""
    z = torch.tensor([[200.0, 0.0, 1.0, -5.0]])
    w = route(z, 2, experts=torch.tensor([[1, 2]])).weights
    torch.testing.assert_close(w, torch.tensor([[0.0, 1.0]]).softmax(-1))


def test_no_limit_on_the_number_of_experts() -> None:
    z = torch.randn(9, 896, generator=generator(18), dtype=F64)
    r = route(z, 8, score="sigmoid", bias=torch.zeros(896), n_group=8, topk_group=4)  # 112 experts a group
    assert r.experts.tolist() == brute_force_choice(z, torch.zeros(896), 8, 8, 4, "top2")


def test_nan_stays_in_its_row() -> None:
    z = torch.randn(4, 6, generator=generator(19))
    z[1, 2] = torch.nan
    for score in ("softmax", "sigmoid"):
        r, clean = route(z, 3, score=score), route(z[[0, 2, 3]], 3, score=score)
        assert r.weights[1].isnan().any()
        assert torch.equal(r.weights[[0, 2, 3]], clean.weights) and torch.equal(r.experts[[0, 2, 3]], clean.experts)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: route(torch.zeros(2, 4), 2, score="tanh"), "score"),
        (lambda: route(torch.zeros(2, 4), 2, n_group=2, topk_group=1, group_score="mean"), "group_score"),
        (lambda: route(torch.zeros(2, 4), 3, n_group=2, topk_group=1), "top_k"),
        (lambda: moe(**problem(1, 2, 3, 2, 2, 1), activation="tanh"), "activation"),
        (lambda: moe(**problem(1, 2, 3, 2, 2, 1), weight_on="both"), "weight_on"),
        (lambda: moe(**problem(1, 2, 3, 2, 2, 1), layout="out"), "layout"),
        (lambda: load_balancing_loss(torch.zeros(2, 4), torch.ones(4), normalize="two"), "normalize"),
    ],
)
def test_bad_arguments_are_named(call, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        call()


# ---- losses


def test_load_balancing_loss_equals_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    z = torch.randn(73, 10, generator=generator(20), requires_grad=True)
    want = load_balancing_loss_func((z,), num_experts=10, top_k=3)
    r = route(z, 3)
    got = load_balancing_loss(z.softmax(-1), r.counts, normalize="top_k")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(load_balancing_loss(z.softmax(-1), r.counts), want / 3, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(t, z)[0] for t in (got, want)), rtol=1e-5, atol=1e-8)


def test_balanced_load_gives_one_and_k() -> None:
    probs, counts = torch.full((12, 6), 1 / 6, dtype=F64), torch.full((6,), 4)  # T = 12, K = 2
    assert load_balancing_loss(probs, counts).item() == pytest.approx(1, abs=1e-12)
    assert load_balancing_loss(probs, counts, normalize="top_k").item() == pytest.approx(2, abs=1e-12)
    assert load_balancing_loss(probs[:0], counts * 0).item() == 0


def test_losses_gradcheck() -> None:
    z = torch.randn(7, 5, generator=generator(21), dtype=F64, requires_grad=True)
    r, cu = route(z, 2, score="sigmoid"), torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    assert gradcheck(lambda z: load_balancing_loss(z.softmax(-1), r.counts), [z])
    assert gradcheck(router_z_loss, [z])
    assert gradcheck(lambda z: sequence_balance_loss(z.sigmoid(), r.experts, cu), [z])
    want = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in z.tolist()) / 7
    assert router_z_loss(z).item() == pytest.approx(want, rel=1e-12)


def test_sequence_balance_loss_by_the_paper() -> None:
    """Per sequence of T tokens: Σ_e f_e·P_e, f_e = E/(K·T)·count_e, P_e = mean_t s_te/Σs; mean over sequences."""
    z = torch.randn(9, 6, generator=generator(22), dtype=F64)
    r = route(z, 2, score="sigmoid")
    total = 0.0
    for start, end in ((0, 4), (4, 4), (4, 9)):
        s = z[start:end].sigmoid().tolist()
        chosen = r.experts[start:end].flatten().tolist()
        for e in range(6):
            if s:
                f = 6 / (2 * len(s)) * chosen.count(e)
                total += f * sum(row[e] / sum(row) for row in s) / len(s)
    got = sequence_balance_loss(z.sigmoid(), r.experts, torch.tensor([0, 4, 4, 9]))
    assert got.item() == pytest.approx(total / 3, rel=1e-12)


def test_update_expert_bias_moves_towards_balance() -> None:
    bias = torch.zeros(4)
    assert update_expert_bias(bias, torch.tensor([10, 2, 6, 6]), rate=0.5) is None
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    z = torch.randn(512, 8, generator=generator(23)) + torch.linspace(-1, 1, 8)
    bias = torch.zeros(8)
    spread = lambda: route(z, 2, score="sigmoid", bias=bias).counts.float().std().item()
    before = spread()
    for _ in range(300):
        update_expert_bias(bias, route(z, 2, score="sigmoid", bias=bias).counts, rate=2e-3)
    assert spread() < before / 10


# ---- linear


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
def test_linear_equals_torch(shape: tuple[int, ...]) -> None:
    g = generator(24)
    x, w, b = (torch.randn(s, generator=g, dtype=F64, requires_grad=True) for s in ((*shape, 7), (3, 7), (3,)))
    torch.testing.assert_close(linear_reference.linear(x, w, b), F.linear(x, w, b), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(linear_reference.linear(x, w), F.linear(x, w), rtol=1e-13, atol=1e-13)
    assert gradcheck(linear_reference.linear, [x, w, b])


def test_linear_low_precision_is_float32_rounded_once() -> None:
    g = generator(25)
    x, w = torch.randn(9, 65, generator=g).bfloat16(), torch.randn(4, 65, generator=g).bfloat16()
    got = linear_reference.linear(x, w)
    assert got.dtype == torch.bfloat16 and torch.equal(got, (x.float() @ w.float().T).bfloat16())
