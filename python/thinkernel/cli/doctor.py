"""`thinkernel doctor`: what works here and why something does not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

import thinkernel as tk
from thinkernel.ops import dispatch
from thinkernel.ops.library import OPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> dict[str, Any]:
    """Versions, CPU, GPU, backends (None, or why not), and which op has which kernels."""
    extension = dispatch.C
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "thinkernel": tk.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "triton", "numpy", "einops", "safetensors", "transformers")},
        "cpu": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": extension.isa() if extension else None,
            "isa_levels": list(extension.isa_levels()) if extension else [],
        },
        "gpu": gpus,
        "torch_cuda": torch.version.cuda,
        "extension": "loaded" if extension else dispatch.C_MISSING,
        "cuda_half": (extension.cuda_left_out or "built") if extension else dispatch.C_MISSING,
        "backend": dispatch.requested(),
        "backends": tk.backends(),
        "ops": {name: sorted(op.kernels) for name, op in sorted(OPS.items())},
    }


def run(args: argparse.Namespace) -> int:
    found = report()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"thinkernel {found['thinkernel']}, Python {found['python']}")
    print("packages   " + ", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items()))
    cpu = found["cpu"]
    print(f"cpu        {cpu['machine']}, {cpu['cores']} cores, {cpu['threads']} threads, level {cpu['isa']} of {cpu['isa_levels']}")
    print(f"gpu        {', '.join(found['gpu']) or 'none that torch sees'} (torch built for CUDA {found['torch_cuda']})")
    print(f"extension  {found['extension']}; CUDA half: {found['cuda_half']}")
    print(f"backend    {found['backend']} (use_backend, THINKERNEL_BACKEND)")
    for name, reason in found["backends"].items():
        print(f"  {name:10} {'works' if reason is None else 'no: ' + reason}")
    print("ops")
    for name, kernels in found["ops"].items():
        print(f"  {name:26} {', '.join(kernels)}")
    return 0
