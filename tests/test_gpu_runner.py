"""The staging of `make gpu` and the records of verified kernels, with stand-in commands: none of this needs a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from thinkernel.ops.verified import read_records, verified_kernels

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu_run = load("gpu_run")
gpu_verify = load("gpu_verify")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def stage(name: str, *codes: str, limit_s: float = 60, **options: Any) -> Any:
    return gpu_run.Stage(name, limit_s, lambda out: [python(code) for code in codes], **options)


def counting(folder: Path, name: str, then: str = "") -> str:
    """Code that leaves one line in folder/name for each time it runs."""
    return f"open({str(folder / name)!r}, 'a').write('ran\\n'); {then}"


def runs(folder: Path, name: str) -> int:
    return len((folder / name).read_text().splitlines()) if (folder / name).exists() else 0


def state(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu_run.json").read_text())["stages"]


def test_a_failure_is_recorded_and_the_next_stage_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages = [stage("bad", "print('why it broke'); raise SystemExit(3)"), stage("good", counting(tmp_path, "good"))]
    assert gpu_run.run(stages, out) == 1
    assert state(out)["bad"]["status"] == "failed" and "exit status 3" in state(out)["bad"]["note"]
    assert "why it broke" in (out / "bad.log").read_text()
    assert state(out)["good"]["status"] == "passed" and runs(tmp_path, "good") == 1


def test_a_second_run_repeats_only_what_has_not_passed(tmp_path: Path) -> None:
    out, flag = tmp_path / "out", tmp_path / "mended"
    stages = [
        stage("first", counting(tmp_path, "first")),
        stage("second", counting(tmp_path, "second", f"import os, sys; sys.exit(not os.path.exists({str(flag)!r}))")),
    ]
    assert gpu_run.run(stages, out) == 1
    flag.touch()
    assert gpu_run.run(stages, out) == 0
    assert (runs(tmp_path, "first"), runs(tmp_path, "second")) == (1, 2)
    assert gpu_run.run(stages, out) == 0
    assert (runs(tmp_path, "first"), runs(tmp_path, "second")) == (1, 2)
    assert gpu_run.run(stages, out, again=True) == 0
    assert (runs(tmp_path, "first"), runs(tmp_path, "second")) == (2, 3)


def test_other_sources_count_as_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [stage("one", counting(tmp_path, "one"))]
    assert gpu_run.run(stages, tmp_path / "out") == 0
    monkeypatch.setattr(gpu_run, "source_digest", lambda: "other")
    assert gpu_run.run(stages, tmp_path / "out") == 0
    assert runs(tmp_path, "one") == 2


def test_a_named_stage_runs_alone_and_again(tmp_path: Path) -> None:
    stages = [stage("one", counting(tmp_path, "one")), stage("two", counting(tmp_path, "two"))]
    for _ in range(2):
        assert gpu_run.main(["--out", str(tmp_path / "out"), "--stage", "two"], stages) == 0
    assert (runs(tmp_path, "one"), runs(tmp_path, "two")) == (0, 2)
    assert list(state(tmp_path / "out")) == ["two"]


def test_a_time_limit_ends_the_stage_and_all_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = "import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    parent = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"open({str(pid)!r}, 'w').write(str(child.pid)); print('started', flush=True); time.sleep(600)"
    )
    stages = [stage("slow", parent, limit_s=3), stage("next", counting(tmp_path, "next"))]
    assert gpu_run.run(stages, tmp_path / "out") == 1
    record = state(tmp_path / "out")["slow"]
    assert record["status"] == "timed_out" and "limit of 3 s" in record["note"]
    assert "started" in (tmp_path / "out" / "slow.log").read_text()
    assert runs(tmp_path, "next") == 1
    assert not alive(int(pid.read_text()))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but is not waited for counts as ended."""
    for _ in range(100):
        try:
            if (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.1)
    return True


def test_the_limit_is_the_stage_s_not_each_command_s(tmp_path: Path) -> None:
    stages = [stage("two", "import time; time.sleep(600)", "pass", limit_s=1, stop_at_failure=False)]
    assert gpu_run.run(stages, tmp_path / "out") == 1
    assert len(state(tmp_path / "out")["two"]["commands"]) == 1


def test_commands_go_on_after_a_failure_where_the_stage_says_so(tmp_path: Path) -> None:
    codes = ("raise SystemExit(1)", counting(tmp_path, "later"))
    assert gpu_run.run([stage("bench", *codes, stop_at_failure=False)], tmp_path / "out") == 1
    assert runs(tmp_path, "later") == 1
    assert gpu_run.run([stage("build", *codes)], tmp_path / "out2") == 1
    assert runs(tmp_path, "later") == 1
    assert state(tmp_path / "out")["bench"]["status"] == state(tmp_path / "out2")["build"]["status"] == "failed"


def test_what_the_machine_lacks_is_named_and_nothing_is_run(tmp_path: Path) -> None:
    stages = [stage("build", counting(tmp_path, "build"), needs=lambda: ["cmake (the build)", "ninja (the build)"])]
    assert gpu_run.run(stages, tmp_path / "out") == 1
    note = state(tmp_path / "out")["build"]["note"]
    assert "lacks cmake (the build); ninja (the build)" in note and runs(tmp_path, "build") == 0
    assert note in (tmp_path / "out" / "build.log").read_text()


def test_a_stage_without_commands_fails(tmp_path: Path) -> None:
    assert gpu_run.run([stage("nothing")], tmp_path / "out") == 1
    assert state(tmp_path / "out")["nothing"]["status"] == "failed"


def test_a_terminated_run_records_it_and_resumes(tmp_path: Path) -> None:
    out, marker = tmp_path / "out", tmp_path / "ran"
    code = f"import sys, time; open({str(marker)!r}, 'a').write('ran\\n'); time.sleep(600)"
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import gpu_run; "
        f"stage = gpu_run.Stage('long', 60, lambda out: [[sys.executable, '-c', {code!r}]]); "
        f"sys.exit(gpu_run.main(['--out', {str(out)!r}], [stage]))"
    )
    process = subprocess.Popen(python(program))
    for _ in range(600):
        if marker.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    assert state(out)["long"]["status"] == "interrupted"
    assert gpu_run.run([stage("long", counting(tmp_path, "ran"))], out) == 0
    assert state(out)["long"]["status"] == "passed"


def test_the_environment_of_a_stage(tmp_path: Path) -> None:
    names = ("THINKERNEL_CUDA", "THINKERNEL_REQUIRE_GPU", "PYTHONPATH", "THINKERNEL_COMMIT")
    code = f"import os; print([os.environ.get(n) for n in {names!r}])"
    assert gpu_run.run([stage("env", code, environment={"THINKERNEL_CUDA": "1"})], tmp_path) == 0
    log = (tmp_path / "env.log").read_text()
    assert "['1', '1', '" + str(ROOT / "python") in log and "None" not in log.splitlines()[-1]


def test_the_shipped_stages_in_order_fit_ten_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_run.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["build", "tests", "verify", "bench"]
    assert sum(shipped.limit_s for shipped in gpu_run.STAGES) < 600
    for shipped in gpu_run.STAGES:
        for command in shipped.commands(Path("out")):
            scripts = [part for part in command if part.endswith((".py", "tests/gpu")) and not part.startswith("-")]
            assert all((ROOT / script).exists() for script in scripts), command


def test_a_bad_argument_is_one_clear_line() -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_run.py"), "--stage", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'nonsense'" in done.stderr


# ---- records of verified kernels


def record(**changes: Any) -> dict[str, Any]:
    kernel = gpu_verify.KERNELS["topk"]
    fields = {
        "kernel": "topk", "gpu": "a GPU", "capability": "9.0", "date": "2026-01-01", "commit": "c",
        "sources": gpu_verify.digest(kernel), "passed": True,
    }  # fmt: skip
    return {**fields, **changes}


def test_packaged_records_are_of_the_sources_as_they_are() -> None:
    stale = [entry["kernel"] for entry in read_records() if entry["passed"] and not gpu_verify.holds(entry)]
    assert not stale, f"changed since they were verified: {stale}; run `make gpu` and accept its record, or drop these"
    assert verified_kernels() == {entry["kernel"] for entry in read_records() if entry["passed"] is True}


def test_every_cuda_source_belongs_to_a_kernel_with_tests() -> None:
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").rglob("*.cu")}
    assert sources == {kernel.source for kernel in gpu_verify.KERNELS.values()}
    assert all((ROOT / kernel.tests).exists() for kernel in gpu_verify.KERNELS.values())


def test_the_digest_covers_included_files_and_not_the_host_shim() -> None:
    names = {path.name for path in gpu_verify.sources_of(ROOT / "csrc/cuda/topk.cu")}
    assert names >= {"topk.cu", "topk_kernel.cuh", "simt.cuh", "cuda_kernels.h", "topk.h", "types.h"}
    assert not names & {path.name for path in (ROOT / "csrc/cuda/host_shim").iterdir()}


def test_accepts_records_of_these_sources_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "package" / "verified.json"
    target.parent.mkdir()
    target.write_text("[]\n")
    monkeypatch.setattr(gpu_verify, "VERIFIED", target)
    incoming = tmp_path / "verified.json"
    incoming.write_text(json.dumps([record(sources="other")]))
    assert gpu_verify.main(["--accept", str(incoming)]) == 1
    assert json.loads(target.read_text()) == []
    incoming.write_text(json.dumps([record()]))
    assert gpu_verify.main(["--accept", str(incoming)]) == 0
    assert json.loads(target.read_text()) == [record()]


@pytest.mark.parametrize("text", ["{}", "[{}]", "not json", '[{"kernel": "topk", "passed": true}]'])
def test_refuses_a_malformed_record(text: str, tmp_path: Path) -> None:
    path = tmp_path / "verified.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="verified.json"):
        read_records(path)


@pytest.mark.parametrize(
    ("body", "passes"),
    [
        ("def test_a(): pass", True),
        ("def test_a(): assert False", False),
        ("import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no')", False),
        ("", False),
        ("raise RuntimeError('at import')", False),
    ],
    ids=["pass", "fail", "skip", "empty", "error"],
)
def test_a_kernel_passes_only_when_its_tests_ran_and_passed(body: str, passes: bool, tmp_path: Path) -> None:
    tests = tmp_path / "test_kernel.py"
    tests.write_text(body + "\n")
    assert gpu_verify.run_tests(str(tests)) is passes


def test_verification_records_each_kernel_s_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_verify, "current_gpu", lambda: ("a GPU", "9.0"))
    monkeypatch.setattr(gpu_verify, "VERIFIED", tmp_path / "packaged.json")
    monkeypatch.setenv("THINKERNEL_COMMIT", "abc")
    (tmp_path / "packaged.json").write_text(json.dumps([record(sources="other")]))
    topk_tests = gpu_verify.KERNELS["topk"].tests
    outcomes = {tests: iter([tests != topk_tests, True]) for tests in {kernel.tests for kernel in gpu_verify.KERNELS.values()}}
    asked: list[str] = []
    monkeypatch.setattr(gpu_verify, "run_tests", lambda tests: asked.append(tests) or next(outcomes[tests]))
    assert gpu_verify.main(["--out", str(tmp_path)]) == 1
    entries = json.loads((tmp_path / "verified.json").read_text())
    assert [entry["kernel"] for entry in entries] == sorted(gpu_verify.KERNELS)
    for entry in entries:
        kernel = gpu_verify.KERNELS[entry["kernel"]]
        assert entry["passed"] is (kernel.tests != topk_tests) and entry["commit"] == "abc"
        assert entry["sources"] == gpu_verify.digest(kernel)
    assert gpu_verify.main(["--out", str(tmp_path)]) == 0
    entries = json.loads((tmp_path / "verified.json").read_text())
    assert [entry["kernel"] for entry in entries] == sorted(gpu_verify.KERNELS)
    assert all(entry["passed"] is True and entry["gpu"] == "a GPU" for entry in entries)
    (tmp_path / "packaged.json").write_text(json.dumps(entries))
    assert gpu_verify.main(["--out", str(tmp_path)]) == 0  # verified before: not asked again
    assert all(asked.count(tests) == 2 for tests in outcomes) and len(asked) == 2 * len(outcomes)


@pytest.mark.skipif(os.environ.get("CUDA_VISIBLE_DEVICES", "") != "", reason="a GPU may be there")
def test_without_a_gpu_nothing_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert gpu_verify.main(["--out", str(tmp_path)]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "verified.json").exists()
