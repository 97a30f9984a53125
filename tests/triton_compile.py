"""Compiling the Triton kernels ahead of time, for GPUs that are not here, exactly as the host functions would launch them.

The host functions run on CPU tensors with `launch` replaced: instead of running, every kernel is compiled for the asked
architecture with the argument types, alignments and options that the launch would have had.
"""
from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from thinkernel.kernels import (
    attention,
    attention_backward,
    attention_decode,
    configs,
    grpo,
    grpo_advantages,
    grpo_logits,
    grpo_policy,
    indexer,
    indexer_loss,
    linear,
    mla,
    moe,
    moe_backward,
    moe_route,
    native_sparse,
    native_sparse_backward,
    native_sparse_choose,
    native_sparse_walk,
    sparse_attention,
    sparse_attention_backward,
    topk,
)  # fmt: skip
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
MODULES = (  # whose launches a compile check catches
    attention, attention_backward, attention_decode, grpo, grpo_advantages, grpo_logits, grpo_policy, indexer, indexer_loss, linear, mla,
    moe, moe_backward, moe_route, native_sparse, native_sparse_backward, native_sparse_choose, native_sparse_walk, sparse_attention,
    sparse_attention_backward, topk,
)  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled: its name, registers a thread, bytes of stack (spills) and of shared memory, and the PTX."""

    kernel: str
    registers: int
    stack: int
    shared: int
    ptx: str


class _AbsentGPU:
    """What Triton's compiler asks of a driver, for an architecture that this machine does not have."""

    def __init__(self, arch: str) -> None:
        self.capability = TARGETS[arch]

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps one cache per device, so one per architecture here

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def _as(arch: str) -> Iterator[None]:
    before = driver._active
    driver.set_active(_AbsentGPU(arch))
    try:
        with configs.force_architecture(arch):
            yield
    finally:
        driver._active = before


def resources(cubin: bytes) -> tuple[int, int]:
    """-> registers a thread, bytes of stack, as cuobjdump reads them from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"cuobjdump -res-usage: {text!r}"
    return int(found[1]), int(found[2])


def compile_launches(arch: str, call: Callable[[], None], only: str | None = None) -> list[Compiled]:
    """Every kernel that `call` would launch (or the one of that name), compiled for `arch`."""
    found: list[Compiled] = []

    def compile_only(kernel, grid, *arguments, warps, stages, device, **constants) -> None:
        if only is not None and kernel.fn.__name__ != only:
            return
        built = kernel.warmup(*arguments, grid=grid, num_warps=warps, num_stages=stages, **constants)
        registers, stack = resources(built.asm["cubin"])
        found.append(Compiled(kernel.fn.__name__, registers, stack, built.metadata.shared, built.asm["ptx"]))

    with ExitStack() as stack:
        stack.enter_context(_as(arch))
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "launch", compile_only))
        call()
    return found


def attention_forward_call(dtype: torch.dtype, D: int, Dv: int, T: int = 4096, **options) -> Callable[[], None]:
    q, k, v = torch.empty(1, 512, 8, D, dtype=dtype), torch.empty(1, T, 2, D, dtype=dtype), torch.empty(1, T, 2, Dv, dtype=dtype)
    out, lse = torch.empty(1, 512, 8, Dv, dtype=dtype), torch.empty(1, 512, 8)
    if "cu_seqlens_q" in options:
        q, k, v, out, lse = (x[0] for x in (q, k, v, out, lse))
    return lambda: attention.attention_forward(q, k, v, out, lse, causal=True, **options)


def attention_backward_call(dtype: torch.dtype, D: int, Dv: int, **options) -> Callable[[], None]:
    q, k, v = torch.empty(1, 512, 8, D, dtype=dtype), torch.empty(1, 1024, 2, D, dtype=dtype), torch.empty(1, 1024, 2, Dv, dtype=dtype)
    out, lse = torch.empty(1, 512, 8, Dv, dtype=dtype), torch.empty(1, 512, 8)
    if "cu_seqlens_q" in options:
        q, k, v, out, lse = (x[0] for x in (q, k, v, out, lse))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    return lambda: attention.attention_backward(q, k, v, out, lse, out, dq, dk, dv, causal=True, **options)


def attention_decode_call(dtype: torch.dtype, D: int, Dv: int, paged: bool = False, prefix: int = 0, **options) -> Callable[[], None]:
    q, out, lse = torch.empty(2, 1, 8, D, dtype=dtype), torch.empty(2, 1, 8, Dv, dtype=dtype), torch.empty(2, 1, 8)
    shape = (64, 64, 2) if paged else (2, 2048, 2)
    k, v = torch.empty(*shape, D, dtype=dtype), torch.empty(*shape, Dv, dtype=dtype)
    table = torch.zeros(2, 32, dtype=torch.int32) if paged else None
    seqlens = torch.tensor([5, 9], dtype=torch.int32)
    if prefix:
        shape = (64, 64, 2) if paged else (prefix, 2)
        shared_k, shared_v = torch.empty(*shape, D, dtype=dtype), torch.empty(*shape, Dv, dtype=dtype)
        options["prefix"] = (shared_k, shared_v, prefix, torch.zeros(64, dtype=torch.int32) if paged else None)
    return lambda: attention.attention_decode(q, k, v, out, lse, seqlens=seqlens, block_table=table, **options)


def mla_decode_call(dtype: torch.dtype, L: int = 512, R: int = 64, *, H: int = 16, Sq: int = 1, paged: bool = False, prefix: int = 0,
                    fp8: bool = False, T: int = 2048) -> Callable[[], None]:
    q, out, lse = torch.empty(2, Sq, H, L + R, dtype=dtype), torch.empty(2, Sq, H, L, dtype=dtype), torch.empty(2, Sq, H)
    width, kind = (656, torch.uint8) if fp8 else (L + R, dtype)
    cache = torch.empty(*((64, 64) if paged else (2, T)), width, dtype=kind)
    table = torch.zeros(2, 32, dtype=torch.int32) if paged else None
    shared = None
    if prefix:
        pages = torch.zeros(64, dtype=torch.int32) if paged else None
        shared = (torch.empty(*((64, 64) if paged else (prefix,)), width, dtype=kind), prefix, pages)
    seqlens = torch.tensor([5, 9], dtype=torch.int32)
    return lambda: mla.mla_decode(q, cache, out, lse, seqlens=seqlens, block_table=table, scale=192**-0.5, prefix=shared)


def sparse_call(dtype: torch.dtype, D: int = 576, Dv: int = 512, *, H: int = 128, Hkv: int = 0, K: int = 2048, packed: bool = False,
                cache: bool = False, paged: bool = False, fp8: bool = False, backward: bool = False, **options) -> Callable[[], None]:
    """Hkv = 0: latents. packed: one row of sequences; cache: with seqlens."""
    B, S, T = 2, 8, 4096
    lead = (B * S,) if packed else (B, S)
    q, out, lse = torch.empty(*lead, H, D, dtype=dtype), torch.empty(*lead, H, Dv, dtype=dtype), torch.empty(*lead, H)
    rows, kind = (T,) if packed else (64, 64) if paged else (B, T), torch.uint8 if fp8 else dtype
    kv = torch.empty(*rows, *((Hkv, D) if Hkv else (656 if fp8 else D,)), dtype=kind)
    v = torch.empty(*rows, Hkv, Dv, dtype=dtype) if Hkv else None
    indices = torch.zeros(*lead, *((Hkv,) if Hkv else ()), K, dtype=torch.int32)
    if packed:
        options |= dict(cu_seqlens_q=torch.tensor([0, 5, 16], dtype=torch.int32), cu_seqlens_k=torch.tensor([0, 9, T], dtype=torch.int32))
    if cache or paged:
        options["seqlens"] = torch.tensor([5, 9], dtype=torch.int32)
    scale = 192**-0.5
    if backward:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(kv), None if v is None else torch.empty_like(v)
        dsinks = torch.zeros(H) if "sinks" in options else None
        return lambda: sparse_attention_backward.sparse_attention_backward(
            q, kv, v, indices, out, lse, out, dq, dk, dv, scale=scale, dsinks=dsinks, **options)
    options["block_table"] = torch.zeros(B, 64, dtype=torch.int32) if paged else None
    return lambda: sparse_attention.sparse_attention(q, kv, v, indices, out, lse, scale=scale, **options)


def latent_cache_calls(dtype: torch.dtype, fp8: bool, paged: bool) -> Callable[[], None]:
    """append_latent, then gather_latent."""
    width, kind = (656, torch.uint8) if fp8 else (576, dtype)
    cache = torch.empty(*((64, 64) if paged else (2, 2048)), width, dtype=kind)
    latent, rope = torch.empty(2, 4, 512, dtype=dtype), torch.empty(2, 4, 64, dtype=dtype)
    table, seqlens = torch.zeros(2, 32, dtype=torch.int32) if paged else None, torch.tensor([5, 9], dtype=torch.int32)
    out = torch.empty(2, 2048, 576, dtype=torch.bfloat16 if fp8 else dtype)

    def call() -> None:
        mla.append_latent(cache, latent, rope, seqlens=seqlens, block_table=table)
        mla.gather_latent(cache, out, seqlens=seqlens, block_table=table)

    return call


def logprob_forward_call(dtype: torch.dtype, **options) -> Callable[[], None]:
    h, w, rows = torch.empty(256, 1024, dtype=dtype), torch.empty(4096, 1024, dtype=dtype), torch.empty(2, 256)
    target, lse = torch.zeros(256, dtype=torch.int64), torch.empty(256, dtype=torch.float64)
    return lambda: grpo.linear_logprob_forward(h, w, target, None, *rows, lse, **options)


def logprob_backward_call(dtype: torch.dtype, **options) -> Callable[[], None]:
    h, w, rows = torch.empty(256, 1024, dtype=dtype), torch.empty(4096, 1024, dtype=dtype), torch.zeros(3, 256)
    target, lse = torch.zeros(256, dtype=torch.int64), torch.zeros(256, dtype=torch.float64)
    dh, dw = torch.empty_like(h), torch.empty_like(w)
    buffer = 256 * 2048 * h.element_size()  # half of the vocabulary, so that dhidden continues from chunk to chunk
    return lambda: grpo.linear_logprob_backward(h, w, target, None, lse, *rows, dh, dw, None, buffer_bytes=buffer, **options)


def logits_forward_call(dtype: torch.dtype, V: int = 151936, **options) -> Callable[[], None]:
    logits, target, rows = torch.empty(16, V, dtype=dtype), torch.zeros(16, dtype=torch.int64), torch.empty(2, 16)
    return lambda: grpo_logits.logprob_forward(logits, target, *rows, torch.empty(16, dtype=torch.float64), **options)


def logits_backward_call(dtype: torch.dtype, V: int = 151936, **options) -> Callable[[], None]:
    logits, target, rows = torch.empty(16, V, dtype=dtype), torch.zeros(16, dtype=torch.int64), torch.zeros(3, 16)
    lse, dlogits = torch.zeros(16, dtype=torch.float64), torch.empty(16, V, dtype=dtype)
    return lambda: grpo_logits.logprob_backward(logits, target, lse, *rows, dlogits, **options)


def policy_call(packed: bool = False, per_token: bool = False, everything: bool = False, **options) -> Callable[[], None]:
    shape = (4096,) if packed else (8, 512)
    logprob, old, ref, rollout, entropy, dlogprob, dref, dentropy = (torch.empty(shape) for _ in range(8))
    mask, cu = torch.zeros(shape, dtype=torch.uint8), torch.arange(0, 4097, 512, dtype=torch.int32) if packed else None
    more = dict(top=mask, total=torch.ones(1, dtype=torch.float64), dref=dref, dentropy=dentropy, entropy_coef=0.1) if everything else {}
    chosen = grpo_policy.Options(**options)
    return lambda: grpo_policy.policy_loss(
        logprob, old, torch.empty(shape if per_token else 8), mask, chosen, torch.empty(()), torch.empty(13),
        ref=ref if chosen.kl else None, rollout=rollout, entropy=entropy, cu_seqlens=cu, dlogprob=dlogprob, **more)


def advantages_call(n: int = 1, ids: bool = False, **options) -> Callable[[], None]:
    rewards, more = torch.empty(64, n), {"normalize": 0, "normalize_then_sum": False, "eps": 1e-6, "correction": 1} | options
    return lambda: grpo_advantages.group_advantages(
        rewards, 0 if ids else 8, torch.zeros(64, dtype=torch.int64) if ids else None, torch.ones(n) if n > 1 else None,
        torch.ones(64) if ids else None, torch.empty(64), torch.empty(64, dtype=torch.uint8), **more)


def linear_call(dtype: torch.dtype, rows: int, transposed: bool = False, bias: bool = True) -> Callable[[], None]:
    x, w = torch.empty(rows, 1024, dtype=dtype), torch.empty(1024, 1024, dtype=dtype)
    b, out = torch.empty(1024, dtype=dtype) if bias else None, torch.empty(rows, 1024, dtype=dtype)
    return lambda: linear.linear(x, w.t() if transposed else w, b, out)


def topk_call(dtype: torch.dtype, rows: int, length: int, lengths: bool = True) -> Callable[[], None]:
    scores, counts = torch.empty(rows, length, dtype=dtype), torch.empty(rows, dtype=torch.int32) if lengths else None
    values, indices = torch.empty(rows, 2048, dtype=dtype), torch.empty(rows, 2048, dtype=torch.int32)
    return lambda: topk.select(scores, counts, values, indices)


def index_inputs(dtype: torch.dtype, B: int = 2, S: int = 512, T: int = 4096, Hi: int = 64, Di: int = 128) -> tuple[torch.Tensor, ...]:
    return torch.empty(B, S, Hi, Di, dtype=dtype), torch.empty(B, T, Di, dtype=dtype), torch.empty(B, S, Hi)


def indexer_scores_call(dtype: torch.dtype, causal: bool = True, **sizes: int) -> Callable[[], None]:
    """Forward, then backward."""
    q, k, w = index_inputs(dtype, **sizes)
    out, dk = torch.empty(*q.shape[:2], k.shape[1]), torch.empty(k.shape)

    def call() -> None:
        indexer.indexer_scores(q, k, w, out, causal=causal)
        indexer.indexer_scores_backward(q, k, w, out, torch.empty_like(q), dk, torch.empty_like(w), causal=causal)

    return call


def indexer_topk_call(dtype: torch.dtype, paged: bool = False, packed: bool = False, fp8: bool = False, **sizes: int) -> Callable[[], None]:
    q, k, w = index_inputs(dtype, **sizes)
    k, scale = (k.to(torch.float8_e4m3fn), torch.empty(k.shape[:-1])) if fp8 else (k, None)
    more: dict[str, torch.Tensor | None] = dict(k_scale=scale)
    if paged:
        k, scale = k.view(-1, 64, k.shape[-1]), None if scale is None else scale.view(-1, 64)
        more = dict(k_scale=scale, seqlens=torch.zeros(2, dtype=torch.int32), block_table=torch.zeros(2, 64, dtype=torch.int32))
    if packed:
        q, k, w, scale = q.flatten(0, 1), k.flatten(0, 1), w.flatten(0, 1), None if scale is None else scale.flatten()
        cu = torch.tensor([0, 300, len(q)], dtype=torch.int32)
        more = dict(k_scale=scale, cu_seqlens_q=cu, cu_seqlens_k=cu)
    indices = torch.empty(*q.shape[:-2], 2048, dtype=torch.int32)
    return lambda: indexer.indexer_topk(q, k, w, indices, causal=True, **more)


def indexer_loss_call(dtype: torch.dtype, sparse: bool = False, lse: bool = False, H: int = 128, Hkv: int = 1, D: int = 576,
                      **sizes: int) -> Callable[[], None]:
    """Forward, then backward."""
    q, k, w = index_inputs(dtype, **sizes)
    rows, S, T = q.shape[0] * q.shape[1], q.shape[1], k.shape[1]
    target_q, target_k = torch.empty(rows, H, D, dtype=dtype), torch.empty(q.shape[0], T, Hkv, D, dtype=dtype)
    indices = torch.empty(rows, 2048, dtype=torch.int32) if sparse else None
    loss, kept, dk = torch.empty(rows), torch.empty(rows, 2048 if sparse else 3 + 2 * H), torch.empty(k.shape)
    flat_q, flat_w = q.flatten(0, 1), w.flatten(0, 1)

    def call() -> None:
        target = indexer_loss.Target(target_q, target_k, S, indices, 0.1)
        indexer_loss.indexer_loss(flat_q, k, flat_w, target, torch.empty(rows, H) if lse else None, loss, kept)
        indexer_loss.indexer_loss_backward(flat_q, k, flat_w, target, kept, loss, torch.empty_like(flat_q), dk, torch.empty_like(flat_w))

    return call


def block_sparse_calls(dtype: torch.dtype, D: int = 128, Dv: int = 128, *, H: int = 32, Hkv: int = 2, moba: bool = False, block: int = 64,
                       slots: int = 16, packed: bool = False, cache: bool = False) -> dict[str, Callable[[], None]]:
    """The choice, attention over what is chosen, and its backward: NSA's own sizes, or MoBA's."""
    S, T = 512, 512 if packed else 4096
    X = H if moba else Hkv
    q, k, v = torch.empty(1, S, H, D, dtype=dtype), torch.empty(1, T, Hkv, D, dtype=dtype), torch.empty(1, T, Hkv, Dv, dtype=dtype)
    kc, out, lse = torch.empty(1, T // 16 - 1, Hkv, D, dtype=dtype), torch.empty(1, S, H, Dv, dtype=dtype), torch.empty(1, S, H)
    indices = torch.zeros(1, S, X, slots, dtype=torch.int32)
    cu = torch.tensor([0, 100, S], dtype=torch.int32) if packed else None
    if packed:
        q, k, v, kc, out, lse, indices = (x[0] for x in (q, k, v, kc, out, lse, indices))
    counts = torch.tensor([T], dtype=torch.int32) if cache else None
    more = dict(compress_block=32, stride=16, scale=0.1, cu_compressed=cu, seqlens=counts)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    return {
        "choose": lambda: native_sparse_choose.choose(
            q, k if moba else kc, None if moba else lse, indices, T=T, block=block, cu_seqlens=cu, **({} if moba else more)),
        "forward": lambda: native_sparse.block_attention(
            q, k, v, indices, out, lse, block=block, scale=0.1, cu_seqlens=cu, seqlens=counts),
        "backward": lambda: native_sparse_backward.block_backward(
            q, k, v, indices, out, lse, out, dq, dk, dv, block=block, scale=0.1, cu_seqlens=cu),
    }


def branch_gates_calls(dtype: torch.dtype, Dv: int = 128) -> Callable[[], None]:
    """The sum of branches, its backward, the sum without gates."""
    branches, gates = torch.empty(3, 1, 512, 32, Dv, dtype=dtype), torch.empty(1, 512, 32, 3, dtype=dtype)
    out = torch.empty(1, 512, 32, Dv, dtype=dtype)

    def call() -> None:
        native_sparse.branch_gates(branches.unbind(), gates, out)
        native_sparse.branch_gates_backward(branches, gates, out, torch.empty_like(branches), torch.empty_like(gates))
        native_sparse.branch_gates(branches.unbind(), None, out)

    return call


def route_calls(dtype: torch.dtype, E: int = 256, K: int = 8, **options) -> Callable[[], None]:
    """route, then its backward; `n_group` and the others as in tk.route."""
    N, rule = 512, {"score": "softmax", "renormalize": True, "scaling": 1.0} | options
    logits, experts, weights = torch.empty(N, E, dtype=dtype), torch.zeros(N, K, dtype=torch.int32), torch.empty(N, K)
    counts, order, offsets = (torch.empty(n, dtype=torch.int32) for n in (E, N * K, E + 1))
    bias = torch.empty(E) if rule.pop("bias", False) else None
    own = {name: rule[name] for name in ("score", "renormalize", "scaling")}

    def call() -> None:
        moe_route.route_forward(logits, bias, experts, weights, counts, order, offsets, **rule)
        moe_route.route_backward(logits, experts, weights, logits, **own)

    return call


def experts_calls(dtype: torch.dtype, tokens: int = 4096, *, activation: str = "swiglu", weight_on: str = "output",
                  layout: str = "out_in", biases: bool = False) -> Callable[[], None]:
    """moe's forward, without z and with it, then its whole backward."""
    H, inner, E, K = 1024, 512, 16, 4
    columns = inner if activation == "relu2" else 2 * inner
    shapes = ((E, columns, H), (E, H, inner)) if layout == "out_in" else ((E, H, columns), (E, inner, H))
    x, y, z = (torch.empty(n, width, dtype=dtype) for n, width in ((tokens, H), (tokens, H), (tokens * K, columns)))
    up, down = (torch.empty(shape, dtype=dtype) for shape in shapes)
    weights, experts = torch.empty(tokens, K), torch.zeros(tokens, K, dtype=torch.int32)
    b1, b2 = (torch.empty(E, columns), torch.empty(E, H)) if biases else (None, None)
    options = dict(activation=activation, weight_on=weight_on, layout=layout, limit=7.0)

    def call() -> None:
        for kept in (None, z):
            moe.moe_forward(x, up, down, weights, experts, b1, b2, y, kept, **options)
        moe_backward.moe_backward(y, z, x, up, down, weights, experts, b1, b2, x, up, down, weights, b1, b2, **options)

    return call
