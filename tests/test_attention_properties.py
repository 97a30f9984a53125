"""Random combinations of attention's features on the C++ kernels: the numerics rule, and the bits that must not move.

A seed stands for one call: sizes, feature combination, strides and dtype; a failure names it, and
`python tests/test_attention_properties.py SEED` prints it. The slow sweeps go through thousands of seeds, new ones each time.
Shapes: B batch, S queries, T keys, H query heads, Hkv key heads, D head dim, Dv value dim, N packed tokens, P pages.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import thinkernel as tk
import torch
import torch.nn.functional as F
from thinkernel.ops.dispatch import C
from thinkernel.ops.memory import poisoned_results
from thinkernel.testing.attention import torch_attention, torch_decode
from thinkernel.testing.cases import Case
from thinkernel.testing.compare import assert_bitwise
from thinkernel.testing.inputs import Draw
from thinkernel.testing.validate import judge, messages
from torch import Tensor

pytestmark = pytest.mark.skipif(not hasattr(C, "attention_forward"), reason="the C++ core is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIRST = int(time.time()) if os.environ.get("THINKERNEL_FRESH_EXAMPLES") == "1" else 0  # of the slow sweeps' seeds


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- random calls --------------------------------------------------------------------------------------------------


def head_dim(rng: random.Random) -> int:
    return rng.choice([32, 64, 64, 80, 96, 128, 128, 192, 256, rng.randint(1, 256), rng.randint(32, 256)])


def length(rng: random.Random) -> int:
    return rng.choice([rng.randint(2, 20), rng.randint(20, 60), rng.choice([31, 32, 33, 63, 64, 65]), rng.randint(60, 130)])


def features(rng: random.Random, draws_chunk: bool = True) -> dict[str, Any]:
    """Options of the mask and the scores; each is given in a part of the calls, so that all pairs occur."""
    some: dict[str, Any] = {}
    if rng.random() < 0.35:
        side = lambda: rng.choice([-1, 0, 1, rng.randint(2, 20), rng.randint(20, 100), 600])
        some["window"] = (side(), side())
    if draws_chunk and rng.random() < 0.2:
        some["chunk"] = rng.choice([1, 2, rng.randint(3, 40), 64, 700])
    if rng.random() < 0.25:
        some["softcap"] = rng.choice([1.0, 5.0, 30.0])
    if rng.random() < 0.3:
        some["scale"] = rng.choice([0.3, 0.05, -0.2, 0.0, 1])
    return some


@dataclass(frozen=True)
class Call:
    """One random call of tk.attention. lengths: of packed sequences (queries, keys)."""

    seed: int
    dtype: torch.dtype
    B: int
    S: int
    T: int
    H: int
    Hkv: int
    D: int
    Dv: int
    options: dict[str, Any]
    sinks: bool
    sinks_dtype: torch.dtype | None
    key_start: tuple[int, ...] | None = None
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    layouts: tuple[str, ...] = field(default=("plain",) * 4)

    def inputs(self, draw: Draw) -> dict[str, Any]:
        lead = (lambda n: (n,)) if self.lengths else (lambda n: (self.B, n))
        shapes = dict(q=(self.H, self.D), k=(self.Hkv, self.D), v=(self.Hkv, self.Dv))
        found: dict[str, Any] = {}
        for name, layout in zip("qkv", self.layouts):
            batch, heads = lead(self.S if name == "q" else self.T), shapes[name][0]
            if layout == "expand batch" and not self.lengths and self.B:
                batch = (1, batch[1])
            found[name] = draw.normal(*batch, 1 if layout == "expand heads" else heads, shapes[name][1])
        if self.sinks:
            found["sinks"] = draw.normal(self.H, dtype=self.sinks_dtype)
        if self.key_start is not None:
            found["key_start"] = torch.tensor(self.key_start, dtype=torch.int32)
        if self.lengths is not None:
            found["cu_seqlens_q"], found["cu_seqlens_k"] = (offsets(x) for x in self.lengths)
        return found

    def run(self, attention: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
            wide = [laid_out(x, layout, self.B, h) for x, layout, h in zip((q, k, v), self.layouts, (self.H, self.Hkv, self.Hkv))]
            out, lse = attention(*wide, **self.options, **more)
            # the cotangents arrive in the order of what is returned
            return (out.transpose(-3, -2), lse.mT) if self.layouts[3] == "bhsd" else (out, lse)

        return run

    def draws(self) -> int:
        """The largest error of a few numbers is itself a noisy number: the fewer numbers, the more draws."""
        few = max(3, min(16, 1000 // (1 + self.B * self.H * min(self.S, self.T))))
        return max(few, 200 // self.H) if self.sinks else few  # a sink has one gradient a head

    def keys_seen(self) -> float:
        """How many keys a query sees: the lowest tenth's most (of those that see any)."""
        mask = {name: x for name, x in self.options.items() if name in ("causal", "window", "chunk")}
        inputs = {name: x[..., :1] * 0 if name in "qkv" else x for name, x in self.inputs(Draw(0)).items() if name != "sinks"}
        for name, layout, heads in zip("qkv", self.layouts, (self.H, self.Hkv, self.Hkv)):
            inputs[name] = laid_out(inputs[name], layout if "expand" in layout else "plain", self.B, heads)
        _, lse = torch_attention(**inputs, **mask)  # every score is 0
        seen = lse.exp().flatten()
        seen = seen[seen > 0].round()
        return float(seen.quantile(0.1)) if seen.numel() else 0.0

    def case(self) -> Case:
        def ours(*args: Any, **more: Any) -> Any:
            return tk.attention(*args, **more, return_lse=True)

        def torchs(*args: Any, **more: Any) -> Any:
            return torch_attention(*args, **more, sdpa=few >= 8 and self.S >= 8)

        few = self.keys_seen()
        names = ("q", "k", "v", "sinks") if self.sinks else ("q", "k", "v")
        return Case("attention", f"seed {self.seed}: {self}", self.inputs, self.run(ours), names, self.run(torchs))


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def laid_out(x: Tensor, layout: str, batch: int, heads: int) -> Tensor:
    """The same values in another memory layout, differentiably; the last dimension stays contiguous but for "last"."""
    if layout == "bhsd":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "padded":  # a view into a larger tensor, with NaN around
        return F.pad(x, (2, 3, 1, 1, 1, 0), value=float("nan"))[..., 1:, 1:-1, 2:-3]
    if layout == "last":
        return x.mT.contiguous().mT
    if layout == "expand batch" and x.dim() == 4:
        return x.expand(batch, -1, -1, -1)
    return x.expand(*x.shape[:-2], heads, x.shape[-1]) if layout == "expand heads" else x


def random_call(seed: int) -> Call:
    rng = random.Random(seed)
    Hkv, group = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3, 4])
    D = head_dim(rng)
    Dv = rng.choice([D, D, D, 128 if D == 192 else head_dim(rng)])
    B, S = rng.choice([1, 1, 2, 3]), length(rng)
    T = rng.choice([S, S, S, length(rng), S + length(rng), length(rng) + (500 if S < 40 else 0)])
    edge = rng.random()
    if edge < 0.03:
        B = 0
    elif edge < 0.06:
        S = 0
    elif edge < 0.09:
        T = 0
    elif edge < 0.15:
        S = 1
    elif edge < 0.18:
        T = 1
    key_start = lengths = None
    kind = rng.random()
    if kind < 0.2:
        key_start = tuple(rng.randint(0, T) for _ in range(B))
    elif kind < 0.45:
        count = rng.choice([1, 2, 4, 7])
        of_q = tuple(rng.choice([0, 1, length(rng)]) for _ in range(count))
        of_k = of_q if rng.random() < 0.5 else tuple(rng.choice([0, 1, n, length(rng)]) for n in of_q)
        lengths, B, S, T = (of_q, of_k), 1, sum(of_q), sum(of_k)
    layouts = [rng.choice(["plain", "plain", "bhsd", "padded", "last"]) for _ in range(4)]
    for i in (1, 2):
        layouts[i] = rng.choice([layouts[i]] * 4 + ["expand batch", "expand heads"])
    sinks = rng.random() < 0.25
    return Call(
        seed=seed, dtype=DTYPES[seed % 3], B=B, S=S, T=T, H=Hkv * group, Hkv=Hkv, D=D, Dv=Dv,
        options={"causal": rng.random() < 0.6, **features(rng)}, sinks=sinks, sinks_dtype=rng.choice([None, torch.float32]),
        key_start=key_start, lengths=lengths, layouts=tuple(layouts),
    )


# ---- the rule ------------------------------------------------------------------------------------------------------


def assert_within(case: Case, dtype: torch.dtype, seed: int, draws: int) -> None:
    wrong = messages(judge(case, "cpu", dtype, seed=seed, draws=draws))
    assert not wrong, "\n".join(wrong)


def check_prefill(seed: int) -> None:
    call = random_call(seed)
    assert_within(call.case(), call.dtype, seed, call.draws())


@pytest.mark.parametrize("seed", range(200))
def test_any_attention(seed):
    check_prefill(seed)


@pytest.mark.parametrize("sink", [60.0, 95.0, 1e4, -1e4, -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sink_far_from_the_scores(sink, dtype):
    """A row that a sink swallows gives 0, and passes the gradient of lse on as if there were none; e^(sink − lse) overflows."""
    draw = Draw(5, dtype)
    inputs = dict(q=draw.normal(2, 40, 4, 32), k=draw.normal(2, 40, 2, 32), v=draw.normal(2, 40, 2, 32))
    dout, dlse = draw.normal(2, 40, 4, 32), draw.normal(2, 40, 4, dtype=torch.float32)
    found = everything(inputs | {"sinks": torch.full((4,), sink)}, dout, dlse, causal=True)
    want = everything(inputs, dout * (sink < 0), dlse, causal=True)
    want["out"] *= sink < 0
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=2e-6)
    assert found["dsinks"].abs().max() < 1e-20


# ---- decode --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One random call of tk.attention_decode. page, prefix_page: 0 is contiguous; prefix: its length, None without one."""

    seed: int
    dtype: torch.dtype
    Sq: int
    T: int
    H: int
    Hkv: int
    D: int
    Dv: int
    seqlens: tuple[int, ...]
    page: int
    options: dict[str, Any]
    sinks: bool
    prefix: int | None = None
    prefix_page: int = 0
    layouts: tuple[str, ...] = ("plain",) * 3
    table_dtype: torch.dtype = torch.int32

    def inputs(self, draw: Draw) -> dict[str, Any]:
        B = len(self.seqlens)
        found = dict(
            q=draw.normal(B, self.Sq, self.H, self.D), k=draw.normal(B, self.T, self.Hkv, self.D),
            v=draw.normal(B, self.T, self.Hkv, self.Dv)
        )
        if self.sinks:
            found["sinks"] = draw.normal(self.H)
        if self.prefix is not None:
            found["shared_k"], found["shared_v"] = draw.normal(self.prefix, self.Hkv, self.D), draw.normal(self.prefix, self.Hkv, self.Dv)
        return found

    def run(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        """Lays the keys out as the call says: everything past a sequence's end is NaN, its table entries are −7."""

        def run(q: Tensor, k: Tensor, v: Tensor, shared_k: Tensor | None = None, shared_v: Tensor | None = None, **more: Any) -> Any:
            lengths = torch.tensor(self.seqlens, dtype=self.table_dtype)
            if self.page:
                k, table = in_pages(k, self.seqlens, self.page, self.seed)
                v, _ = in_pages(v, self.seqlens, self.page, self.seed)
                more["block_table"] = table.to(self.table_dtype)
            else:
                k, v = (ended(x, self.seqlens) for x in (k, v))
            if shared_k is not None and shared_v is not None:
                both = [x[None] for x in (shared_k, shared_v)]
                if self.prefix_page:
                    (pages_k, table), (pages_v, _) = (in_pages(x, (self.prefix,), self.prefix_page, self.seed + 1) for x in both)
                    more["prefix"] = pages_k, pages_v, self.prefix, table[0].to(self.table_dtype)
                else:  # with slots past its length
                    more["prefix"] = *(F.pad(x[0], (0, 0, 0, 0, 0, 2), value=float("nan")) for x in both), self.prefix
            q, k, v = (laid_out(x, layout, 0, 0) for x, layout in zip((q, k, v), self.layouts))
            return decode(q, k, v, seqlens=lengths, **self.options, **more)

        return run

    def case(self) -> Case:
        ours = self.run(lambda *args, **more: tk.attention_decode(*args, **more, return_lse=True))
        torchs = self.run(lambda *args, **more: torch_decode(*args, **more, sdpa=False))
        return Case("attention", f"seed {self.seed}: {self}", self.inputs, ours, (), torchs)


def ended(cache: Tensor, seqlens: tuple[int, ...]) -> Tensor:
    past = torch.arange(cache.shape[1]) >= torch.tensor(seqlens, dtype=torch.int64)[:, None]  # [B, T]
    return cache.masked_fill(past[:, :, None, None], float("nan"))


def in_pages(cache: Tensor, seqlens: tuple[int, ...], page: int, seed: int) -> tuple[Tensor, Tensor]:
    """The first seqlens[b] positions of each row in shuffled pages -> pages [P, page, ...], table [B, max_pages]."""
    B, max_pages = len(seqlens), -(-max(seqlens, default=0) // page) + 1
    order = Draw(seed).pages(B, max_pages) if B else torch.zeros(0, max_pages, dtype=torch.int32)
    pages = torch.full((B * max_pages + 3, page, *cache.shape[2:]), float("nan"), dtype=cache.dtype)
    table = torch.full_like(order, -7)
    for b, n in enumerate(seqlens):
        used = order[b, : -(-n // page)]
        table[b, : len(used)] = used
        held = F.pad(cache[b, :n], (0, 0, 0, 0, 0, len(used) * page - n), value=float("nan"))
        pages[used.long()] = held.view(len(used), page, *held.shape[1:])
    return pages, table


def random_step(seed: int, *, bits: bool = False) -> Step:
    """bits: prefixes of whole splits (512 keys) only, as those must not move a bit."""
    rng = random.Random(seed + 10**6)
    Hkv, group = rng.choice([1, 2, 2, 3]), rng.choice([1, 2, 4, 7])
    D = head_dim(rng)
    Sq = rng.choice([1, 1, 1, 2, 3, rng.randint(1, 16), 16])
    T = rng.choice([rng.randint(1, 40), rng.randint(30, 150), rng.choice([31, 32, 33, 64, 511, 512, 513]), rng.randint(500, 1100)])
    lengths = [rng.choice([T, rng.randint(0, T), rng.randint(0, T), min(T, Sq), min(T, Sq - 1),
    0, 1]) for _ in range(rng.choice([0, 1, 2, 3, 4, 4]))]
    prefix = None
    if rng.random() < 0.4:
        prefix = rng.choice([512, 1024]) if bits else rng.choice([0, 1, rng.randint(1, 40), rng.randint(30, 150),
        512, rng.randint(500, 700)])
    return Step(
        seed=seed, dtype=DTYPES[seed % 3], Sq=Sq, T=T, H=Hkv * group, Hkv=Hkv, D=D,
        Dv=rng.choice([D, D, 128 if D == 192 else head_dim(rng)]),
        seqlens=tuple(lengths), page=rng.choice([0, 0, 1, 3, 16, rng.randint(1, 70), 64, 128]),
        options={"causal": rng.random() < 0.85, **features(rng)}, sinks=rng.random() < 0.25, prefix=prefix,
        prefix_page=rng.choice([0, 0, 1, 16, rng.randint(1, 70)]),
        layouts=tuple(rng.choice(["plain", "plain", "bhsd", "padded", "last"]) for _ in range(3)),
        table_dtype=rng.choice([torch.int32, torch.int64]),
    )


def check_decode(seed: int) -> None:
    step = random_step(seed)
    numbers = 1 + len(step.seqlens) * step.H * step.Sq
    assert_within(step.case(), step.dtype, seed, draws=max(3, min(16, 600 // numbers)))


@pytest.mark.parametrize("seed", range(100))
def test_any_decode(seed):
    check_decode(seed)


# ---- the bits that must not move -----------------------------------------------------------------------------------


def everything(inputs: dict[str, Any], dout: Tensor, dlse: Tensor, **options: Any) -> dict[str, Tensor]:
    """out, lse and all gradients of one call."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    with tk.use_backend("cpu"), poisoned_results():
        out, lse = tk.attention(**(inputs | leaves), **options, return_lse=True)
        grads = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
    return {"out": out, "lse": lse} | {f"d{name}": x for name, x in zip(leaves, grads)}


def same(found: dict[str, Tensor], want: dict[str, Tensor], what: str, names: tuple[str, ...] = ("out", "lse", "dq", "dk", "dv")) -> None:
    for name in names:
        assert_bitwise(found[name], want[name], f"{name}, {what}")


def check_bits(seed: int) -> None:
    """Run to run, on 1, 2 and 4 threads, in any layout, alone and in the batch, left-padded, packed: forward and backward."""
    rng = random.Random(seed + 2 * 10**6)
    dtype, draw = DTYPES[seed % 3], Draw(seed, DTYPES[seed % 3])
    B, Hkv, group, D = rng.choice([2, 3]), rng.choice([1, 2]), rng.choice([1, 2, 3]), head_dim(rng)
    S = rng.choice([length(rng), length(rng), 200])
    T = rng.choice([S, S, length(rng), S + length(rng), 530])
    H, Dv = Hkv * group, rng.choice([D, D, head_dim(rng)])
    options: dict[str, Any] = {"causal": rng.random() < 0.7, **features(rng)}
    inputs: dict[str, Any] = dict(q=draw.normal(B, S, H, D), k=draw.normal(B, T, Hkv, D), v=draw.normal(B, T, Hkv, Dv))
    if rng.random() < 0.3:
        inputs["sinks"] = draw.normal(H)
    dout, dlse = draw.normal(B, S, H, Dv), draw.normal(B, S, H, dtype=torch.float32)
    layouts = [rng.choice(["plain", "bhsd", "padded", "last"]) for _ in range(4)]
    b, pad = rng.randrange(B), rng.choice([1, 7, 32, rng.randint(1, 90)])
    what = f"seed {seed}: {dtype} B={B} S={S} T={T} H={H}/{Hkv} D={D}/{Dv} {options} {layouts} pad={pad}"

    torch.set_num_threads(2)
    want = everything(inputs, dout, dlse, **options)
    for threads in (1, 4, 2):
        torch.set_num_threads(threads)
        same(everything(inputs, dout, dlse, **options), want, f"{threads} threads, {what}", tuple(want))
    torch.set_num_threads(rng.choice([1, 2, 3]))
    views = {name: laid_out(x, layout, B, H) for (name, x), layout in zip(list(inputs.items())[:3], layouts)}
    same(everything(inputs | views, laid_out(dout, layouts[3], B, H), dlse, **options), want, f"other strides, {what}", tuple(want))

    row = {name: x[b : b + 1] for name, x in want.items() if name != "dsinks"}
    alone = {name: x if name == "sinks" else x[b : b + 1] for name, x in inputs.items()}
    cut = dout[b : b + 1], dlse[b : b + 1]
    same(everything(alone, *cut, **options), row, f"alone, {what}")

    # Padding before the keys; before the queries too where those then see nothing.
    queries = pad if options["causal"] and S >= T else 0
    noise = Draw(seed + 1, dtype)
    front = lambda x, n: torch.cat([noise.normal(*x.shape[:1], n, *x.shape[2:]).to(x.dtype), x], 1)
    padded = {"q": front(alone["q"], queries), "k": front(alone["k"], pad), "v": front(alone["v"], pad)}
    padded["key_start"] = torch.tensor([pad])
    found = everything(alone | padded, *(front(x, queries) for x in cut), **options)
    same({name: x[:, pad if name in ("dk", "dv") else queries :] for name, x in found.items() if name != "dsinks"}, row, f"padded, {what}")
    assert not any(found[name][:, :pad].any() for name in ("dk", "dv")), f"gradients of padding, {what}"

    # Packed among neighbours of other lengths, one of them NaN throughout.
    lengths = [(rng.choice([0, 1, length(rng)]), rng.choice([0, 1, length(rng)])) for _ in range(2)]
    pack = lambda x, side: torch.cat([torch.full((lengths[0][side], *x.shape[2:]), float("nan"), dtype=x.dtype), *x.unbind(),
                                      noise.normal(lengths[1][side], *x.shape[2:]).to(x.dtype)])
    offset = [offsets((lengths[0][side], *[(S, T)[side]] * B, lengths[1][side])) for side in (0, 1)]
    packed = {name: x if name == "sinks" else pack(x, int(name != "q")) for name, x in inputs.items()}
    found = everything(packed, pack(dout, 0), pack(dlse, 0), cu_seqlens_q=offset[0], cu_seqlens_k=offset[1], **options)
    for i in range(B):
        at = {"dk": offset[1], "dv": offset[1]}
        bounds = {name: at.get(name, offset[0])[i + 1 : i + 3].tolist() for name in row}
        part, dense = {name: found[name][a:z] for name, (a, z) in bounds.items()}, {name: want[name][i] for name in row}
        same(part, dense, f"packed sequence {i}, {what}")


@pytest.mark.parametrize("seed", range(60))
def test_bits_of_attention(seed):
    check_bits(seed)


def check_decode_bits(seed: int) -> None:
    """On 1, 2 and 4 threads, contiguous and in pages, alone, and as rows of a prefill; with a prefix as without."""
    step = random_step(seed, bits=True)
    inputs = step.inputs(Draw(seed, step.dtype))
    B, what = len(step.seqlens), f"{step}"

    def decode(call: Step, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with tk.use_backend("cpu"), poisoned_results():
            return call.run(lambda *args, **more: tk.attention_decode(*args, **more, return_lse=True))(**given)

    def equal(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], how: str) -> None:
        for name, a, x in zip(("out", "lse"), found, want):
            assert_bitwise(a, x, f"{name} {how}, {what}")

    want = decode(step, inputs)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        equal(decode(step, inputs), want, f"on {threads} threads")
    for page in (0, 5, 32):
        equal(decode(replace(step, page=page, layouts=("plain",) * 3), inputs), want, f"in pages of {page}")
    if step.prefix is not None:
        whole = {name: x for name, x in inputs.items() if not name.startswith("shared")}
        for name, x in (("k", inputs["shared_k"]), ("v", inputs["shared_v"])):
            whole[name] = torch.cat([x.expand(B, *x.shape), inputs[name]], 1)
        inputs = whole
        step = replace(step, prefix=None, seqlens=tuple(n + step.prefix for n in step.seqlens))
        equal(decode(step, inputs), want, "without the prefix")
    for b, n in enumerate(step.seqlens):
        one = {name: x if name == "sinks" else x[b : b + 1] for name, x in inputs.items()}
        rows = want[0][b : b + 1], want[1][b : b + 1]
        equal(decode(replace(step, seqlens=(n,)), one), rows, f"of row {b} alone")
        before = Draw(seed + 3, step.dtype).normal(1, max(0, n - step.Sq), step.H, step.D)
        prompt = {"q": torch.cat([before, one["q"]], 1), "k": one["k"][:, :n], "v": one["v"][:, :n]}
        if "sinks" in one:
            prompt["sinks"] = one["sinks"]
        with tk.use_backend("cpu"):
            out, lse = tk.attention(**prompt, **step.options, return_lse=True)
        equal((out[:, -step.Sq :], lse[:, -step.Sq :]), rows, f"of row {b} in a prefill")


@pytest.mark.parametrize("seed", range(60))
def test_bits_of_decode(seed):
    check_decode_bits(seed)


# ---- long sweeps ---------------------------------------------------------------------------------------------------

SWEEPS = [(check_prefill, 2000), (check_decode, 1000), (check_bits, 400), (check_decode_bits, 400)]


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
@pytest.mark.parametrize("check, count", SWEEPS, ids=lambda x: getattr(x, "__name__", None))
def test_thousands_more(check, count, block):
    first = 1000 + FIRST + block * count // 10
    for seed in range(first, first + count // 10):
        check(seed)


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:]):
        print(random_call(seed), random_step(seed), sep="\n")
