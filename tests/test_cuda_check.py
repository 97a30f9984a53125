"""The spill check: it sees a spill in ptxas' output, and the CUDA sources have none (where nvcc is there)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_check", ROOT / "tools" / "cuda_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module
    spec.loader.exec_module(module)
    return module


cuda_check = load()

CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onev' for 'sm_80'
ptxas info    : Function properties for _Z3onev
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, used 1 barriers, 8460 bytes smem, 432 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3twov' for 'sm_90a'
ptxas info    : Function properties for _Z3twov
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""


def test_parses_registers_shared_memory_and_stack() -> None:
    one, two = cuda_check.parse_ptxas(CLEAN)
    assert (one.name, one.arch, one.registers, one.shared_bytes, one.stack_bytes) == ("_Z3onev", "80", 56, 8460, 0)
    assert (two.name, two.arch, two.registers, two.shared_bytes, two.stack_bytes) == ("_Z3twov", "90a", 40, 0, 16)
    assert not one.spills and not two.spills


@pytest.mark.parametrize(("stores", "loads"), [(8, 0), (0, 4), (8, 4)])
def test_sees_a_spill(stores: int, loads: int) -> None:
    found = f"{stores} bytes spill stores, {loads} bytes spill loads"
    text = CLEAN.replace("0 bytes spill stores, 0 bytes spill loads", found, 1)
    assert [kernel.spills for kernel in cuda_check.parse_ptxas(text)] == [True, False]


@pytest.mark.parametrize("missing", ["bytes stack frame", "Used 56"])
def test_refuses_output_that_does_not_describe_a_kernel(missing: str) -> None:
    text = "\n".join(line for line in CLEAN.splitlines() if missing not in line)
    with pytest.raises(ValueError, match="_Z3onev"):
        cuda_check.parse_ptxas(text)


needs_nvcc = pytest.mark.skipif(cuda_check.find_nvcc() is None, reason="no nvcc")


@needs_nvcc
def test_a_spilling_kernel_fails_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(
        """
        __global__ void __launch_bounds__(1024, 2) many(float* out, const float* in) {
          float live[96];
          #pragma unroll
          for (int i = 0; i < 96; ++i) live[i] = in[threadIdx.x + 1024 * i];
          __syncthreads();
          #pragma unroll
          for (int round = 0; round < 4; ++round) {
            #pragma unroll
            for (int i = 0; i < 96; ++i) live[i] = live[i] * live[(i + 7) % 96] + live[(i + 50) % 96];
          }
          #pragma unroll
          for (int i = 0; i < 96; ++i) out[threadIdx.x + 1024 * i] = live[i];
        }
        """
    )
    assert cuda_check.main(["--arch", "90a", "--", str(source)]) == 1
    assert "many spills on sm_90a" in capsys.readouterr().err


@needs_nvcc
def test_a_source_without_kernels_and_a_broken_one_fail_the_check(tmp_path: Path) -> None:
    for text in ("int nothing;\n", "this is not CUDA\n"):
        source = tmp_path / "other.cu"
        source.write_text(text)
        assert cuda_check.main(["--arch", "90a", "--", str(source)]) == 1


@needs_nvcc
@pytest.mark.slow
def test_shipped_sources_do_not_spill() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "cuda_check.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
