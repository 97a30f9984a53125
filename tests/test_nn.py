"""The modules on their own, as somebody drops them into a model: against plain torch, gradients, caches, errors.

Shapes: B batch, S tokens, H heads, D head dim, E experts.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from thinkernel import nn
from thinkernel.nn.activation import silu
from thinkernel.nn.cache import append_rows
from thinkernel.nn.linear import linear_per_head
from thinkernel.nn.rope import inverse_frequencies, rotate
from thinkernel.reference import moe as moe_reference
from thinkernel.testing.compare import assert_bitwise

HIDDEN = 40


def rope_for(dim: int, batch: int, size: int, start: int = 0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return nn.RotaryEmbedding(dim, **options)(torch.arange(start, start + size).expand(batch, size))


def randomize(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5)


def build(kind: str, **options) -> torch.nn.Module:
    torch.manual_seed(21)
    latent = dict(kv_latent=24, q_latent=20, nope_dim=12, rope_dim=8, value_dim=10)
    module = {
        "gqa": lambda: nn.GroupedQueryAttention(HIDDEN, 6, 2, 8, qk_norm=True, **options),
        "mla": lambda: nn.MultiHeadLatentAttention(HIDDEN, 3, **{**latent, **options}),
        "dsa": lambda: nn.SparseLatentAttention(
            HIDDEN, 3, **{**latent, "top_k": 7, "indexer_heads": 4, "indexer_dim": 12, **options}
        ),
    }[kind]()
    randomize(module)
    return module


# ---- rotary embedding


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_the_complex_product(interleaved: bool) -> None:
    x = torch.randn(2, 9, 3, 12, dtype=torch.float64)
    cos, sin = rope_for(12, 2, 9, start=5, theta=100.0)
    angle = torch.arange(5, 14)[:, None] * 100.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)  # [S, 6]
    pairs = x.unflatten(-1, (6, 2)) if interleaved else x.unflatten(-1, (2, 6)).mT
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # [S, 1, 6]
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    expected = turned.flatten(-2) if interleaved else turned.mT.flatten(-2)
    torch.testing.assert_close(rotate(x, (cos, sin), interleaved=interleaved), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_products_depend_on_the_distance_alone(interleaved: bool) -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)
    products = []
    for start in (0, 7, 100):
        a = rotate(q, rope_for(16, 1, 1, start + 3), interleaved=interleaved)
        b = rotate(k, rope_for(16, 1, 1, start), interleaved=interleaved)
        products.append((a * b).sum().item())
    assert products == pytest.approx([products[0]] * 3, rel=1e-4, abs=1e-4)


def test_yarn_scales() -> None:
    yarn = nn.Yarn(factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0)
    assert yarn.cos_sin_factor == 1.0
    assert yarn.softmax_factor == pytest.approx((0.1 * 3.6888794541139363 + 1) ** 2)
    assert nn.Yarn(factor=40.0, original_max_positions=4096).softmax_factor == 1.0
    assert nn.Yarn(factor=40.0, original_max_positions=4096).cos_sin_factor == pytest.approx(1.36888794541139363)
    assert nn.Yarn(factor=0.5, original_max_positions=64, mscale_all_dim=1.0).softmax_factor == 1.0
    assert nn.Yarn(factor=4.0, original_max_positions=64, attention_factor=0.25).cos_sin_factor == 0.25
    plain, slowed = inverse_frequencies(64, 10000.0), inverse_frequencies(64, 10000.0, yarn)
    assert slowed[0] == plain[0] and slowed[-1] == pytest.approx(plain[-1].item() / 40)
    with pytest.raises(ValueError, match="^dim: got 7"):
        nn.RotaryEmbedding(7)


# ---- attention modules


def test_grouped_query_attention_is_sdpa() -> None:
    module = build("gqa")
    x = torch.randn(2, 19, HIDDEN)
    rope = rope_for(8, 2, 19)
    heads = []
    for projection, norm in ((module.q_proj, module.q_norm), (module.k_proj, module.k_norm), (module.v_proj, None)):
        t = F.linear(x, projection.weight).unflatten(-1, (-1, 8))
        heads.append((t if norm is None else rotate(norm(t), rope, interleaved=False)).transpose(1, 2))
    out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    expected = F.linear(out.transpose(1, 2).flatten(-2), module.o_proj.weight)
    torch.testing.assert_close(module(x, rope), expected, rtol=1e-4, atol=1e-5)


def test_sinks_softcap_and_window_are_passed_on() -> None:
    x = torch.randn(1, 15, HIDDEN)
    plain = build("gqa")
    expected = plain(x)
    for options in (dict(sinks=True), dict(softcap=0.5), dict(window=(3, 0)), dict(scale=0.9)):
        module = build("gqa", **options)
        module.load_state_dict(plain.state_dict(), strict=False)
        assert (module(x) - expected).abs().max() > 1e-3, options


@pytest.mark.parametrize("kind", ["gqa", "mla", "dsa"])
def test_cache_is_the_whole(kind: str) -> None:
    module, x = build(kind), torch.randn(2, 20, HIDDEN)
    dim = 8
    expected = module(x, rope_for(dim, 2, 20))
    cache = module.new_cache(2, 25, dtype=x.dtype, device="cpu")
    for tensor in cache:
        tensor.fill_(torch.nan)  # what was never written is never read
    parts, start = [], 0
    for size in (9, 1, 1, 4, 5):
        step = nn.CacheStep(torch.full((2,), start + size, dtype=torch.int32), start + size, fresh=start == 0)
        parts.append(module(x[:, start : start + size], rope_for(dim, 2, size, start), cache=cache, step=step))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gqa", "mla", "dsa"])
@pytest.mark.parametrize("size", [1, 6, 20])
def test_attention_gradients_flow(kind: str, size: int) -> None:
    module, x = build(kind), torch.randn(2, size, HIDDEN, requires_grad=True)
    module(x, rope_for(8, 2, size)).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    for name, parameter in module.named_parameters():
        if "indexer" in name:
            assert parameter.grad is None, name  # the selection has no gradient
        elif size > 1:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("sparse", [True, False])
def test_indexer_learns_from_its_own_loss_alone(sparse: bool) -> None:
    module = build("dsa")
    x = torch.randn(2, 20, HIDDEN, requires_grad=True)
    out, loss = module(x, rope_for(8, 2, 20), sparse=sparse, return_indexer_loss=True)
    assert loss.shape == (2, 20) and (loss > -1e-6).all() and loss[:, 0].abs().max() < 1e-6  # one key: nothing to learn
    torch.testing.assert_close(out, module(x, rope_for(8, 2, 20), sparse=sparse))
    loss.sum().backward()
    assert x.grad is None
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == ("indexer" in name), name


def test_indexer_loss_falls_by_training() -> None:
    """Some steps on one batch must move the indexer towards the main attention."""
    module, x, rope = build("dsa"), torch.randn(4, 24, HIDDEN), rope_for(8, 4, 24)
    optimizer = torch.optim.Adam(module.indexer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = module(x, rope, sparse=False, return_indexer_loss=True)[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_attention_errors_are_named() -> None:
    with pytest.raises(ValueError, match="^kv_heads: got 4"):
        nn.GroupedQueryAttention(HIDDEN, 6, 4)
    with pytest.raises(ValueError, match="^q_latent: got None"):
        build("dsa", q_latent=None)
    with pytest.raises(ValueError, match="^top_k: got 0"):
        build("dsa", top_k=0)
    with pytest.raises(ValueError, match="^dim: got 4"):
        build("dsa", indexer_dim=4)
    with pytest.raises(ValueError, match="^key_start: "):
        build("dsa")(torch.randn(1, 3, HIDDEN), rope_for(8, 1, 3), key_start=torch.zeros(1, dtype=torch.int32))
    module = build("gqa")
    cache = module.new_cache(1, 8, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="^step: got None"):
        module(torch.randn(1, 3, HIDDEN), cache=cache)


def test_append_rows_writes_each_row_at_its_own_place() -> None:
    cache = torch.zeros(3, 8, 2)
    new = torch.arange(12, dtype=torch.float32).view(3, 2, 2) + 1
    append_rows(cache, new, nn.CacheStep(torch.tensor([2, 8, 5], dtype=torch.int32), 8, fresh=False))
    expected = torch.zeros(3, 8, 2)
    for row, start in enumerate((0, 6, 3)):
        expected[row, start : start + 2] = new[row]
    assert torch.equal(cache, expected)


# ---- linear, feed-forward, experts


def test_linear_is_linear() -> None:
    module = nn.Linear(13, 7)
    x = torch.randn(3, 5, 13, requires_grad=True)
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), rtol=1e-5, atol=1e-6)
    weight = torch.randn(4, 6, 13)
    heads = torch.randn(2, 3, 4, 13)
    torch.testing.assert_close(
        linear_per_head(heads, weight), torch.einsum("bshi,hoi->bsho", heads, weight), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_silu_is_torchs_with_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    extremes = torch.tensor([0.0, -0.0, -1e4, 1e4, -90.0, 90.0, torch.inf, torch.nan])
    x = torch.cat((4 * torch.randn(92), extremes)).to(dtype).view(5, 20)
    torch.testing.assert_close(silu(x), F.silu(x), equal_nan=True)
    assert silu(torch.tensor(-torch.inf)).isnan() == F.silu(torch.tensor(-torch.inf)).isnan()
    x = torch.randn(201, 37).to(dtype)
    whole = silu(x)
    assert all(torch.equal(silu(x[row]), whole[row]) for row in range(201))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    silu(a).square().sum().backward()
    F.silu(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("score, bias, shared", [("softmax", False, 0), ("sigmoid", True, 2)])
def test_mixture_of_experts_is_the_sum_over_experts(score: str, bias: bool, shared: int) -> None:
    torch.manual_seed(4)
    module = nn.MixtureOfExperts(
        HIDDEN, 12, 8, 3, score=score, expert_bias=bias, shared_experts=shared, n_group=4, topk_group=2, scaling=1.3
    )
    if bias:
        module.expert_bias.normal_()
    x = torch.randn(2, 9, HIDDEN)
    routing = moe_reference.route(
        x.flatten(0, 1) @ module.router.T, 3, score=score, bias=module.expert_bias, n_group=4, topk_group=2, scaling=1.3
    )
    expected = torch.zeros(18, HIDDEN)
    for n, token in enumerate(x.flatten(0, 1)):
        for weight, e in zip(routing.weights[n], routing.experts[n].tolist(), strict=True):
            gate, up = (module.w_gate_up[e] @ token).chunk(2)
            expected[n] += weight * (module.w_down[e] @ (F.silu(gate) * up))
    expected = expected.view_as(x)
    if shared:
        assert module.shared.gate_proj.weight.shape == (24, HIDDEN)
        expected = expected + module.shared(x)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_experts_leave_padding_out() -> None:
    torch.manual_seed(6)
    module = nn.MixtureOfExperts(HIDDEN, 12, 8, 2)
    x, valid = torch.randn(2, 9, HIDDEN), torch.rand(2, 9) < 0.6
    out, losses = module(x, valid=valid, return_losses=True)
    torch.testing.assert_close(out[valid], module(x)[valid])
    assert not out[~valid].any()
    assert losses.counts.sum() == 2 * valid.sum()
    alone, alone_losses = module(x[valid], return_losses=True)
    torch.testing.assert_close(alone_losses.balance, losses.balance)
    nothing = module(x, valid=torch.zeros_like(valid))
    assert not nothing.any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balance_loss_is_one_when_balanced_and_spreads_the_load(score: str) -> None:
    torch.manual_seed(8)
    even = nn.MixtureOfExperts(HIDDEN, 4, 8, 2, score=score)
    torch.nn.init.zeros_(even.router)
    assert even(torch.randn(64, HIDDEN), return_losses=True)[1].balance.item() == pytest.approx(1, abs=1e-5)
    module = nn.MixtureOfExperts(HIDDEN, 4, 8, 2, score=score)
    with torch.no_grad():
        module.router[0] += 0.5  # together with the tokens' mean below: expert 0 is everybody's choice
    x = torch.randn(512, HIDDEN) + 0.5
    _, first = module(x, return_losses=True)
    assert first.balance > 1.05
    optimizer = torch.optim.Adam([module.router], lr=0.02)
    for _ in range(60):
        _, losses = module(x, return_losses=True)
        optimizer.zero_grad()
        losses.balance.backward()
        optimizer.step()
    assert abs(losses.balance - 1) < (first.balance - 1) / 3
    assert losses.counts.max() < first.counts.max() / 1.5


def test_selection_bias_moves_towards_balance_without_gradient() -> None:
    torch.manual_seed(9)
    module = nn.MixtureOfExperts(HIDDEN, 4, 8, 2, score="sigmoid", expert_bias=True)
    x = torch.randn(512, HIDDEN) + 0.5
    _, first = module(x, return_losses=True)
    for _ in range(100):
        _, losses = module(x, return_losses=True)
        module.update_bias(losses.counts, rate=1e-2)
    assert losses.counts.max() - losses.counts.min() < (first.counts.max() - first.counts.min()) / 2
    assert not module.expert_bias.requires_grad
    with pytest.raises(ValueError, match="^expert_bias: "):
        nn.MixtureOfExperts(HIDDEN, 4, 8, 2).update_bias(losses.counts)


def test_expert_gradients_flow() -> None:
    torch.manual_seed(10)
    module = nn.MixtureOfExperts(HIDDEN, 12, 4, 2, score="sigmoid", expert_bias=True, shared_experts=1)
    x = torch.randn(30, HIDDEN, requires_grad=True)
    module(x).square().sum().backward()
    for name, tensor in [("x", x), *module.named_parameters()]:
        assert tensor.grad.isfinite().all() and tensor.grad.any(), name


OPTIONS: dict[str, dict] = {
    "gpt-oss": dict(score="softmax_topk", router_bias=True, bias=True, activation="gpt_oss", layout="in_out"),
    "llama 4": dict(score="sigmoid_topk", renormalize=False, weight_on="input", layout="in_out", shared_experts=1),
    "gated, clamped": dict(score="sqrtsoftplus", expert_bias=True, limit=0.7, shared_experts=2, shared_dim=10, shared_gate=True),
    "geglu": dict(activation="geglu_tanh", shared_experts=1, limit=0.5),
    "relu2": dict(activation="relu2", shared_experts=1, bias=True, balance="top_k"),
    "hash": dict(score="sqrtsoftplus", hash_vocab=31, balance="sequence"),
}  # fmt: skip


def filled(name: str) -> nn.MixtureOfExperts:
    torch.manual_seed(15)
    module = nn.MixtureOfExperts(HIDDEN, 12, 8, 3, **OPTIONS[name])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=1.0 if parameter.ndim == 1 else HIDDEN**-0.5)
        if module.expert_bias is not None:
            module.expert_bias.normal_(std=0.1)
    return module


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_experts(name: str) -> None:
    """Every option reaches the computation; a token's bits are its own; the weights load again."""
    module = filled(name)
    x, tokens = torch.randn(4, 7, HIDDEN), torch.randint(31, (4, 7))
    more = dict(tokens=tokens) if name == "hash" else {}
    y, losses = module(x, **more, return_losses=True, return_experts=True)
    flat, o = x.flatten(0, 1).double(), OPTIONS[name]
    d = {n: t.double() if t.is_floating_point() else t for n, t in module.state_dict().items()}
    logits = flat @ d["router"].T + d.get("router_bias", 0)
    rule = dict(score=module.score, renormalize=module.renormalize, bias=d.get("expert_bias"))
    chosen = d["token_experts"][tokens.flatten()] if name == "hash" else None
    r = moe_reference.route(logits, 3, **rule, experts=chosen)
    assert torch.equal(losses.experts.flatten(0, 1).int(), r.experts)
    keys = ("activation", "limit", "weight_on", "layout")
    biases = {n: d.get(n) for n in ("b_gate_up", "b_down")}
    want = moe_reference.moe(flat, d["w_gate_up"], d["w_down"], r.weights, r.experts, **{n: o[n] for n in keys if n in o}, **biases)
    if module.shared is not None:
        up = flat @ d["shared.up_proj.weight"].T
        z = up if module.activation == "relu2" else torch.cat((flat @ d["shared.gate_proj.weight"].T, up), -1)
        out = moe_reference.activate(z, module.activation, module.limit) @ d["shared.down_proj.weight"].T
        want = want + out * (torch.sigmoid(flat @ d["shared_gate.weight"].T) if "shared_gate" in o else 1)
    torch.testing.assert_close(y.flatten(0, 1).double(), want, rtol=1e-4, atol=1e-5)
    for b, s in ((0, 0), (2, 5)):
        alone = module(x[b, s][None], **{n: t[b, s][None] for n, t in more.items()})
        assert_bitwise(alone[0], y[b, s])
    copy = nn.MixtureOfExperts(HIDDEN, 12, 8, 3, **o)
    copy.load_state_dict(module.state_dict())
    assert_bitwise(copy(x, **more), y)


def test_balance_of_sequences_and_normalisations() -> None:
    """balance="sequence": each row of x, without its padding, is a sequence; "top_k" is K times "one"."""
    x, valid = torch.randn(3, 9, HIDDEN), torch.arange(9) < torch.tensor([9, 0, 4])[:, None]
    found = {}
    for balance in ("one", "top_k", "sequence"):
        torch.manual_seed(16)
        module = nn.MixtureOfExperts(HIDDEN, 12, 8, 3, score="sigmoid", balance=balance)
        found[balance] = module(x, valid=valid, return_losses=True)[1].balance
        alone = [module(x[b][valid[b]], return_losses=True)[1].balance for b in (0, 2)]
    torch.testing.assert_close(found["top_k"], 3 * found["one"])
    torch.testing.assert_close(found["sequence"], sum(alone) / 3)  # an empty sequence counts as 0


@pytest.mark.parametrize(
    "arguments, options, name",
    [
        ((8, 9), {}, "top_k"),
        ((8, 0), {}, "top_k"),
        ((8, 2), dict(n_group=3), "n_group"),
        ((8, 2), dict(score="relu"), "score"),
        ((8, 2), dict(activation="silu"), "activation"),
        ((8, 2), dict(activation="gpt_oss", shared_experts=1), "activation"),
        ((8, 2), dict(layout="hf"), "layout"),
        ((8, 2), dict(weight_on="both"), "weight_on"),
        ((8, 2), dict(limit=-1.0), "limit"),
        ((8, 2), dict(balance="half"), "balance"),
        ((8, 2), dict(shared_gate=True), "shared_gate"),
    ],
)
def test_expert_errors_are_named(arguments: tuple, options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        nn.MixtureOfExperts(HIDDEN, 12, *arguments, **options)


# ---- head and loss


@pytest.mark.parametrize("bias, softcap", [(False, None), (True, 3.0)])
def test_head_logits_and_log_probabilities_agree(bias: bool, softcap: float | None) -> None:
    torch.manual_seed(12)
    head = nn.LinearLogProb(HIDDEN, 57, bias=bias, softcap=softcap)
    if bias:
        torch.nn.init.normal_(head.bias)
    hidden, target = torch.randn(3, 11, HIDDEN, requires_grad=True), torch.randint(57, (3, 11))
    logprob, entropy = head(hidden, target, temperature=0.8)
    log_probs = (head(hidden).double() / 0.8).log_softmax(-1)
    torch.testing.assert_close(logprob.double(), log_probs.gather(-1, target[..., None])[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(log_probs.exp() * log_probs).sum(-1), rtol=1e-4, atol=1e-5)
    (logprob.sum() + entropy.sum()).backward()
    assert hidden.grad.any() and all(p.grad.any() for p in head.parameters())


def test_grpo_loss_pushes_the_rewarded_up() -> None:
    torch.manual_seed(14)
    loss_of = nn.GRPOLoss(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)
    assert "epsilon_high=0.28" in repr(loss_of)
    logprob = -torch.rand(4, 6)
    logprob.requires_grad_()
    mask = torch.ones(4, 6)
    mask[2, 3:] = 0
    advantages = torch.tensor([1.0, -1.0, 2.0, 0.0])
    loss, metrics = loss_of(logprob, logprob.detach(), advantages, mask)
    loss.backward()
    # at ratio one: d loss / d logprob = -A · mask / tokens
    torch.testing.assert_close(logprob.grad, -advantages[:, None] * mask / mask.sum(), rtol=1e-5, atol=1e-7)
    assert all(not value.requires_grad for value in metrics.values())
