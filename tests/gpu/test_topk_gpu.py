"""The CUDA top-k kernel on a GPU, equal to the CPU reference: this file passing is what marks the kernel as verified.

Shapes: N rows · T scores a row · k kept. Selection is exact, so indices must be equal and values equal bit for bit.
"""

from __future__ import annotations

import pytest
import thinkernel as tk
import torch
from thinkernel.ops.memory import poisoned_results
from thinkernel.reference import sparse as reference
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(pattern: str, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if pattern == "ties":
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)
    if pattern == "constant":
        return torch.full(shape, 0.75, dtype=dtype)
    scores = torch.randn(shape, generator=generator).to(dtype)
    if pattern == "specials":
        for value in (0.0, -0.0, torch.inf, -torch.inf, torch.nan):
            scores[torch.rand(shape, generator=generator) < 0.15] = value
    if pattern == "low_bits":  # all but the lowest bits agree: the last digit decides
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        one = torch.ones((), dtype=dtype).view(bits)
        scores = (one + torch.randint(0, 7, shape, generator=generator).to(bits)).view(dtype)
    return scores


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    values, indices = (x.cpu() for x in found)
    assert torch.equal(indices, expected[1].cpu())
    assert torch.equal(values.isnan(), expected[0].cpu().isnan())
    bits = torch.int32 if values.dtype == torch.float32 else torch.int16
    assert torch.equal(*(v.masked_fill(v.isnan(), 9.0).view(bits) for v in (values, expected[0].cpu())))


def topk(scores: Tensor, k: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with tk.use_backend("cuda"), poisoned_results():
        return tk.topk(scores, k, lengths=lengths)


SIZES = [
    (1, 1, 1), (3, 1, 5), (4, 61, 64), (7, 509, 37), (5, 4096, 2048), (5, 4097, 1), (300, 8191, 2048),
    (2, 100_003, 2048), (1, 1_000_003, 2048), (1, 300_000, 20_000),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pattern", ["normal", "ties", "constant", "specials", "low_bits"])
def test_equals_the_reference(pattern: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, length, k = size
    scores = draw(pattern, rows, length, dtype=dtype, seed=rows + length + k)
    assert_same(topk(scores.cuda(), k), reference.topk(scores, k))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "length", "k"), [(12, 300, 64), (9, 6007, 512), (3, 90_001, 2048)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_lengths(rows: int, length: int, k: int, index_dtype: torch.dtype, dtype: torch.dtype) -> None:
    scores = draw("specials", rows, length, dtype=dtype, seed=k)
    generator = torch.Generator().manual_seed(k)
    lengths = torch.randint(0, length + 1, (rows,), generator=generator).to(index_dtype)
    edges = torch.tensor([0, k, length, 1, k - 1, k + 1], dtype=index_dtype)[:rows]
    lengths[: len(edges)] = edges
    unread = torch.arange(length) >= lengths[:, None]
    poisoned = scores.masked_fill(unread, torch.inf)  # what lies past a length would win if it were read
    assert_same(topk(poisoned.cuda(), k, lengths.cuda()), reference.topk(scores, k, lengths=lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_at_every_alignment_and_leading_dimensions(dtype: torch.dtype) -> None:
    whole = draw("ties", 2, 3, 1031, dtype=dtype, seed=5)
    for start in range(9):
        scores = whole.cuda()[..., start : start + 1001]
        assert_same(topk(scores, 100), reference.topk(whole[..., start : start + 1001], 100))
    across = whole.cuda().transpose(0, 2)  # the last dimension is not contiguous
    assert_same(topk(across, 2), reference.topk(whole.transpose(0, 2), 2))


@pytest.mark.gpu
def test_empty_problems() -> None:
    assert [x.shape for x in topk(torch.empty(0, 5, device="cuda"), 3)] == [(0, 3), (0, 3)]
    values, indices = topk(torch.empty(2, 0, device="cuda"), 3)
    assert (indices == -1).all() and (values == -torch.inf).all()


@pytest.mark.gpu
def test_a_row_s_result_does_not_depend_on_the_batch_and_two_runs_agree() -> None:
    # Alone, the row is cut into pieces; among 300 it is worked on by one block.
    scores = draw("ties", 300, 70_001, dtype=torch.float32, seed=11).cuda()
    together = topk(scores, 2048)
    again = topk(scores, 2048)
    assert all(torch.equal(x, y) for x, y in zip(together, again, strict=True))
    for row in (0, 150, 299):
        alone = topk(scores[row : row + 1], 2048)
        assert all(torch.equal(x[row : row + 1], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    rows, length = 36_000, 65_536
    scores = torch.zeros(rows, length, dtype=torch.bfloat16, device="cuda")
    last = draw("specials", 1, length, dtype=torch.bfloat16, seed=3)
    scores[-1] = last[0].cuda()
    values, indices = topk(scores, 100)
    assert_same((values[-1:], indices[-1:]), reference.topk(last, 100))
    assert (indices[:-1] == torch.arange(100, device="cuda", dtype=torch.int32)).all() and (values[:-1] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_goes_to_the_positions_the_values_came_from(dtype: torch.dtype) -> None:
    scores = draw("ties", 6, 333, dtype=dtype, seed=4)
    lengths = torch.tensor([333, 0, 20, 60, 61, 1], dtype=torch.int32)
    dvalues = torch.randn(6, 60, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = []
    for device, backend in (("cuda", "cuda"), ("cpu", "reference")):
        leaf = scores.to(device).requires_grad_()
        with tk.use_backend(backend), poisoned_results():
            values, _ = tk.topk(leaf, 60, lengths=lengths.to(device))
            grads.append(torch.autograd.grad(values, leaf, dvalues.to(device))[0].cpu())
    assert torch.equal(*grads)


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_inside_a_graph() -> None:
    scores = draw("normal", 1, 200_000, dtype=torch.float32, seed=2)
    expected = reference.topk(scores, 512)
    static = torch.zeros(1, 200_000, device="cuda")
    source = scores.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on another stream the kernel would read `static` before the copy
        static.copy_(source)
        found = topk(static, 512)
    stream.synchronize()
    assert_same(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = topk(static, 512)
    static.copy_(source.flip(1))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, reference.topk(scores.flip(1), 512))


@pytest.mark.gpu
def test_bad_arguments_raise_before_any_kernel_runs() -> None:
    scores = torch.zeros(2, 8, device="cuda")
    with pytest.raises(ValueError, match="k"):
        topk(scores, 0)
    with pytest.raises(ValueError, match="lengths"):
        topk(scores, 2, torch.ones(3, dtype=torch.int32, device="cuda"))
    with tk.use_backend("cuda"), pytest.raises(NotImplementedError, match="float64"):
        tk.topk(scores.double(), 2)
