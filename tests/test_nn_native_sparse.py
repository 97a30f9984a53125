"""tk.nn.NativeSparseAttention: its definition, decoding, packing, causality and gradients."""

from __future__ import annotations

import pytest
import thinkernel as tk
import torch
from thinkernel import nn
from thinkernel.reference.native_sparse import compressed_length
from thinkernel.testing import assert_bitwise, check
from torch import Tensor
from torch.testing import assert_close

HIDDEN = 32
SIZES = dict(block=8, compress_block=4, stride=2, top_n=4, window=6)


def build(dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> nn.NativeSparseAttention:
    torch.manual_seed(seed)
    module = nn.NativeSparseAttention(HIDDEN, 4, 2, 16, **SIZES, **options)
    return module.to(dtype)


def rope_at(positions: Tensor, dim: int = 16, scaling=None) -> tuple[Tensor, Tensor]:
    return nn.RotaryEmbedding(dim, scaling=scaling)(positions)


def prompt(B: int, S: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = torch.randn(B, S, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x, rope_at(torch.arange(S)[None].expand(B, S))


def by_definition(module: nn.NativeSparseAttention, x: Tensor, positions: Tensor) -> Tensor:
    """The module's formula with loops over the compressed blocks, every rotation spelled out at its own position."""
    B, S, _ = x.shape

    def turn(t: Tensor, at: Tensor) -> Tensor:  # t [B, s, H, D], at [s]
        cos, sin = (c.to(t.dtype) for c in rope_at(at))
        a, b = t.chunk(2, -1)
        cos, sin = cos[None, :, None], sin[None, :, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    q, k, v = (p(x).unflatten(-1, (h, 16)) for p, h in ((module.q_proj, 4), (module.k_proj, 2), (module.v_proj, 2)))
    kc, vc = [], []
    for i in range(compressed_length(S, 4, 2)):
        window = slice(2 * i, 2 * i + 4)
        in_block = turn(k[:, window], torch.arange(-3, 1))  # by the place before the block's last token
        key, value = (phi(t.transpose(1, 2)) for phi, t in ((module.compress_k, in_block), (module.compress_v, v[:, window])))
        kc.append(turn(key[:, None], positions[2 * i + 3 : 2 * i + 4])), vc.append(value[:, None])
    empty = k.new_zeros(B, 0, 2, 16)
    gates = module.branch_gates(x).unflatten(-1, (4, 3)).sigmoid()
    out = tk.native_sparse_attention(
        turn(q, positions), turn(k, positions), v, torch.cat([empty, *kc], 1), torch.cat([empty, *vc], 1), gates, **SIZES
    )
    return module.o_proj(out.flatten(-2))


@pytest.mark.parametrize("compression", ["mlp", "mean"])
@pytest.mark.parametrize("S", [1, 3, 29])
def test_forward_is_its_definition(compression, S):
    module = build(torch.float64, compression=compression)
    x, rope = prompt(2, S, torch.float64)
    with tk.use_backend("reference"):
        # positions and cos are float32: two rotations instead of one agree to that
        assert_close(module(x, rope), by_definition(module, x, torch.arange(S)), rtol=1e-5, atol=1e-6)


def test_mean_of_turned_keys_is_the_compressed_key():
    module = build(compression="mean")
    k = torch.randn(1, 9, 2, 16)
    rope = rope_at(torch.arange(9)[None])
    starts = module._starts(k, None)
    turn = tuple(t.index_select(-2, starts + 3) for t in rope)
    kc, _ = module._compress(module._windows(k, starts), module._windows(k, starts), turn)
    assert_close(kc, torch.stack([k[:, s : s + 4].mean(1) for s in starts.tolist()], 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [[30, *[1] * 14], [5, 12, 3, 1, 9], [1] * 20])
def test_prefill_and_decode_are_one_forward(dtype, steps):
    """Within the rule against the float64 module, as the forward over all tokens is."""
    total = sum(steps)
    module = build(dtype)
    x, rope = prompt(2, total, dtype)
    cache, done, parts = module.new_cache(2, total + 3, dtype=dtype, device="cpu"), 0, []
    with torch.no_grad():
        whole = module(x, rope)
        for n in steps:
            step = nn.CacheStep(torch.full((2,), done + n, dtype=torch.int32), done + n, fresh=done == 0)
            parts.append(module(x[:, done : done + n], tuple(t[:, done : done + n] for t in rope), cache=cache, step=step))
            done += n
        with tk.use_backend("reference"):
            exact = build(torch.float64)
            exact.load_state_dict(module.state_dict())
            exact = exact(x.double(), rope)
            base = module(x, rope)
    check(torch.cat(parts, 1), exact, base)
    check(whole, exact, base)


def test_rows_of_unequal_length_decode_as_alone():
    module, lengths = build(), [17, 6, 30]
    x, rope = prompt(3, 40)
    with torch.no_grad():
        alone = []
        for b, n in enumerate(lengths):
            cache = module.new_cache(1, 40, dtype=torch.float32, device="cpu")
            first = nn.CacheStep(torch.tensor([n], dtype=torch.int32), n, fresh=True)
            module(x[b : b + 1, :n], tuple(t[b : b + 1, :n] for t in rope), cache=cache, step=first)
            outs = []
            for i in range(8):
                step = nn.CacheStep(torch.tensor([n + i + 1], dtype=torch.int32), n + i + 1, fresh=False)
                at = slice(n + i, n + i + 1)
                outs.append(module(x[b : b + 1, at], tuple(t[b : b + 1, at] for t in rope), cache=cache, step=step))
            alone.append(torch.cat(outs, 1))
        cache = module.new_cache(3, 40, dtype=torch.float32, device="cpu")
        first = nn.CacheStep(torch.full((3,), 30, dtype=torch.int32), 30, fresh=True)  # right padding behind 17 and 6
        module(x[:, :30], tuple(t[:, :30] for t in rope), cache=cache, step=first)
        for i in range(8):
            at = torch.tensor(lengths) + i
            row = torch.arange(3)
            step = nn.CacheStep((at + 1).int(), 31 + i, fresh=False)
            out = module(x[row, at][:, None], tuple(t[row, at][:, None] for t in rope), cache=cache, step=step)
            for b in range(3):
                assert_bitwise(out[b], alone[b][0, i : i + 1], f"row {b}, step {i}")


def test_packed_equals_separate():
    module, lengths = build(), [19, 3, 33]
    x, _ = prompt(1, sum(lengths))
    cu = torch.tensor([0, 19, 22, 55], dtype=torch.int32)
    rope = rope_at(nn.packed_positions(cu, 55))
    out = module(x[0], rope, cu_seqlens=cu)
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist()):
        assert_bitwise(out[a:b], module(x[:, a:b], rope_at(torch.arange(b - a)[None]))[0])


def test_the_future_changes_nothing():
    module = build()
    x, rope = prompt(1, 40)
    before = module(x, rope)
    for t in (3, 11, 25):
        changed = x.clone()
        changed[:, t + 1 :] = 5.0
        assert_bitwise(module(changed, rope)[:, : t + 1], before[:, : t + 1])


def test_every_parameter_gets_a_gradient():
    module = build()
    x, rope = prompt(2, 40)
    module(x.requires_grad_(), rope).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert x.grad is not None and x.grad.isfinite().all()


def test_gradients_are_those_of_the_reference():
    found = []
    for backend in ("auto", "reference"):
        module = build(qk_norm=True, bias=True)
        x, rope = prompt(2, 40)
        with tk.use_backend(backend):
            module(x, rope).square().sum().backward()
        found.append([p.grad for p in module.parameters()])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_scaled_rotations_are_undone():
    """YaRN's cos and sin carry a factor: the mean of turned keys is the mean of what was turned, factor and all."""
    module = build(compression="mean")
    x, rope = prompt(1, 12)
    rope = tuple(1.3 * t for t in rope)
    _, k, _, _ = module._project(x, rope)
    starts = module._starts(k, None)
    kc, _ = module._compress(module._windows(k, starts), module._windows(k, starts), tuple(t.index_select(-2, starts + 3) for t in rope))
    assert_close(kc, torch.stack([k[:, s : s + 4].mean(1) for s in starts.tolist()], 1), rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="^compression: got 'max'"):
        build(compression="max")
    with pytest.raises(ValueError, match="^block: got 7"):
        nn.NativeSparseAttention(HIDDEN, 4, block=7, stride=2)
    with pytest.raises(ValueError, match="^top_n: got 2"):
        nn.NativeSparseAttention(HIDDEN, 4, top_n=2)
    module = build()
    with pytest.raises(ValueError, match="^step: got None"):
        module(torch.randn(1, 3, HIDDEN), cache=module.new_cache(1, 8, dtype=torch.float32, device="cpu"))
    for cache, x in ((module.new_cache(2, 8, dtype=torch.float32, device="cpu"), torch.randn(1, 3, HIDDEN)),
                     (module.new_cache(1, 2, dtype=torch.float32, device="cpu"), torch.randn(1, 3, HIDDEN))):  # fmt: skip
        step = nn.CacheStep(torch.tensor([3], dtype=torch.int32), 3, fresh=True)
        with pytest.raises(ValueError, match="^cache: got"):
            module(x, cache=cache, step=step)
    for cu_seqlens, error in ((torch.tensor([0, 8, 6]), ValueError), ([0, 6], TypeError), (torch.tensor([0, 5]), ValueError)):
        with pytest.raises(error, match="^cu_seqlens: got"):
            module(torch.randn(6, HIDDEN), cu_seqlens=cu_seqlens)
