"""GroupedQueryAttention against the attention layers of transformers, and against itself: decoded, packed, padded, paged.

Shapes: B batch, S tokens, N packed tokens, H heads, D head dim, R rotary dims.

Every family below is built twice from the same random weights: transformers' layer, whose state dict loads strictly into
ours. Theirs runs eagerly with an additive mask, so nothing of ours is in it.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import thinkernel as tk
import torch
from thinkernel import nn
from thinkernel.nn.activation import sigmoid
from thinkernel.ops.dispatch import unavailable, use_backend
from thinkernel.testing.compare import assert_bitwise, check

transformers = pytest.importorskip("transformers")

needs_cpu = pytest.mark.skipif(unavailable("cpu", torch.device("cpu")) is not None, reason="needs the built extension")

HIDDEN, H, HKV, D = 60, 6, 2, 16
SIZES = dict(
    hidden_size=HIDDEN,
    num_attention_heads=H,
    num_key_value_heads=HKV,
    head_dim=D,
    num_hidden_layers=2,
    intermediate_size=32,
    vocab_size=32,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    attn_implementation="eager",
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN = dict(rope_type="yarn", rope_theta=150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=64)
PLAIN = dict(rope_type="default", rope_theta=1000.0)


@dataclass
class Family:
    """name: the class is <name>Attention of transformers' module; config: its configuration beside SIZES; options: ours;
    layer: the number of the layer built; rope_layer: the key of rope_parameters where they go by layer type."""

    module: str
    name: str
    config: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    layer: int = 0
    rope: bool = True
    rope_layer: str | None = None
    config_name: str | None = None


QK = dict(qk_norm=True, eps=1e-5)
FAMILIES = {
    "llama": Family("llama", "Llama", dict(rope_parameters=LLAMA3)),
    "llama-bias": Family("llama", "Llama", dict(attention_bias=True, num_key_value_heads=6), dict(bias=True, kv_heads=6)),
    "qwen2": Family("qwen2", "Qwen2", dict(rope_parameters=YARN), dict(bias=True, out_bias=False)),
    "qwen3": Family("qwen3", "Qwen3", {}, QK),
    "mistral": Family("mistral", "Mistral", dict(sliding_window=9), dict(window=(8, 0))),
    "gemma2": Family(
        "gemma2",
        "Gemma2",
        dict(sliding_window=11, query_pre_attn_scalar=40, attn_logit_softcapping=2.5),
        dict(window=(10, 0), scale=40**-0.5, softcap=2.5),
    ),
    "gemma3": Family(
        "gemma3",
        "Gemma3",
        dict(query_pre_attn_scalar=24, layer_types=["sliding_attention", "full_attention"], sliding_window=7),
        dict(scale=24**-0.5, norm_zero_centred=True, **QK),
        layer=1,
        rope_layer="full_attention",
        config_name="Gemma3TextConfig",
    ),
    "gpt_oss": Family(
        "gpt_oss",
        "GptOss",
        dict(sliding_window=13, rope_parameters=YARN | dict(truncate=False), layer_types=["sliding_attention", "full_attention"]),
        dict(bias=True, sinks=True, window=(12, 0)),
    ),
    "olmo2": Family("olmo2", "Olmo2", {}, dict(qk_norm="full", eps=1e-5)),
    "glm4": Family(
        "glm4",
        "Glm4",
        dict(attention_bias=True, rope_parameters=PLAIN | dict(partial_rotary_factor=0.5)),
        dict(bias=True, out_bias=False, rotary_dim=8, rope_interleaved=True),
    ),
    "stablelm": Family(
        "stablelm",
        "StableLm",
        dict(use_qkv_bias=True, rope_parameters=PLAIN | dict(partial_rotary_factor=0.25), head_dim=10),
        dict(bias=True, out_bias=False, head_dim=10, rotary_dim=2),
    ),
    "qwen3_next": Family(
        "qwen3_next",
        "Qwen3Next",
        dict(rope_parameters=PLAIN | dict(partial_rotary_factor=0.25)),
        dict(gate="q_proj", rotary_dim=4, norm_zero_centred=True, **QK),
    ),
    "afmoe": Family(
        "afmoe",
        "Afmoe",
        dict(sliding_window=10, layer_types=["sliding_attention", "full_attention"]),
        dict(gate="gate_proj", window=(9, 0), **QK),
    ),
    "llama4": Family(
        "llama4",
        "Llama4Text",
        dict(rope_parameters=PLAIN, use_qk_norm=False, no_rope_layers=[1, 0], attention_chunk_size=11),
        dict(chunk=11, rope_interleaved=True),
    ),
    "smollm3-nope": Family("smollm3", "SmolLM3", dict(no_rope_layers=[0, 1]), {}, rope=False),
}
# Everything at once, as no model has it.
WHOLE = dict(
    value_dim=12, bias=True, qk_norm="full", norm_zero_centred=True, rotary_dim=6, rope_interleaved=True, scale=0.4,
    window=(5, 0), sinks=True, softcap=2.0, gate="q_proj",
)
OWN = {"whole": WHOLE, "chunk": dict(chunk=11, value_dim=24, gate="gate_proj")}  # without a layer to compare with


def build(**options: Any) -> nn.GroupedQueryAttention:
    sizes = dict(hidden=HIDDEN, heads=H, kv_heads=HKV, head_dim=D) | options
    module = nn.GroupedQueryAttention(sizes.pop("hidden"), sizes.pop("heads"), sizes.pop("kv_heads"), sizes.pop("head_dim"), **sizes)
    randomize(module)
    return module


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    """Weights at a scale where attention is far from uniform and gates and norms far from constant."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            gain = 2.0 if name.startswith(("q_proj", "k_proj")) else 1.0
            parameter.normal_(std=gain * parameter.shape[-1] ** -0.5)
        elif "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.normal_(std=0.5)


@dataclass
class Pair:
    """run_theirs(x, positions) -> result; ours with the same weights; rope: ours, None for a layer without positions."""

    theirs: torch.nn.Module | None
    ours: nn.GroupedQueryAttention
    rope: nn.RotaryEmbedding | None
    run_theirs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None

    @property
    def hidden(self) -> int:
        return self.ours.hidden

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if self.rope is None else self.rope(positions)


def pair(name: str) -> Pair:
    if name in OWN:
        torch.manual_seed(0)
        ours = build(**OWN[name])
        return Pair(None, ours, nn.RotaryEmbedding(ours.rotary_dim, 1000.0), None)
    family = FAMILIES[name]
    module = importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    config = getattr(transformers, family.config_name or f"{family.name}Config")(**(SIZES | family.config))
    torch.manual_seed(list(FAMILIES).index(name))
    theirs = getattr(module, f"{family.name}Attention")(config, family.layer).eval()
    for parameter in theirs.parameters():
        parameter.data.fill_(0.0 if "Next" in family.name or "Gemma" in family.name else 1.0)  # their norms' start
    randomize(theirs)
    ours = build(**family.options)
    ours.load_state_dict(theirs.state_dict(), strict=True)

    embed = getattr(module, f"{family.name}RotaryEmbedding")(config)
    layer_type = () if family.rope_layer is None else (family.rope_layer,)
    parameters = config.rope_parameters[family.rope_layer] if family.rope_layer else config.rope_parameters
    rope = nn.RotaryEmbedding.from_hf(parameters, ours.head_dim, max_positions=config.max_position_embeddings)
    window, chunk = family.options.get("window"), family.options.get("chunk")

    def run(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        size = x.shape[1]
        query, key = torch.arange(size)[:, None], torch.arange(size)
        hidden = (key > query) | (query - key > (size if window is None else window[0]))  # [S, S]
        if chunk is not None:
            hidden |= query // chunk != key // chunk
        mask = torch.zeros(1, 1, size, size, dtype=x.dtype).masked_fill(hidden, torch.finfo(x.dtype).min)
        return theirs(x, position_embeddings=embed(x, positions, *layer_type), attention_mask=mask)[0]

    return Pair(theirs, ours, rope if family.rope else None, run)


def cache_step(size: int, end: int, batch: int, block_table: torch.Tensor | None = None) -> nn.CacheStep:
    return nn.CacheStep(torch.full((batch,), end, dtype=torch.int32), end, fresh=end == size, block_table=block_table)


def decode(p: Pair, x: torch.Tensor, cache: Any, sizes: list[int], table: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """x [B, S, hidden] in pieces of these sizes, through the cache."""
    parts, end = [], 0
    for size in sizes:
        end += size
        angles = p.angles(torch.arange(end - size, end).expand(len(x), size))
        parts.append(p.ours(x[:, end - size : end], angles, cache=cache, step=cache_step(size, end, len(x), table), **options))
    return torch.cat(parts, dim=1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- against transformers


@pytest.mark.parametrize("name", FAMILIES)
def test_is_the_layer_of_transformers(name: str) -> None:
    """Result and every gradient; the float32 error against our float64 is no more than the rule allows beside theirs."""
    p = pair(name)
    x = torch.randn(2, 37, p.hidden)
    positions = torch.stack((torch.arange(37), torch.arange(37) + 90))
    results = {}
    for side, layer, run in (("theirs", p.theirs, p.run_theirs), ("ours", p.ours, lambda x, at: p.ours(x, p.angles(at)))):
        x_ = x.clone().requires_grad_()
        out = run(x_, positions)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        names, parameters = zip(*sorted(layer.named_parameters()), strict=True)
        results[side] = out, dict(zip(("x", *names), torch.autograd.grad((out * weight).sum(), (x_, *parameters)), strict=True))
    (theirs, their_grads), (ours, our_grads) = results["theirs"], results["ours"]
    assert relative(ours, theirs) <= 1e-5
    assert their_grads.keys() == our_grads.keys()
    for key, grad in their_grads.items():
        if grad.abs().max() > 1e-4 * their_grads["x"].abs().max():  # a key's bias moves nothing: its gradient is rounding
            assert relative(our_grads[key], grad) <= 2e-5, key

    wide = copy.deepcopy(p.ours).double()
    with use_backend("reference"), torch.no_grad():
        exact = wide(x.double(), p.angles(positions))
    check(ours, exact, theirs, name=name)


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "mistral", "gpt_oss", "glm4", "stablelm", "smollm3-nope"])
@torch.no_grad()
def test_is_the_layer_of_transformers_in_float64(name: str) -> None:
    """Where theirs computes in float64 throughout (their norms do not); their softmax does under SDPA and with sinks."""
    p = pair(name)
    if name != "gpt_oss":
        p.theirs.config._attn_implementation = "sdpa"
    p.theirs.double(), p.ours.double()
    x, positions = torch.randn(2, 37, p.hidden, dtype=torch.float64), torch.arange(37).expand(2, 37)
    with use_backend("reference"):
        assert relative(p.ours(x, p.angles(positions)), p.run_theirs(x, positions)) <= 1e-12


def test_state_dict_is_loaded_strictly() -> None:
    """A missing or a foreign weight is an error: nothing is dropped in silence."""
    p = pair("gpt_oss")
    weights = p.theirs.state_dict()
    assert {"sinks", "q_proj.bias", "o_proj.bias"} < set(weights)
    with pytest.raises(RuntimeError, match="sinks"):
        build(bias=True).load_state_dict(weights)
    with pytest.raises(RuntimeError, match="q_norm"):
        build(bias=True, sinks=True, qk_norm=True).load_state_dict(weights)


def test_state_dict_round_trip() -> None:
    torch.manual_seed(1)
    module, again = build(**WHOLE), build(**WHOLE)
    again.load_state_dict(module.state_dict())
    x, rope = torch.randn(2, 9, HIDDEN), nn.RotaryEmbedding(6)(torch.arange(9).expand(2, 9))
    assert_bitwise(again(x, rope), module(x, rope))


# ---- one token, one result


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*FAMILIES, *OWN])
@torch.no_grad()
def test_decoding_gives_the_bits_of_prefill(name: str, dtype: torch.dtype) -> None:
    """Token by token, several at once, over more than one block of keys; alone as in the batch."""
    p = pair(name)
    p.ours.to(dtype)
    x = torch.randn(2, 561, p.hidden, dtype=dtype)
    with use_backend("cpu"):
        whole = p.ours(x, p.angles(torch.arange(561).expand(2, 561)))
        assert_bitwise(p.ours(x[1:], p.angles(torch.arange(561)[None])), whole[1:], "alone")
        for sizes in ([1] * 40, [17] + [1] * 9, [530, 1, 1, 4, 16, 9]):
            cache = p.ours.new_cache(2, 600, dtype=dtype, device="cpu")
            for t in cache:
                t.fill_(torch.nan)  # what was never written is never read
            assert_bitwise(decode(p, x, cache, sizes), whole[:, : sum(sizes)], f"{sizes}")


@needs_cpu
@pytest.mark.parametrize("name", [*FAMILIES, *OWN])
def test_neighbours_and_left_padding_change_no_bit(name: str) -> None:
    """Of the result and of the gradient of x, on one thread as on two."""
    p = pair(name)
    x, start = torch.randn(3, 41, p.hidden, requires_grad=True), torch.tensor([0, 13, 40], dtype=torch.int32)
    slots = torch.arange(41)
    positions = (slots - start[:, None]).clamp(min=0)
    weight = torch.randn_like(x) * (slots >= start[:, None])[..., None]  # what padding gives has no meaning
    with use_backend("cpu"):
        out = p.ours(x, p.angles(positions), key_start=start)
        (grad,) = torch.autograd.grad((out * weight).sum(), x)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for row, first in enumerate(start.tolist()):
                own = x.detach()[row : row + 1, first:].requires_grad_()
                alone = p.ours(own, p.angles(slots[None, : 41 - first]))
                assert_bitwise(out[row, first:], alone[0], f"row {row}")
                (own_grad,) = torch.autograd.grad((alone * weight[row, first:]).sum(), own)
                assert_bitwise(grad[row, first:], own_grad[0], f"gradient of row {row}")
                assert not grad[row, :first].any()
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*FAMILIES, *OWN])
def test_packed_sequences_are_the_sequences_alone(name: str, dtype: torch.dtype) -> None:
    """Results and gradients, an empty sequence among them; the same bits where the kernel takes packed sequences."""
    p = pair(name)
    p.ours.to(dtype)
    cu = torch.tensor([0, 19, 19, 20, 53], dtype=torch.int32)
    positions = nn.packed_positions(cu, 53)
    assert positions.tolist() == [*range(19), 0, *range(33)]
    x = torch.randn(53, p.hidden, dtype=dtype, requires_grad=True)
    out = p.ours(x, p.angles(positions), cu_seqlens=cu)
    alone = [
        p.ours(x[None, a:b], p.angles(torch.arange(b - a)[None]))[0] for a, b in ((0, 19), (19, 20), (20, 53))
    ]
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((y * weight).sum(), (x, *p.ours.parameters())) for y in (out, torch.cat(alone))]

    def forward_and_backward() -> None:
        with torch.enable_grad():
            p.ours(x, p.angles(positions), cu_seqlens=cu).sum().backward()

    kernels = tk.explain(forward_and_backward)
    assert "attention_forward: " in kernels and "attention_backward: " in kernels
    if "attention_forward: cpu" in kernels:
        assert_bitwise(out, torch.cat(alone))
    if "attention_backward: cpu" in kernels:
        assert_bitwise(grads[0][0], grads[1][0], "gradient")  # weights' gradients sum over the rows in another order
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative(out, torch.cat(alone)) <= tolerance
    for a, b in zip(*grads, strict=True):
        if b.abs().max() > 1e-4 * grads[1][0].abs().max():
            assert relative(a, b) <= 2 * tolerance

    wide = copy.deepcopy(p.ours).double()
    with torch.no_grad(), use_backend("reference"):
        exact = wide(x.double(), p.angles(positions), cu_seqlens=cu)
        baseline = p.ours(x, p.angles(positions), cu_seqlens=cu)
    check(out, exact, baseline, name=name)


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "gemma2", *OWN])
@torch.no_grad()
def test_pages_are_the_cache(name: str) -> None:
    p = pair(name)
    x, page = torch.randn(2, 43, p.hidden), 8
    table = torch.tensor([[3, 1, 12, 7, 9, 10], [0, 5, 2, 11, 8, 4]], dtype=torch.int32)
    plain = p.ours.new_cache(2, 48, dtype=x.dtype, device="cpu")
    pages = p.ours.new_cache(13, page, dtype=x.dtype, device="cpu")
    for t in (*plain, *pages):
        t.fill_(torch.nan)
    sizes = [17, 1, 1, 5, 16, 3]
    assert_bitwise(decode(p, x, pages, sizes, table), decode(p, x, plain, sizes))
    assert pages[0][6].isnan().all()  # nobody's page


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "gemma2", *OWN])
@torch.no_grad()
def test_a_shared_prefix_is_the_same_prompt_in_every_row(name: str) -> None:
    """The prompt's keys, read from a cache of one row, stand before the own keys of three rows."""
    p = pair(name)
    prompt, own = torch.randn(1, 29, p.hidden), torch.randn(3, 8, p.hidden)
    shared = p.ours.new_cache(1, 29, dtype=own.dtype, device="cpu")
    decode(p, prompt, shared, [29])
    cache = p.ours.new_cache(3, 8, dtype=own.dtype, device="cpu")
    parts, end = [], 0
    for size in (3, 1, 4):
        end += size
        angles = p.angles(torch.arange(29 + end - size, 29 + end).expand(3, size))
        step, prefix = cache_step(size, end, 3), (shared[0][0], shared[1][0], 29)
        parts.append(p.ours(own[:, end - size : end], angles, cache=cache, step=step, prefix=prefix))
    x = torch.cat((prompt.expand(3, -1, -1), own), dim=1)
    whole = p.ours(x, p.angles(torch.arange(37).expand(3, 37)))[:, 29:]
    assert relative(torch.cat(parts, 1), whole) <= 1e-5


@pytest.mark.parametrize("heads", [1, 2, 8])
@torch.no_grad()
def test_norms_angles_and_gates_do_not_see_their_neighbours(heads: int) -> None:
    """What the module computes outside our kernels with torch: the same bits for a row alone and among others."""
    for dim in (3, 8, 20, 33, 64, 128):
        x, rows = 3 * torch.randn(3, 200, heads, dim), [(0, 0), (1, 17), (2, 199)]
        norms = [torch.nn.RMSNorm(dim), nn.ZeroCentredRMSNorm(dim)]
        for function in (*norms, sigmoid):
            for dtype in (torch.float32, torch.bfloat16):
                inputs = x.to(dtype)
                whole = function(inputs)
                strided = function(torch.cat((inputs, inputs), dim=-1)[..., dim:])  # the gate's half of q_proj
                assert_bitwise(strided, whole, f"{function} {dim} {dtype} strided")
                for b, s in rows:
                    assert_bitwise(function(inputs[b : b + 1, s : s + 1])[0, 0], whole[b, s], f"{function} {dim} {dtype}")
        rope = nn.RotaryEmbedding(2 * dim)
        angles = rope(torch.arange(900).expand(2, 900))
        for position in (0, 1, 77, 899):
            for a, b in zip(rope(torch.tensor([[position]])), angles, strict=True):
                assert_bitwise(a[0, 0], b[1, position], f"angle {position} of {dim}")
    full = torch.nn.RMSNorm(32767)
    x = torch.randn(4, 32767)
    assert_bitwise(full(x)[2], full(x[2:3])[0], "the longest row that torch sums in one piece")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sigmoid_is_torchs(dtype: torch.dtype) -> None:
    extremes = torch.tensor([0.0, -0.0, -1e4, 1e4, -90.0, 90.0, torch.inf, -torch.inf, torch.nan])
    a, b = (torch.cat((4 * torch.randn(91), extremes)).to(dtype).view(5, 20).requires_grad_() for _ in range(2))
    b.data.copy_(a.data)
    torch.testing.assert_close(sigmoid(a), torch.sigmoid(b), equal_nan=True)
    sigmoid(a).nansum().backward()
    torch.sigmoid(b).nansum().backward()
    torch.testing.assert_close(a.grad, b.grad, equal_nan=True)
    assert a.grad[:, :11].isfinite().all()


# ---- training


@pytest.mark.parametrize("gate, norm, packed", [("q_proj", "full", False), ("gate_proj", "head", True)])
def test_gradients_of_everything_at_once(gate: str, norm: str, packed: bool) -> None:
    torch.manual_seed(3)
    sizes = dict(hidden=5, heads=4, kv_heads=2, head_dim=4, value_dim=3, rotary_dim=2)
    module = build(**(WHOLE | sizes | dict(gate=gate, qk_norm=norm, window=(2, 0)))).double()
    shape, options = ((7, 5), dict(cu_seqlens=torch.tensor([0, 4, 7]))) if packed else ((2, 4, 5), {})
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    positions = nn.packed_positions(options["cu_seqlens"], 7) if packed else torch.arange(4).expand(2, 4)
    angles = nn.RotaryEmbedding(2, 10.0)(positions)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, angles), options)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(run, (x, *parameters), atol=1e-7)


@pytest.mark.parametrize("options", [WHOLE, WHOLE | dict(gate="gate_proj", qk_norm="head", norm_zero_centred=False)])
def test_autocast_follows_float32(options: dict) -> None:
    """bfloat16 inside, gradients of the float32 parameters, and a cache in either dtype."""
    torch.manual_seed(4)
    module, x = build(**options), torch.randn(2, 21, HIDDEN)
    rope = nn.RotaryEmbedding(6)
    angles = rope(torch.arange(21).expand(2, 21))
    expected = module(x, angles)
    wanted = torch.autograd.grad(expected.square().sum(), tuple(module.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, angles)
    assert out.dtype == torch.bfloat16 and relative(out.float(), expected) < 0.03
    for (name, parameter), grad in zip(
        module.named_parameters(), torch.autograd.grad(out.float().square().sum(), tuple(module.parameters())), strict=True
    ):
        assert grad.dtype == parameter.dtype and grad.isfinite().all() and grad.any(), name
    for (name, _), a, b in zip(
        module.named_parameters(), torch.autograd.grad(module(x, angles).square().sum(), tuple(module.parameters())), wanted, strict=True
    ):
        assert_bitwise(a, b, name)  # nothing of the autocast region stays behind
    p = Pair(module, module, rope, lambda x, at: x)
    for dtype in (torch.float32, torch.bfloat16):
        cache = module.new_cache(2, 21, dtype=dtype, device="cpu")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert relative(decode(p, x, cache, [11, 1, 9]).float(), expected) < 0.03


def compiled_equals_eager(backend: str, tolerance: float) -> None:
    torch.manual_seed(5)
    module, x = build(**WHOLE), torch.randn(2, 21, HIDDEN, requires_grad=True)
    angles = nn.RotaryEmbedding(6)(torch.arange(21).expand(2, 21))
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    results = []
    for run in (module, compiled):
        out = run(x, angles)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert relative(b, a) <= tolerance, i


def test_compiles_in_one_graph() -> None:
    compiled_equals_eager("aot_eager", 0.0)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    """It fuses norm, RoPE and gate, whose roundings then differ."""
    compiled_equals_eager("inductor", 1e-5)


@torch.no_grad()
def test_decoding_compiles_in_one_graph() -> None:
    p = pair("qwen3")
    torch.compiler.reset()
    compiled = Pair(p.theirs, torch.compile(p.ours, fullgraph=True, backend="aot_eager"), p.rope, p.run_theirs)
    x, sizes = torch.randn(2, 9, p.hidden), [5, 1, 1, 2]
    caches = [p.ours.new_cache(2, 12, dtype=x.dtype, device="cpu") for _ in range(2)]
    assert_bitwise(decode(compiled, x, caches[0], sizes), decode(p, x, caches[1], sizes))
    assert_bitwise(caches[0][0], caches[1][0])


# ---- errors


@pytest.mark.parametrize(
    "options, name",
    [
        (dict(heads=0), "heads"),
        (dict(kv_heads=4), "kv_heads"),
        (dict(kv_heads=0), "kv_heads"),
        (dict(head_dim=None, heads=8), "heads"),
        (dict(head_dim=0), "head_dim"),
        (dict(value_dim=0), "value_dim"),
        (dict(rotary_dim=17), "rotary_dim"),
        (dict(rotary_dim=7), "rotary_dim"),
        (dict(rotary_dim=0), "rotary_dim"),
        (dict(qk_norm="row"), "qk_norm"),
        (dict(norm_zero_centred=True), "norm_zero_centred"),
        (dict(gate="v_proj"), "gate"),
        (dict(softcap=0.0), "softcap"),
        (dict(window=(3,)), "window"),
        (dict(window=4), "window"),
        (dict(window=(-2, 0)), "window"),
        (dict(chunk=0), "chunk"),
    ],
)
def test_bad_options_are_named(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        build(**options)


def test_bad_calls_are_named() -> None:
    module, x = build(rotary_dim=8), torch.randn(2, 5, HIDDEN)
    rope = nn.RotaryEmbedding(8)(torch.arange(5).expand(2, 5))
    cache, step = module.new_cache(2, 8, dtype=x.dtype, device="cpu"), cache_step(5, 5, 2)
    start, cu = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 4, 10], dtype=torch.int32)
    pages = cache_step(5, 5, 2, torch.zeros(2, 1, dtype=torch.int32))
    for arguments, name in (
        (dict(x=x[..., :-1]), "x"),
        (dict(x=x[0]), "x"),
        (dict(x=x, cu_seqlens=cu), "x"),
        (dict(rope=nn.RotaryEmbedding(16)(torch.arange(5).expand(2, 5))), "rope"),
        (dict(rope=tuple(t[:, :4] for t in rope)), "rope"),
        (dict(rope=tuple(t[..., :1] for t in rope)), "rope"),
        (dict(rope=rope[0]), "rope"),
        (dict(x=x.flatten(0, 1), rope=rope, cu_seqlens=cu), "rope"),
        (dict(x=x.flatten(0, 1), cu_seqlens=cu + 1), "cu_seqlens_q"),
        (dict(x=x.flatten(0, 1), cu_seqlens=cu, key_start=start), "key_start"),
        (dict(key_start=start + 6), "key_start"),
        (dict(key_start=start[:1]), "key_start"),
        (dict(cache=cache), "step"),
        (dict(step=step), "cache"),
        (dict(cache=cache, step=step, key_start=start), "key_start"),
        (dict(x=x.flatten(0, 1), cache=cache, step=step, cu_seqlens=cu), "cu_seqlens"),
        (dict(cache=cache, step=cache_step(5, 9, 2)), "seqlens"),
        (dict(cache=module.new_cache(3, 8, dtype=x.dtype, device="cpu"), step=step), "k_cache"),
        (dict(prefix=(cache[0][0], cache[1][0], 3)), "prefix"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            module(**({"x": x} | arguments))
    sizes = dict(kv_latent=24, q_latent=20, nope_dim=12, rope_dim=8, value_dim=10)
    latent = nn.SparseLatentAttention(HIDDEN, 3, top_k=4, indexer_heads=2, indexer_dim=12, **sizes)
    with pytest.raises(ValueError, match="^step: got a block_table"):
        latent(x, rope, cache=latent.new_cache(2, 8, dtype=x.dtype, device="cpu"), step=pages)
