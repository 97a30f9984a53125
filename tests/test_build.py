"""What the build promises: no torch in the core, no code of a higher ISA level in a lower one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from thinkernel.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]


def test_the_core_knows_no_torch_and_one_file_knows_python():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            text = path.read_text()
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), path
            assert ("pybind11" in text) == (path.name == "bindings.cpp"), path


@pytest.mark.skipif(dispatch.C is None or shutil.which("nm") is None, reason="needs the extension and nm")
def test_no_weak_symbol_of_one_isa_level_is_shared_with_another():
    """An inline function outside the level's namespace is merged by the linker, and AVX-512 code lands in the baseline."""
    objects = sorted((ROOT / "build").glob("cmake-*/CMakeFiles/tk_*.dir/**/*.o"))
    if not objects:
        pytest.skip("no object files: the extension was built elsewhere")
    foreign = {}
    for path in objects:
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        level = re.search(r"tk_(\w+)\.dir", str(path)).group(1)
        for line in listing.splitlines():
            match = re.match(r"[0-9a-f]+ ([WwVu]) (.*)", line)
            if match and f"tk::{level}::" not in match.group(2) and match.group(2) != "DW.ref.__gxx_personality_v0":
                foreign.setdefault(path.name, []).append(match.group(2))
    assert not foreign, foreign
