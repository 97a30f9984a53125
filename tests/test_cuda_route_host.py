"""The CUDA kernels of route on the host shim: the shipped sources, one thread per CUDA thread, and the op's own host code over them.

Every rule is held to the reference as tests/test_cpu_route.py holds the C++ kernel, ties and replays exactly. The sanitizers run a
test program of their own; with one of the kernels' barriers taken out ThreadSanitizer must report a race.

Shapes: N tokens, E experts, K experts a token.
"""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import thinkernel as tk
import torch
from cuda_host import ADDRESS, CUDA, RACE, ROOT, THREAD, check, compile_object, link
from cuda_host import run as run_program
from test_cpu_route import RULES, check_rule, run
from thinkernel.ops import moe, moe_cuda
from thinkernel.ops.memory import poisoned_results
from thinkernel.reference import moe as reference
from thinkernel.testing.compare import assert_bitwise
from thinkernel.testing.compare import check as check_values
from thinkernel.testing.inputs import Draw

GROUPS = ("rules", "ties", "replay", "edges")
# One host thread per CUDA thread: blocks of two warps, and few tiles, so that a warp takes several rows of one.
SMALL_BLOCKS = ("-DTK_ROUTE_WARPS=2", "-DTK_ROUTE_TILES=5")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


class Builds:
    """The test program with the kernels compiled in each way, and the kernels as a library; made when first asked for."""

    WAYS = {"plain": ("-O0", "-g0"), "address": ADDRESS, "thread": (*THREAD, "-DTK_TEST_REMOVE_BARRIER=tk_shim::removed_barrier")}

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, dict[str, Path]()

    def objects(self, way: str, other: str, *flags: str) -> list[Path]:
        sources = [CUDA / "route.cu", CUDA / "host_shim" / other]
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda s: compile_object(self.folder / f"{way}_{s.name}.o", s, *SMALL_BLOCKS, *flags), sources))

    def program(self, way: str) -> Path:
        if way not in self.made:
            flags = self.WAYS[way]  # the first of a sanitizer's is for the linker too
            self.made[way] = link(self.folder / way, self.objects(way, "route_host_test.cpp", *flags), *flags[:1])
        return self.made[way]

    def library(self) -> Path:
        return link(self.folder / "route.so", self.objects("plain", "route_host_library.cpp", *self.WAYS["plain"]), "-shared")


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("route_host"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["address", "thread"])
def test_the_sanitizers_are_silent(way: str, builds: Builds) -> None:
    check(run_program(builds.program(way), 1, *GROUPS), *GROUPS)


def barriers() -> list[int]:
    """The numbers of the kernels' barriers, as their source has them."""
    return sorted({int(n) for n in re.findall(r"(?:block|warp)_barrier<(\d+)>\(\)", (CUDA / "route_kernel.cuh").read_text())})


@pytest.mark.slow
@pytest.mark.parametrize("barrier", barriers())
def test_thread_sanitizer_finds_a_removed_barrier(barrier: int, builds: Builds) -> None:
    done = run_program(builds.program("thread"), 4, "rules", "ties", removed_barrier=barrier)
    assert done.returncode == RACE and "ThreadSanitizer: data race" in done.stderr, done.stdout + done.stderr


# ---- the op's host code, over the host library in place of the extension

_C_TYPES = {"float": ctypes.c_float, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}
_ENUMS = ("DType", "MoeScore")


def fields_of(struct: str) -> list[tuple[str, Any]]:
    """The data members of a params struct, its base's first, as the header declares them."""
    headers = "".join((ROOT / "csrc/include" / name).read_text() for name in ("moe.h", "route_cuda.h"))
    found = re.search(rf"struct {struct}(?: : (\w+))? {{\n(.*?)\n}};", headers, re.S)
    assert found, struct
    fields = fields_of(found[1]) if found[1] else []
    for line in re.sub(r"//.*", "", found[2]).split(";"):
        declared = re.match(r"\s*(?:const )?(\w+)(\*?) (.*)", line.strip(), re.S)
        if declared is None:
            continue
        kind, star, names = declared.groups()
        one = ctypes.c_void_p if star else _C_TYPES["int32_t" if kind in _ENUMS else kind]
        fields += [(name.split("=")[0].strip(), one) for name in names.split(",")]
    return fields


class HostExtension:
    """Stands in for thinkernel._C: the CUDA half's functions and params, run on the host."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.calls = library, 0
        library.tk_route_workspace_bytes.restype = library.tk_params_size.restype = ctypes.c_int64
        for i, name in enumerate(("RouteForwardCudaParams", "RouteBackwardParams")):
            struct = type(name, (ctypes.Structure,), {"_fields_": fields_of(name)})
            assert ctypes.sizeof(struct) == library.tk_params_size(i), f"{name}: this test reads its layout wrong"
            setattr(self, name, struct)

    def route_cuda_workspace_bytes(self, params: ctypes.Structure) -> int:
        return int(self.library.tk_route_workspace_bytes(ctypes.byref(params)))

    def route_forward_cuda(self, params: ctypes.Structure, stream: int) -> None:
        assert stream == 77 and self.library.tk_route_forward(ctypes.byref(params))
        self.calls += 1

    def route_backward_cuda(self, params: ctypes.Structure, stream: int) -> None:
        assert stream == 77 and self.library.tk_route_backward(ctypes.byref(params))
        self.calls += 1


@pytest.fixture(scope="module")
def loaded(builds: Builds) -> HostExtension:
    library = ctypes.CDLL(str(builds.library()))
    library.tk_route_forward.restype = library.tk_route_backward.restype = ctypes.c_bool
    return HostExtension(library)


@pytest.fixture
def host(loaded: HostExtension, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostExtension]:
    """tk.route on CPU tensors runs the CUDA kernels."""
    monkeypatch.setattr(moe_cuda, "C", loaded)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    for op in (moe.route_op, moe.route_backward):
        monkeypatch.setitem(op.kernels, "cpu", op.kernels["cuda"])
    before = loaded.calls
    with poisoned_results():
        yield loaded
    assert loaded.calls > before, "the CUDA kernels were not called"


def spread(N: int, E: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits [N, E], no two equal in a row in any dtype."""
    draw = Draw(1)
    ranks = torch.stack([draw.permutation(E) for _ in range(N)])
    return ((ranks - E / 2) * (6 / E) + draw.normal(N, 1, scale=0.1)).to(dtype)


@pytest.mark.parametrize("number", range(len(RULES)), ids=lambda i: list(RULES)[i])
def test_rules(number: int, host: HostExtension) -> None:
    """A few rows each: a launch here is as many threads that wait for each other at every shuffle."""
    rule = list(RULES.values())[number]
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
    N, E, K = ((13, 48, 6), (9, 64, 1), (11, 24, 4))[number % 3]
    K = min(K, rule.get("topk_group", 1) * E // rule.get("n_group", 1))
    check_rule(spread(N, E, dtype), K, rule)


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ((3, 1, 1), dict(score="sigmoid")), ((3, 7, 7), {}), ((3, 65, 32), dict(score="sigmoid", bias=True, renormalize=False)),
        ((3, 130, 9), dict(n_group=13, topk_group=4, renormalize=False)), ((2, 384, 8), dict(score="sigmoid", bias=True, scaling=2.827)),
        ((2, 1024, 32), dict(score="sigmoid", bias=True, n_group=8, topk_group=4)), ((1, 256, 8), dict(score="sqrtsoftplus", bias=True)),
        ((2, 1000, 3), dict(score="sigmoid", n_group=1000, topk_group=500)), ((2, 896, 16), dict(renormalize=False)),
        ((2, 300, 5), dict(score="sigmoid", n_group=3, topk_group=1, bias=True)),
    ],
    ids=str,
)  # fmt: skip
def test_sizes(sizes: tuple[int, int, int], rule: dict[str, Any], host: HostExtension) -> None:
    N, E, K = sizes
    check_rule(spread(N, E, torch.float32), K, rule)


@pytest.mark.parametrize("name", ["gpt-oss", "gpt-oss, grouped", "llama4", "sigmoid of the chosen", "softmax", "sqrtsoftplus, max"])
def test_ties_go_to_the_lower_number(name: str, host: HostExtension) -> None:
    """Scores from a handful of values, negative biases, minus zeros: chosen exactly as the reference chooses."""
    rule, draw = RULES[name], Draw(6)
    z = draw.integers(-2, 3, 6, 48).float() * draw.integers(0, 2, 6, 48).float() * -1.0
    bias = -draw.integers(0, 3, 48).float() - 5 if rule.get("bias") else None
    for K in (1, 7):
        options = rule | dict(bias=bias)
        found, want = tk.route(z, K, **options), reference.route(z, K, **options)
        for field in ("experts", "counts", "order", "offsets"):
            assert torch.equal(getattr(found, field), getattr(want, field)), field


@pytest.mark.parametrize("name", RULES)
def test_replay(name: str, host: HostExtension) -> None:
    """Given experts, equal ones in a row too: the live weights and their gradient."""
    rule, draw = RULES[name], Draw(7)
    z, experts = draw.normal(8, 24), draw.integers(0, 24, 8, 5)
    found, dz = run(tk.route, z, 5, rule, None, experts=experts.long())
    exact, exact_dz = run(reference.route, z.double(), 5, rule, None, experts=experts)
    near, near_dz = run(reference.route, z, 5, rule, None, experts=experts)
    assert torch.equal(found.experts, experts) and torch.equal(found.order, exact.order) and torch.equal(found.counts, exact.counts)
    check_values(found.weights.detach(), exact.weights.detach(), near.weights.detach())
    check_values(dz, exact_dz, near_dz)


OTHERS = [("softmax", True), ("softmax", False), ("softmax_topk", True), ("sigmoid", True), ("sqrtsoftplus", False)]


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_experts_of_other_ranks(options: tuple[str, bool], host: HostExtension) -> None:
    """Replayed experts outside 0 … E−1: weight 0 and no gradient, the others as if alone; not counted, last in the order."""
    score, renormalize = options
    draw, E = Draw(12), 20
    z, chosen = draw.normal(12, E), draw.integers(-1, E + 3, 12, 4).int()
    here = (chosen >= 0) & (chosen < E)
    rest = (None, 4, score, 1, 1, "top2", renormalize, 1.5)
    weights, kept, counts, order, offsets = moe_cuda.route(z, chosen, *rest)
    dweights = draw.normal(12, 4)
    dz = moe_cuda.route_backward(dweights, z, chosen, score, renormalize, 1.5)
    assert torch.equal(kept, chosen) and (weights[~here] == 0).all()
    for row in range(12):
        own = chosen[row][here[row]][None]
        wanted = torch.zeros(1, E)
        if own.numel():
            leaf = z[row][None].clone().requires_grad_()
            alone = reference.route(leaf, own.shape[1], score=score, renormalize=renormalize, scaling=1.5, experts=own).weights
            torch.testing.assert_close(weights[row][here[row]], alone[0])
            (wanted,) = torch.autograd.grad(alone, leaf, dweights[row][here[row]][None])
        torch.testing.assert_close(dz[row][None], wanted)
    bins = torch.where(here, chosen, E).flatten()
    assert torch.equal(order, bins.argsort(stable=True).int()) and torch.equal(counts, bins.bincount(minlength=E + 1)[:E].int())
    assert offsets[-1] == here.sum() == counts.sum()


@pytest.mark.parametrize("name", ["deepseek-v3", "softmax, plain", "gpt-oss"])
def test_bits_by_batch(name: str, host: HostExtension) -> None:
    rule, E = RULES[name], 40
    z = Draw(8).normal(23, E)
    bias = Draw(9).normal(E, scale=0.2) if rule.get("bias") else None
    found, dz = run(tk.route, z, 4, rule, bias)
    again, dz_again = run(tk.route, z, 4, rule, bias)
    for a, b in zip((*again, dz_again), (*found, dz), strict=True):
        assert_bitwise(a.detach(), b.detach())
    for first, last in ((0, 1), (14, 19)):
        some = tk.route(z[first:last], 4, **(rule | dict(bias=bias)))
        assert_bitwise(some.weights, found.weights[first:last].detach())
        assert_bitwise(some.experts, found.experts[first:last])


def test_extremes(host: HostExtension) -> None:
    """Scores where softplus underflows and the sigmoid is 0 or 1, an infinite logit, NaN in one row alone, no rows."""
    z = Draw(10).normal(9, 40) * 40
    others = torch.arange(9) != 7
    for score in reference.SCORES:
        found, dz = run(tk.route, z, 4, dict(score=score), None)
        assert found.weights.isfinite().all() and dz.isfinite().all(), score
        dirty = z.clone()
        dirty[7] = torch.nan
        again, dz_again = run(tk.route, dirty, 4, dict(score=score), None)
        assert again.weights[7].isnan().all() and dz_again[7].isnan().any(), score
        assert again.experts[7].tolist() == [0, 1, 2, 3]
        assert_bitwise(again.weights[others].detach(), found.weights[others].detach())
    z[:, 3] = -torch.inf
    assert not (tk.route(z, 4).experts == 3).any()
    found = tk.route(torch.empty(0, 6, requires_grad=True), 2)
    assert found.weights.shape == (0, 2) and (found.counts == 0).all() and (found.offsets == 0).all()
    strided = Draw(11).normal(9, 50)
    assert_bitwise(tk.route(strided[:, :24], 3).weights, tk.route(strided[:, :24].contiguous(), 3).weights)


def test_what_it_covers() -> None:
    z = torch.zeros(3, 8)
    assert moe_cuda.route_covers(z, None, None, 2) is None
    assert "float64" in (moe_cuda.route_covers(z.double(), None, None, 2) or "")
    assert "1025" in (moe_cuda.route_covers(torch.zeros(1, 1025), None, None, 2) or "")
    assert "33" in (moe_cuda.route_covers(torch.zeros(1, 64), None, None, 33) or "")
    assert "bias" in (moe_cuda.route_covers(z, None, torch.zeros(8, dtype=torch.float64), 2) or "")


@pytest.mark.parametrize(
    "change",
    [dict(experts=1025), dict(experts=0), dict(top_k=33), dict(top_k=0), dict(tokens=-1), dict(groups=3), dict(top_groups=0),
     dict(top_k=9), dict(dtype=3), dict(score=5), dict(workspace_bytes=8), dict(workspace=None)],
    ids=str,
)  # fmt: skip
def test_refuses_bad_sizes(change: dict[str, Any], loaded: HostExtension) -> None:
    buffer = torch.zeros(4096)
    fields: dict[str, Any] = dict.fromkeys(("logits", "chosen", "weights", "counts", "order", "offsets", "workspace"), buffer.data_ptr())
    fields |= dict(tokens=2, experts=8, top_k=2, stride=8, groups=1, top_groups=1, workspace_bytes=4096)
    forward = loaded.library.tk_route_forward
    assert forward(ctypes.byref(loaded.RouteForwardCudaParams(**fields)))  # type: ignore[attr-defined]
    assert not forward(ctypes.byref(loaded.RouteForwardCudaParams(**fields | change)))  # type: ignore[attr-defined]
