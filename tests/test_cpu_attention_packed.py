"""Packed sequences (cu_seqlens) in attention's C++ forward: float64, and the bits of each sequence run alone.

Shapes: N packed queries, Nk packed keys, H query heads, Hkv key heads, D head dim, Dv value dim.
"""

from __future__ import annotations

import pytest
import thinkernel as tk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thinkernel.ops.dispatch import C
from thinkernel.reference import attention as reference
from thinkernel.testing.compare import assert_bitwise, check
from thinkernel.testing.inputs import Draw
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "attention_forward"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _cpu_backend():
    threads = torch.get_num_threads()
    with tk.use_backend("cpu"):
        yield
    torch.set_num_threads(threads)


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def _packed(seed: int, dtype: torch.dtype, q_lens: list[int], k_lens: list[int], H: int, Hkv: int, D: int, Dv: int):
    """-> q [N, H, D], k [Nk, Hkv, D], v [Nk, Hkv, Dv] and the two offsets."""
    draw = Draw(seed, dtype)
    q, k, v = draw.normal(sum(q_lens), H, D), draw.normal(sum(k_lens), Hkv, D), draw.normal(sum(k_lens), Hkv, Dv)
    return q, k, v, {"cu_seqlens_q": _offsets(q_lens), "cu_seqlens_k": _offsets(k_lens)}


def _wide(options: dict) -> dict:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()}


def _check_packed(q: Tensor, k: Tensor, v: Tensor, offsets: dict, **options) -> None:
    """By the numerics rule, and bitwise: each sequence alone, and every thread count."""
    results = []
    for threads in (2, 1, 4):
        torch.set_num_threads(threads)
        results.append(tk.attention(q, k, v, return_lse=True, **offsets, **options))
    out, lse = results[0]
    for other in results[1:]:
        assert_bitwise(other[0], out, "out on other threads")
        assert_bitwise(other[1], lse, "lse on other threads")
    want, want_lse = reference.attention(q.double(), k.double(), v.double(), **offsets, **_wide(options))
    base, base_lse = reference.attention(q, k, v, **offsets, **options)
    check(out, want, base, name="out")
    check(lse, want_lse, base_lse, name="lse")

    cu_q, cu_k = (offsets[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = tk.attention(q[None, rows], k[None, keys], v[None, keys], return_lse=True, **options)
        assert_bitwise(alone[0][0], out[rows], f"out of sequence {b} alone")
        assert_bitwise(alone[1][0], lse[rows], f"lse of sequence {b} alone")


LENGTHS = [  # queries, keys of each sequence
    pytest.param([7, 1, 130, 33], [7, 1, 130, 33], id="the-same"),
    pytest.param([0, 5, 0, 64, 3, 0], [3, 5, 0, 600, 0, 0], id="with-empty-ones"),
    pytest.param([1, 40, 17], [700, 13, 1100], id="other-than-the-queries"),
    pytest.param([3, 2, 5, 1, 4, 6, 2, 900, 1, 3], [3, 2, 5, 1, 4, 6, 2, 900, 1, 3], id="one-long-among-short"),
    pytest.param([11] * 40, [13] * 40, id="many-short"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_lens, k_lens", LENGTHS)
def test_packed(q_lens, k_lens, dtype):
    q, k, v, offsets = _packed(1, dtype, q_lens, k_lens, 6, 2, 40, 24)
    _check_packed(q, k, v, offsets, causal=True)


@pytest.mark.parametrize(
    "options",
    [dict(causal=False), dict(window=(20, 3)), dict(causal=True, chunk=37), dict(causal=True, softcap=4.0),
     dict(causal=True, sinks=True, scale=0.3)],
    ids=lambda o: "+".join(o),
)
def test_packed_masks(options):
    q, k, v, offsets = _packed(2, torch.float32, [9, 70, 0, 530], [9, 90, 4, 530], 4, 2, 32, 48)
    if "sinks" in options:
        options = options | {"sinks": Draw(3).normal(4)}
    _check_packed(q, k, v, offsets, **options)


def test_packed_is_the_padded_batch():
    """Sequences of one length, packed: the bits of the batch [B, S, H, D]."""
    draw = Draw(4, torch.bfloat16)
    q, k, v = draw.normal(5, 77, 4, 64), draw.normal(5, 77, 2, 64), draw.normal(5, 77, 2, 64)
    cu = _offsets([77] * 5)
    batch = tk.attention(q, k, v, causal=True, return_lse=True)
    packed = tk.attention(*(x.flatten(0, 1) for x in (q, k, v)), causal=True, cu_seqlens_q=cu, return_lse=True)
    assert_bitwise(packed[0], batch[0].flatten(0, 1), "out")
    assert_bitwise(packed[1], batch[1].flatten(0, 1), "lse")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=0, max_size=9),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 4)), dims=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES), causal=st.booleans(), transposed=st.booleans(), seed=st.integers(0, 10**6),
)
def test_any_mix_of_lengths(lengths, heads, dims, dtype, causal, transposed, seed):
    q_lens, k_lens = [s for s, _ in lengths], [t for _, t in lengths]
    q, k, v, offsets = _packed(seed, dtype, q_lens, k_lens, heads[0] * heads[1], heads[0], *dims)
    if transposed:  # the same numbers in [H, N, D] order
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    _check_packed(q, k, v, offsets, causal=causal)


def test_neighbours_never_mix():
    """NaN in one sequence stays there, and a long neighbour moves no bits."""
    q, k, v, offsets = _packed(5, torch.float32, [40, 30, 50], [40, 30, 50], 2, 1, 16, 16)
    clean = tk.attention(q, k, v, causal=True, **offsets)
    for x in (q, k, v):
        x[40:70] = float("nan")
    out = tk.attention(q, k, v, causal=True, **offsets)
    assert out[40:70].isnan().all()
    assert_bitwise(out[:40], clean[:40], "the sequence before")
    assert_bitwise(out[70:], clean[70:], "the sequence after")
