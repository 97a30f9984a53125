"""MultiHeadLatentAttention: its two modes, caches of every layout, chunked prefill, packed rows, and what may not move a bit.

Shapes: B batch, S tokens, H heads, C latent, R rope, N nope, Dv value dims. Truth is the module in float64 on the reference
backend, the baseline plain torch in the module's dtype; gradients are in the cases of `validate`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from thinkernel import nn
from thinkernel.ops.dispatch import use_backend
from thinkernel.reference.mla import dequantize_latent
from thinkernel.testing.cases import torch_mla
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

HIDDEN = 48
DTYPES = [torch.float32, torch.bfloat16]
SMALL = dict(kv_latent=40, q_latent=36, nope_dim=24, rope_dim=8, value_dim=20)
KINDS = {  # heads, sizes
    "v3": (4, SMALL),
    "lite": (3, {**SMALL, "q_latent": None}),
    "one head": (1, SMALL),
    "many heads, GLM": (17, dict(kv_latent=48, q_latent=40, nope_dim=12, rope_dim=6, value_dim=18)),
    "half-split": (2, {**SMALL, "rope_interleaved": False, "bias": True}),
    "512 + 64": (3, dict(kv_latent=512, q_latent=None, nope_dim=16, rope_dim=64, value_dim=24)),
}


def build(kind: str, dtype: torch.dtype = torch.float32, **options) -> nn.MultiHeadLatentAttention:
    heads, sizes = KINDS[kind]
    torch.manual_seed(len(kind))
    module = nn.MultiHeadLatentAttention(HIDDEN, heads, **{**sizes, **options})
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5)
    return module.to(dtype).requires_grad_(False)


def rope_for(module: nn.MultiHeadLatentAttention, positions: Tensor) -> tuple[Tensor, Tensor]:
    return nn.RotaryEmbedding(module.rope_dim, 100.0)(positions)


def place(ends: list[int], fresh: bool = False, table: Tensor | None = None) -> nn.CacheStep:
    return nn.CacheStep(torch.tensor(ends, dtype=torch.int32), max(ends), fresh=fresh, block_table=table)


def through_cache(
    module: nn.MultiHeadLatentAttention, x: Tensor, sizes: list[int], *, cache: tuple | None = None, table: Tensor | None = None,
    cache_dtype: torch.dtype | None = None, mode: str = "auto", poison: bool = True,
) -> Tensor:
    """x [B, S, hidden] in calls of `sizes` tokens over an empty cache whose unwritten places are NaN."""
    B, S = x.shape[:2]
    if cache is None:
        cache = module.new_cache(B, S + 3, dtype=cache_dtype or x.dtype, device="cpu")
    if poison:
        cache[0].fill_(0x7F if cache[0].dtype == torch.uint8 else torch.nan)
    parts, start = [], 0
    for size in sizes:
        end = start + size
        rope = rope_for(module, torch.arange(start, end).expand(B, size))
        step = place([end] * B, fresh=start == 0, table=table)
        parts.append(module(x[:, start:end], rope, cache=cache, step=step, mode=mode))
        start = end
    assert start == S
    return torch.cat(parts, 1)


def truth_and_baseline(module: nn.MultiHeadLatentAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    rope = rope_for(module, torch.arange(x.shape[1]).expand(x.shape[:2]))
    with use_backend("reference"):
        truth = copy.deepcopy(module).double()(x.double(), rope)
    return truth, torch_mla(module, dict(module.named_parameters()), x, rope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_absorbed_and_expanded_agree(kind: str, dtype: torch.dtype) -> None:
    module = build(kind, dtype)
    x = torch.randn(4, 33, HIDDEN).to(dtype)
    truth, baseline = truth_and_baseline(module, x)
    rope = rope_for(module, torch.arange(33).expand(4, 33))
    for mode in ("expanded", "absorbed", "auto"):
        check(module(x, rope, mode=mode), truth, baseline, name=mode)
    assert_bitwise(module(x, rope), module(x, rope, mode="expanded"))


@pytest.mark.parametrize("kind", KINDS)
def test_modes_are_the_same_function_in_float64(kind: str) -> None:
    module, x = build(kind, torch.float64), torch.randn(2, 21, HIDDEN, dtype=torch.float64)
    rope = rope_for(module, torch.arange(21).expand(2, 21))
    with use_backend("reference"):
        expanded = module(x, rope)
        torch.testing.assert_close(module(x, rope, mode="absorbed"), expanded, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(through_cache(module, x, [9, 1, 1, 10]), expanded, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1] * 30, [13, *[1] * 17], [7, 12, 11]], ids=["steps", "prefilled, steps", "chunks"])
def test_decode_and_chunks_are_the_prefill(kind: str, dtype: torch.dtype, sizes: list[int]) -> None:
    """Absorbed steps within the rule; chunks over expanded heads with the very bits of one prefill."""
    module, x = build(kind, dtype), torch.randn(3, 30, HIDDEN).to(dtype)
    truth, baseline = truth_and_baseline(module, x)
    for mode in ("auto", "absorbed"):
        check(through_cache(module, x, sizes, mode=mode), truth, baseline, name=mode)
    whole = module(x, rope_for(module, torch.arange(30).expand(3, 30)))
    assert_bitwise(through_cache(module, x, sizes, mode="expanded"), whole, "expanded")


def test_auto_takes_the_cheaper_form() -> None:
    assert nn.MultiHeadLatentAttention(8, 1, q_latent=None).absorb_up_to == 170
    module = build("v3", value_dim=4, nope_dim=4)
    limit = module.absorb_up_to
    assert 1 < limit < 20
    x = torch.randn(1, 40, HIDDEN)
    sizes = [20, limit, 20 - limit]
    got, few, many = (through_cache(module, x, sizes, mode=mode) for mode in ("auto", "absorbed", "expanded"))
    assert_bitwise(got[:, 20 : 20 + limit], few[:, 20 : 20 + limit])
    assert_bitwise(got[:, :20], many[:, :20])
    if 20 - limit > limit:
        assert_bitwise(got[:, 20 + limit :], many[:, 20 + limit :])


def pages_for(module: nn.MultiHeadLatentAttention, batch: int, size: int, page: int, dtype: torch.dtype) -> tuple[tuple, Tensor]:
    """Shuffled pages for `batch` rows of up to `size` tokens; table entries past the end name no page."""
    count = -(-size // page)
    order = torch.randperm(batch * count + 2)[: batch * count].view(batch, count)
    table = torch.cat([order, torch.full((batch, 2), -7)], dim=1).int()
    return module.new_cache(batch * count + 2, page, dtype=dtype, device="cpu"), table


@pytest.mark.parametrize("mode", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("page", [1, 5, 16])
def test_pages_move_no_bit(page: int, cache_dtype: torch.dtype, mode: str) -> None:
    module, x = build("512 + 64"), torch.randn(2, 24, HIDDEN)
    sizes = [11, 1, 1, 4, 7]
    pages, table = pages_for(module, 2, 24, page, cache_dtype)
    plain = through_cache(module, x, sizes, cache_dtype=cache_dtype, mode=mode)
    assert plain.isfinite().all()
    assert_bitwise(through_cache(module, x, sizes, cache=pages, table=table, mode=mode), plain)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_a_narrow_cache_is_what_every_token_sees(cache_dtype: torch.dtype) -> None:
    """However the tokens are cut into calls, expanded heads give the same bits; absorbed ones agree to rounding with float64 over
    what the cache holds."""
    module, x = build("512 + 64"), torch.randn(3, 26, HIDDEN)
    one = through_cache(module, x, [26], cache_dtype=cache_dtype, mode="expanded")
    assert_bitwise(through_cache(module, x, [9, 1, 16], cache_dtype=cache_dtype, mode="expanded"), one)
    assert_bitwise(through_cache(module, x, [26], cache_dtype=cache_dtype), one)

    cache = module.new_cache(3, 26, dtype=cache_dtype, device="cpu")
    steps = through_cache(module, x, [12, *[1] * 14], cache=cache)
    held = dequantize_latent(cache[0]) if cache_dtype == torch.uint8 else cache[0]
    wide = copy.deepcopy(module).double()
    with use_backend("reference"):
        q_nope, q_rope, _ = wide._queries(x.double(), rope_for(module, torch.arange(26).expand(3, 26)))
        latent, k_rope = held.double().split((512, 64), dim=-1)
        truth = wide.o_proj(wide._expanded(q_nope, q_rope, latent, k_rope).flatten(-2))
    if cache_dtype == torch.uint8:  # queries stay float32
        torch.testing.assert_close(steps.double(), truth, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(steps.double(), truth, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("bits,bound", [(torch.bfloat16, 0.02), (torch.uint8, 0.12)], ids=str)
def test_what_a_narrow_cache_costs(bits: torch.dtype, bound: float) -> None:
    """Error of the module's output over its own size, against float64 without a narrow cache: bfloat16 rounds by 2^-9, e4m3 by 2^-4."""
    module, x = build("512 + 64"), torch.randn(4, 40, HIDDEN)
    truth, _ = truth_and_baseline(module, x)
    got = through_cache(module, x, [20, *[1] * 20], cache_dtype=bits)
    error = ((got - truth).square().mean() / truth.square().mean()).sqrt().item()
    assert 0 < error < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
def test_a_row_alone_and_in_a_batch(mode: str, dtype: torch.dtype) -> None:
    module, x = build("v3", dtype), torch.randn(5, 23, HIDDEN).to(dtype)
    whole = through_cache(module, x, [16, 1, 6], mode=mode)
    for row in (0, 4):
        assert_bitwise(through_cache(module, x[row : row + 1], [16, 1, 6], mode=mode), whole[row : row + 1])
    assert_bitwise(through_cache(module, x, [16, *[1] * 7], mode=mode), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert_bitwise(through_cache(module, x, [16, 1, 6], mode=mode), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["auto", "expanded", "absorbed"])
def test_rows_of_different_lengths(mode: str) -> None:
    """Each row is appended at its own length, what a neighbour holds past it is never read."""
    module, x = build("v3"), torch.randn(3, 20, HIDDEN)
    held, new = [5, 14, 0], 4
    cache = module.new_cache(3, 20, dtype=x.dtype, device="cpu")
    cache[0].fill_(torch.nan)
    for row, n in enumerate(held):
        if n:
            part = tuple(t[row : row + 1] for t in cache)
            module(x[row : row + 1, :n], rope_for(module, torch.arange(n)[None]), cache=part, step=place([n], fresh=True), mode=mode)
    positions = torch.tensor(held)[:, None] + torch.arange(new)
    tokens = torch.stack([x[row, n : n + new] for row, n in enumerate(held)])
    got = module(tokens, rope_for(module, positions), cache=cache, step=place([n + new for n in held]), mode=mode)
    for row, n in enumerate(held):
        alone = through_cache(module, x[row : row + 1, : n + new], [n, new] if n else [new], mode=mode)
        torch.testing.assert_close(got[row], alone[0, n:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_and_padded_rows_are_the_rows(dtype: torch.dtype) -> None:
    module, lengths = build("lite", dtype), [7, 1, 12]
    rows = [torch.randn(n, HIDDEN).to(dtype) for n in lengths]
    alone = [module(x[None], rope_for(module, torch.arange(len(x))[None]))[0] for x in rows]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = nn.packed_positions(cu, sum(lengths))
    packed = module(torch.cat(rows), rope_for(module, positions), cu_seqlens=cu)
    assert_bitwise(packed, torch.cat(alone))
    start = torch.tensor([12 - n for n in lengths], dtype=torch.int32)
    padded = torch.stack([torch.cat([torch.randn(12 - len(x), HIDDEN).to(dtype), x]) for x in rows])
    out = module(padded, rope_for(module, (torch.arange(12) - start[:, None]).clamp(min=0)), key_start=start)
    for row, x in enumerate(alone):
        assert_bitwise(out[row, start[row] :], x)


@pytest.mark.parametrize("pages", [False, True])
def test_a_shared_prefix_is_read_as_part_of_every_row(pages: bool) -> None:
    module, x = build("v3"), torch.randn(2, 19, HIDDEN)
    x[:, :11] = x[:1, :11]
    whole = through_cache(module, x, [11, 8], mode="absorbed")
    shared = module.new_cache(1, 12, dtype=x.dtype, device="cpu")
    module(x[:1, :11], rope_for(module, torch.arange(11)[None]), cache=shared, step=place([11], fresh=True))
    prefix: tuple = (shared[0][0], 11)
    if pages:
        prefix = (shared[0][0].view(3, 4, -1)[[1, 2, 0]], 11, torch.tensor([2, 0, 1], dtype=torch.int32))
    cache = module.new_cache(2, 8, dtype=x.dtype, device="cpu")
    rope = rope_for(module, torch.arange(11, 19).expand(2, 8))
    for fresh in (True, False):
        out = module(x[:, 11:], rope, cache=cache, step=place([8, 8], fresh=fresh), prefix=prefix)
        assert_bitwise(out, whole[:, 11:])


def test_the_prepared_weights_follow_the_weights() -> None:
    """By an optimiser, by load_state_dict, by `.data` (as weights are synchronised), by replacement, by a cast."""
    module, x = build("v3"), torch.randn(1, 6, HIDDEN)
    rope = rope_for(module, torch.arange(6)[None])

    def agree() -> None:
        fresh = build("v3", module.kv_b_proj.weight.dtype)
        fresh.load_state_dict(module.state_dict())
        given = x.to(fresh.o_proj.weight.dtype)
        assert_bitwise(module(given, rope, mode="absorbed"), fresh(given, rope, mode="absorbed"))

    module(x, rope, mode="absorbed")
    kept = module._up_weights()[0]
    assert module._up_weights()[0] is kept and kept.is_contiguous()  # prepared once
    weight = module.kv_b_proj.weight
    with torch.no_grad():
        weight.add_(0.1 * torch.randn_like(weight))
    agree()
    assert module._up_weights()[0] is not kept
    module.load_state_dict({name: tensor + 0.1 for name, tensor in module.state_dict().items()})
    agree()
    weight.data.copy_(torch.randn_like(weight) / 5)
    agree()
    module.kv_b_proj.weight = torch.nn.Parameter(torch.randn_like(weight) / 5, requires_grad=False)
    agree()
    module.bfloat16()
    agree()
    sizes = dict(kv_latent=64, q_latent=None, nope_dim=16, rope_dim=8, value_dim=16)  # as many weights as divide by the columns
    square = nn.MultiHeadLatentAttention(HIDDEN, 8, **sizes).requires_grad_(False)
    square(x, rope, mode="absorbed")
    square.kv_b_proj.weight.data[:, 1:] *= 1.5
    assert_bitwise(square(x, rope, mode="absorbed"), copy.deepcopy(square)(x, rope, mode="absorbed"))
    up_k = square.kv_b_proj.weight.view(8, 32, 64)[:, :16].transpose(1, 2)
    assert_bitwise(square._up_weights()[0], up_k)
    module.kv_b_proj.weight.requires_grad_()
    assert module._up_weights()[0].requires_grad  # under autograd the weights themselves


def test_gradients_of_a_prefill_with_a_cache_are_those_without() -> None:
    module, x = build("v3").requires_grad_(), torch.randn(2, 9, HIDDEN)
    rope = rope_for(module, torch.arange(9).expand(2, 9))
    found = []
    for options in ({}, dict(cache=module.new_cache(2, 9, dtype=x.dtype, device="cpu"), step=place([9, 9], fresh=True))):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(module(leaf, rope, **options).square().sum(), [leaf, *module.parameters()]))
    for a, b in zip(*found, strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_cache(cache_dtype: torch.dtype) -> None:
    module = build("v3")
    x = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(3))
    want, _ = truth_and_baseline(module, x)
    for mode in ("auto", "expanded", "absorbed"):
        with torch.autocast("cpu", torch.bfloat16):
            found = through_cache(module, x, [6, 1, 2], cache_dtype=cache_dtype, mode=mode)
        assert (found.double() - want).norm() < 0.03 * want.norm(), mode


def test_prepared_in_inference_mode() -> None:
    """What a frozen module prepared there serves a caller who differentiates."""
    module, x = build("v3"), torch.randn(1, 6, HIDDEN, requires_grad=True)
    rope = rope_for(module, torch.arange(6)[None])
    with torch.inference_mode():
        module(x, rope, mode="absorbed")
    found = module(x, rope, mode="absorbed")
    assert_bitwise(found.detach(), build("v3")(x, rope, mode="absorbed").detach())


def test_errors_are_named() -> None:
    module, x = build("v3"), torch.randn(2, 5, HIDDEN)
    rope = rope_for(module, torch.arange(5).expand(2, 5))
    cache, step = module.new_cache(2, 8, dtype=x.dtype, device="cpu"), place([5, 5], fresh=True)
    start, cu = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 4, 10], dtype=torch.int32)
    for arguments, name in (
        (dict(x=x[..., 1:]), "x"),
        (dict(x=x[0]), "x"),
        (dict(mode="latent"), "mode"),
        (dict(cache=cache), "step"),
        (dict(step=step), "cache"),
        (dict(cache=cache, step=step, key_start=start), "key_start"),
        (dict(mode="absorbed", key_start=start), "key_start"),
        (dict(x=x.flatten(0, 1), mode="absorbed", cu_seqlens=cu), "cu_seqlens"),
        (dict(prefix=(cache[0][0], 3)), "prefix"),
        (dict(cache=cache, step=step, prefix=(cache[0][0], 3), mode="expanded"), "prefix"),
        (dict(cache=cache, step=place([5, 9])), "seqlens"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            module(**{"x": x, "rope": rope, **arguments})
    with pytest.raises(ValueError, match="^dtype: got uint8"):
        module.new_cache(1, 4, dtype=torch.uint8, device="cpu")
