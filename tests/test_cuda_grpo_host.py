"""The CUDA kernels of grpo on the host shim: the shipped sources, one thread per CUDA thread, and the ops' own host code over them.

Numerics are held to the DESIGN rule against the float64 reference; the sanitizers run the same kernels on random cases (slow
tests), and with the barrier of a block's merge taken out ThreadSanitizer must report a race.

Shapes: logits [N, V], B sequences of S tokens (packed: N), R samples.
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
import torch
from cuda_host import ADDRESS, CUDA, RACE, ROOT, THREAD, check, compile_object, link, run
from thinkernel.ops import logprob_gpu, policy_loss, policy_loss_gpu
from thinkernel.ops.memory import poisoned_results
from thinkernel.reference import grpo as reference
from thinkernel.testing.compare import assert_bitwise
from thinkernel.testing.compare import check as check_rule
from torch import Tensor

GROUPS = ("logprob", "policy", "advantages")
SOURCES = ("logprob.cu", "policy_loss.cu", "advantages.cu")
# One host thread per CUDA thread: blocks of two warps, and short ones, so that few tokens make several.
SMALL_BLOCKS = ("-DTK_LOGPROB_THREADS=64", "-DTK_POLICY_THREADS=64", "-DTK_POLICY_TOKENS=128", "-DTK_ADVANTAGES_THREADS=64")
NAN = float("nan")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


class Builds:
    """The test program with the kernels compiled in each way, and the kernels as a library; made when first asked for."""

    WAYS = {"plain": (), "address": ADDRESS, "thread": (*THREAD, "-DTK_TEST_REMOVE_BARRIER=tk_shim::removed_barrier")}

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, dict[str, Path]()

    def objects(self, way: str, other: str) -> list[Path]:
        sources = [*(CUDA / name for name in SOURCES), CUDA / "host_shim" / other]
        with ThreadPoolExecutor(2) as pool:
            flags = (*SMALL_BLOCKS, *self.WAYS[way])
            return list(pool.map(lambda s: compile_object(self.folder / f"{way}_{s.name}.o", s, *flags), sources))

    def program(self, way: str) -> Path:
        if way not in self.made:
            sanitizer = {"plain": (), "address": ADDRESS, "thread": THREAD}[way]
            self.made[way] = link(self.folder / way, self.objects(way, "grpo_host_test.cpp"), *sanitizer)
        return self.made[way]

    def library(self) -> Path:
        return link(self.folder / "grpo.so", self.objects("plain", "grpo_host_library.cpp"), "-shared")


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("grpo_host"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "address", "thread"])
def test_every_group_and_the_sanitizers_are_silent(way: str, builds: Builds) -> None:
    check(run(builds.program(way), 1, *GROUPS), *GROUPS)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_thread_sanitizer_finds_a_removed_barrier(group: str, builds: Builds) -> None:
    assert {"1"} == set(re.findall(r"block_barrier<(\d+)>\(\)", (CUDA / "simt.cuh").read_text()))
    done = run(builds.program("thread"), 4, group, removed_barrier=1)
    assert done.returncode == RACE and "ThreadSanitizer: data race" in done.stderr, done.stdout + done.stderr


# ---- the ops' host code, over the host library in place of the extension

_C_TYPES = {"float": ctypes.c_float, "double": ctypes.c_double, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}
_ENUMS = ("DType", "Form", "Level", "Reduction", "Kl", "Rollout")


def fields_of(struct: str) -> list[tuple[str, Any]]:
    """The data members of a params struct, its base's first, as the header declares them."""
    headers = "".join((ROOT / "csrc/include" / name).read_text() for name in ("grpo.h", "policy_math.h", "policy_loss.h", "policy_cuda.h"))
    found = re.search(rf"struct {struct}(?: : ([\w:]+))? {{\n(.*?)\n}};", headers, re.S)
    assert found, struct
    fields = fields_of(found[1].split("::")[-1]) if found[1] else []
    for line in re.sub(r"//.*", "", found[2]).split(";"):
        declared = re.match(r"\s*(?:const )?(\w+)(\*?) (.*)", line.strip(), re.S)
        if declared is None:
            continue
        kind, star, names = declared.groups()
        for name in names.split(","):
            name, count = re.match(r"\s*(\w+)(?:\[(\d+)\])?", name).groups()  # type: ignore[union-attr]
            one = ctypes.c_void_p if star else _C_TYPES["int32_t" if kind in _ENUMS else kind]
            fields.append((name, one * int(count) if count else one))
    return fields


class HostExtension:
    """Stands in for thinkernel._C: the CUDA half's functions and params, run on the host."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.calls = library, 0
        library.tk_policy_loss_workspace_bytes.restype = ctypes.c_int64
        library.tk_params_size.restype = ctypes.c_int64
        names = ("LogprobForwardParams", "LogprobBackwardParams", "PolicyLossCudaParams", "GroupAdvantagesCudaParams")
        for i, name in enumerate(names):
            struct = type(name, (ctypes.Structure,), {"_fields_": fields_of(name)})
            assert ctypes.sizeof(struct) == library.tk_params_size(i), f"{name}: this test reads its layout wrong"
            setattr(self, name, struct)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, "tk_" + name.replace("_cuda", ""))

        def call(params: ctypes.Structure, stream: int | None = None) -> int:
            if stream is not None:
                assert stream == 77
                self.calls += 1
            return function(ctypes.byref(params))

        return call


@pytest.fixture(scope="module")
def loaded(builds: Builds) -> HostExtension:
    return HostExtension(ctypes.CDLL(str(builds.library())))


@pytest.fixture
def host(loaded: HostExtension, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostExtension]:
    for module in (logprob_gpu, policy_loss_gpu):
        monkeypatch.setattr(module, "C", loaded)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    with poisoned_results():
        yield loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "softcap"), [((40, 333), 0.0), ((3, 9, 1000), 5.0), ((2, 1), 0.0)], ids=str)
def test_logprob_within_the_rule(shape: tuple[int, ...], softcap: float, dtype: torch.dtype, host: HostExtension) -> None:
    torch.manual_seed(len(shape))
    wide = (3 * torch.randn(*shape[:-2], shape[-2] + 1, shape[-1])).to(dtype)
    logits, target = wide[..., 1:, :], torch.randint(0, shape[-1], shape[:-1])  # rows that do not follow each other
    target[..., 1] = -100
    g, h = torch.randn(2, *target.shape)
    options = (0.8, softcap, -100, True)
    lp, ent, lse = logprob_gpu.cuda_forward(logits, target.int(), *options)
    dlogits = logprob_gpu.cuda_backward(g, h, logits, target, lse, ent, *options)
    results = []
    for kind in (torch.float64, dtype):
        leaf = logits.to(kind).requires_grad_()
        rows = reference.logprob(leaf, target, temperature=0.8, softcap=softcap or None)
        results.append((rows[0].detach(), rows[1].detach(), torch.autograd.grad(rows, leaf, [x.to(rows[0].dtype) for x in (g, h)])[0]))
    for name, x, ref, base in zip(("logprob", "entropy", "dlogits"), (lp, ent, dlogits), *results, strict=True):
        check_rule(x.flatten(0, -2) if x.dim() > 2 else x, *(r.flatten(0, -2) if x.dim() > 2 else r for r in (ref, base)), name=name)
    assert host.calls > 0 and (lp[..., 1] == 0).all() and (dlogits[..., 1, :] == 0).all()
    one = logprob_gpu.cuda_forward(logits[..., :1, :], target[..., :1], *options)
    assert_bitwise(one[0], lp[..., :1], "a row alone")


OPTIONS: list[dict[str, Any]] = [
    dict(loss_type="grpo", delta=1.1, beta=0.2, kl="k1"),
    dict(loss_type="bnpo", beta=0.1, kl="k2", kl_correction=True, log_ratio_clamp=0.15),
    dict(loss_type="dr_grpo", max_completion_length=400, importance_sampling_level="sequence", beta=0.1, kl_correction=True),
    dict(loss_type="dapo", epsilon_high=0.28, num_items_in_batch=200, entropy_coef=0.01),
    dict(loss_type="dapo", top_entropy=0.3, entropy_coef=0.02, rollout_correction="token_truncate", rollout_clip=(0.8, 1.2)),
    dict(loss_type="gspo", rollout_correction="sequence_truncate", rollout_clip=(None, 1.5), off_policy_threshold=0.02),
    dict(loss_type="cispo", epsilon_high=1.1, rollout_correction="token_mask", rollout_clip=(0.9, 1.3)),
    dict(loss_type="sapo", tau=(1.2, 1.5)),
    dict(loss_type="luspo", rollout_correction="sequence_mask", rollout_clip=(0.5, 1.4)),
    dict(loss_type="vespo", rollout_correction="token_truncate", rollout_clip=(0.7, 1.3)),
    dict(loss_type="reinforce", entropy_coef=0.1),
    dict(loss_type="rloo", log_ratio_clamp=0.5),
]  # fmt: skip
LENGTHS = [300, 0, 128, 20, 205]


def draw(packed: bool, per_token: bool, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(LENGTHS),) if packed else (len(LENGTHS), max(LENGTHS))
    mask = torch.rand(shape, generator=generator) < 0.8
    normal = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    logprob = -normal(*shape).abs()
    inputs = dict(
        logprob=logprob, old_logprob=logprob + 0.2 * normal(*shape), ref_logprob=logprob + 0.3 * normal(*shape),
        rollout_logprob=logprob + 0.3 * normal(*shape), entropy=normal(*shape).abs(), mask=mask,
        advantages=normal(*shape) if per_token else normal(len(LENGTHS)),
    )  # fmt: skip
    if packed:
        inputs["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    else:
        mask &= torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    inputs["rollout_logprob"][..., 3] = NAN
    for name in ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "entropy"):
        inputs[name][~mask] = NAN
    return inputs


def evaluate(inputs: dict[str, Tensor], dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    leaves = [inputs[name].clone().requires_grad_() for name in ("logprob", "entropy", "ref_logprob")]
    inputs |= dict(zip(("logprob", "entropy", "ref_logprob"), leaves, strict=True))
    loss, metrics = policy_loss.policy_loss(**inputs, **options)
    grads = torch.autograd.grad(2 * loss, leaves, allow_unused=True)
    found = {"loss": loss.detach(), **{f"metric {k}": v for k, v in metrics.items()}}
    return found | {f"d{i}": g for i, g in enumerate(grads) if g is not None}


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=lambda i: str(OPTIONS[i]))
def test_policy_loss_within_the_rule(number: int, host: HostExtension, monkeypatch: pytest.MonkeyPatch) -> None:
    options, packed, per_token = OPTIONS[number], number % 2 == 0, number % 4 > 1
    inputs = draw(packed, per_token, number)
    cuda = policy_loss.policy_loss_op.kernels["cuda"]
    want, base = (evaluate(inputs, dtype, options) for dtype in (torch.float64, torch.float32))
    with monkeypatch.context() as patch:
        patch.setitem(policy_loss.policy_loss_op.kernels, "cpu", cuda)
        found, calls = evaluate(inputs, torch.float32, options), host.calls
        again = evaluate(inputs, torch.float32, options)
    assert host.calls > calls and found.keys() == want.keys()
    for name, x in found.items():
        assert_bitwise(x, again[name], f"{name}, second run")
        if x.dim():
            check_rule(x.flatten(), want[name].flatten(), base[name].flatten(), name=name)
        else:
            bound = 2 * (base[name] - want[name]).abs() + 4 * torch.finfo(torch.float32).eps * want[name].abs().clamp(min=0.1)
            assert (x - want[name]).abs() <= bound, f"{name}: {x.item()} against {want[name].item()}"


RULES: list[dict[str, Any]] = [dict(normalize=rule) for rule in ("group", "none", "batch", "rloo", "maxrl", "whiten")]
RULES += [dict(correction=0, eps=1e-4), dict(aggregation="normalize_then_sum")]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_advantages_within_the_rule(rule: dict[str, Any], host: HostExtension, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    R = 150
    rewards = torch.randn(R, 3) + 2
    rewards[7:14], rewards[21:28, 0], rewards[30], rewards[35:41] = 0.1, NAN, NAN, NAN
    weights = torch.rand(3) + 0.5
    for more in (dict(group_size=50), dict(group_ids=torch.arange(R) // 7 * 10), dict(group_ids=torch.randint(-9, 9, (R,)))):
        if rule.get("normalize") == "whiten":
            more |= dict(whiten_over="tokens", token_counts=torch.randint(1, 50, (R,)))
        want, base = (
            policy_loss.group_advantages(rewards.to(t), weights=weights.to(t), return_zero_variance=True, **more, **rule)
            for t in (torch.float64, torch.float32)
        )
        with monkeypatch.context() as patch:
            patch.setitem(policy_loss.advantages_op.kernels, "cpu", policy_loss.advantages_op.kernels["cuda"])
            found = policy_loss.group_advantages(rewards, weights=weights, return_zero_variance=True, **more, **rule)
        check_rule(found[0], want[0].double(), base[0])
        assert torch.equal(found[1], want[1]) and (found[0][found[1]] == 0).all()
    assert host.calls > 0
