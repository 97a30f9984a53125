"""What sparse attention and its indexer refuse before any kernel runs, by the name of the argument, and what they still take.

Shapes: B batch, S queries, T keys, H heads, Hkv key heads, D head dim, Hi index heads, Di index dim, K slots, P pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import thinkernel as tk
import torch
from thinkernel.reference import sparse as reference
from thinkernel.reference.mla import quantize_latent
from thinkernel.testing import assert_bitwise
from thinkernel.testing.inputs import Draw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

B, S, T, H, Hkv, D, K = 2, 3, 6, 4, 2, 8, 2
Hi, Di, P, PAGE = 2, 4, 5, 4
NUMBERS: dict[str, Any] = {"nan": float("nan"), "inf": float("inf"), "1e300": 1e300, "text": "a", "flag": True}


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(*shape, dtype=dtype, device=device)


def ints(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def pages(**changed: Any) -> dict[str, Any]:
    """Lengths and page numbers of two sequences."""
    return dict(seqlens=ints(5, 2), block_table=ints([0, 1], [2, 3])) | changed


def packed(**changed: Any) -> dict[str, Any]:
    """Offsets of two sequences of S tokens."""
    return dict(cu_seqlens_q=ints(0, S, 2 * S)) | changed


def latents(**changed: Any) -> Any:
    """sparse_attention over latents [B, T, D]."""
    q, kv, indices = ones(B, S, H, D), ones(B, T, D), torch.zeros(B, S, K, dtype=torch.int32)
    return tk.sparse_attention(**dict(q=q, kv=kv, indices=indices) | changed)


def latent_pages(**changed: Any) -> Any:
    return latents(**dict(kv=ones(P, PAGE, D)) | changed)


def latents_packed(**changed: Any) -> Any:
    """sparse_attention over two packed sequences of S tokens."""
    indices = torch.zeros(2 * S, K, dtype=torch.int32)
    return latents(**packed(q=ones(2 * S, H, D), kv=ones(2 * S, D), indices=indices) | changed)


def gqa(v: Tensor | None = None, **changed: Any) -> Any:
    """sparse_attention over keys and values [B, T, Hkv, D]."""
    kv = ones(B, T, Hkv, D), ones(B, T, Hkv, D) if v is None else v
    return latents(**dict(kv=kv, indices=torch.zeros(B, S, Hkv, K, dtype=torch.int32)) | changed)


def indexer(function: Callable[..., Any], **changed: Any) -> Any:
    return function(**dict(q=ones(B, S, Hi, Di), k=ones(B, T, Di), w=ones(B, S, Hi)) | changed)


def topk(**changed: Any) -> Any:
    return indexer(tk.indexer_topk, **dict(top_k=K) | changed)


def topk_pages(**changed: Any) -> Any:
    return topk(**dict(k=ones(P, PAGE, Di)) | changed)


def topk_packed(**changed: Any) -> Any:
    return topk(**packed(q=ones(2 * S, Hi, Di), k=ones(2 * S, Di), w=ones(2 * S, Hi)) | changed)


def loss(**changed: Any) -> Any:
    return indexer(tk.indexer_loss, **dict(target_q=ones(B, S, H, D), target_kv=ones(B, T, Hkv, D), scale=0.3) | changed)


def no_heads(**changed: Any) -> dict[str, Any]:
    return dict(q=ones(B, S, 0, Di), w=ones(B, S, 0)) | changed


def autocast(call: Callable[..., Any], **changed: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call(**changed)


Refused = dict[str, tuple[str, Callable[..., Any], dict[str, Any]]]  # name -> the argument, the call, what is wrong with it

KEYS_AND_VALUES: Refused = {
    "v in another dtype": ("kv", gqa, dict(v=ones(B, T, Hkv, D, dtype=torch.bfloat16))),
    "v in float64": ("kv", gqa, dict(v=ones(B, T, Hkv, D, dtype=torch.float64))),
    "v on another device": ("kv", gqa, dict(v=ones(B, T, Hkv, D, device="meta"))),
    "v in float64 under autocast": ("kv", lambda v: autocast(gqa, v=v), dict(v=ones(B, T, Hkv, D, dtype=torch.float64))),
    "latents in float64 under autocast": ("kv", lambda kv: autocast(latents, kv=kv), dict(kv=ones(B, T, D, dtype=torch.float64))),
    "v without values": ("kv", gqa, dict(v=ones(B, T, Hkv, 0))),
    "q and k without values": ("q", gqa, dict(q=ones(B, S, H, 0), kv=(ones(B, T, Hkv, 0), ones(B, T, Hkv, D)), scale=1.0)),
    "q without heads": ("q", latents, dict(q=ones(B, S, 0, D))),
    "FP8 of 576 bytes": ("kv", latents, dict(q=ones(B, S, H, 576), kv=ones(B, T, 576, dtype=torch.uint8))),
    "FP8 of 660 bytes": ("kv", latents, dict(q=ones(B, S, H, 576), kv=ones(B, T, 660, dtype=torch.uint8))),
    "FP8 of 8 bytes in pages": ("kv", latent_pages, pages(q=ones(B, S, H, 576), kv=ones(P, PAGE, 8, dtype=torch.uint8))),
}
LENGTHS: Refused = {
    f"{name}: {what}": (wrong, call, pages(**changed) if paged else changed)
    for name, call, paged in (
        ("attention", latents, False), ("attention over pages", latent_pages, True),
        ("attention over k, v", gqa, False), ("topk", topk, False), ("topk over pages", topk_pages, True),
    )
    for what, wrong, changed in (
        ("lengths as a list", "seqlens", dict(seqlens=[5, 2])),
        ("lengths in float", "seqlens", dict(seqlens=ones(B))),
        ("one length as a number", "seqlens", dict(seqlens=torch.tensor(2))),
        ("too few lengths", "seqlens", dict(seqlens=ints(5))),
        ("too many lengths", "seqlens", dict(seqlens=ints(5, 2, 1))),
        ("lengths in a column", "seqlens", dict(seqlens=ints([5], [2]))),
        ("pages as a list", "block_table", dict(block_table=[[0, 1], [2, 3]])),
        ("pages in float", "block_table", dict(block_table=ones(B, 2))),
        ("pages of one row", "block_table", dict(block_table=ints([0, 1]))),
        ("pages of three rows", "block_table", dict(block_table=ints([0, 1], [2, 3], [0, 0]))),
        ("pages without rows", "block_table", dict(block_table=ints(0, 1))),
    )
    if paged or "block_table" not in changed
}  # fmt: skip
LENGTHS |= {
    "attention: pages of no positions": ("kv", latent_pages, pages(kv=ones(P, 0, D), seqlens=ints(0, 0))),
    "attention: k, v in pages of no positions": ("kv", gqa, pages(kv=(ones(P, 0, Hkv, D),) * 2, seqlens=ints(0, 0))),
    "topk: lengths on another device": ("seqlens", topk, dict(seqlens=ints(5, 2).to("meta"))),
    "topk: pages on another device": ("block_table", topk_pages, pages(block_table=ints([0, 1], [2, 3]).to("meta"))),
    "topk: pages of no positions": ("k", topk_pages, pages(k=ones(P, 0, Di), seqlens=ints(0, 0))),
}
PACKED: Refused = {
    f"{name}: {what}": (wrong, call, changed)
    for name, call in (("attention", latents_packed), ("topk", topk_packed))
    for what, wrong, changed in (
        ("fewer offsets of keys", "cu_seqlens_k", dict(cu_seqlens_k=ints(0, 2 * S))),
        ("more offsets of keys", "cu_seqlens_k", dict(cu_seqlens_k=ints(0, 2, S, 2 * S))),
        ("offsets of keys in float", "cu_seqlens_k", dict(cu_seqlens_k=torch.tensor([0.0, S, 2 * S]))),
        ("offsets of keys as a list", "cu_seqlens_k", dict(cu_seqlens_k=[0, S, 2 * S])),
        ("offsets of keys on another device", "cu_seqlens_k", dict(cu_seqlens_k=ints(0, S, 2 * S).to("meta"))),
        ("offsets in float", "cu_seqlens_q", dict(cu_seqlens_q=torch.tensor([0.0, S, 2 * S]), cu_seqlens_k=ints(0, S, 2 * S))),
        ("offsets as a list", "cu_seqlens_q", dict(cu_seqlens_q=[0, S, 2 * S])),
        ("offsets on another device", "cu_seqlens_q", dict(cu_seqlens_q=ints(0, S, 2 * S).to("meta"))),
        ("pages", "block_table", dict(block_table=ints([0, 1], [2, 3]))),
    )
}
PACKED |= {
    "attention: lengths": ("seqlens", latents_packed, dict(seqlens=ints(3, 3))),
    "attention: lengths and pages": ("seqlens", latents_packed, pages(seqlens=ints(3, 3))),
    "attention: offsets of keys alone": ("cu_seqlens_k", latents, dict(cu_seqlens_k=ints(0, B))),
    "topk: offsets of keys alone": ("cu_seqlens_k", topk, dict(cu_seqlens_k=ints(0, B))),
}
INDEXER: Refused = {
    "topk: no index heads": ("q", topk, no_heads()),
    "topk: no index heads, packed": ("q", topk_packed, dict(q=ones(2 * S, 0, Di), w=ones(2 * S, 0))),
    "scores: no index heads": ("q", lambda **x: indexer(tk.indexer_scores, **x), no_heads()),
    "loss: no index heads": ("q", loss, no_heads()),
    "loss: no index heads, sparse": ("q", loss, no_heads(indices=torch.zeros(B, S, K, dtype=torch.int32))),
    "topk: scales as a list": ("k_scale", topk, dict(k_scale=[[1.0] * T] * B)),
    "topk: scales as integers": ("k_scale", topk, dict(k_scale=ones(B, T, dtype=torch.int32))),
    "topk: scales as FP8": ("k_scale", topk, dict(k_scale=ones(B, T).to(torch.float8_e4m3fn))),
    "topk: scales on another device": ("k_scale", topk, dict(k_scale=ones(B, T, device="meta"))),
    "loss: fewer keys' rows": ("k", loss, dict(k=ones(1, T, Di), target_kv=ones(1, T, Hkv, D))),
    "loss: more keys' rows": ("k", loss, dict(k=ones(B + 1, T, Di), target_kv=ones(B + 1, T, Hkv, D))),
    "loss: three heads of keys for four": ("target_kv", loss, dict(target_kv=ones(B, T, 3, D))),
    "loss: more heads of keys than of queries": ("target_kv", loss, dict(target_kv=ones(B, T, 2 * H, D))),
    "loss: no heads of keys": ("target_kv", loss, dict(target_kv=ones(B, T, 0, D))),
    "loss: no heads of queries": ("target_q", loss, dict(target_q=ones(B, S, 0, D))),
    "loss: no heads of queries, latents": ("target_q", loss, dict(target_q=ones(B, S, 0, D), target_kv=ones(B, T, D))),
    "loss: lse as a list": ("target_lse", loss, dict(target_lse=[[[0.0] * H] * S] * B)),
    "loss: lse as integers": ("target_lse", loss, dict(target_lse=ones(B, S, H, dtype=torch.int64))),
}
SCALES: Refused = {f"attention: {name}": ("scale", latents, dict(scale=x)) for name, x in NUMBERS.items()}
SCALES |= {f"loss: {name}": ("scale", loss, dict(scale=x)) for name, x in NUMBERS.items()}
SCALES |= {"loss: None": ("scale", loss, dict(scale=None)), "attention: a tensor": ("scale", latents, dict(scale=ones(1)))}


REFUSED = [*KEYS_AND_VALUES.items(), *LENGTHS.items(), *PACKED.items(), *INDEXER.items(), *SCALES.items()]


@pytest.mark.parametrize("argument, call, changed", [case for _, case in REFUSED], ids=[name for name, _ in REFUSED])
def test_refused(argument, call, changed):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: "):
        call(**changed)


# ---- what they take --------------------------------------------------------------------------------------------

FP8 = dict(q=ones(B, S, H, 576), kv=torch.zeros(B, T, 656, dtype=torch.uint8))
TAKEN: dict[str, tuple[Callable[..., Any], dict[str, Any], list[int]]] = {  # name -> the call, its options, the result's shape
    "latents": (latents, {}, [B, S, H, D]),
    "k, v": (gqa, dict(v=ones(B, T, Hkv, 5)), [B, S, H, 5]),
    "k, v in a list": (gqa, dict(kv=[ones(B, T, Hkv, D), ones(B, T, Hkv, D)]), [B, S, H, D]),
    "integer scale": (latents, dict(scale=1), [B, S, H, D]),
    "lengths": (latents, dict(seqlens=ints(5, 2)), [B, S, H, D]),
    "lengths in int64": (latents, dict(seqlens=ints(5, 2, dtype=torch.int64)), [B, S, H, D]),
    "pages": (latent_pages, pages(), [B, S, H, D]),
    "k, v in pages": (gqa, pages(kv=(ones(P, PAGE, Hkv, D), ones(P, PAGE, Hkv, 5))), [B, S, H, 5]),
    "FP8": (latents, FP8, [B, S, H, 576]),
    "FP8 in pages": (latents, pages(**FP8 | dict(kv=torch.zeros(P, PAGE, 656, dtype=torch.uint8))), [B, S, H, 576]),
    "packed": (latents_packed, {}, [2 * S, H, D]),
    "packed, other keys": (latents_packed, dict(kv=ones(9, D), cu_seqlens_k=ints(0, 4, 9, dtype=torch.int64)), [2 * S, H, D]),
    "no sequences": (latents, dict(q=ones(0, S, H, D), kv=ones(0, T, D), indices=torch.zeros(0, S, K).int()), [0, S, H, D]),
    "topk": (topk, {}, [B, S, K]),
    "topk with scales": (topk, dict(k=ones(B, T, Di).to(torch.float8_e4m3fn), k_scale=ones(B, T)), [B, S, K]),
    "topk from lengths": (topk, dict(seqlens=ints(5, 2)), [B, S, K]),
    "topk from pages": (topk_pages, pages(k_scale=ones(P, PAGE)), [B, S, K]),
    "topk, packed": (topk_packed, dict(k_scale=ones(2 * S)), [2 * S, K]),
    "loss": (loss, {}, []),
    "loss of latents": (loss, dict(target_kv=ones(B, T, D), target_lse=ones(B, S, H), reduction="none"), [B, S]),
    "loss, sparse": (loss, dict(indices=torch.zeros(B, S, K, dtype=torch.int64), scale=-1), []),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_still_taken(name):
    call, options, shape = TAKEN[name]
    assert list(call(**options).shape) == shape


@pytest.mark.parametrize("name", TAKEN)
def test_shapes_alone_are_looked_at(name):
    """The checks trace on tensors that hold no values."""
    call, options, shape = TAKEN[name]
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: Any) -> Any:
        if isinstance(x, Tensor):
            return mode.from_tensor(x)
        return type(x)(fake(y) for y in x) if isinstance(x, (tuple, list)) else x

    with mode:
        assert list(call(**{n: fake(x) for n, x in options.items()}).shape) == shape


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_as_one_graph(dynamic):
    def decode(q: Tensor, kv: Tensor, indices: Tensor, seqlens: Tensor, table: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        chosen = tk.indexer_topk(q, kv, w, top_k=K, seqlens=seqlens, block_table=table)
        return chosen, tk.sparse_attention(q, kv, indices, scale=0.2, seqlens=seqlens, block_table=table)  # type: ignore[return-value]

    kv, indices = torch.randn(P, PAGE, D), torch.zeros(B, S, K, dtype=torch.int32)
    given = torch.randn(B, S, H, D), kv, indices, ints(5, 3), ints([0, 1], [2, 3]), torch.randn(B, S, H)
    found = torch.compile(decode, fullgraph=True, backend="eager", dynamic=dynamic)(*given)
    for x, want in zip(found, decode(*given), strict=True):
        assert torch.equal(x, want)


def test_compiled_refuses():
    with pytest.raises((ValueError, TypeError, torch._dynamo.exc.Unsupported), match="seqlens: got"):
        torch.compile(latents, fullgraph=True, backend="eager")(seqlens=ones(B))


def test_autocast_takes_what_it_casts():
    """k, v of another dtype than q, all three cast."""
    kv = ones(B, T, Hkv, D), ones(B, T, Hkv, D, dtype=torch.float16)
    assert autocast(gqa, kv=kv).dtype == torch.bfloat16


def test_values_are_those_of_the_reference():
    q, kv = torch.randn(B, S, H, D), torch.randn(P, PAGE, D)
    indices = torch.tensor([0, -1], dtype=torch.int32).expand(B, S, K)
    found = tk.sparse_attention(q, kv, indices, **pages())
    want, _ = reference.sparse_attention(q, kv, indices, **pages())
    torch.testing.assert_close(found, want)


def test_fp8_tokens_under_autocast() -> None:
    """The bytes are no numbers to be cast; the queries are."""
    draw = Draw(2)
    q, indices = draw.normal(1, 1, 2, 576), torch.arange(7, dtype=torch.int32).view(1, 1, 7)
    kv = quantize_latent(draw.normal(1, 7, 512), draw.normal(1, 7, 64))
    with torch.autocast("cpu", torch.bfloat16):
        found = tk.sparse_attention(q, kv, indices, value_dim=512, scale=0.04)
    want = tk.sparse_attention(q.bfloat16(), kv, indices, value_dim=512, scale=0.04)
    assert_bitwise(found, want)
