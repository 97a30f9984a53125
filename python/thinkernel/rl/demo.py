"""The main job from the base model to the report: evaluate, train, evaluate, write.

The run's folder: run.json (settings), base.safetensors (with --from-scratch), checkpoint.pt, model.safetensors,
report.json, report.md, curve.png.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import thinkernel as tk
from thinkernel.models import Transformer, save
from thinkernel.rl.checkpoint import write_json
from thinkernel.rl.evaluate import evaluate
from thinkernel.rl.models import base_path, load_base
from thinkernel.rl.pretrain import PretrainConfig, pretrain, save_base
from thinkernel.rl.report import summarize, write_report
from thinkernel.rl.rollout import Sampler, derive_seed, make_batch
from thinkernel.rl.tasks.arithmetic import make_problems
from thinkernel.rl.trainer import TrainConfig, Trainer

HELD_OUT_SEED = 20_240  # one held-out set for all runs, so that seeds compare


@dataclass(frozen=True)
class DemoSettings:
    train: TrainConfig
    folder: Path
    eval_problems: int = 200
    eval_samples: int = 16
    from_scratch: bool = False
    show_progress: bool = True

    def as_dict(self) -> dict:
        return {
            **self.train.as_dict(),
            "eval_problems": self.eval_problems,
            "eval_samples": self.eval_samples,
            "from_scratch": self.from_scratch,
        }


def _check_folder(settings: DemoSettings) -> str:
    """ "new", "resume" or "finished"; ValueError where the folder belongs to something else."""
    folder, note = settings.folder, settings.folder / "run.json"
    if not note.exists():
        if folder.exists() and any(not entry.name.endswith(".tmp") for entry in folder.iterdir()):
            raise ValueError(f"--out: {folder} holds files but no run; takes a new or empty folder, or a run to resume")
        return "new"
    before, now = json.loads(note.read_text()), settings.as_dict()
    other = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if other:
        changes = ", ".join(f"{key} {before.get(key)} → {now.get(key)}" for key in other)
        raise ValueError(f"{folder} holds a run with other settings ({changes}); takes another --out, or --fresh")
    return "finished" if (folder / "report.json").exists() else "resume"


def _base_model(settings: DemoSettings) -> tuple[Transformer, dict]:
    """The shipped base model, or one made here (kept in the run's folder, so that a resume finds it)."""
    preset, path = settings.train.preset, base_path(settings.train.preset)
    if settings.from_scratch:
        path = settings.folder / "base.safetensors"
        if not path.exists():
            start, cpu_start = time.perf_counter(), time.process_time()
            config = PretrainConfig()
            model = pretrain(preset, config, show_progress=settings.show_progress)
            took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
            facts = {"preset": preset, "steps": config.steps, **{name: round(value) for name, value in took.items()}}
            save_base(model, path, facts)
            print(f"base model made in {took['seconds']:.0f} s: {path}")
    elif not path.exists():
        raise ValueError(f"base model: {path} is missing; use --from-scratch to make it")
    return load_base(path), json.loads(path.with_suffix(".json").read_text())


def explain_kernels(model: Transformer) -> str:
    """Which backend runs each op of a training step and of a decoding step."""
    batch = make_batch([[1, 2, 3]], [[4, 5]])

    def work() -> None:
        model(batch.tokens, targets=batch.targets, lengths=batch.lengths, return_losses=True)
        cache = model.new_cache(1, 4)
        model.hidden_states(batch.tokens[:, :2], cache=cache)
        model.hidden_states(batch.tokens[:, 2:3], cache=cache)

    return tk.explain(work)


def run_demo(settings: DemoSettings) -> dict:
    """Runs, or resumes, the main job; returns the report's contents."""
    state = _check_folder(settings)
    folder, config = settings.folder, settings.train
    if state == "finished":
        print(f"{folder} holds this run, finished; --fresh runs it anew\n")
        print((folder / "report.md").read_text())
        return json.loads((folder / "report.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", settings.as_dict())

    started = time.perf_counter()
    model, base = _base_model(settings)
    parameters = sum(p.numel() for p in model.parameters())
    kernels = explain_kernels(model)
    trainer = Trainer(model, config, folder=folder)
    if trainer.checkpoint_path.exists():
        trainer.resume()
        print(f"resuming {folder} after step {trainer.step} of {config.steps}")
    print(f"{config.preset}: {parameters:,} parameters, {torch.get_num_threads()} threads; run folder {folder}")

    held_out = make_problems(settings.eval_problems, seed=HELD_OUT_SEED, held_out=True)
    sampler = Sampler(model, config.max_new_tokens, config.temperature, show_progress=settings.show_progress)

    def held_out_accuracy(when: str) -> dict:
        seed = derive_seed("evaluate", when, config.seed)
        result = evaluate(sampler, held_out, samples=settings.eval_samples, seed=seed, label=f"held-out, {when}")
        votes = ", ".join(f"majority of {k}: {100 * v:.1f} %" for k, v in result.majority.items() if k != "1")
        print(f"held-out accuracy {when}: {100 * result.accuracy:.1f} %  {votes}  ({100 * result.worked:.0f} % written step by step)")
        return result.as_dict()

    if "before" not in trainer.notes:
        trainer.notes["before"] = held_out_accuracy("before")
        trainer.save()
    hidden = not settings.show_progress
    with tqdm(total=config.steps, initial=trainer.step, desc="GRPO", unit="step", disable=hidden) as bar:

        def show(record: dict) -> None:
            bar.set_postfix(accuracy=f"{record['accuracy']:.2f}", worked=f"{record['worked']:.2f}", refresh=False)
            bar.update()

        trainer.run(show)
    after = held_out_accuracy("after")
    save(model, folder / "model.safetensors", metadata={"preset": config.preset})
    summary = summarize(settings.as_dict(), trainer.notes["before"], after, trainer.history, kernels, base=base)
    summary["parameters"], summary["wall_seconds"] = parameters, time.perf_counter() - started
    write_report(folder, summary)
    print(
        f"held-out accuracy {100 * trainer.notes['before']['accuracy']:.1f} % → {100 * after['accuracy']:.1f} % in "
        f"{config.steps} steps; {summary['wall_seconds']:.0f} s in all\n"
        f"report: {folder / 'report.md'}, {folder / 'curve.png'}\n"
        f'try it: thinkernel generate --run {folder} --prompt "((7+5)*3-4)"'
    )
    return summary
