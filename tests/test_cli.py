"""The command line: help everywhere, honest exit codes, one clear line for a bad argument."""

from __future__ import annotations

import json

import pytest
from thinkernel.cli.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: thinkernel " + command in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, what",
    [
        (["doctor", "--nope"], "--nope"),
        (["validate", "--dtype", "int8"], "int8"),
        (["validate", "--backend", "tpu"], "tpu"),
        (["validate", "--device", "foo"], "foo"),
        (["validate", "--device", "meta"], "meta"),
        (["bench", "nothing"], "nothing"),
        (["nothing"], "nothing"),
        (["generate", "--run", "/nowhere/at/all", "--prompt", "1+1"], "/nowhere/at/all"),
        (["demo", "--steps", "-1"], "steps"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(argv, what, capsys):
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2
    assert what in err and len(err.strip().splitlines()) == 1, err


def test_no_command_prints_help_and_fails(capsys):
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


def test_doctor_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"]
    assert set(found["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert found["backends"]["reference"] is None
    assert "reference" in found["ops"]["attention_forward"]


def test_validate_prints_a_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "table.json"
    assert main(["validate", "--backend", "reference", "--family", "linear", "--dtype", "float32", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "linear/odd dweight" in out and "within the rule" in out
    rows = json.loads(file.read_text())
    assert all(row["within"] and row["ratio"] <= 1 for row in rows)
