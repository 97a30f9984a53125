"""The ops framework: every case passes opcheck, compiles in one graph with the eager gradients, and dispatch is honest.

An op joins by one line in thinkernel.testing.cases.
"""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import thinkernel as tk
import torch
from thinkernel.ops import dispatch
from thinkernel.testing import assert_bitwise
from thinkernel.testing.cases import CASES
from thinkernel.testing.inputs import Draw
from thinkernel.testing.validate import _outputs
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = [case for case in CASES if case.small]


class Recorder(TorchDispatchMode):
    """Collects the thinkernel ops that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "thinkernel" and not func.name().endswith("_backward"):
            self.calls.append((func, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.filterwarnings("ignore:thinkernel:RuntimeWarning")
def test_opcheck(case, backend):
    inputs = case.inputs(Draw(7))
    with tk.use_backend(backend), torch.no_grad(), Recorder() as recorder:
        case.run(**inputs)
    if not recorder.calls:
        pytest.skip("plain torch, no op of its own")
    func, args = recorder.calls[0]
    if backend == "auto" and tk.explain(case.run, **inputs).endswith("reference"):
        pytest.skip("auto is the reference here")
    differentiable = set(case.gradients)
    names = [argument.name for argument in func._schema.arguments]
    args = tuple(
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() and name in differentiable else x
        for name, x in zip(names, args)
    )
    with tk.use_backend(backend):
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.filterwarnings("ignore:thinkernel:RuntimeWarning")
def test_compiles_in_one_graph_with_the_eager_gradients(case):
    torch._dynamo.reset()
    inputs = case.inputs(Draw(11))
    eager = _outputs(case, inputs, 11, case.run)
    compiled = _outputs(case, inputs, 11, torch.compile(case.run, fullgraph=True, backend="aot_eager"))
    for i, (a, b) in enumerate(zip(eager, compiled, strict=True)):
        torch.testing.assert_close(b, a, rtol=2e-6, atol=2e-6, equal_nan=True, msg=lambda m, i=i: f"result {i}: {m}")


@pytest.mark.parametrize("name", ["attention/causal", "grpo/linear-logprob-vocab-odd", "linear/odd"])
def test_compiles_with_dynamic_shapes(name):
    torch._dynamo.reset()
    case = next(c for c in CASES if c.name == name)
    compiled = torch.compile(case.run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (33, 21):
        inputs = case.inputs(Draw(rows))
        cut = {k: v[:, :rows] if v.dim() == 4 else v[:rows] if v.shape[0] in (23, 37) else v for k, v in inputs.items()}
        for a, b in zip(_outputs(case, cut, 3, case.run), _outputs(case, cut, 3, compiled), strict=True):
            assert_bitwise(a, b, name)


def test_double_backward_is_a_named_error():
    q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))
    (dq,) = torch.autograd.grad(tk.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_backward has no gradient"):
        dq.sum().backward()


def _twice(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A result of a function whose backward op returns a list, and a leaf of it."""
    draw = Draw(5)
    leaf, k, w = draw.normal(1, 3, 2, 8).requires_grad_(), draw.normal(1, 3, 8), draw.normal(1, 3, 2)
    indices = torch.tensor([[[0, -1], [0, 1], [2, 0]]], dtype=torch.int32)
    if name == "sparse_attention":
        return tk.sparse_attention(leaf, k, indices), leaf
    if name == "indexer_scores":
        return tk.indexer_scores(leaf, k, w, causal=False), leaf
    if name == "indexer_loss":
        return tk.indexer_loss(leaf, k, w, draw.normal(1, 3, 2, 8), k, indices=indices, scale=0.3), leaf
    if name == "topk":
        x = draw.normal(3, 9).requires_grad_()
        return tk.topk(x, 2)[0], x
    x = draw.normal(3, 8).requires_grad_()
    experts, weights = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int32), torch.rand(3, 2)
    return tk.moe(x, draw.normal(3, 8, 8), draw.normal(3, 8, 4), weights, experts), x


@pytest.mark.parametrize("name", ["sparse_attention", "indexer_scores", "indexer_loss", "topk", "moe"])
def test_double_backward_of_ops_that_return_lists(name):
    out, leaf = _twice(name)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        torch.autograd.grad(grad.square().sum(), leaf)


@pytest.mark.parametrize("name", ["attention", "linear", "logprob", "linear_logprob", "sparse_attention", "attention_decode"])
def test_forward_mode_is_a_named_error(name):
    """It would see a constant."""
    draw = Draw(6)
    x, other = draw.normal(1, 2, 2, 8), draw.normal(1, 2, 2, 8)
    indices, target = torch.tensor([[[0, -1], [0, 1]]], dtype=torch.int32), torch.tensor([1, 3])
    lengths = torch.tensor([2], dtype=torch.int32)
    run = {
        "attention": lambda x: tk.attention(x, other, other),
        "linear": lambda x: tk.linear(x, other[0, 0]),
        "logprob": lambda x: tk.logprob(x[0, 0], target)[0],
        "linear_logprob": lambda x: tk.linear_logprob(x[0, 0], draw.normal(5, 8), target)[0],
        "sparse_attention": lambda x: tk.sparse_attention(x, other[:, :, 0], indices),
        "attention_decode": lambda x: tk.attention_decode(x, other, other, seqlens=lengths),
    }[name]
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(run, (x,), (other,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        run(torch.autograd.forward_ad.make_dual(x, other))


def test_appending_takes_no_gradient():
    """Compiled or not: the cache holds numbers alone."""
    cache, new = torch.zeros(1, 4, 2, 8), torch.randn(1, 2, 2, 8, requires_grad=True)
    tk.append_kv(cache, cache.clone(), new, new, seqlens=torch.tensor([2], dtype=torch.int32))
    assert not cache.requires_grad and torch.equal(cache[:, :2], new)


def test_decode_refuses_a_gradient_by_name():
    q, cache = torch.randn(1, 1, 2, 8, requires_grad=True), torch.randn(1, 4, 2, 8)
    out = tk.attention_decode(q, cache, cache, seqlens=torch.tensor([4], dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="attention_decode has no gradient"):
        out.sum().backward()


def test_raw_ops_differentiate():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    torch.ops.thinkernel.linear_forward(x, w, None).sum().backward()
    torch.testing.assert_close(w.grad, x.detach().sum(0).expand(5, 4))


@pytest.mark.parametrize("name", ["attention", "linear", "linear_logprob"])
def test_autocast_casts_like_torch(name):
    draw = Draw(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if name == "attention":
            assert tk.attention(*(draw.normal(1, 4, 2, 8) for _ in range(3))).dtype == torch.bfloat16
        elif name == "linear":
            x = draw.normal(3, 8).requires_grad_()
            y = tk.linear(x, draw.weight(5, 8), draw.normal(5))
            assert y.dtype == torch.bfloat16
            y.float().sum().backward()
            assert x.grad.dtype == torch.float32
        else:
            lp, ent = tk.linear_logprob(draw.normal(3, 8), draw.weight(9, 8), draw.integers(0, 9, 3))
            assert lp.dtype == ent.dtype == torch.float32


@pytest.mark.parametrize("wide", ["x", "weight", "bias"])
def test_autocast_refuses_one_float64_tensor(wide):
    """It casts all but float64, and a kernel takes one dtype."""
    draw = Draw(4)
    given = {"x": draw.normal(3, 8), "weight": draw.weight(5, 8), "bias": draw.normal(5)}
    given[wide] = given[wide].double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="^(weight|bias): got"):
            tk.linear(*given.values())
        with pytest.raises(TypeError, match="^(weight|bias): got"):
            tk.linear_logprob(given["x"], given["weight"], draw.integers(0, 5, 3), bias=given["bias"])


def test_forced_backend_that_does_not_cover_is_an_error():
    with tk.use_backend("cpu"), pytest.raises(NotImplementedError, match="router_z_loss: backend 'cpu' does not cover.*no cpu kernel"):
        tk.router_z_loss(torch.randn(3, 4))
    with tk.use_backend("cpu"), pytest.raises(NotImplementedError, match="float64"):
        tk.attention(*(torch.randn(1, 2, 2, 8, dtype=torch.float64) for _ in range(3)))
    with tk.use_backend("cuda"), pytest.raises(NotImplementedError, match="cuda"):
        tk.topk(torch.randn(3, 9), 2)


def test_use_backend_restores_and_checks():
    before = dispatch.requested()
    with tk.use_backend("reference"):
        assert dispatch.requested() == "reference"
    assert dispatch.requested() == before
    with pytest.raises(ValueError, match="use_backend.*'gpu'"):
        tk.use_backend("gpu")


def test_fallback_warns_once_and_names_the_reason():
    dispatch._warned.clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            tk.router_z_loss(torch.randn(3, 9))
    messages = [str(w.message) for w in seen if "router_z_loss" in str(w.message)]
    assert len(messages) == 1 and "no cpu kernel" in messages[0]


def test_explain_names_the_kernel_and_runs_nothing():
    q = torch.randn(1, 4, 2, 8)
    if dispatch.C is not None:
        assert tk.explain(tk.attention, q, q, q, causal=True) == "attention_forward: cpu"
    text = tk.explain(tk.grpo_loss, torch.randn(1, 3, 8), torch.randn(9, 8), torch.zeros(1, 3, dtype=torch.long), None,
                      torch.ones(1), torch.ones(1, 3))
    assert "linear_logprob_forward" in text and ("policy_loss: cpu" in text or dispatch.C is None)
    with tk.use_backend("reference"):
        assert tk.explain(tk.attention, q, q, q) == "attention_forward: reference"


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False)


def test_environment_chooses_the_backend():
    done = _python("import thinkernel as tk, torch; q = torch.ones(1, 2, 1, 4); print(tk.explain(tk.attention, q, q, q))",
                   THINKERNEL_BACKEND="reference")
    assert done.stdout.strip() == "attention_forward: reference", done.stderr
    done = _python("import thinkernel", THINKERNEL_BACKEND="gpu")
    assert done.returncode != 0 and "THINKERNEL_BACKEND is 'gpu'" in done.stderr


@pytest.mark.parametrize("how, why", [("missing", "is not built"), ("broken", "does not load: undefined symbol")])
def test_without_the_extension_the_reference_works_and_says_why(how, why):
    block = {
        "missing": "sys.modules['thinkernel._C'] = None",
        "broken": """
import importlib.abc, importlib.machinery
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == 'thinkernel._C' else None
    def exec_module(self, module): raise ImportError('undefined symbol: tk_test')
sys.meta_path.insert(0, Broken())""",
    }[how]
    code = f"""
import sys, warnings
{block}
import torch, thinkernel as tk
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    q = torch.randn(1, 4, 2, 8)
    assert tk.attention(q, q, q).shape == q.shape
print(seen[0].message)
print(tk.backends()['cpu'])
"""
    done = _python(code, THINKERNEL_BACKEND="auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(why) == 2, done.stdout


# ---- bad input: each call ends in an error that names the argument ------------------------------------------------

Q, K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8)
LENGTHS, TABLE = torch.tensor([3, 5], dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
H, W, T = torch.zeros(6, 8), torch.zeros(11, 8), torch.zeros(6, dtype=torch.long)
X, UP, DOWN = torch.zeros(6, 8), torch.zeros(4, 12, 8), torch.zeros(4, 8, 6)
WEIGHTS, EXPERTS = torch.ones(6, 2), torch.zeros(6, 2, dtype=torch.int32)
QI, KI, WI = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 8), torch.zeros(2, 3, 4)
C, G, NSA = torch.zeros(2, 1, 2, 8), torch.zeros(2, 3, 4, 3), dict(block=4, compress_block=4, stride=2)
KV, INDICES = torch.zeros(2, 5, 8), torch.zeros(2, 3, 4, dtype=torch.int32)

BAD = [
    ("q", lambda: tk.attention(Q[0], K, K)),
    ("q", lambda: tk.attention("q", K, K)),
    ("q", lambda: tk.attention(Q.long(), K.long(), K.long())),
    ("k", lambda: tk.attention(Q, K[..., :7], K)),
    ("k", lambda: tk.attention(Q, K.double(), K)),
    ("k", lambda: tk.attention(Q[:1], K, K)),
    ("v", lambda: tk.attention(Q, K, K[:, :4])),
    ("k", lambda: tk.attention(Q[:, :, :3], K, K)),
    ("k", lambda: tk.attention(Q, K.to("meta"), K)),
    ("window", lambda: tk.attention(Q, K, K, window=3)),
    ("window", lambda: tk.attention(Q, K, K, window=(-2, 0))),
    ("chunk", lambda: tk.attention(Q, K, K, chunk=0)),
    ("softcap", lambda: tk.attention(Q, K, K, softcap=-1.0)),
    ("scale", lambda: tk.attention(Q, K, K, scale="1")),
    ("sinks", lambda: tk.attention(Q, K, K, sinks=torch.zeros(3))),
    ("key_start", lambda: tk.attention(Q, K, K, key_start=torch.zeros(3, dtype=torch.int32))),
    ("key_start", lambda: tk.attention(Q, K, K, key_start=torch.tensor([0, 6], dtype=torch.int32))),
    ("key_start", lambda: tk.attention(Q, K, K, key_start=torch.tensor([0, -1], dtype=torch.int32))),
    ("cu_seqlens_k", lambda: tk.attention(Q, K, K, cu_seqlens_k=torch.tensor([0, 5], dtype=torch.int32))),
    ("cu_seqlens_q", lambda: tk.attention(Q[0], K[0], K[0], cu_seqlens_q=torch.tensor([0, 9], dtype=torch.int32))),
    ("seqlens", lambda: tk.attention_decode(Q, K, K, seqlens=LENGTHS[:1])),
    ("seqlens", lambda: tk.attention_decode(Q, K, K, seqlens=LENGTHS + 1)),
    ("seqlens", lambda: tk.attention_decode(Q, K, K, seqlens=LENGTHS - 4)),
    ("seqlens", lambda: tk.attention_decode(Q, K, K, seqlens=LENGTHS.float())),
    ("block_table", lambda: tk.attention_decode(Q, K, K, seqlens=LENGTHS, block_table=TABLE + 2)),
    ("block_table", lambda: tk.attention_decode(Q, K, K, seqlens=LENGTHS, block_table=TABLE[:1])),
    ("prefix", lambda: tk.attention_decode(Q, K, K, seqlens=LENGTHS, prefix=K)),
    ("prefix length", lambda: tk.attention_decode(Q, K, K, seqlens=LENGTHS, prefix=(K[0], K[0], 9))),
    ("k_new", lambda: tk.append_kv(K, K, Q, Q, seqlens=LENGTHS)),
    ("out_b", lambda: tk.merge_attention(Q, Q[..., 0], Q[:1], Q[..., 0])),
    ("value_dim", lambda: tk.mla_decode(Q, KV, seqlens=LENGTHS, value_dim=9, scale=1.0)),
    ("q", lambda: tk.mla_decode(Q, KV[..., :7], seqlens=LENGTHS, value_dim=4, scale=1.0)),
    ("kv_cache", lambda: tk.mla_decode(Q, KV.byte(), seqlens=LENGTHS, value_dim=4, scale=1.0)),
    ("rope", lambda: tk.append_latent(KV, torch.zeros(2, 1, 6), torch.zeros(2, 1, 3), seqlens=LENGTHS)),
    ("k", lambda: tk.topk(torch.zeros(3, 4), 0)),
    ("lengths", lambda: tk.topk(torch.zeros(3, 4), 2, lengths=torch.tensor([5, 0, 0], dtype=torch.int32))),
    ("w", lambda: tk.indexer_topk(QI, KI, WI[:1], top_k=2)),
    ("k", lambda: tk.indexer_scores(QI, KI[..., :4], WI)),
    ("top_k", lambda: tk.indexer_topk(QI, KI, WI, top_k=0)),
    ("indices", lambda: tk.sparse_attention(Q, KV, INDICES[:, :2])),
    ("indices", lambda: tk.sparse_attention(Q, KV, INDICES + 5)),
    ("indices", lambda: tk.sparse_attention(Q, KV, INDICES - 2)),
    ("kv", lambda: tk.sparse_attention(Q, (K, K[:, :4]), INDICES)),
    ("reduction", lambda: tk.indexer_loss(QI, KI, WI, Q, KV, scale=1.0, reduction="max")),
    ("gates", lambda: tk.native_sparse_attention(Q, K, K, C, C, G[..., :2], **NSA)),
    ("k_compressed", lambda: tk.native_sparse_attention(Q, K, K, C[:, :0], C[:, :0], G, **NSA)),
    ("v_compressed", lambda: tk.native_sparse_attention(Q, K, K, C, C[..., :7], G, **NSA)),
    ("k_compressed", lambda: tk.native_sparse_attention(Q, K, K, C.double(), C, G, **NSA)),
    ("block", lambda: tk.native_sparse_attention(Q, K, K, C, C, G, block=3, compress_block=4, stride=2)),
    ("compress_block", lambda: tk.native_sparse_attention(Q, K, K, C, C, G, block=4, compress_block=5, stride=2)),
    ("top_n", lambda: tk.native_sparse_attention(Q, K, K, C, C, G, **NSA, top_n=2)),
    ("window", lambda: tk.native_sparse_attention(Q, K, K, C, C, G, **NSA, window=0)),
    ("seqlens", lambda: tk.native_sparse_attention(Q, K, K, C, C, G, **NSA, seqlens=LENGTHS + 1)),
    ("seqlens", lambda: tk.native_sparse_attention(Q, K, K, C, C, G, **NSA, seqlens=LENGTHS[:1])),
    ("cu_seqlens", lambda: tk.native_sparse_attention(Q[0], K[0, :3], K[0, :3], C[0, :0], C[0, :0], G[0], **NSA, cu_seqlens=LENGTHS)),
    ("k", lambda: tk.block_attention(Q, K[..., :7], K, block=2, top_k=1)),
    ("v", lambda: tk.block_attention(Q, K, K[:, :4], block=2, top_k=1)),
    ("block", lambda: tk.block_attention(Q, K, K, block=0, top_k=1)),
    ("top_k", lambda: tk.block_attention(Q, K, K, block=2, top_k=0)),
    ("scale", lambda: tk.block_attention(Q, K, K, block=2, top_k=1, scale="1")),
    ("top_k", lambda: tk.route(torch.zeros(3, 4), 5)),
    ("score", lambda: tk.route(torch.zeros(3, 4), 2, score="tanh")),
    ("n_group", lambda: tk.route(torch.zeros(3, 4), 2, n_group=3)),
    ("bias", lambda: tk.route(torch.zeros(3, 4), 2, bias=torch.zeros(3))),
    ("experts", lambda: tk.route(torch.zeros(3, 4), 2, experts=torch.full((3, 2), 4))),
    ("w_down", lambda: tk.moe(X, UP, DOWN[:, :7], WEIGHTS, EXPERTS)),
    ("layout", lambda: tk.moe(X, UP, DOWN, WEIGHTS, EXPERTS, layout="hf")),
    ("experts", lambda: tk.moe(X, UP, DOWN, WEIGHTS, EXPERTS.float())),
    ("weights", lambda: tk.moe(X, UP, DOWN, WEIGHTS[:3], EXPERTS[:3])),
    ("weight", lambda: tk.linear(H, W[:, :7])),
    ("weight", lambda: tk.linear(H, W.bfloat16())),
    ("bias", lambda: tk.linear(H, W, torch.zeros(3))),
    ("target", lambda: tk.linear_logprob(H, W, T + 11)),
    ("target", lambda: tk.linear_logprob(H, W, T - 1)),
    ("target", lambda: tk.linear_logprob(H, W, T.float())),
    ("temperature", lambda: tk.linear_logprob(H, W, T, temperature=0.0)),
    ("softcap", lambda: tk.linear_logprob(H, W, T, softcap=float("inf"))),
    ("weight", lambda: tk.linear_logprob(H, W[:0], T)),
    ("target", lambda: tk.logprob(torch.zeros(3, 4), torch.tensor([0, 4, 0]))),
    ("group_size", lambda: tk.group_advantages(torch.zeros(6), 4)),
    ("mask", lambda: tk.policy_loss(torch.zeros(2, 3), None, torch.zeros(2), torch.ones(2, 2))),
    ("loss_type", lambda: tk.policy_loss(torch.zeros(2, 3), None, torch.zeros(2), torch.ones(2, 3), loss_type="x")),
]


@pytest.mark.parametrize("i", range(len(BAD)), ids=[f"{name.replace(' ', '-')}-{i}" for i, (name, _) in enumerate(BAD)])
@pytest.mark.filterwarnings("ignore:thinkernel:RuntimeWarning")
def test_bad_input_names_the_argument(i):
    name, call = BAD[i]
    with pytest.raises((ValueError, TypeError), match=rf"^{name}:"):
        call()


@pytest.mark.parametrize("name", ["patch", "unpatch"])
def test_what_is_not_there_yet_says_so_by_name(name):
    with pytest.raises(NotImplementedError, match=f"{name} is not implemented yet"):
        getattr(tk, name)(None)
