"""policy_loss on the CPU against the eager PyTorch expression of the same loss: forward + backward, interleaved in one run.

    python bench/policy_loss.py
    python bench/policy_loss.py --sequences 64 --length 4096 --repeats 21 --compiled

Two eager forms: "torch" computes what ours does, the loss and the metrics of policy_loss; "loss alone" is the shortest
expression of the loss, whose gradient autograd has to form, without a single metric. Medians over repeats in which every
contestant runs in turn, timed right after an untimed run of its own; the best of --rounds such medians of each, every round in a
process of its own: the machines at hand are slower for seconds at a time, and in some processes malloc gives each buffer back to
the kernel, whose page faults then decide. The floor: every tensor that the option needs read once, the
gradient written, read and written again (scaled), at the machine's copy rate beyond the caches. Beside them
group_advantages against its eager form (1024 samples in groups of 8). Results go to bench/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import thinkernel as tk
import torch
from thinkernel.ops.dispatch import C
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
COPY = 26e9  # bytes per second, read + write, on 2 cores of the reference machine
LOW, HIGH = 0.8, 1.2


def ratio(x: Tensor, d: dict[str, Tensor], level: str) -> Tensor:
    log_ratio = x - d["old_logprob"]
    if level == "token":
        return log_ratio.exp()
    return ((log_ratio * d["mask"]).sum(-1) / d["mask"].sum(-1).clamp(min=1)).exp()[:, None]


def eager(
    x: Tensor, entropy: Tensor, d: dict[str, Tensor], loss_type: str, o: dict[str, Any], metrics: dict[str, Tensor] | None = None
) -> Tensor:
    """The loss in plain PyTorch, and (into `metrics`) policy_loss's metrics; masks are bool, as ours takes them."""
    a, mask = d["advantages"][:, None], d["mask"]
    level = "sequence" if loss_type in ("gspo", "luspo") else o.get("importance_sampling_level", "token")
    r = (((x - d["old_logprob"]) * mask).sum(-1, keepdim=True)).exp() if loss_type == "rloo" else ratio(x, d, level)
    if loss_type == "cispo":
        loss = -r.clamp(max=o["epsilon_high"]).detach() * a * x
    elif loss_type == "sapo":
        t = torch.where(a > 0, 1.0, 1.05)
        loss = -torch.sigmoid(t * (r - 1)) * 4 / t * a
    elif loss_type == "vespo":
        with torch.no_grad():
            w = ((x - d["old_logprob"]).clamp(-20, 20) * mask).sum(-1, keepdim=True).clamp(-18.42, 20)
            k, lam = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
            phi = (lam + k * w - lam * w.exp()).exp()
        loss = -phi * a * x
    elif loss_type == "reinforce":
        loss = -a * x
    else:
        capped = r.clamp(max=o["delta"]) if "delta" in o else r
        loss = -torch.min(capped * a, r.clamp(LOW, HIGH) * a)
    if "off_policy_threshold" in o:
        drift = ((d["rollout_logprob"] - x.detach()) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        loss = loss * ((a >= 0) | (drift <= o["off_policy_threshold"]))
    bonus = mask
    if "top_entropy" in o:
        bonus = mask & (entropy >= torch.quantile(entropy.detach()[mask], 1 - o["top_entropy"]))
        loss = loss * bonus
    if "rollout_correction" in o:
        how = o["rollout_correction"]
        log_is = d["old_logprob"] - d["rollout_logprob"]
        weight = ((log_is * mask).sum(-1, keepdim=True) if how.startswith("sequence") else log_is).exp()
        loss = loss * (weight.clamp(max=3.0) if how.endswith("truncate") else weight.masked_fill(weight > 3.0, 0))
    if "beta" in o:
        delta = d["ref_logprob"] - x
        kl = {"k1": lambda: -delta, "k2": lambda: delta.square() / 2, "k3": lambda: delta.exp() - delta - 1}[o.get("kl", "k3")]()
        loss = loss + o["beta"] * (kl * r if "kl_correction" in o else kl)
    if metrics is not None:
        with torch.no_grad():
            count = mask.sum().clamp(min=1)
            log_ratio, own = x - d["old_logprob"], r.expand(mask.shape)
            metrics["approx_kl"] = ((log_ratio.exp() - 1 - log_ratio) * mask).sum() / count
            metrics["ratio_mean"] = (own * mask).sum() / count
            metrics["ratio_min"] = own.masked_fill(~mask, torch.inf).amin()
            metrics["ratio_max"] = own.masked_fill(~mask, -torch.inf).amax()
            if loss_type not in ("sapo", "vespo", "reinforce"):
                metrics["clip_low"] = ((r < LOW) & (a < 0) & mask).sum() / count
                metrics["clip_high"] = ((r > o.get("epsilon_high", HIGH)) & (a > 0) & mask).sum() / count
            if "beta" in o:
                metrics["kl"] = (kl * mask).sum() / count
            if "rollout_correction" in o:
                metrics["rollout_ratio"] = (weight * mask).sum() / count
            if "entropy_coef" in o or "top_entropy" in o:
                metrics["entropy"] = (entropy * mask).sum() / count
    loss = loss * mask
    if loss_type in ("grpo", "gspo", "sapo", "rloo"):
        total = (loss.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    elif loss_type in ("luspo", "reinforce"):
        total = loss.sum(-1).mean()
    elif loss_type == "dr_grpo":
        total = loss.sum() / (len(a) * o["max_completion_length"])
    else:
        total = loss.sum() / mask.sum().clamp(min=1)
    if "entropy_coef" in o:
        total = total - o["entropy_coef"] * (entropy * bonus).sum() / bonus.sum().clamp(min=1)
    return total


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("grpo", "bnpo", "dapo", "gspo", "sapo", "luspo", "vespo", "ppo", "reinforce", "rloo")},
    "dr_grpo": ("dr_grpo", dict(max_completion_length=4096)),
    "cispo": ("cispo", dict(epsilon_high=5.0)),
    "dapo delta": ("dapo", dict(delta=1.5)),
    "dapo k1": ("dapo", dict(beta=0.1, kl="k1")),
    "dapo k2": ("dapo", dict(beta=0.1, kl="k2")),
    "dapo k3": ("dapo", dict(beta=0.1)),
    "dapo k3 corrected": ("dapo", dict(beta=0.1, kl_correction=True)),
    "dapo sequence ratio": ("dapo", dict(importance_sampling_level="sequence")),
    "dapo off-policy mask": ("dapo", dict(off_policy_threshold=0.1)),
    "dapo entropy bonus": ("dapo", dict(entropy_coef=0.01)),
    "dapo top entropy": ("dapo", dict(top_entropy=0.2)),
    "dapo token truncate": ("dapo", dict(rollout_correction="token_truncate")),
    "dapo token mask": ("dapo", dict(rollout_correction="token_mask")),
    "dapo sequence truncate": ("dapo", dict(rollout_correction="sequence_truncate")),
    "dapo sequence mask": ("dapo", dict(rollout_correction="sequence_mask")),
    "grpo k3, bonus, token truncate": ("grpo", dict(beta=0.1, entropy_coef=0.01, rollout_correction="token_truncate")),
}


def needed(o: dict[str, Any]) -> list[str]:
    """The optional tensors that an option reads."""
    wants = {
        "ref_logprob": "beta" in o, "entropy": "entropy_coef" in o or "top_entropy" in o,
        "rollout_logprob": "rollout_correction" in o or "off_policy_threshold" in o,
    }
    return [name for name, want in wants.items() if want]


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(), run()
    for _ in range(repeats):
        for name, run in runs.items():
            run()  # so that each is timed on its own caches, not on those the one before it left
            times[name].append(milliseconds(run))
    return {name: statistics.median(t) for name, t in times.items()}


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    g = torch.Generator().manual_seed(0)
    B, S = args.sequences, args.length
    draw = lambda scale: scale * torch.randn(B, S, generator=g)
    x = -draw(1.0).abs() - 0.1
    data = dict(
        old_logprob=x + draw(0.1), ref_logprob=x + draw(0.1), rollout_logprob=x + draw(0.02),
        advantages=torch.randn(B, generator=g), mask=torch.arange(S) < torch.randint(S // 2, S + 1, (B,), generator=g)[:, None],
    )
    entropy = draw(1.0).abs().requires_grad_()
    x.requires_grad_()
    compiled = torch.compile(eager) if args.compiled else None
    rows: list[dict[str, object]] = []
    for name, (loss_type, o) in OPTIONS.items():
        names = needed(o)
        tensors = {k: data[k] for k in ("old_logprob", "advantages", "mask")} | {k: data[k] for k in names if k != "entropy"}
        leaves = [x, entropy] if "entropy_coef" in o else [x]
        ent = {"entropy": entropy if "entropy_coef" in o else entropy.detach()} if "entropy" in names else {}

        def ours(o=o, t=loss_type, tensors=tensors, ent=ent, leaves=leaves) -> object:
            return torch.autograd.grad(tk.policy_loss(x, **tensors, **ent, loss_type=t, **o)[0], leaves)

        def torch_eager(o=o, t=loss_type, leaves=leaves, f=eager) -> object:
            return torch.autograd.grad(f(x, entropy, data, t, o), leaves)

        def with_metrics(o=o, t=loss_type, leaves=leaves) -> object:
            return torch.autograd.grad(eager(x, entropy, data, t, o, {}), leaves)

        runs: dict[str, Callable[[], object]] = {"thinkernel": ours, "torch": with_metrics, "loss alone": torch_eager}
        if compiled is not None:
            torch._dynamo.reset()
            runs["torch compiled"] = lambda f=torch_eager: f(f=compiled)
        for got, want in zip(ours(), torch_eager(), strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        found = medians(runs, args.repeats)
        floor = 1e3 * B * S * (1 + 4 * (2 + len(names) + 3 * len(leaves))) / COPY
        rows.append({"option": name, "median_ms": found, "floor_ms": floor})
    return rows


def measure_advantages(repeats: int) -> list[dict[str, object]]:
    g = torch.Generator().manual_seed(0)
    r = torch.randn(1024, generator=g)
    ids = torch.arange(128).repeat_interleave(8)[torch.randperm(1024, generator=g)]

    def by_size() -> Tensor:
        table = r.view(-1, 8)
        return ((table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-6)).flatten()

    def by_ids() -> Tensor:
        _, index, count = ids.unique(return_inverse=True, return_counts=True)
        mean = torch.zeros(len(count)).index_add_(0, index, r) / count
        d = r - mean[index]
        std = (torch.zeros(len(count)).index_add_(0, index, d * d) / (count - 1)).sqrt()
        return d / (std[index] + 1e-6)

    rows: list[dict[str, object]] = []
    for name, ours, theirs in (
        ("group_size", lambda: tk.group_advantages(r, 8), by_size), ("group_ids", lambda: tk.group_advantages(r, group_ids=ids), by_ids)
    ):
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-5)
        found = medians({"thinkernel": ours, "torch": theirs}, 20 * repeats)
        rows.append({"option": f"group_advantages {name}", "median_ms": found})
    return rows


def best_of(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each contestant's best median over the rounds, and what that makes of the ratios."""
    rows = []
    for same in zip(*rounds, strict=True):
        best = {name: min(row["median_ms"][name] for row in same) for name in same[0]["median_ms"]}
        ours = best["thinkernel"]
        speedups = {name: t / ours for name, t in best.items() if name != "thinkernel"}
        rows.append(same[0] | {"median_ms": best, "speedup": speedups, "medians_ms": [row["median_ms"] for row in same]})
        peers = "".join(f"  {name} {best[name]:6.3f} ({x:4.1f}x)" for name, x in speedups.items())
        print(f"{same[0]['option']:32} {ours:6.3f} ms{peers}" + (f"  floor {same[0]['floor_ms']:.2f}" if "floor_ms" in same[0] else ""))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile's form of the eager expression")
    parser.add_argument("--one-round", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one_round:
        print(json.dumps(measure(args) + measure_advantages(args.repeats)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--one-round"]
    rounds = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(args.rounds)]
    rows = best_of([json.loads(out.splitlines()[-1]) for out in rounds])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "machine": platform.processor() or platform.machine(), "isa": C.isa(), "threads": args.threads, "commit": commit,
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "sequences": args.sequences,
        "length": args.length, "repeats": args.repeats, "rounds": args.rounds, "results": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "policy_loss_cpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
