"""The CUDA top-k kernel on the host shim: the same source, one thread per CUDA thread, against a sort and reference.

The kernel is built plain, with AddressSanitizer + UBSan, and with ThreadSanitizer. With any one of its barriers taken
out ThreadSanitizer must report a race, in the same build: so its silence about the whole kernel means something.

Shapes: N rows · L scores a row · k kept.
"""

from __future__ import annotations

import ctypes
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_host import ADDRESS, CUDA, RACE, ROOT, THREAD, check, compile_object, link, run
from thinkernel.ops import sparse_backends
from thinkernel.reference.sparse import topk as reference_topk

GROUPS = ("patterns", "lengths", "edges", "pieces", "long")
# One host thread per CUDA thread: blocks smaller than the shipped ones, of two and four warps.
SMALL_BLOCKS = ("-DTK_TOPK_SHORT_THREADS=64", "-DTK_TOPK_LONG_THREADS=128")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def seed_of(request: pytest.FixtureRequest) -> int:
    return int.from_bytes(request.node.name.encode()[-6:], "big")


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The test program with the kernel compiled in each way, and the kernel as a library."""
    folder = tmp_path_factory.mktemp("topk_host")
    kernel: dict[str, tuple[str, ...]] = {
        "address": (*SMALL_BLOCKS, *ADDRESS),
        "thread": (*SMALL_BLOCKS, *THREAD, "-DTK_TEST_REMOVE_BARRIER=tk_shim::removed_barrier"),
        "plain": SMALL_BLOCKS,
        "shipped_blocks": (),
    }
    with ThreadPoolExecutor(2) as pool:
        objects = {
            name: pool.submit(compile_object, folder / f"{name}.o", CUDA / "topk.cu", *flags)
            for name, flags in kernel.items()
        }
        shim = CUDA / "host_shim"
        test = pool.submit(compile_object, folder / "test.o", shim / "topk_host_test.cpp")
        interface = pool.submit(compile_object, folder / "library.o", shim / "topk_host_library.cpp")
    sanitizer = {"address": ADDRESS, "thread": THREAD}
    programs = {
        name: link(folder / name, [job.result(), test.result()], *sanitizer.get(name, ()))
        for name, job in objects.items()
    }
    library = link(folder / "topk.so", [objects["plain"].result(), interface.result()], "-shared")
    return {**programs, "library": library}


def barriers() -> list[int]:
    """The numbers of the kernel's block barriers, as its source has them."""
    return sorted({int(n) for n in re.findall(r"block_barrier<(\d+)>\(\)", (CUDA / "topk_kernel.cuh").read_text())})


def test_equals_a_sort(builds: dict[str, Path], request: pytest.FixtureRequest) -> None:
    groups = (*GROUPS, "hundred_thousand")
    check(run(builds["plain"], seed_of(request), *groups), *groups)


def test_equals_a_sort_with_the_shipped_block_sizes(builds: dict[str, Path], request: pytest.FixtureRequest) -> None:
    check(run(builds["shipped_blocks"], seed_of(request), "edges", "long"), "edges", "long")


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers_are_silent(
    builds: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    check(run(builds["address"], seed_of(request), *GROUPS), *GROUPS)


def test_thread_sanitizer_is_silent(builds: dict[str, Path], request: pytest.FixtureRequest) -> None:
    groups = ("lengths", "edges", "long")
    check(run(builds["thread"], seed_of(request), *groups), *groups)


@pytest.mark.parametrize("barrier", barriers())
def test_thread_sanitizer_finds_a_removed_barrier(barrier: int, builds: dict[str, Path]) -> None:
    done = run(builds["thread"], barrier, "patterns", removed_barrier=barrier)
    assert done.returncode == RACE and "ThreadSanitizer: data race" in done.stderr, done.stdout + done.stderr


@pytest.mark.slow
def test_million_scores_and_every_group_in_every_build(
    builds: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    check(run(builds["plain"], seed_of(request), "million"), "million")
    check(run(builds["shipped_blocks"], seed_of(request), *GROUPS), *GROUPS)
    check(run(builds["thread"], seed_of(request), *GROUPS), *GROUPS)


# ---- against the Python reference, NaN and all


@pytest.fixture(scope="module")
def library(builds: dict[str, Path]) -> ctypes.CDLL:
    return ctypes.CDLL(str(builds["library"]))


def topk_on_host(
    library: ctypes.CDLL, scores: torch.Tensor, k: int, lengths: torch.Tensor | None, chunk: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, length = scores.shape
    values = torch.full((rows, k), 7, dtype=scores.dtype)  # [N, k]
    indices = torch.full((rows, k), -7, dtype=torch.int32)  # [N, k]
    code = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[scores.dtype]
    pointers = [ctypes.c_void_p(t.data_ptr() if t is not None else None) for t in (scores, lengths, values, indices)]
    sizes = [ctypes.c_int64(n) for n in (rows, length, scores.stride(0), k, chunk)]
    library.topk_on_host(*pointers, ctypes.c_int32(code), *sizes)
    return values, indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "length", "k", "chunk"), [(3, 257, 31, 0), (2, 1000, 1, 0), (2, 61, 64, 0), (2, 700, 40, 96)]
)
def test_equals_the_reference(
    dtype: torch.dtype, rows: int, length: int, k: int, chunk: int, library: ctypes.CDLL
) -> None:
    generator = torch.Generator().manual_seed(rows * length + k)
    scores = torch.randn(rows, length + 5, generator=generator).to(dtype)[:, :length]  # [N, L], rows L + 5 apart
    scores[torch.rand(rows, length, generator=generator) < 0.1] = 0.0
    scores[torch.rand(rows, length, generator=generator) < 0.1] = -0.0
    scores[torch.rand(rows, length, generator=generator) < 0.1] = -torch.inf
    scores[torch.rand(rows, length, generator=generator) < 0.1] = torch.nan
    for lengths in (None, torch.randint(0, length + 1, (rows,), generator=generator).int()):  # [N]
        values, indices = topk_on_host(library, scores, k, lengths, chunk)
        expected_values, expected_indices = reference_topk(scores, k, lengths=lengths)
        assert torch.equal(indices, expected_indices)
        # −0.0 is told from +0.0; which NaN it is is not: torch's own gather changes the payload of 16-bit ones.
        assert torch.equal(values.isnan(), expected_values.isnan())
        bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
        assert torch.equal(*(v.masked_fill(v.isnan(), 9.0).view(bits) for v in (values, expected_values)))


def test_keeps_nan_only_after_everything_else(library: ctypes.CDLL) -> None:
    scores = torch.tensor([[torch.nan, -torch.inf, 1.0, -torch.nan, torch.inf]])
    assert topk_on_host(library, scores, 3, None)[1].tolist() == [[1, 2, 4]]
    assert topk_on_host(library, scores, 4, None)[1].tolist() == [[0, 1, 2, 4]]


# ---- the op's host code, over the host library in place of the extension


class HostExtension:
    """Stands in for thinkernel._C: the same functions and params, run on the host, with every row cut into pieces."""

    FIELDS = frozenset(re.findall(r"^  [^;]*?(\w+);", (ROOT / "csrc/include/topk.h").read_text(), re.M))

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.calls = 0

    def TopkParams(self, **fields: int) -> SimpleNamespace:
        assert set(fields) <= self.FIELDS
        return SimpleNamespace(**fields)

    def topk_cuda_workspace_bytes(self, params: SimpleNamespace) -> int:
        return 1000

    def topk_cuda(self, params: SimpleNamespace, stream: int) -> None:
        assert params.workspace_bytes == 1000 and params.workspace != 0 and stream == 77
        self.calls += 1
        pointers = [ctypes.c_void_p(p or None) for p in (params.scores, params.lengths, params.values, params.indices)]
        sizes = [ctypes.c_int64(n) for n in (params.rows, params.length, params.row_stride, params.k, 0)]
        self.library.topk_on_host(*pointers, ctypes.c_int32(params.dtype), *sizes)


def test_the_op_s_host_code_hands_over_the_right_tensors(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = HostExtension(library)
    assert {"scores", "lengths", "row_stride", "workspace_bytes", "dtype", "chunk"} <= extension.FIELDS
    monkeypatch.setattr(sparse_backends, "C", extension)
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(sparse_backends.torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(sparse_backends.torch.cuda, "current_stream", lambda: stream)
    generator = torch.Generator().manual_seed(8)
    whole = torch.randn(2, 3, 141, generator=generator)
    lengths = torch.randint(0, 142, (2, 3), generator=generator)
    cases = [
        (whole, 17, None), (whole, 17, lengths), (whole, 17, lengths.int()), (whole[..., 3:90], 200, None),
        (whole.transpose(0, 2), 2, None), (whole[:, 1], 5, lengths[:, 1]), (whole[0, 0], 9, None),
        (whole.bfloat16(), 9, None), (whole[..., :0], 4, None),
    ]  # fmt: skip
    for scores, k, counts in cases:
        assert sparse_backends.topk_covers(scores, k, counts) is None
        values, indices = sparse_backends.cuda_topk(scores, k, counts)
        expected_values, expected_indices = reference_topk(scores, k, lengths=counts)
        assert torch.equal(values, expected_values) and torch.equal(indices, expected_indices)
    assert extension.calls == len(cases)
    for scores, k, counts in cases:
        leaf = scores.detach().clone().requires_grad_()
        values = reference_topk(leaf, k, lengths=counts)[0]
        dvalues = torch.randn(values.shape, generator=generator).to(values.dtype)
        (expected,) = torch.autograd.grad(values, leaf, dvalues)
        (dscores,) = sparse_backends.cuda_topk_backward([dvalues, None], scores, k, counts)
        assert torch.equal(dscores, expected)
    extension.calls = 0
    assert [x.shape for x in sparse_backends.cuda_topk(whole[:0], 4, None)] == [(0, 3, 4), (0, 3, 4)]
    assert extension.calls == 0  # an empty problem launches nothing
    assert "float64" in (sparse_backends.topk_covers(whole.double(), 4, None) or "")
