"""The main job: task, verifier, corpus, rollouts, GRPO steps, checkpoints, report and the two commands."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import thinkernel as tk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkernel.models import Transformer
from thinkernel.rl import checkpoint, tokenizer
from thinkernel.rl import demo as demo_module
from thinkernel.rl import trainer as trainer_module
from thinkernel.rl.demo import DemoSettings, run_demo
from thinkernel.rl.evaluate import evaluate, majority_at
from thinkernel.rl.models import MODELS, load_base, load_run_or_base
from thinkernel.rl.pretrain import PretrainConfig, corpus_batch, pretrain, save_base, worked_share
from thinkernel.rl.rewards import majority_vote, parse_answer, reward
from thinkernel.rl.rollout import IGNORED, Sampler, derive_seed, make_batch
from thinkernel.rl.tasks import arithmetic
from thinkernel.rl.trainer import TrainConfig, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:thinkernel. .* runs on the reference backend")
PRESETS = tuple(MODELS)


def tiny_model(preset: str, seed: int = 0) -> Transformer:
    """The demo's model with two layers (the second one an expert layer where there are experts)."""
    torch.manual_seed(seed)
    return Transformer(dataclasses.replace(MODELS[preset], layers=2))


def tiny_config(preset: str, **changes) -> TrainConfig:
    return dataclasses.replace(TrainConfig(preset=preset, steps=3, prompts=3, group=4, max_new_tokens=6, checkpoint_every=1), **changes)


# ---- the task


def test_expressions_evaluate_to_the_answer_and_stories_tell_the_same_chain():
    for problem in arithmetic.make_problems(400, seed=11, held_out=False, word_share=0.0):
        assert eval(problem.prompt) == problem.answer
        assert all(0 <= value <= arithmetic.VALUE_LIMIT for value in problem.values)
    for problem in arithmetic.make_problems(400, seed=12, held_out=False, word_share=1.0):
        numbers = [int(word.strip(".")) for word in problem.prompt.split() if word.strip(".").isdigit()]
        assert numbers == [problem.start, *(operand for _, operand in problem.steps)]


def test_worked_solutions_are_right_line_by_line():
    for problem in arithmetic.make_problems(300, seed=13, held_out=False):
        *steps, last = arithmetic.worked(problem).split(";")
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert last == f"#{problem.answer}"
        assert reward(problem, arithmetic.worked(problem), finished=True) == (1.0, 1.0)


def test_guesses_are_right_as_often_as_asked():
    rng = random.Random(5)
    problems = arithmetic.make_problems(1500, seed=14, held_out=False)
    for share in (0.0, 0.3, 1.0):
        right = sum(reward(p, arithmetic.guess(p, rng, right_share=share), finished=True)[0] for p in problems)
        assert abs(right / len(problems) - share) < 0.05


def test_held_out_problems_are_disjoint_from_training():
    held_out = {p.chain for p in arithmetic.make_problems(500, seed=1, held_out=True)}
    trained = {p.chain for p in arithmetic.make_problems(4000, seed=2, held_out=False)}
    assert len(held_out) == 500 and not held_out & trained
    story = arithmetic.make_problem(random.Random(3), held_out=True, word_share=1.0)
    twin = dataclasses.replace(story, prompt=arithmetic.expression(story.start, story.steps) + "\n")
    assert arithmetic.is_held_out(story) and arithmetic.is_held_out(twin)


def test_evaluation_refuses_problems_of_the_training_side():
    sampler = Sampler(tiny_model("qwen3"), max_new_tokens=2)
    with pytest.raises(ValueError, match="held-out problems only"):
        evaluate(sampler, arithmetic.make_problems(2, seed=0, held_out=False), samples=1, seed=0, label="x")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(tokenizer.CHARACTERS + tokenizer.WORDS), max_size=40))
def test_tokenizer_round_trip(pieces):
    text = "".join(pieces)
    assert tokenizer.decode([tokenizer.BOS, *tokenizer.encode(text), tokenizer.EOS, tokenizer.PAD]) == text


def test_tokenizer_names_what_it_cannot_read():
    with pytest.raises(ValueError, match="got '%' at position 2"):
        tokenizer.encode("12%3")
    for problem in arithmetic.make_problems(100, seed=4, held_out=True):
        ids = tokenizer.encode(problem.prompt + arithmetic.worked(problem))
        assert max(ids) < tokenizer.VOCAB_SIZE and tokenizer.decode(ids) == problem.prompt + arithmetic.worked(problem)


# ---- the verifier


@settings(max_examples=200, deadline=None)
@given(st.integers(-999999, 999999), st.integers(0, 2**31), st.booleans())
def test_verifier_accepts_exactly_the_right_integer(number, seed, with_steps):
    problem = arithmetic.make_problem(random.Random(seed), held_out=False)
    text = ("3+4=7;" if with_steps else "") + f"#{number}"
    assert reward(problem, text, finished=True) == (float(number == problem.answer), 1.0)
    assert reward(problem, f"#{problem.answer}", finished=True) == (1.0, 1.0)
    assert reward(problem, f"#{problem.answer}", finished=False) == (0.0, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "#",
        "68",
        "#68#68",
        "#68;",
        "#068",
        "#+68",
        "#-0",
        "#6 8",
        "# 68",
        "#68\n",
        "1+2=3#68",
        ";#68",
        "12;;#68",
        "#-",
        "#٦٨",
        "#6.0",
        "1+2=3;\n#68",
        "#1234567",
    ],
)
def test_verifier_rejects_ill_formed_completions(text):
    assert parse_answer(text, finished=True) is None


def test_verifier_takes_negative_and_zero():
    assert parse_answer("#-7", finished=True) == -7 and parse_answer("1-1=0;#0", finished=True) == 0


def test_majority_vote():
    assert majority_vote([3, 5, 5, 3]) == 3 and majority_vote([None, 5, 3, 3]) == 3
    assert majority_vote([None, None, 4]) == 4 and majority_vote([None]) is None and majority_vote([]) is None
    answers, truths = [[1, 2, 2, 2], [7, 7, 8, None]], [2, 7]
    assert majority_at(answers, truths, 1) == 5 / 8
    assert majority_at(answers, truths, 2) == 2 / 4  # (1,2) ties to 1; (2,2); (7,7); (8,None)
    assert majority_at(answers, truths, 4) == 1.0
    with pytest.raises(ValueError, match="k: got 8"):
        majority_at(answers, truths, 8)


# ---- corpus and batches


def test_corpus_is_on_the_training_side_mixed_as_asked_and_reproducible():
    config = PretrainConfig(steps=100, batch=64)
    assert worked_share(config, 0) == config.worked_before and worked_share(config, 99) == config.worked_habit
    step_token = tokenizer.encode(";")[0]
    for step, share in ((3, config.worked_before), (95, config.worked_habit)):
        has_steps = (corpus_batch(config, step).targets == step_token).any(1).float().mean()
        assert abs(float(has_steps) - share) < 0.2
    assert all(torch.equal(a, b) for a, b in zip(corpus_batch(config, 5), corpus_batch(config, 5)) if a is not None)
    assert not torch.equal(corpus_batch(config, 5).tokens, corpus_batch(config, 6).tokens)


def test_make_batch_lines_targets_up():
    batch = make_batch([[1, 7], [1, 8, 9]], [[5, 2], [6, 2]], [[-1.0, -2.0], [-3.0, -4.0]])
    assert batch.tokens.tolist() == [[1, 7, 5, 0], [1, 8, 9, 6]]
    assert batch.targets.tolist() == [[IGNORED, 5, 2, IGNORED], [IGNORED, IGNORED, 6, 2]]
    assert batch.lengths.tolist() == [3, 4]
    assert batch.old_logprob.tolist() == [[0, -1, -2, 0], [0, 0, -3, -4]]
    assert torch.equal(batch.mask, batch.old_logprob.bool().float())


# ---- rollouts and training


@pytest.mark.parametrize("preset", PRESETS)
def test_rollout_logprobs_are_those_of_the_trainer(preset):
    model = tiny_model(preset)
    prompts = [p.prompt for p in arithmetic.make_problems(5, seed=6, held_out=False)]
    rollout = Sampler(model, max_new_tokens=24).sample(prompts, samples=3, seed=1)
    batch = make_batch(rollout.prompts, rollout.completions, rollout.logprobs)
    assert batch.tokens.shape[1] > 32  # longer than top_k: the sparse path is on the way
    with torch.no_grad():
        logprob = model(batch.tokens, targets=batch.targets, lengths=batch.lengths).logprob
    assert float(((logprob - batch.old_logprob).abs() * batch.mask).max()) < 2e-4


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_is_grpo_loss(preset):
    """The head inside the model plus policy_loss is the one-call grpo_loss on the hidden states."""
    trainer = Trainer(tiny_model(preset), tiny_config(preset))
    rollout, _ = trainer.rollout()
    batch = make_batch(rollout.prompts, rollout.completions, rollout.logprobs)
    advantages = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(3))
    out = trainer.model(batch.tokens, targets=batch.targets, lengths=batch.lengths)
    ours, _ = trainer.loss(out.logprob, batch.old_logprob, advantages, batch.mask, entropy=out.entropy)
    hidden, _ = trainer.model.hidden_states(batch.tokens, lengths=batch.lengths)
    head, options = trainer.model.head.weight, trainer.loss.options
    whole, _ = tk.grpo_loss(hidden, head, batch.targets, batch.old_logprob, advantages, batch.mask, **options)
    assert torch.allclose(ours, whole, rtol=1e-6, atol=1e-7)


def weights_of(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def lenient_reward(monkeypatch):
    """Rewards that an untrained model earns now and then too, so that its groups have variance."""
    monkeypatch.setattr(trainer_module, "reward", lambda problem, text, *, finished: (len(text) % 2, float(finished)))


@pytest.mark.parametrize("preset", PRESETS)
def test_training_changes_weights_reproducibly_and_resumes_bitwise(preset, tmp_path, lenient_reward):
    config = tiny_config(preset)
    straight = Trainer(tiny_model(preset), config)
    start = weights_of(straight.model)
    straight.run()
    assert not same(start, weights_of(straight.model))
    assert all("loss" in record for record in straight.history)

    first = Trainer(tiny_model(preset), config, folder=tmp_path)

    def interrupt(record: dict) -> None:
        if record["step"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(interrupt)
    second = Trainer(tiny_model(preset, seed=99), config, folder=tmp_path)
    second.resume()
    assert second.step == 2
    second.run()
    assert same(weights_of(straight.model), weights_of(second.model))
    strip = [{k: v for k, v in r.items() if "seconds" not in k} for r in straight.history]
    assert strip == [{k: v for k, v in r.items() if "seconds" not in k} for r in second.history]


def test_v32_learns_its_indexer_and_moves_its_routing_bias(lenient_reward):
    trainer = Trainer(tiny_model("deepseek_v32"), tiny_config("deepseek_v32", max_new_tokens=40))
    before = weights_of(trainer.model)
    trainer.run()
    after = weights_of(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("indexer" in name for name in moved) and any("expert_bias" in name for name in moved)
    assert all(record["indexer_loss"] > 0 for record in trainer.history)


def test_groups_of_equal_reward_change_nothing():
    trainer = Trainer(tiny_model("qwen3"), tiny_config("qwen3", steps=1, max_new_tokens=1))  # none finishes
    before = weights_of(trainer.model)
    trainer.run()
    assert trainer.history[0]["active_share"] == 0 and same(before, weights_of(trainer.model))


def test_resume_refuses_another_run(tmp_path):
    trainer = Trainer(tiny_model("qwen3"), tiny_config("qwen3"), folder=tmp_path)
    trainer.save()
    other = Trainer(tiny_model("qwen3"), tiny_config("qwen3", seed=4), folder=tmp_path)
    with pytest.raises(ValueError, match="other settings .seed: 0 there, 4 here."):
        other.resume()


def test_a_kill_in_the_middle_of_a_write_keeps_the_last_checkpoint(tmp_path):
    """A child saves one checkpoint, then is killed (SIGKILL) with the second half written."""
    path = tmp_path / "checkpoint.pt"
    script = textwrap.dedent(f"""
        import os, signal, torch
        from pathlib import Path
        from thinkernel.rl import checkpoint
        path = Path({str(path)!r})
        checkpoint.save(path, {{"step": 1, "model": torch.arange(1000)}})
        def half(file):
            file.write(b"x" * 5000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.write_atomically(path, half)
    """)
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = checkpoint.load(path)
    assert state["step"] == 1 and torch.equal(state["model"], torch.arange(1000))


def test_a_failing_write_leaves_no_rubbish(tmp_path):
    def fail(file):
        raise RuntimeError("disk")

    checkpoint.save(tmp_path / "a.pt", {"step": 3})
    with pytest.raises(RuntimeError, match="disk"):
        checkpoint.write_atomically(tmp_path / "a.pt", fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"] and checkpoint.load(tmp_path / "a.pt")["step"] == 3


def test_seeds_of_different_draws_differ():
    draws = ("problems", "samples")
    seeds = {derive_seed(seed, what, step) for seed in range(4) for what in draws for step in range(50)}
    assert len(seeds) == 400 and max(seeds) < 2**48


# ---- base model, demo, commands


def test_pretraining_learns_and_is_reproducible():
    config = PretrainConfig(steps=8, batch=8, warmup_steps=2)
    first, second = (pretrain("qwen3", config, show_progress=False) for _ in range(2))
    assert same(weights_of(first), weights_of(second))
    batch = corpus_batch(dataclasses.replace(config, seed=77), 0)
    torch.manual_seed(config.seed)

    def loss(model):
        with torch.no_grad():
            out = model(batch.tokens, targets=batch.targets, lengths=batch.lengths)
        return -float((out.logprob * batch.mask).sum() / batch.mask.sum())

    assert loss(first) < loss(Transformer(MODELS["qwen3"]))


def test_base_files_are_small_and_round_trip(tmp_path):
    model = tiny_model("deepseek_v32")
    save_base(model, tmp_path / "base.safetensors", {"preset": "deepseek_v32"})
    loaded = load_base(tmp_path / "base.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    shipped = list((Path(tk.__file__).parent / "rl" / "base").glob("*.safetensors"))
    assert {path.stem for path in shipped} == set(PRESETS)
    assert sum(path.stat().st_size for path in shipped) <= 5_000_000


@pytest.mark.parametrize("preset", PRESETS)
def test_demo_runs_reports_and_generates(preset, tmp_path, capsys):
    folder = tmp_path / "run"
    config = tiny_config(preset, steps=1, max_new_tokens=8)
    settings = DemoSettings(config, folder, eval_problems=3, eval_samples=4, show_progress=False)
    summary = run_demo(settings)
    assert set(summary["after"]["majority"]) == {"1", "4"} and summary["steps"] == 1
    for name in ("report.json", "report.md", "curve.png", "model.safetensors", "checkpoint.pt", "run.json"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "report.json").read_text())["after"] == summary["after"]
    run_demo(settings)
    assert "finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings .seed 0 → 5"):
        run_demo(dataclasses.replace(settings, train=dataclasses.replace(config, seed=5)))

    from thinkernel.cli import generate as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = ["--run", str(folder), "--prompt", "(3+4*2-5)", "--samples", "2", "--max-new-tokens", "6"]
    assert command.run(parser.parse_args(arguments)) == 0
    first = capsys.readouterr().out
    assert first.startswith("(3+4*2-5)\n") and "majority of 2" in first
    assert command.run(parser.parse_args(arguments)) == 0 and capsys.readouterr().out == first
    assert command.run(parser.parse_args([*arguments[:3], "what?"])) == 2
    assert "got 'w' at position 0" in capsys.readouterr().err


def test_demo_from_scratch_makes_its_base_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "PretrainConfig", lambda: PretrainConfig(steps=2, batch=4))
    config = tiny_config("qwen3", steps=1, max_new_tokens=4)
    settings = DemoSettings(config, tmp_path / "run", 2, 1, from_scratch=True, show_progress=False)
    run_demo(settings)
    base = tmp_path / "run" / "base.safetensors"
    made = base.read_bytes()
    (tmp_path / "run" / "report.json").unlink()  # as if the run had been killed before its report
    run_demo(settings)
    assert base.read_bytes() == made and capsys.readouterr().out.count("base model made") == 1


def test_generate_takes_an_unfinished_run_and_names_a_wrong_folder(tmp_path):
    with pytest.raises(ValueError, match="takes a `thinkernel demo` folder"):
        load_run_or_base(tmp_path, None)
    trainer = Trainer(tiny_model("deepseek_v32"), tiny_config("deepseek_v32"), folder=tmp_path)
    trainer.save()
    assert same(weights_of(load_run_or_base(tmp_path, None)), weights_of(trainer.model))


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "0"], ["--group", "1"], ["--preset", "gpt"], ["--learning-rate", "2"], ["--eval-samples", "3"]],
)
def test_demo_names_bad_arguments(arguments, capsys):
    from thinkernel.cli import demo as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_demo_keeps_off_foreign_folders(tmp_path, capsys):
    from thinkernel.cli import demo as command

    (tmp_path / "notes.txt").write_text("mine")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for extra in ([], ["--fresh"]):
        assert command.run(parser.parse_args(["--out", str(tmp_path), *extra])) == 2
        assert "no run" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"
