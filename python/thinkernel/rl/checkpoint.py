"""Checkpoints that a kill cannot break.

A file is written under a temporary name in the same folder, flushed to disk and renamed over the old one: whatever
happens, the path holds either the old checkpoint or the new one, whole. Every random draw of a run is seeded by
(seed, step), so model, optimizer and step are all the state there is, and a resumed run repeats the uninterrupted
one bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = 1


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` and makes the result appear at `path` at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def save(path: Path, state: dict[str, Any]) -> None:
    """state: tensors, numbers, strings and containers of them."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path) -> dict[str, Any]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise ValueError(f"{path}: got checkpoint format {state.get('format')}, takes {FORMAT}")
    return state
