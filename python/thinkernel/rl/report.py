"""What a finished run leaves behind: report.json, report.md and curve.png."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path

import torch

from thinkernel.rl.checkpoint import write_json, write_text


def machine() -> dict:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the architecture's name has to do
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def summarize(settings: dict, before: dict, after: dict, history: list[dict], kernels: str, *, base: dict) -> dict:
    """Everything the report says, as plain values."""
    trained = [record for record in history if "loss" in record]
    return {
        "settings": settings,
        "machine": machine(),
        "kernels": kernels.splitlines(),
        "base": base,
        "before": before,
        "after": after,
        "gain_points": 100 * (after["accuracy"] - before["accuracy"]),
        "gain_factor": after["accuracy"] / before["accuracy"] if before["accuracy"] else None,
        "steps": len(history),
        "median_step_seconds": statistics.median(record["seconds"] for record in history),
        "median_rollout_seconds": statistics.median(record["rollout_seconds"] for record in history),
        "median_update_seconds": statistics.median(record["update_seconds"] for record in history),
        "rollout_tokens_per_second": sum(r["tokens"] for r in history) / sum(r["rollout_seconds"] for r in history),
        "train_seconds": sum(record["seconds"] for record in history),
        "logprob_gap_max": max((record["logprob_gap_max"] for record in trained), default=None),
        "history": history,
    }


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def markdown(summary: dict) -> str:
    before, after, settings = summary["before"], summary["after"], summary["settings"]
    rows = [("accuracy of one sample", before["accuracy"], after["accuracy"])]
    rows += [(f"majority of {k}", before["majority"][k], after["majority"][k]) for k in after["majority"] if k != "1"]
    rows += [
        ("solutions written step by step", before["worked"], after["worked"]),
        ("accuracy of those", before["accuracy_when_worked"], after["accuracy_when_worked"]),
        ("well-formed answers", before["well_formed"], after["well_formed"]),
    ]
    gap = summary["logprob_gap_max"]
    lines = [
        f"# {settings['preset']}: {summary['steps']} GRPO steps, seed {settings['seed']}",
        "",
        f"Held-out accuracy {_percent(before['accuracy'])} → {_percent(after['accuracy'])} "
        f"({summary['gain_points']:+.1f} points) on {after['problems']} problems never trained on, "
        f"{after['samples']} samples each at temperature {settings['temperature']}.",
        "",
        "| held out | before | after |",
        "|---|---|---|",
        *(f"| {name} | {_percent(old)} | {_percent(new)} |" for name, old, new in rows),
        f"| tokens per completion | {before['mean_tokens']:.1f} | {after['mean_tokens']:.1f} |",
        "",
        "![rewards by step](curve.png)",
        "",
        f"- {settings['prompts']} prompts × {settings['group']} samples a step; median step "
        f"{summary['median_step_seconds']:.2f} s (rollout {summary['median_rollout_seconds']:.2f}, "
        f"update {summary['median_update_seconds']:.2f}); {summary['rollout_tokens_per_second']:.0f} sampled tokens/s",
        f"- {summary['train_seconds']:.0f} s of training; evaluation {before['seconds']:.0f} s before and "
        f"{after['seconds']:.0f} s after ({after['tokens_per_second']:.0f} tokens/s)",
        f"- largest difference between a token's log-probability in the rollout and in the trainer: "
        f"{'no update was made' if gap is None else f'{gap:.1e}'}",
        f"- {summary['machine']['cpu']}, {summary['machine']['threads']} threads, torch {summary['machine']['torch']}",
        "",
        "Kernels:",
        "",
        "```",
        *summary["kernels"],
        "```",
        "",
    ]
    return "\n".join(lines)


def plot(history: list[dict], before: dict, after: dict, path: Path, *, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [record["step"] + 1 for record in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(steps, [record["accuracy"] for record in history], label="accuracy reward", color="tab:blue")
    left.plot(steps, [record["format"] for record in history], label="format reward", color="tab:gray", linewidth=1)
    left.plot(steps, [record["worked"] for record in history], label="written step by step", color="tab:orange")
    left.scatter(
        [0, len(history)],
        [before["accuracy"], after["accuracy"]],
        color="tab:green",
        zorder=3,
        label="held-out accuracy",
    )
    left.set(xlabel="GRPO step", ylabel="share of completions", ylim=(0, 1.02), title=title)
    left.legend(fontsize=8)
    counts = list(after["majority"])
    for evaluation, name, color in ((before, "before", "tab:gray"), (after, "after", "tab:green")):
        right.plot(counts, [evaluation["majority"][k] for k in counts], marker="o", label=name, color=color)
    right.set(
        xlabel="samples per problem (majority vote)",
        ylabel="held-out accuracy",
        ylim=(0, 1.02),
        title="self-consistency",
    )
    right.legend(fontsize=8)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def write_report(folder: Path, summary: dict) -> None:
    settings = summary["settings"]
    plot(
        summary["history"],
        summary["before"],
        summary["after"],
        folder / "curve.png",
        title=f"{settings['preset']}, seed {settings['seed']}",
    )
    write_json(folder / "report.json", summary)
    write_text(folder / "report.md", markdown(summary))
