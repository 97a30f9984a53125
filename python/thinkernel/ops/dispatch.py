"""Which backend runs an op. Nothing else in the library chooses.

Backends: "cpu" (C++), "cuda" (CUDA C++), "triton", "reference" (plain torch, the specification).
Automatic choice: a CPU tensor takes cpu, a CUDA tensor takes cuda when that kernel is marked verified on
hardware, else triton; reference is what is left, with one warning that names the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from thinkernel.ops.verified import verified_kernels

BACKENDS = ("reference", "cpu", "triton", "cuda")
_CHOICES = (*BACKENDS, "auto")


def _from_environment() -> str:
    name = os.environ.get("THINKERNEL_BACKEND", "auto") or "auto"
    if name not in _CHOICES:
        raise ValueError(f"THINKERNEL_BACKEND is {name!r}; it takes one of {', '.join(_CHOICES)}")
    return name


# One setting for the process, not per thread: autograd runs CUDA backwards on threads of its own.
_requested = _from_environment()
_warned: set[tuple[str, str]] = set()
_explaining: list[Choice] | None = None


@dataclass(frozen=True)
class Choice:
    """What runs one op: `backend`, and for each backend passed over, `rejected[backend]` = why."""

    op: str
    backend: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        why = "".join(f"\n  not {name}: {reason}" for name, reason in self.rejected.items())
        return f"{self.op}: {self.backend}{why}"


@dataclass(frozen=True)
class Kernel:
    """One backend's implementation of an op. `covers(*op_args)` returns None, or why it cannot take the call."""

    run: Callable[..., Any]
    covers: Callable[..., str | None] | None = None


class _UseBackend:
    """Sets the backend at once; as a context manager it puts the former one back."""

    def __init__(self, name: str):
        global _requested
        if name not in _CHOICES:
            raise ValueError(f"use_backend: name is {name!r}; it takes one of {', '.join(_CHOICES)}")
        self.former, _requested = _requested, name

    def __enter__(self) -> _UseBackend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _requested
        _requested = self.former


def use_backend(name: str) -> _UseBackend:
    """Force a backend for every op: "cpu", "triton", "cuda", "reference", or "auto" to choose per call.

    Works as a plain call and as a context manager, for the whole process. A forced backend that does not cover a
    call raises NotImplementedError; it never falls back. `THINKERNEL_BACKEND` sets the initial value.
    """
    return _UseBackend(name)


def requested() -> str:
    """The backend asked for: a name, or "auto"."""
    return _requested


def _load_extension() -> tuple[Any, str]:
    """The C++ module or None, and why not."""
    try:
        # torch is imported above, so that its OpenMP runtime is the one the extension binds to
        return importlib.import_module("thinkernel._C"), ""
    except ImportError as error:
        if importlib.util.find_spec("thinkernel._C") is None:
            return None, "the C++ extension thinkernel._C is not built (run `pip install .`, or `make build`)"
        return None, f"the C++ extension thinkernel._C does not load: {error}"


C, C_MISSING = _load_extension()


def interpreting() -> bool:
    """Whether Triton kernels run under Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on tensors of `device` at all, or None."""
    if backend == "cpu":
        if device.type != "cpu":
            return f"the tensors are on {device}, the cpu backend takes CPU tensors"
        return C_MISSING or None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if device.type != "cuda" and not interpreting():
            return f"the tensors are on {device}; triton takes CUDA tensors (or CPU tensors with TRITON_INTERPRET=1)"
        return None
    if backend == "cuda":
        if C is None:
            return C_MISSING
        if C.cuda_left_out:
            return f"the CUDA half is not built: {C.cuda_left_out}"
        return None if device.type == "cuda" else f"the tensors are on {device}, the cuda backend takes CUDA tensors"
    return None


def backends() -> dict[str, str | None]:
    """Each backend, with None where it can run in this process or the reason why not."""
    devices = {"cpu": "cpu", "triton": "cpu" if interpreting() else "cuda", "cuda": "cuda", "reference": "cpu"}
    found: dict[str, str | None] = {}
    for name in BACKENDS:
        device = torch.device(devices[name])
        found[name] = unavailable(name, device)
        if found[name] is None and device.type == "cuda" and not torch.cuda.is_available():
            found[name] = "torch sees no CUDA device"
    return found


def choose(op: str, kernels: dict[str, Kernel], device: torch.device, args: Sequence[Any]) -> Choice:
    """The backend for one call of `op`, by the rules at the top of this file."""
    order = ("cpu", "reference") if device.type == "cpu" else ("cuda", "triton", "reference")
    forced = _requested != "auto"
    rejected: dict[str, str] = {}
    for backend in (_requested,) if forced else order:
        reason = _rejection(op, backend, kernels, device, args, forced)
        if reason is None:
            choice = Choice(op, backend, rejected)
            if backend == "reference" and not forced and _explaining is None:
                _warn_once(op, rejected)
            return choice
        rejected[backend] = reason
    raise NotImplementedError(f"{op}: backend {_requested!r} does not cover this call: {rejected[_requested]}")


def _rejection(
    op: str, backend: str, kernels: dict[str, Kernel], device: torch.device, args: Sequence[Any], forced: bool
) -> str | None:
    reason = unavailable(backend, device)
    if reason is not None:
        return reason
    if backend not in kernels:
        return f"there is no {backend} kernel for {op} yet"
    covers = kernels[backend].covers
    reason = covers(*args) if covers is not None else None
    if reason is None and backend == "cuda" and not forced and op not in verified_kernels():
        reason = "the CUDA kernel is not verified on hardware yet (force it with use_backend('cuda'))"
    return reason


def _warn_once(op: str, rejected: dict[str, str]) -> None:
    reason = "; ".join(rejected.values())
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"thinkernel: {op} runs on the reference backend: {reason}", RuntimeWarning, stacklevel=6)


@contextmanager
def recording() -> Iterator[list[Choice]]:
    """Inside, ops record what they would run and return empty results of the right shape."""
    global _explaining
    former, _explaining = _explaining, []
    try:
        yield _explaining
    finally:
        _explaining = former


def record(choice: Choice) -> bool:
    """Notes `choice` when explain() is asking; then the op must not run."""
    if _explaining is None:
        return False
    _explaining.append(choice)
    return True


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which kernels `fn(*args, **kwargs)` would run, and why no other: one paragraph an op. Runs no kernel.

    >>> print(tk.explain(tk.attention, q, k, v, causal=True))
    attention_forward: cpu
    """
    with recording() as choices, torch.no_grad():
        fn(*args, **kwargs)
    return "\n".join(dict.fromkeys(str(choice) for choice in choices)) or f"{fn.__name__}: plain torch, no kernel"
