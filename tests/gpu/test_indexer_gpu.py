"""The Triton top-k, indexer and indexer's loss on a real GPU, at real sizes: against float64, and bits that must not move.

Shapes: N rows, T scores a row or keys, k kept; B batch, S queries, Hi index heads, Di index dim, H heads of the attention, K slots.
"""

from __future__ import annotations

import pytest
import thinkernel as tk
import torch
from test_topk_gpu import SIZES, assert_same, draw
from thinkernel.ops.memory import poisoned_results
from thinkernel.reference import sparse as reference
from thinkernel.testing.compare import assert_bitwise, check
from torch import Tensor

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEARNT = ("q", "k", "w")


@pytest.fixture(autouse=True)
def triton():
    with tk.use_backend("triton"), poisoned_results():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pattern", ["normal", "ties", "constant", "specials", "low_bits"])
def test_topk_equals_the_reference(pattern: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, length, k = size
    scores = draw(pattern, rows, length, dtype=dtype, seed=rows + length + k)
    assert_same(tk.topk(scores.cuda(), k), reference.topk(scores, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_of_ragged_rows_of_a_batch_and_alone(dtype: torch.dtype) -> None:
    scores, lengths = draw("specials", 300, 40_001, dtype=dtype, seed=1), torch.randint(0, 40_002, (300,), dtype=torch.int32)
    lengths[:4] = torch.tensor([0, 2048, 40_001, 1])
    poisoned = scores.masked_fill(torch.arange(40_001) >= lengths[:, None], torch.inf).cuda()
    found = tk.topk(poisoned, 2048, lengths=lengths.cuda())
    assert_same(found, reference.topk(scores, 2048, lengths=lengths))
    for row in (2, 299):  # alone it is cut into parts
        alone = tk.topk(poisoned[row : row + 1], 2048, lengths=lengths[row : row + 1].cuda())
        assert torch.equal(alone[1], found[1][row : row + 1])


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def scores_and_gradients(q: Tensor, k: Tensor, w: Tensor, dout: Tensor, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, w)]
    with tk.use_backend(backend):
        out = tk.indexer_scores(*leaves)
        return {"scores": out.detach()} | dict(zip(LEARNT, torch.autograd.grad(out, leaves, dout.to(out.dtype)), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 512, 1024, 64, 128), (2, 130, 700, 32, 64), (2, 70, 301, 5, 200), (1, 33, 2000, 1, 40)], ids=str)
def test_scores(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    B, S, T, Hi, Di = sizes
    torch.manual_seed(S)
    q, k, w = normal(B, S, Hi, Di, dtype=dtype), normal(B, T, Di, dtype=dtype), normal(B, S, Hi, dtype=dtype)
    dout = torch.randn(B, S, T, device="cuda")
    found, again = (scores_and_gradients(q, k, w, dout, "triton", dtype) for _ in range(2))
    ref64, base = (scores_and_gradients(q, k, w, dout, "reference", t) for t in (torch.float64, dtype))
    for name, x in found.items():
        assert_bitwise(again[name], x, f"{name}, second run")
        check(x, ref64[name], base[name], name=name)
    for s in (0, S - 1):  # decode and prefill: the same bits
        alone = tk.indexer_scores(q[-1:, s : s + 1], k[-1:], w[-1:, s : s + 1], causal=False)
        seen = T - S + s + 1
        assert_bitwise(alone[..., :seen], found["scores"][-1:, s : s + 1, :seen], f"query {s} alone")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("S,Hi,Di", [(512, 64, 128), (1, 64, 128), (3, 16, 64)])
def test_selection_is_topk_of_the_scores(S: int, Hi: int, Di: int, dtype: torch.dtype) -> None:
    """Dense, in pages, in FP8 (small integers, whose scores are exact) and packed; a second run and a row alone: the same choice."""
    B, T, k = 3, 9000, 2048
    q, keys, w = (torch.randint(-3, 4, s, device="cuda").to(dtype) for s in ((B, S, Hi, Di), (B, T, Di), (B, S, Hi)))
    w = w.float()
    want = tk.topk(tk.indexer_scores(q, keys, w), k, lengths=torch.arange(T - S + 1, T + 1, device="cuda").expand(B, S))[1]
    found = tk.indexer_topk(q, keys, w, top_k=k)
    assert torch.equal(found, want) and torch.equal(tk.indexer_topk(q, keys, w, top_k=k), found)
    assert torch.equal(tk.indexer_topk(q[1:2, -1:], keys[1:2], w[1:2, -1:], top_k=k), found[1:2, -1:])
    cu_q, cu_k = (torch.arange(B + 1, device="cuda", dtype=torch.int32) * n for n in (S, T))
    packed = tk.indexer_topk(*(x.flatten(0, 1) for x in (q, keys, w)), top_k=k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert torch.equal(packed.view(B, S, k), found)
    order = torch.randperm(B * T // 60, device="cuda")
    table, seqlens = order.view(B, -1).int(), torch.full((B,), T, device="cuda", dtype=torch.int32)
    for cache, scale in ((keys, None), (keys.to(torch.float8_e4m3fn), torch.ones(B, T, device="cuda"))):
        pages = torch.empty_like(cache).view(-1, 60, Di)
        pages.view(torch.uint8)[order] = cache.view(-1, 60, Di).view(torch.uint8)
        scales = None if scale is None else scale.view(-1, 60)
        got = tk.indexer_topk(q, pages, w, top_k=k, seqlens=seqlens, block_table=table, k_scale=scales)
        assert torch.equal(got, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("K", [0, 300])
@pytest.mark.parametrize("H,Hkv,D", [(128, 0, 576), (32, 8, 128)])
def test_loss(H: int, Hkv: int, D: int, K: int, with_lse: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(H + K)
    B, S, T, Hi, Di = 2, 40, 700, 64, 128
    target_kv = normal(B, T, Hkv, D, dtype=dtype) if Hkv else normal(B, T, D, dtype=dtype)
    inputs = dict(q=normal(B, S, Hi, Di, dtype=dtype), k=normal(B, T, Di, dtype=dtype), w=torch.randn(B, S, Hi, device="cuda") * 0.01,
                  target_q=normal(B, S, H, D, dtype=dtype), target_kv=target_kv)
    if K:
        inputs["indices"] = torch.rand(B, S, T - S, device="cuda").topk(K).indices.sort(-1).values.int()
        inputs["indices"][0, 0, 7:] = -1
    if with_lse:
        inputs["target_lse"] = 6 + torch.randn(B, S, H, device="cuda")

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        given = {n: x.to(x.dtype if n == "indices" or dtype != torch.float64 else dtype) for n, x in inputs.items()}
        leaves = [given[n].detach().requires_grad_() for n in LEARNT]
        with tk.use_backend(backend):
            loss = tk.indexer_loss(**given | dict(zip(LEARNT, leaves, strict=True)), scale=D**-0.5, reduction="none")
            return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]

    found, again, ref64, base = run("triton", dtype), run("triton", dtype), run("reference", torch.float64), run("reference", dtype)
    for name, x, y, want, same in zip(("loss", "dq", "dk", "dw"), found, again, ref64, base, strict=True):
        assert_bitwise(y, x, f"{name}, second run")
        check(x, want, same, name=name)


def test_peak_memory_does_not_grow_with_the_square() -> None:
    """Selection over 64K keys: the workspace of 128 MiB and the result, where [S, T] scores would be 1 GiB."""
    S, T = 4096, 65_536
    q, k, w = normal(1, S, 8, 64, dtype=torch.bfloat16), normal(1, T, 64, dtype=torch.bfloat16), torch.randn(1, S, 8, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with tk.use_backend("triton"):
        tk.indexer_topk(q, k, w, top_k=512)
    assert torch.cuda.max_memory_allocated() - before < 200 << 20
