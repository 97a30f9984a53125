"""The experts and the router on the CPU against the best PyTorch forms of them, interleaved in one run.

    python bench/moe.py                                              # everything
    python bench/moe.py --work forward decode --dtypes bfloat16 --repeats 15

forward, training (forward + backward): T tokens through K of E experts (SwiGLU, weights [out, in]) against a python loop with
F.linear and index_add, one product an expert on sorted rows, F.grouped_mm and the implementations that transformers has ("eager",
"grouped_mm") of Qwen3MoeExperts. Ours of the forward: weights packed once, whose cost is printed, and packed along the way, as in
training. decode: 1 and 8 tokens over 128 experts, beside plain loops that read as many bytes of the same weights. route:
DeepSeek-V3's rule for 40,000 tokens against the same in eager PyTorch. Medians of times and of ratios; the memory a first
training call takes beyond its results, beside what must be kept, x and the pre-activations. Results go to
bench/results/moe_cpu.json, where what other runs found of other work stays.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import thinkernel as tk
import torch
import torch.nn.functional as F
from attention import RESULTS, commit, cpu_name, interleave
from memory import STREAMS, readers_of
from record import high_water_rise_mib
from thinkernel.ops import moe_cpu
from thinkernel.ops.dispatch import C
from torch import Tensor

Form = Callable[..., Tensor]
Row = dict[str, object]


def tensors(T: int, H: int, inner: int, E: int, K: int, dtype: torch.dtype) -> list[Tensor]:
    """x, w_gate_up, w_down, weights, experts: a router's choice among random logits."""
    routing = tk.route(torch.randn(T, E), K)
    up, down = torch.randn(E, 2 * inner, H) * H**-0.5, torch.randn(E, H, inner) * inner**-0.5
    return [torch.randn(T, H).to(dtype), up.to(dtype), down.to(dtype), routing.weights, routing.experts]


def loop(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """What a model's python loop does; unbind, so that no gradient is as large as all weights."""
    y = torch.zeros_like(x)
    for e, (w1, w2) in enumerate(zip(up.unbind(0), down.unbind(0))):
        token, k = torch.where(experts == e)
        gate, rise = F.linear(x[token], w1).chunk(2, dim=-1)
        y = y.index_add(0, token, F.linear(F.silu(gate) * rise, w2) * weights[token, k, None].to(x.dtype))
    return y


def sorted_rows(experts: Tensor, E: int) -> tuple[Tensor, Tensor]:
    flat = experts.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=E)


def by_expert(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Rows sorted once, a product an expert, results weighed and summed over k."""
    n, k = experts.shape
    order, counts = sorted_rows(experts, len(up))
    parts = x[order // k].split(counts.tolist())
    out = []
    for rows, w1, w2 in zip(parts, up.unbind(0), down.unbind(0)):
        gate, rise = F.linear(rows, w1).chunk(2, dim=-1)
        out.append(F.linear(F.silu(gate) * rise, w2))
    return together(torch.cat(out), weights, order, n, k)


def together(out: Tensor, weights: Tensor, order: Tensor, n: int, k: int) -> Tensor:
    out = out * weights.flatten()[order, None].to(out.dtype)
    return out[torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=order.device))].view(n, k, -1).sum(1)


def grouped(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    n, k = experts.shape
    order, counts = sorted_rows(experts, len(up))
    offs = counts.cumsum(0).int()
    gate, rise = F.grouped_mm(x[order // k], up.mT, offs=offs).chunk(2, dim=-1)
    return together(F.grouped_mm(F.silu(gate) * rise, down.mT, offs=offs), weights, order, n, k)


def transformers_form(kind: str, up: Tensor, down: Tensor) -> Form | None:
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        return None
    config = Qwen3MoeConfig(num_experts=len(up), hidden_size=down.shape[1], moe_intermediate_size=down.shape[2])
    config._experts_implementation = kind
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)

    def form(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        for name, w in (("gate_up_proj", up), ("down_proj", down)):  # in place of the module's parameters, without a copy
            module._parameters.pop(name, None)
            setattr(module, name, w)
        return module(x, experts.long(), weights.to(x.dtype))

    return form


def forms(given: list[Tensor]) -> dict[str, Form]:
    found: dict[str, Form] = {"python loop": loop, "per expert": by_expert}
    if hasattr(F, "grouped_mm"):
        found["F.grouped_mm"] = grouped
    for kind in ("eager", "grouped_mm"):
        form = transformers_form(kind, *given[1:3])
        if form is not None:
            found[f"transformers {kind}"] = form
    want = tk.moe(*given).float()
    for who, form in list(found.items()):
        try:
            worst = (form(*given).float() - want).abs().max().item()
        except (RuntimeError, NotImplementedError) as error:
            print(f"{who} left out: {str(error).splitlines()[0]}")
            del found[who]
        else:
            assert worst < 0.1, (who, worst)
    return found


def report(work: str, shape: str, dtype: str, runs: dict[str, Callable[[], object]], repeats: int, **more: object) -> Row:
    """Times the runs, of which the first is ours -> a row of the results, printed as a line."""
    times = interleave(runs, repeats)
    middle = {who: statistics.median(found) for who, found in times.items()}
    ours, *others = middle
    speedup = {who: round(statistics.median(b / a for a, b in zip(times[ours], times[who])), 2) for who in others}
    milliseconds = {who: round(t * 1e3, 3) for who, t in middle.items()}
    print(f"{work} {shape} {dtype}: {milliseconds} ms; times ours: {speedup}" + (f"; {more}" if more else ""), flush=True)
    return dict(work=work, shape=shape, dtype=dtype, repeats=repeats, milliseconds=milliseconds, speedup=speedup, **more)


def forward(name: str, repeats: int) -> list[Row]:
    T, H, inner, E, K = 2048, 1024, 512, 32, 4
    given = tensors(T, H, inner, E, K, getattr(torch, name))

    def along_the_way() -> Tensor:
        former, moe_cpu.PACKED_BYTES = moe_cpu.PACKED_BYTES, 0
        kept = dict(moe_cpu._packed)
        moe_cpu._packed.clear()
        try:
            return tk.moe(*given)
        finally:
            moe_cpu.PACKED_BYTES = former
            moe_cpu._packed.update(kept)

    def packing() -> float:
        moe_cpu._packed.clear()
        start = time.perf_counter()
        moe_cpu.packed_weights(given[0], given[1], given[2], "swiglu", "out_in")
        return 1e3 * (time.perf_counter() - start)

    with torch.no_grad():
        cost = round(statistics.median(packing() for _ in range(5)), 1)
        runs: dict[str, Callable[[], object]] = {
            "thinkernel": lambda: tk.moe(*given), "thinkernel packing along the way": along_the_way
        }
        runs |= {who: lambda form=form: form(*given) for who, form in forms(given).items()}
        return [report("forward", f"T{T} H{H} I{inner} E{E} K{K}", name, runs, repeats, packing_ms=cost)]


def training(name: str, repeats: int, peak: bool = False) -> list[Row]:
    T, H, inner, E, K = 2048, 1024, 512, 32, 4
    dtype = getattr(torch, name)
    given = tensors(T, H, inner, E, K, dtype)
    leaves, dy = [x.requires_grad_() for x in given[:4]], torch.randn(T, H).to(dtype)

    def run(form: Form) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form(*leaves, given[4]), leaves, dy)

    if peak:  # of a process that has done nothing else
        results = sum(x.numel() * x.element_size() for x in leaves) / 2**20
        print(round(high_water_rise_mib(run(tk.moe)) - results, 1))
        return []
    runs = {"thinkernel": run(tk.moe)} | {who: run(form) for who, form in forms(given).items()}
    command = [sys.executable, __file__, "--peak-of", name, "--threads", str(torch.get_num_threads())]
    found = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    floor = (T * H + 2 * T * K * inner) * dtype.itemsize / 2**20
    memory = dict(peak_mib_beyond_results=found, kept_floor_mib=floor)
    return [report("training", f"T{T} H{H} I{inner} E{E} K{K}", name, runs, repeats, **memory)]


def decode(name: str, repeats: int) -> list[Row]:
    H, inner, E, K = 2048, 768, 128, 8
    rows, dtype = [], getattr(torch, name)
    _, up, down, _, _ = tensors(1, H, inner, E, K, dtype)
    for T in (1, 8):
        calls = [(torch.randn(T, H).to(dtype), torch.rand(T, K), torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int())
                 for _ in range(repeats + 2)]  # fmt: skip
        touched = statistics.mean(experts.unique().numel() for *_, experts in calls)
        read = int(touched * 3 * inner * H * dtype.itemsize) >> 20 << 20
        turn = iter(calls * 2)

        def ours(turn: object = turn) -> Tensor:  # other experts each time: the last ones' weights lie in the cache
            x, weights, experts = next(turn)  # type: ignore[call-overload]
            return tk.moe(x, up, down, weights, experts)

        memory = up.view(-1).view(torch.uint8)  # the read loops go round in it, so that they too find nothing in the caches
        places = itertools.cycle(range(0, max(1, memory.numel() - read), read))

        def reader(streams: int, read: int = read, memory: Tensor = memory, places: Iterator[int] = places) -> object:
            at = next(places)
            return list(readers_of([memory[at : at + read]], torch.get_num_threads()).values())[streams]()

        with torch.no_grad():
            runs: dict[str, Callable[[], object]] = {"thinkernel": ours}
            if readers_of([memory[:0]], 1):
                runs |= {f"read in place {n} streams": lambda i=i: reader(i) for i, n in enumerate(STREAMS)}
            row = report("decode", f"T{T} H{H} I{inner} E{E} K{K}", name, runs, repeats, mib_read=read >> 20)
        loops = [ratio for who, ratio in row["speedup"].items() if who.startswith("read")]  # type: ignore[attr-defined]
        row["percent_of_read_bandwidth"] = round(100 * min(loops)) if loops else None
        print(f"  {row['percent_of_read_bandwidth']} % of the fastest read loop")
        rows.append(row)
    return rows


def eager_route(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """DeepSeek-V3's router as its model code writes it, and the sort by expert that the experts want."""
    scores = logits.sigmoid()
    choice = scores + bias
    best = choice.view(-1, 8, 32).topk(2, dim=-1).values.sum(-1).topk(4, dim=-1, sorted=False).indices
    kept = logits.new_zeros(len(logits), 8).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 8, 32).reshape(-1, 256)
    experts = choice.masked_fill(kept == 0, -torch.inf).topk(8, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
    flat = experts.flatten()
    return weights, experts, torch.bincount(flat, minlength=256), flat.argsort(stable=True)


def route(name: str, repeats: int) -> list[Row]:
    logits, bias = torch.randn(40_000, 256).to(getattr(torch, name)), torch.randn(256) * 0.1
    runs = {
        "thinkernel": lambda: tk.route(logits, 8, score="sigmoid", bias=bias, n_group=8, topk_group=4, scaling=2.5),
        "eager": lambda: eager_route(logits.float(), bias),
    }
    return [report("route", "40000x256, 4 of 8 groups, K8", name, runs, repeats)]


WORK = {"forward": forward, "training": training, "decode": decode, "route": route}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "moe_cpu.json", help="results file")
    parser.add_argument("--peak-of", choices=["float32", "bfloat16"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.peak_of:
        training(args.peak_of, 0, peak=True)
        return
    record: Row = dict(
        machine=cpu_name(), isa=C.isa(), threads=args.threads, torch=torch.__version__, commit=commit(),
        date=datetime.date.today().isoformat(),
    )  # fmt: skip
    args.out.parent.mkdir(exist_ok=True)
    found = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows: list[Row] = [row for row in found if row["work"] not in args.work or row["dtype"] not in args.dtypes]  # of other runs
    for work in args.work:
        for name in args.dtypes:
            with tk.use_backend("cpu"):
                rows += WORK[work](name, args.repeats)
            args.out.write_text(json.dumps(record | dict(rows=rows), indent=1) + "\n")  # at once: a run may be cut off
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
