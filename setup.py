"""Builds the C++ core with CMake and ninja. torch is neither imported nor needed here.

THINKERNEL_CUDA=auto|0|1 governs the CUDA half: auto builds it when nvcc is found and says so when not.
THINKERNEL_SOFT_AMX=1 emulates AMX tiles, so that the amx level's code runs, slowly, on CPUs with AVX-512-BF16 alone: for its tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cuda = os.environ.get("THINKERNEL_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            raise SystemExit(f"THINKERNEL_CUDA is {cuda!r}; it takes auto, 0 or 1")
        soft = os.environ.get("THINKERNEL_SOFT_AMX", "0")
        if soft not in ("0", "1"):
            raise SystemExit(f"THINKERNEL_SOFT_AMX is {soft!r}; it takes 0 or 1")
        # A folder per interpreter and choice keeps rebuilds incremental.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-cuda-{cuda}{'-soft-amx' * int(soft)}"
        build.mkdir(parents=True, exist_ok=True)
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise SystemExit("building thinkernel needs cmake and ninja: pip install cmake ninja")
        configure = [
            cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTHINKERNEL_CUDA={cuda}",
            f"-DTHINKERNEL_SOFT_AMX={soft}",
            f"-DTHINKERNEL_OUTPUT={target.name}",
            f"-DTHINKERNEL_OUTPUT_DIR={target.parent}",
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "-j", jobs], check=True)
        if not target.exists():
            raise SystemExit(f"the build ended without {target}")


setup(ext_modules=[Extension("thinkernel._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
