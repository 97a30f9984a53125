"""Attention against two implementations that are not ours, on the same random numbers: torch's (SDPA, flex_attention) and
transformers' eager attention with its masks, as gpt-oss, Gemma 2, Mistral, Qwen 3 and Llama 4 compute it.

The peer's float64 result is the truth: our float64 reference agrees with it to rounding, and the C++ kernels by the numerics rule
(its baseline is torch_attention, not the peer: an eager softmax over one key has no error at all).
Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, D head dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import thinkernel as tk
import torch
import torch.nn.functional as F
from thinkernel.ops import dispatch
from thinkernel.testing.attention import torch_attention
from thinkernel.testing.compare import check
from thinkernel.testing.inputs import Draw
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:return_lse is deprecated")
Run = Callable[..., tuple[Tensor, ...]]  # q, k, v (, sinks) -> out [B, S, H, Dv] (, lse [B, S, H])
B, H, Hkv = 6, 6, 2
SIZES = [(70, 70), (24, 90), (1, 75)]  # S, T: square, more keys, decode


def agree(
    options: dict[str, Any], peer: Run, S: int, T: int, *, seed: int, D: int = 32, Dv: int = 32, sinks: bool = False, lse: bool = False,
    gradients: bool = True, keep: Tensor | None = None,
) -> None:
    """tk.attention(**options) against peer: out, lse where the peer has it, and the gradients of all inputs through them.

    keep [B, S, 1, 1]: the queries to compare.
    """
    draw = Draw(seed)
    names = ["q", "k", "v", "sinks"] if sinks else ["q", "k", "v"]
    tensors = [draw.normal(B, S, H, D), draw.normal(B, T, Hkv, D), draw.normal(B, T, Hkv, Dv), *([draw.normal(H)] if sinks else [])]
    cotangents = [draw.normal(B, S, H, Dv), draw.normal(B, S, H)]
    kept = torch.ones(B, S, 1, 1, dtype=torch.bool) if keep is None else keep

    def results(function: Run, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_(gradients) for x in tensors]
        outs = [torch.where(kept, x, 0.0) if x.dim() == 4 else x for x in function(*leaves)[: 1 + lse]]
        if not gradients:
            return outs
        return [*outs, *torch.autograd.grad(outs, leaves, [g.to(x.dtype) for g, x in zip(cotangents, outs)])]

    def called(function: Callable[..., tuple[Tensor, ...]], **more: Any) -> Run:
        def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, ...]:
            if "cu_seqlens_q" not in options:
                return function(q, k, v, sinks=sinks, **options, **more)
            rows = [function(*x, sinks=sinks, **options, **more) for x in zip(q, k, v)]
            return tuple(torch.stack(x) for x in zip(*rows))

        return run

    ours = called(tk.attention, return_lse=True)
    truth, baseline = results(peer, torch.float64), results(called(torch_attention, sdpa=False), torch.float32)
    labels = ["out", "lse"][: 1 + lse] + [f"d{name}" for name in names]
    with tk.use_backend("reference"):
        for name, a, x in zip(labels, results(ours, torch.float64), truth):
            torch.testing.assert_close(a, x, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}, reference in float64: {m}")
    if dispatch.C is not None:
        with tk.use_backend("cpu"):
            for name, a, x, base in zip(labels, results(ours, torch.float32), truth, baseline):
                check(a.detach(), x.detach(), base.detach(), name=f"{name}, cpu")


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


# ---- torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("S, T", SIZES)
@pytest.mark.parametrize("options", [dict(), dict(causal=True), dict(scale=0.3), dict(causal=True, scale=-0.2)], ids=str)
@pytest.mark.parametrize("Dv", [32, 20])
def test_sdpa(S, T, options, Dv):
    def peer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        mask = torch.arange(T) <= torch.arange(T - S, T)[:, None] if options.get("causal") else None  # bottom right
        out = F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=mask, scale=options.get("scale"), enable_gqa=True)
        return (out.transpose(1, 2),)

    agree(options, peer, S, T, seed=S, Dv=Dv, gradients=S > 1)  # one query leaves too few numbers in dK


# Each: our options, flex's mask of (position of the query, key), flex's score.
FLEX = {
    "causal": (dict(causal=True), lambda p, j: j <= p),
    "window": (dict(causal=True, window=(9, 0)), lambda p, j: (j <= p) & (j >= p - 9)),
    "window, both sides": (dict(window=(5, 3)), lambda p, j: (j <= p + 3) & (j >= p - 5)),
    "window, right": (dict(window=(-1, 2)), lambda p, j: j <= p + 2),
    "chunk": (dict(causal=True, chunk=16), lambda p, j: (j <= p) & (j // 16 == p // 16)),
    "chunk in a window": (dict(causal=True, chunk=32, window=(12, 0)), lambda p, j: (j <= p) & (j // 32 == p // 32) & (j >= p - 12)),
    "softcap": (dict(causal=True, softcap=2.0), lambda p, j: j <= p),
    "softcap, scale": (dict(softcap=1.5, scale=0.4), lambda p, j: j >= 0),
}


@pytest.mark.parametrize("S, T", SIZES)
@pytest.mark.parametrize("case", FLEX)
def test_flex_attention(case, S, T):
    """Output and lse; flex_attention has no backward on the CPU."""
    options, visible = FLEX[case]
    cap = options.get("softcap")

    def peer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mask = create_block_mask(lambda b, h, i, j: visible(i + (T - S), j), None, None, S, T, device="cpu")
        score = (lambda s, b, h, i, j: cap * torch.tanh(s / cap)) if cap else None
        out, aux = flex_attention(
            *heads_first(q, k, v), score_mod=score, block_mask=mask, scale=options.get("scale"), enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
        return out.transpose(1, 2), aux.lse.transpose(1, 2)

    agree(options, peer, S, T, seed=S + 1, lse=True, gradients=False)


def test_flex_attention_of_packed_sequences():
    """A document mask over one long sequence against cu_seqlens."""
    lengths = [5, 1, 40, 0, 24]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    n = sum(lengths)

    def peer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mask = create_block_mask(lambda b, h, i, j: (document[i] == document[j]) & (j <= i), None, None, n, n, device="cpu")
        out, aux = flex_attention(*heads_first(q, k, v), block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
        return out.transpose(1, 2), aux.lse.transpose(1, 2)

    agree(dict(causal=True, cu_seqlens_q=cu_seqlens), peer, n, n, seed=3, lse=True, gradients=False)


# ---- transformers --------------------------------------------------------------------------------------------------

masking = pytest.importorskip("transformers.masking_utils")


def eager(model: str, **arguments: Any) -> Run:
    """transformers' own function of this model, q, k, v -> out; additive masks as it builds them."""
    forward = importlib.import_module(f"transformers.models.{model}.modeling_{model}").eager_attention_forward
    mask_function, padding = arguments.pop("mask_function", masking.causal_mask_function), arguments.pop("padding", None)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor]:
        S, T = q.shape[1], k.shape[1]
        mask = masking.eager_mask(
            batch_size=B, q_length=S, kv_length=T, q_offset=T - S, mask_function=mask_function, attention_mask=padding, dtype=q.dtype
        )
        module = SimpleNamespace(
            num_key_value_groups=H // Hkv, sinks=sinks, training=False, head_dim=q.shape[-1], scaling=q.shape[-1] ** -0.5,
            config=SimpleNamespace(_attn_implementation="eager"),
        )
        given = dict(scaling=q.shape[-1] ** -0.5) | arguments
        # Gemma's softmax is float32 whatever the dtype; in float64 it must not be the reference's accuracy that is measured
        softmax = F.softmax
        if q.dtype == torch.float64:
            F.softmax = lambda x, dim, dtype=None: softmax(x, dim)
        try:
            return (forward(module, *heads_first(q, k, v), mask, dropout=0.0, **given)[0],)
        finally:
            F.softmax = softmax

    return run


@pytest.mark.parametrize("S, T", SIZES)
@pytest.mark.parametrize("sliding", [None, 12])
def test_gpt_oss_sinks(S, T, sliding):
    mask = masking.causal_mask_function if sliding is None else masking.sliding_window_causal_mask_function(sliding)
    window = None if sliding is None else (sliding - 1, 0)
    agree(
        dict(causal=True, window=window), eager("gpt_oss", mask_function=mask), S, T, seed=S + 2, D=64, Dv=64, sinks=True
    )


@pytest.mark.parametrize("S, T", SIZES)
@pytest.mark.parametrize("sliding", [None, 20])
def test_gemma2_softcap(S, T, sliding):
    mask = masking.causal_mask_function if sliding is None else masking.sliding_window_causal_mask_function(sliding)
    window = None if sliding is None else (sliding - 1, 0)
    agree(
        dict(causal=True, softcap=5.0, scale=256**-0.5, window=window),
        eager("gemma2", mask_function=mask, softcap=5.0, scaling=256**-0.5), S, T, seed=S + 4, D=64, Dv=64,
    )


@pytest.mark.parametrize("S, T", SIZES)
@pytest.mark.parametrize("model", ["mistral", "qwen3", "qwen2"])
def test_sliding_window_layers(model, S, T):
    mask = masking.sliding_window_causal_mask_function(16)
    agree(dict(causal=True, window=(15, 0)), eager(model, mask_function=mask), S, T, seed=S + 5)


@pytest.mark.parametrize("S, T", SIZES)
def test_llama4_chunks_with_left_padding(S, T):
    """Chunks count from the first real token; rows of padding are left out of the comparison."""
    start = torch.tensor([0, 7, T - S, 1, 2, T // 2])
    mask = masking.chunked_causal_mask_function(16, start)
    padding = torch.arange(T) >= start[:, None]
    first = (start - (T - S)).clamp_min(0)  # the first query that is no padding
    real = (torch.arange(S) >= first[:, None])[:, :, None, None]
    peer = eager("llama4", mask_function=mask, padding=padding)
    agree(dict(causal=True, chunk=16, key_start=start), peer, S, T, seed=S + 6, keep=real)


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_left_padding_as_models_mask_it(model):
    S = T = 60
    start = torch.tensor([0, 11, 37, 1, 16, 52])
    real = (torch.arange(S) >= start[:, None])[:, :, None, None]
    peer = eager(model, padding=torch.arange(T) >= start[:, None])
    agree(dict(causal=True, key_start=start), peer, S, T, seed=8, keep=real)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_decode_is_a_models_last_rows(backend):
    """A paged step with sinks and a window against gpt-oss's eager rows over the same keys."""
    if backend == "cpu" and dispatch.C is None:
        pytest.skip(dispatch.C_MISSING)
    draw, page, T, Sq, sliding = Draw(9), 16, 90, 2, 40
    q, k, v, sinks = draw.normal(B, Sq, H, 64), draw.normal(B, T, Hkv, 64), draw.normal(B, T, Hkv, 64), draw.normal(H)
    table = draw.pages(B, -(-T // page))
    pages = [torch.full((B * table.shape[1] + 3, page, Hkv, 64), float("nan")) for _ in range(2)]
    for b in range(B):
        for i in range(table.shape[1]):
            for cache, x in zip(pages, (k, v)):
                held = x[b, i * page : (i + 1) * page]
                cache[table[b, i], : len(held)] = held
    peer = eager("gpt_oss", mask_function=masking.sliding_window_causal_mask_function(sliding))
    with tk.use_backend(backend):
        out = tk.attention_decode(
            q, *pages, seqlens=torch.full((B,), T, dtype=torch.int32), block_table=table, sinks=sinks, window=(sliding - 1, 0)
        )
    check(out, peer(*(x.double() for x in (q, k, v, sinks)))[0], peer(q, k, v, sinks)[0])
