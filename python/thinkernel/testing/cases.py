"""One line for each op and variant that `thinkernel validate`, the tests and opcheck run on every backend and dtype.

A case draws its inputs, calls the public function, and names the inputs with a gradient. Its truth is the same call on
the float64 reference; its baseline is torch's own op in the same dtype where torch has one, else our reference there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import thinkernel as tk
from thinkernel.nn.rope import rotate
from thinkernel.reference.mla import quantize_latent
from thinkernel.testing.attention import torch_attention, torch_decode, torch_sparse_attention
from thinkernel.testing.inputs import Draw
from thinkernel.testing.moe import EXPERT_GRADIENTS, expert_inputs, torch_moe
from thinkernel.testing.native_sparse import ROWS as NATIVE_SPARSE_ROWS

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`inputs(draw)` -> keyword inputs of `run`, which returns a tensor or a tuple; integer results must be equal.

    gradients: names of inputs to differentiate. baseline: torch's own form of `run`, or None for our reference.
    selection: for chosen indices, the scores they were chosen by; a swap within `SELECTION_ULPS` is then allowed.
    small: shapes that a kernel interpreter can run in a second.
    """

    family: str
    name: str
    inputs: Callable[[Draw], Inputs]
    run: Callable[..., Any]
    gradients: tuple[str, ...] = ()
    baseline: Callable[..., Any] | None = None
    selection: Callable[..., Tensor] | None = None
    small: bool = True

    def __str__(self) -> str:
        return self.name


# ---- attention -------------------------------------------------------------------------------------------------


def qkv(draw: Draw, B: int, S: int, T: int, H: int, Hkv: int, D: int, Dv: int | None = None, **more: Any) -> Inputs:
    return dict(
        q=draw.normal(B, S, H, D), k=draw.normal(B, T, Hkv, D), v=draw.normal(B, T, Hkv, D if Dv is None else Dv), **more
    )


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """torch's fused attention kernel on [B, H, S, D]: it wants equal head dims, so all three are padded with zeros."""
    scale, Dv = q.shape[-1] ** -0.5 if scale is None else scale, v.shape[-1]
    width = max(q.shape[-1], Dv)
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :Dv]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """torch's attention, and the lse that it does not return, from scores in the same dtype."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    S, T = q.shape[2], k.shape[2]
    visible = torch.arange(T) <= torch.arange(T - S, T)[:, None]  # bottom-right, where is_causal is top-left
    out = _fused(q, k, v, visible if causal else None, scale)
    scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible, float("-inf")) if causal else scores
    return out.transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None, key_start: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, softcap: float = 0.0, window: int = 0, chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention with more: torch's fused op with a mask, its output times the sinks' gate; softcap as an eager model."""
    if cu_seqlens_q is not None:
        cuts = cu_seqlens_q.tolist()
        parts = [_masked(*(x[None, a:b] for x in (q, k, v))) for a, b in zip(cuts, cuts[1:]) if b > a]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts])
    S, T, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = ((q @ k.mT) * q.shape[-1] ** -0.5).float()  # [B, H, S, T]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    p, j = torch.arange(T - S, T)[:, None], torch.arange(T)
    visible = (j <= p) & ((j > p - window) if window else True) & ((j // chunk == p // chunk) if chunk else True)
    if key_start is not None:
        visible = visible & (j >= key_start[:, None, None, None])
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)  # [B, H, S]
    out = scores.softmax(-1).to(v.dtype) @ v if softcap else _fused(q, k, v, visible, None)
    if sinks is not None:
        out = (out * torch.sigmoid(lse - sinks.float()[:, None])[..., None]).to(v.dtype)
    return out.transpose(1, 2), lse.transpose(1, 2)


def attention_case(name: str, *sizes: int, causal: bool = True, lse: bool = True, small: bool = True, **options: Any) -> Case:
    def run(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        out, found = tk.attention(q, k, v, causal=causal, return_lse=True, **options, **more)
        return (out, found) if lse else out

    def baseline(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, found = _sdpa(q, k, v, causal=causal, **options)
        return (out, found) if lse else out

    return Case("attention", name, lambda draw: qkv(draw, *sizes), run, ("q", "k", "v"), baseline, small=small)


def _padded(draw: Draw) -> Inputs:
    return qkv(draw, 3, 9, 9, 4, 2, 16, key_start=torch.tensor([0, 4, 7], dtype=torch.int32))


def _decode_inputs(draw: Draw, *, paged: bool, queries: int = 1) -> Inputs:
    B, H, Hkv, D, page, max_pages = 3, 4, 2, 32, 4, 5
    shape = (B * max_pages + 3, page) if paged else (B, page * max_pages)
    inputs = dict(
        q=draw.normal(B, queries, H, D), k_cache=draw.normal(*shape, Hkv, D), v_cache=draw.normal(*shape, Hkv, D),
        seqlens=torch.tensor([20, 7, 13], dtype=torch.int32),
    )
    return inputs | ({"block_table": draw.pages(B, max_pages)} if paged else {})


def _decode(**inputs: Any) -> Any:
    return tk.attention_decode(**inputs, return_lse=True)


def _merge(draw: Draw) -> Inputs:
    return dict(
        out_a=draw.normal(2, 5, 3, 8), lse_a=draw.normal(2, 5, 3, dtype=torch.float32), out_b=draw.normal(2, 5, 3, 8),
        lse_b=draw.normal(2, 5, 3, dtype=torch.float32),
    )


ATTENTION = [
    attention_case("attention/causal", 2, 33, 33, 4, 2, 64),
    attention_case("attention/full", 1, 17, 40, 4, 4, 32, causal=False),
    attention_case("attention/more-keys", 2, 7, 50, 6, 2, 48),
    attention_case("attention/d192-dv128", 1, 19, 19, 2, 2, 192, 128),
    attention_case("attention/d256", 1, 20, 20, 2, 1, 256),
    attention_case("attention/odd", 1, 13, 13, 3, 1, 23, 7, scale=0.3),
    attention_case("attention/one-token", 3, 1, 1, 4, 2, 16),
    attention_case("attention/long", 1, 300, 700, 4, 1, 64, small=False),
    Case("attention", "attention/key-start", _padded,
         lambda **x: tk.attention(**x, causal=True, return_lse=True), ("q", "k", "v"), _masked),
    Case("attention", "attention/decode", lambda draw: _decode_inputs(draw, paged=False), _decode),
    Case("attention", "attention/decode-paged", lambda draw: _decode_inputs(draw, paged=True, queries=3), _decode),
    Case("attention", "attention/merge", _merge, lambda **x: tk.merge_attention(**x), ("out_a", "lse_a", "out_b", "lse_b")),
]

# Features that kernels take over one by one; until then they run on the reference alone.
ATTENTION_FEATURES = [
    Case("attention", "attention/window", lambda draw: qkv(draw, 2, 30, 30, 4, 2, 32),
         lambda **x: tk.attention(**x, causal=True, window=(6, 0), return_lse=True), ("q", "k", "v"), lambda **x: _masked(**x, window=7)),
    Case("attention", "attention/chunk", lambda draw: qkv(draw, 2, 30, 30, 4, 2, 32),
         lambda **x: tk.attention(**x, causal=True, chunk=8, return_lse=True), ("q", "k", "v"), lambda **x: _masked(**x, chunk=8)),
    # More keys than queries: with a single key an eager softmax's gradient cancels exactly, no fused formula's does.
    Case("attention", "attention/softcap", lambda draw: qkv(draw, 2, 21, 30, 4, 2, 32),
         lambda **x: tk.attention(**x, causal=True, softcap=2.0, return_lse=True), ("q", "k", "v"), lambda **x: _masked(**x, softcap=2.0)),
    Case("attention", "attention/sinks", lambda draw: qkv(draw, 2, 21, 30, 4, 2, 32, sinks=draw.normal(4)),
         lambda **x: tk.attention(**x, causal=True, return_lse=True), ("q", "k", "v", "sinks"), _masked),
    Case("attention", "attention/packed",
         lambda draw: dict(q=draw.normal(20, 4, 32), k=draw.normal(20, 2, 32), v=draw.normal(20, 2, 32),
                           cu_seqlens_q=torch.tensor([0, 5, 5, 20], dtype=torch.int32)),
         lambda **x: tk.attention(**x, causal=True, return_lse=True), ("q", "k", "v"), _masked),
]



def feature_case(
    name: str, *sizes: int, lengths: tuple[Sequence[int], Sequence[int]] | None = None, key_start: Sequence[int] | None = None,
    sinks: bool = False, transposed: bool = False, only_lse: bool = False, **options: Any,
) -> Case:
    """One combination of features, forward and backward. sizes: B, S, T, H, Hkv, D (, Dv); lengths: of packed sequences, queries and
    keys; transposed: views of [B, H, S, D]; only_lse: nothing but the gradient through lse."""
    offsets = [torch.tensor([0, *some]).cumsum(0).int() for some in lengths or ()]

    def inputs(draw: Draw) -> Inputs:
        found = qkv(draw, *sizes)
        if lengths is not None:
            found = {name: x[0] for name, x in found.items()} | dict(cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1])
        if key_start is not None:
            found["key_start"] = torch.tensor(key_start, dtype=torch.int32)
        return found | ({"sinks": draw.normal(sizes[3])} if sinks else {})

    def run(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        if transposed:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        out, lse = tk.attention(q, k, v, return_lse=True, **options, **more)
        return lse if only_lse else (out, lse)

    def baseline(**x: Any) -> Any:
        out, lse = torch_attention(**x, **options, sdpa=False)
        return lse if only_lse else (out, lse)

    names = ("q", "k") if only_lse else ("q", "k", "v", "sinks") if sinks else ("q", "k", "v")
    return Case("attention", f"attention/{name}", inputs, run, names, baseline)


def decode_case(
    name: str, *, queries: int = 1, page: int = 0, prefix: int | None = None, prefix_page: int = 0, sinks: bool = False, **options: Any
) -> Case:
    """page, prefix_page: 0 is contiguous; prefix: how many keys all sequences share."""
    B, H, Hkv, D, room = 3, 4, 2, 32, 21

    def inputs(draw: Draw) -> Inputs:
        pages = -(-room // page) if page else 0
        shape = (B * pages + 3, page) if page else (B, room)
        found = dict(
            q=draw.normal(B, queries, H, D), k_cache=draw.normal(*shape, Hkv, D), v_cache=draw.normal(*shape, Hkv, D),
            seqlens=torch.tensor([21, queries, 13], dtype=torch.int32),
        )
        if page:
            found["block_table"] = draw.pages(B, pages)
        if prefix is not None:
            count = -(-prefix // prefix_page) if prefix_page else 0
            lead = (count + 3, prefix_page) if prefix_page else (prefix,)
            found |= dict(prefix_k=draw.normal(*lead, Hkv, D), prefix_v=draw.normal(*lead, Hkv, D))
            if prefix_page:
                found["prefix_table"] = draw.pages(1, count)[0]
        return found | ({"sinks": draw.normal(H)} if sinks else {})

    def called(decode: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        def run(
            prefix_k: Tensor | None = None, prefix_v: Tensor | None = None, prefix_table: Tensor | None = None, **inputs: Any
        ) -> Any:
            shared = None if prefix_k is None else (prefix_k, prefix_v, prefix, *(() if prefix_table is None else (prefix_table,)))
            return decode(**inputs, **options, **more, prefix=shared)

        return run

    ours, torchs = called(tk.attention_decode, return_lse=True), called(torch_decode, sdpa=False)
    return Case("attention", f"attention/{name}", inputs, ours, (), torchs)


ATTENTION_FEATURES += [
    feature_case("window-both-sides", 2, 30, 30, 4, 2, 32, window=(6, 4)),
    feature_case("window-right", 2, 20, 34, 4, 2, 32, window=(-1, 3)),
    feature_case("more-queries", 2, 40, 21, 4, 2, 32, causal=True),
    # not among the small ones: the Triton kernels refuse it by name
    replace(feature_case("negative-scale", 2, 21, 30, 4, 2, 32, causal=True, scale=-0.2), small=False),
    feature_case("multi-query", 2, 21, 30, 4, 1, 32, causal=True),
    feature_case("multi-head", 2, 21, 30, 3, 3, 32, causal=True),
    feature_case("transposed", 2, 21, 30, 4, 2, 32, causal=True, transposed=True),
    feature_case("lse-gradient", 2, 21, 30, 4, 2, 32, causal=True, only_lse=True),
    feature_case("d192-dv128-sinks", 1, 19, 30, 8, 2, 192, 128, causal=True, sinks=True),
    feature_case("gpt-oss", 2, 30, 30, 4, 2, 64, causal=True, sinks=True, window=(11, 0)),
    feature_case("gemma2", 2, 30, 30, 4, 2, 64, causal=True, softcap=5.0, window=(15, 0)),
    feature_case("llama4", 2, 30, 30, 4, 2, 32, causal=True, chunk=16, key_start=(0, 5)),
    feature_case("packed-cross", 1, 33, 44, 4, 2, 32, causal=True, lengths=((9, 0, 1, 23), (20, 3, 12, 9))),
    feature_case("packed-options", 1, 33, 33, 4, 2, 32, causal=True, sinks=True, softcap=5.0, window=(9, 0), lengths=((9, 1, 23),) * 2),
    decode_case("decode-speculative", queries=5),
    decode_case("decode-pages-of-3", queries=2, page=3),
    decode_case("decode-options", queries=2, page=4, sinks=True, softcap=5.0, window=(9, 0)),
    decode_case("decode-chunk", queries=2, chunk=8),
    decode_case("decode-prefix", prefix=40),
    decode_case("decode-prefix-paged", queries=3, page=4, prefix=37, prefix_page=5),
    decode_case("decode-prefix-options", queries=2, prefix=33, prefix_page=4, sinks=True, softcap=5.0, window=(30, 0)),
]

# ---- mla -------------------------------------------------------------------------------------------------------


def mla_case(
    name: str, *, H: int = 3, L: int = 80, R: int = 16, queries: int = 2, page: int = 0, fp8: bool = False, prefix: int = 0,
    prefix_page: int = 0, room: int = 21, small: bool = True,
) -> Case:
    """Absorbed decode. page, prefix_page: 0 is contiguous; fp8: the cache is quantised, the truth is that of its values."""
    B, D = 3, L + R

    def cached(draw: Draw, *shape: int) -> Tensor:
        if not fp8:
            return draw.normal(*shape, D)
        return quantize_latent(draw.normal(*shape, L, dtype=torch.float32), draw.normal(*shape, R, dtype=torch.float32))

    def inputs(draw: Draw) -> Inputs:
        pages = -(-room // page) if page else 0
        found: Inputs = dict(
            q=draw.normal(B, queries, H, D), kv_cache=cached(draw, *((B * pages + 3, page) if page else (B, room))),
            seqlens=torch.tensor([room, queries, room * 2 // 3], dtype=torch.int32),
        )
        if page:
            found["block_table"] = draw.pages(B, pages)
        if prefix:
            count = -(-prefix // prefix_page) if prefix_page else 0
            found["prefix_kv"] = cached(draw, *((count + 3, prefix_page) if prefix_page else (prefix,)))
            if prefix_page:
                found["prefix_table"] = draw.pages(1, count)[0]
        return found

    def run(prefix_kv: Tensor | None = None, prefix_table: Tensor | None = None, **inputs: Any) -> Any:
        shared = None if prefix_kv is None else (prefix_kv, prefix, *(() if prefix_table is None else (prefix_table,)))
        return tk.mla_decode(**inputs, value_dim=L, scale=48**-0.5, prefix=shared, return_lse=True)

    return Case("mla", f"mla/{name}", inputs, run, small=small)


def _appended(draw: Draw, *, fp8: bool, page: int = 0) -> Inputs:
    """Three new tokens of each sequence, written and read back."""
    B, L, R, room = (2, 512, 64, 20) if fp8 else (2, 80, 16, 20)
    shape = (B * room // page + 3, page) if page else (B, room)
    kv = torch.zeros(*shape, 656, dtype=torch.uint8) if fp8 else draw.normal(*shape, L + R)
    inputs = dict(kv_cache=kv, latent=draw.normal(B, 3, L), rope=draw.normal(B, 3, R), seqlens=torch.tensor([20, 6], dtype=torch.int32))
    return inputs | ({"block_table": draw.pages(B, room // page)} if page else {})


def _append_and_gather(
    kv_cache: Tensor, latent: Tensor, rope: Tensor, seqlens: Tensor, block_table: Tensor | None = None
) -> Tensor:
    kv_cache = kv_cache.clone()
    tk.append_latent(kv_cache, latent, rope, seqlens=seqlens, block_table=block_table)
    return tk.gather_latent(kv_cache, seqlens=seqlens, block_table=block_table)


def _gathered(draw: Draw, *, fp8: bool = False) -> Inputs:
    kv = draw.normal(11, 4, 96)
    if fp8:
        kv = quantize_latent(draw.normal(11, 4, 512, dtype=torch.float32), draw.normal(11, 4, 64, dtype=torch.float32))
    return dict(kv_cache=kv, seqlens=torch.tensor([16, 5], dtype=torch.int32), block_table=draw.pages(2, 4))


MLA = [
    mla_case("decode"),
    mla_case("decode-paged", page=4),
    mla_case("decode-one-token", H=16, L=512, R=64, queries=1),
    mla_case("decode-pages-of-64", H=16, L=512, R=64, queries=1, page=64, room=150),
    mla_case("decode-40-values", H=5, L=32, R=8, queries=8, page=3),
    mla_case("decode-128-heads", H=128, L=64, R=16, queries=1, page=16),
    mla_case("decode-fp8", L=512, R=64, fp8=True),
    mla_case("decode-fp8-paged", H=16, L=512, R=64, queries=1, page=16, fp8=True),
    mla_case("decode-prefix", prefix=40),
    mla_case("decode-prefix-paged", page=4, prefix=37, prefix_page=5),
    mla_case("decode-prefix-fp8", L=512, R=64, page=4, prefix=37, prefix_page=5, fp8=True),
    mla_case("decode-long", H=16, L=512, R=64, queries=1, room=3000, page=64, prefix=1100, small=False),
    Case("mla", "mla/gather", _gathered, lambda **x: tk.gather_latent(**x)),
    Case("mla", "mla/gather-fp8", lambda draw: _gathered(draw, fp8=True), lambda **x: tk.gather_latent(**x)),
    Case("mla", "mla/append", lambda draw: _appended(draw, fp8=False), _append_and_gather),
    Case("mla", "mla/append-paged", lambda draw: _appended(draw, fp8=False, page=4), _append_and_gather),
    Case("mla", "mla/append-fp8", lambda draw: _appended(draw, fp8=True), _append_and_gather),
    Case("mla", "mla/append-fp8-paged", lambda draw: _appended(draw, fp8=True, page=4), _append_and_gather),
]

# ---- sparse ----------------------------------------------------------------------------------------------------


def _indexer(draw: Draw, **more: Any) -> Inputs:
    return dict(q=draw.normal(2, 12, 4, 16), k=draw.normal(2, 20, 16), w=draw.normal(2, 12, 4), **more)


def _sparse(draw: Draw) -> Inputs:
    return dict(q=draw.normal(2, 12, 3, 48), kv=draw.normal(2, 20, 48), indices=draw.selected(2, 12, 20, 6))


def _sparse_gqa(draw: Draw) -> Inputs:
    indices = torch.stack([draw.selected(2, 9, 15, 5) for _ in range(2)], 2)  # [B, S, Hkv, K]
    return dict(
        q=draw.normal(2, 9, 4, 16), k=draw.normal(2, 15, 2, 16), v=draw.normal(2, 15, 2, 24), indices=indices,
        sinks=draw.normal(4),
    )


def _indexer_loss(draw: Draw, *, sparse: bool) -> Inputs:
    inputs = _indexer(draw, target_q=draw.normal(2, 12, 3, 24), target_kv=draw.normal(2, 20, 24))
    return inputs | ({"indices": draw.selected(2, 12, 20, 6)} if sparse else {})


def _indexer_loss_long(draw: Draw, *, sparse: bool) -> Inputs:
    """Several blocks of keys, grouped heads, and the attention's lse."""
    B, S, T, H, Hi = 1, 9, 700, 16, 16
    w = draw.normal(B, S, Hi, scale=(Hi * 64) ** -0.5, dtype=torch.float32)
    inputs = dict(q=draw.normal(B, S, Hi, 64), k=draw.normal(B, T, 64), w=w, target_q=draw.normal(B, S, H, 32),
                  target_kv=draw.normal(B, T, 4, 32), target_lse=6.0 + draw.normal(B, S, H, dtype=torch.float32))  # fmt: skip
    return inputs | ({"indices": draw.selected(B, S, T, 600)} if sparse else {})


SPARSE = [
    Case("sparse", "sparse/topk", lambda draw: dict(scores=draw.normal(5, 200)), lambda scores: tk.topk(scores, 17), ("scores",)),
    Case("sparse", "sparse/topk-lengths",
         lambda draw: dict(scores=draw.normal(4, 40), lengths=torch.tensor([0, 3, 40, 21], dtype=torch.int32)),
         lambda scores, lengths: tk.topk(scores, 9, lengths=lengths)),
    Case("sparse", "sparse/indexer-scores", _indexer, lambda **x: tk.indexer_scores(**x), ("q", "k", "w")),
    Case("sparse", "sparse/indexer-topk", _indexer, lambda **x: tk.indexer_topk(**x, top_k=5),
         selection=lambda **x: tk.indexer_scores(**x)),
    Case("sparse", "sparse/attention-latent", _sparse,
         lambda **x: tk.sparse_attention(**x, value_dim=32, scale=0.2, return_lse=True), ("q", "kv"),
         lambda **x: torch_sparse_attention(**x, value_dim=32, scale=0.2)),
    Case("sparse", "sparse/attention-16-heads",
         lambda draw: dict(q=draw.normal(1, 5, 16, 96), kv=draw.normal(1, 700, 96), indices=draw.selected(1, 5, 700, 600)),
         lambda **x: tk.sparse_attention(**x, value_dim=64, return_lse=True), ("q", "kv"),
         lambda **x: torch_sparse_attention(**x, value_dim=64)),
    Case("sparse", "sparse/attention-gqa-sinks", _sparse_gqa,
         lambda q, k, v, indices, sinks: tk.sparse_attention(q, (k, v), indices, sinks=sinks, return_lse=True),
         ("q", "k", "v", "sinks"),
         lambda q, k, v, indices, sinks: torch_sparse_attention(q, (k, v), indices, sinks=sinks)),
    Case("sparse", "sparse/indexer-loss", lambda draw: _indexer_loss(draw, sparse=True),
         lambda **x: tk.indexer_loss(**x, scale=0.2), ("q", "k", "w")),
    Case("sparse", "sparse/indexer-loss-warm-up", lambda draw: _indexer_loss(draw, sparse=False),
         lambda **x: tk.indexer_loss(**x, scale=0.2, reduction="none"), ("q", "k", "w")),
    Case("sparse", "sparse/indexer-loss-600-keys", lambda draw: _indexer_loss_long(draw, sparse=True),
         lambda **x: tk.indexer_loss(**x, scale=0.2, reduction="none"), ("q", "k", "w")),
    Case("sparse", "sparse/indexer-loss-warm-up-700-keys", lambda draw: _indexer_loss_long(draw, sparse=False),
         lambda **x: tk.indexer_loss(**x, scale=0.2, reduction="none"), ("q", "k", "w")),
]
NATIVE_SPARSE = [Case("sparse", **row) for row in NATIVE_SPARSE_ROWS]

# ---- moe -------------------------------------------------------------------------------------------------------


def route_case(name: str, top_k: int, *, bias: bool = False, **options: Any) -> Case:
    def inputs(draw: Draw) -> Inputs:
        return dict(logits=draw.normal(31, 16)) | ({"bias": draw.normal(16, scale=0.1, dtype=torch.float32)} if bias else {})

    def run(logits: Tensor, bias: Tensor | None = None) -> Any:
        return tuple(tk.route(logits, top_k, bias=bias, **options))

    return Case("moe", f"moe/route-{name}", inputs, run, ("logits",))


def experts_case(name: str, sizes: Inputs | None = None, **options: Any) -> Case:
    """tk.moe with `options`; sizes go to expert_inputs."""
    sizes = sizes or {}
    names = (*EXPERT_GRADIENTS, "b_gate_up", "b_down") if sizes.get("biases") else EXPERT_GRADIENTS
    return Case(
        "moe", f"moe/experts-{name}", lambda draw: expert_inputs(draw, **sizes), lambda **x: tk.moe(**x, **options), names,
        lambda **x: torch_moe(**x, **options),
    )


MOE = [
    route_case("softmax", 3),
    route_case("softmax-plain", 3, renormalize=False),
    route_case("deepseek-v2", 3, n_group=4, topk_group=2, group_score="max", renormalize=False, scaling=1.5),
    route_case("deepseek-v3", 3, score="sigmoid", bias=True, n_group=4, topk_group=2, scaling=2.5),
    route_case("gpt-oss", 3, score="softmax_topk"),
    route_case("llama4", 1, score="sigmoid_topk", renormalize=False),
    route_case("deepseek-v4", 3, score="sqrtsoftplus", bias=True, scaling=1.5),
    experts_case("swiglu"),
    experts_case("in-out", dict(in_out=True), layout="in_out", weight_on="input"),
    experts_case("gpt-oss", dict(in_out=True, biases=True, spread=4.0), layout="in_out", activation="gpt_oss"),
    experts_case("gpt-oss-out-in", dict(biases=True, spread=4.0), activation="gpt_oss", limit=5.0),
    experts_case("clamped", dict(spread=4.0), limit=3.0),
    experts_case("geglu", dict(biases=True), activation="geglu", weight_on="input"),
    experts_case("geglu-tanh", dict(in_out=True), activation="geglu_tanh", layout="in_out"),
    experts_case("relu2", dict(columns=24, biases=True), activation="relu2"),
    experts_case("decode", dict(N=2, H=72, inner=40)),
    Case("moe", "moe/load-balancing",
         lambda draw: dict(probs=draw.normal(31, 16).softmax(-1), counts=draw.integers(0, 9, 16)),
         lambda **x: tk.load_balancing_loss(**x), ("probs",)),
    Case("moe", "moe/z-loss", lambda draw: dict(logits=draw.normal(31, 16)), lambda **x: tk.router_z_loss(**x), ("logits",)),
]

# ---- modules ---------------------------------------------------------------------------------------------------


def torch_mla(module: tk.nn.MultiHeadLatentAttention, weights: Inputs, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """MultiHeadLatentAttention without a cache as a plain torch model computes it: F.linear, F.rms_norm, attention over full heads."""

    def project(name: str, inner: Tensor) -> Tensor:
        return F.linear(inner, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def normed(name: str, inner: Tensor) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.rms_norm(inner, weight.shape, weight, eps=1e-6)

    heads, N, R, C = module.heads, module.nope_dim, module.rope_dim, module.kv_latent
    q = project("q_proj", x) if module.q_latent is None else project("q_b_proj", normed("q_a_norm", project("q_a_proj", x)))
    q_nope, q_rope = q.unflatten(-1, (heads, -1)).split((N, R), -1)  # [B, S, H, ·]
    latent, k_rope = project("kv_a_proj", x).split((C, R), -1)
    k_nope, v = project("kv_b_proj", normed("kv_a_norm", latent)).unflatten(-1, (heads, -1)).split((N, module.value_dim), -1)
    turn = functools.partial(rotate, rope=rope, interleaved=module.rope_interleaved)
    k_rope = turn(k_rope.unsqueeze(-2)).expand(*k_nope.shape[:-1], R)
    q, k = torch.cat((q_nope, turn(q_rope)), -1), torch.cat((k_nope, k_rope), -1)
    out, _ = torch_attention(q, k, v, causal=True, scale=module.scale, sdpa=False)
    return project("o_proj", out.flatten(-2))


def mla_module_case(name: str, *, mode: str = "auto", **sizes: Any) -> Case:
    """The module's output and the gradients of its input and of every weight; mode "absorbed" has no gradient."""
    B, S, hidden, heads = 2, 21, 40, 3
    options = {**dict(kv_latent=24, q_latent=20, nope_dim=12, rope_dim=8, value_dim=10), **sizes}
    module = tk.nn.MultiHeadLatentAttention(hidden, heads, **options)
    shapes = {n: p.shape for n, p in module.named_parameters()}

    def inputs(draw: Draw) -> Inputs:
        weights = {n: draw.weight(*shape) if len(shape) > 1 else 1 + draw.normal(*shape, scale=0.3) for n, shape in shapes.items()}
        return dict(x=draw.normal(B, S, hidden), **weights)

    def rope(x: Tensor) -> tuple[Tensor, Tensor]:
        return tk.nn.RotaryEmbedding(module.rope_dim, 100.0)(torch.arange(S, device=x.device).expand(B, S))

    def run(x: Tensor, **weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x, rope(x)), dict(mode=mode))

    def baseline(x: Tensor, **weights: Tensor) -> Tensor:
        return torch_mla(module, weights, x, rope(x))

    return Case("mla", f"mla/module-{name}", inputs, run, () if mode == "absorbed" else ("x", *shapes), baseline)


MLA_MODULES = [
    mla_module_case("deepseek-v3"),
    mla_module_case("v2-lite", q_latent=None),
    mla_module_case("glm", nope_dim=12, value_dim=20, bias=True),
    mla_module_case("absorbed", mode="absorbed"),
]

# ---- grpo and linear -------------------------------------------------------------------------------------------


def head_case(name: str, N: int, D: int, V: int, *, bias: bool = False, small: bool = True, **options: Any) -> Case:
    def inputs(draw: Draw) -> Inputs:
        target = draw.integers(0, V, N, dtype=torch.int64)
        target[::5] = -100
        # logits of standard deviation 3: some tokens are nearly certain, some are not
        more = dict(bias=draw.normal(V)) if bias else {}
        return dict(hidden=draw.normal(N, D), weight=draw.normal(V, D, scale=3 * D**-0.5), target=target, **more)

    def run(**x: Any) -> Any:
        return tk.linear_logprob(**x, **options)

    return Case("grpo", f"grpo/linear-logprob-{name}", inputs, run, ("hidden", "weight", *(("bias",) if bias else ())), small=small)


def _torch_head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What torch does: logits of the tensors' dtype, the rest in float32."""
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    active = target != -100
    lp = log_p.gather(1, target.clamp_min(0)[:, None])[:, 0]
    return torch.where(active, lp, 0.0), torch.where(active, -(log_p.exp() * log_p).sum(-1), 0.0)


def token_loss(draw: Draw, *names: str, packed: bool = False) -> Inputs:
    """What policy_loss takes, with holes in the mask and an empty sequence; `names` are the optional tensors."""
    B, S = 4, 9
    logprob = -draw.normal(B, S, dtype=torch.float32).abs()
    mask = torch.ones(B, S)
    mask[1, 5:] = 0
    mask[2, 2] = 0
    mask[3] = 0
    near = lambda: logprob + draw.normal(B, S, scale=0.2, dtype=torch.float32)
    inputs = dict(
        logprob=logprob, old_logprob=near(), ref_logprob=near(), rollout_logprob=near(),
        entropy=draw.normal(B, S, dtype=torch.float32).abs(), advantages=draw.normal(B, dtype=torch.float32), mask=mask,
    )
    inputs = {k: v for k, v in inputs.items() if k in (*names, "logprob", "old_logprob", "advantages", "mask")}
    if not packed:
        return inputs
    lengths = torch.tensor([9, 6, 4, 0])
    inside = torch.arange(S) < lengths[:, None]
    inputs = {k: v[inside] if v.dim() == 2 else v for k, v in inputs.items()}
    return inputs | dict(cu_seqlens=torch.tensor([0, 9, 15, 19, 19], dtype=torch.int32))


LOSS_OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # options, the tensors they need
    "plain": ({}, ()),
    "delta": (dict(delta=1.5, epsilon_high=0.28), ()),
    "k1": (dict(beta=0.1, kl="k1"), ("ref_logprob",)),
    "k2": (dict(beta=0.1, kl="k2"), ("ref_logprob",)),
    "k3": (dict(beta=0.1), ("ref_logprob",)),
    "k3-corrected": (dict(beta=0.1, kl_correction=True), ("ref_logprob",)),
    "off-policy": (dict(off_policy_threshold=0.0), ("rollout_logprob",)),
    "entropy-bonus": (dict(entropy_coef=0.03), ("entropy",)),
    "top-entropy": (dict(top_entropy=0.4, entropy_coef=0.03), ("entropy",)),
    "global-tokens": (dict(num_items_in_batch=40), ()),
    "sequence-ratio": (dict(importance_sampling_level="sequence"), ()),
    "token-truncate": (dict(rollout_correction="token_truncate", rollout_clip=(None, 1.1)), ("rollout_logprob",)),
    "token-mask": (dict(rollout_correction="token_mask", rollout_clip=(0.8, 1.2)), ("rollout_logprob",)),
    "sequence-truncate": (dict(rollout_correction="sequence_truncate", rollout_clip=(None, 1.1)), ("rollout_logprob",)),
    "sequence-mask": (dict(rollout_correction="sequence_mask", rollout_clip=(0.2, 5.0)), ("rollout_logprob",)),
}
LOSS_TYPES: dict[str, dict[str, Any]] = {
    "grpo": {}, "bnpo": {}, "dr_grpo": dict(max_completion_length=9), "dapo": dict(epsilon_high=0.28), "gspo": {},
    "cispo": dict(epsilon_high=1.3), "sapo": {}, "luspo": {}, "vespo": {}, "ppo": {}, "reinforce": {}, "rloo": {},
}


def loss_case(loss_type: str, option: str = "plain", *, packed: bool = False, small: bool = True) -> Case:
    arguments, tensors = LOSS_OPTIONS[option]
    arguments = LOSS_TYPES[loss_type] | arguments
    gradients = tuple(name for name in ("logprob", "entropy", "ref_logprob") if name == "logprob" or name in tensors)
    name = f"grpo/policy-loss-{loss_type}" + f"-{option}" * (option != "plain") + "-packed" * packed
    return Case(
        "grpo", name, lambda draw: token_loss(draw, *tensors, packed=packed),
        lambda **x: tk.policy_loss(**x, loss_type=loss_type, **arguments)[0], gradients, small=small,
    )


def loss_cases() -> list[Case]:
    """Every loss type plain and packed, and with every option that it takes; opcheck and compilation do with the first."""
    cases = [loss_case(loss_type) for loss_type in LOSS_TYPES]
    cases += [loss_case(loss_type, packed=True, small=loss_type == "dapo") for loss_type in LOSS_TYPES]
    for loss_type in LOSS_TYPES:
        for option in LOSS_OPTIONS:
            if option != "plain" and not (loss_type == "vespo" and option.startswith("sequence")):
                cases.append(loss_case(loss_type, option, small=loss_type == "dapo"))
    return cases


def _grpo_loss(draw: Draw) -> Inputs:
    return dict(
        hidden=draw.normal(2, 6, 16), weight=draw.normal(37, 16, scale=0.7), target=draw.integers(0, 37, 2, 6),
        old_logprob=-draw.normal(2, 6, dtype=torch.float32).abs() - 2, advantages=draw.normal(2, dtype=torch.float32),
        mask=torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
    )


def _rewards(draw: Draw, *each: int) -> Inputs:
    rewards = draw.normal(24, *each, dtype=torch.float32)
    rewards[3], rewards[8:12] = float("nan"), 1.0
    return dict(rewards=rewards)


def _ragged(draw: Draw) -> Inputs:
    return _rewards(draw) | dict(group_ids=draw.integers(0, 5, 24))


def advantage_cases() -> list[Case]:
    def case(name: str, inputs: Callable[[Draw], Inputs], **options: Any) -> Case:
        return Case("grpo", f"grpo/advantages-{name}", inputs, lambda **x: tk.group_advantages(**x, **options))

    one = [case(n, _rewards, group_size=4, normalize=n) for n in ("group", "none", "batch", "rloo", "maxrl", "whiten")]
    weights = torch.tensor([1.0, 0.25, 2.0])
    return [
        *one,
        case("ragged", _ragged),
        case("population-std", _rewards, group_size=4, correction=0, eps=1e-4),
        case("sum", lambda draw: _rewards(draw, 3), group_size=4, weights=weights),
        case("gdpo", lambda draw: _rewards(draw, 3), group_size=4, weights=weights, aggregation="normalize_then_sum"),
        case("gdpo-tokens", lambda draw: _rewards(draw, 3) | dict(token_counts=draw.integers(1, 99, 24)), group_size=4,
             aggregation="normalize_then_sum", whiten_over="tokens"),
    ]


GRPO = [
    head_case("vocab-odd", 23, 48, 337),
    head_case("softcap-bias", 17, 33, 101, bias=True, softcap=5.0, temperature=0.7),
    head_case("no-entropy", 9, 16, 50, entropy=False),
    head_case("large", 300, 96, 5003, small=False),
    Case("grpo", "grpo/logprob",
         lambda draw: dict(logits=draw.normal(11, 203, scale=3.0), target=draw.integers(0, 203, 11)),
         lambda **x: tk.logprob(**x, temperature=0.8), ("logits",)),
    *advantage_cases(),
    *loss_cases(),
    Case("grpo", "grpo/logprob-softcap",
         lambda draw: dict(logits=draw.normal(3, 7, 4099, scale=3.0)[:, :-1], target=draw.integers(-1, 4099, 3, 6)),
         lambda **x: tk.logprob(**x, softcap=9.0, ignore_index=-1), ("logits",)),
    replace(head_case("keep-logits", 25, 40, 1009, keep_logits=True), baseline=_torch_head),
    Case("grpo", "grpo/grpo-loss", _grpo_loss, lambda **x: tk.grpo_loss(**x)[0], ("hidden", "weight")),
]


def _linear(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    """torch's matrix product. Fewer than 16 rows go to kernels of another order of summation; ours has one order for all."""
    rows = F.pad(x, (0, 0, 0, max(0, 16 - len(x))))
    return F.linear(rows, weight, *bias)[: len(x)]


def linear_case(name: str, N: int, I: int, O: int, *, bias: bool = False, small: bool = True) -> Case:
    def inputs(draw: Draw) -> Inputs:
        return dict(x=draw.normal(N, I), weight=draw.weight(O, I), **(dict(bias=draw.normal(O)) if bias else {}))

    gradients = ("x", "weight", "bias") if bias else ("x", "weight")
    return Case("linear", f"linear/{name}", inputs, lambda **x: tk.linear(**x), gradients, lambda **x: _linear(*x.values()), small=small)


LINEAR = [
    linear_case("odd", 37, 53, 29, bias=True),
    linear_case("one-row", 1, 64, 96),
    linear_case("large", 200, 300, 500, small=False),
]

CASES = [*ATTENTION, *ATTENTION_FEATURES, *MLA, *MLA_MODULES, *SPARSE, *NATIVE_SPARSE, *MOE, *GRPO, *LINEAR]
FAMILIES = ("attention", "mla", "sparse", "moe", "grpo", "linear")
