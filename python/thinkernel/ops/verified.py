"""Which CUDA kernels have passed their tests on real hardware: the records in thinkernel/verified.json.

A record is {kernel, gpu, capability, date, commit, sources, passed}: `kernel` is the op's name, `sources` a digest of
the CUDA sources the run was built from. `make gpu` writes such records; tests hold them to the sources as they are now.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent.parent / "verified.json"
FIELDS = frozenset({"kernel", "gpu", "capability", "date", "commit", "sources", "passed"})


def read_records(path: Path = PATH) -> list[dict[str, Any]]:
    """The records of a file. Raises ValueError, naming the file, where it is not a list of complete records."""
    try:
        records = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a {type(records).__name__}; it takes a list of records")
    for record in records:
        missing = FIELDS - set(record) if isinstance(record, dict) else FIELDS
        if missing:
            raise ValueError(f"{path}: a record lacks {', '.join(sorted(missing))}: {record}")
    return records


@functools.cache
def verified_kernels() -> frozenset[str]:
    """Names of the ops whose CUDA kernel has passed on a GPU; automatic dispatch takes no other. Read once."""
    return frozenset(record["kernel"] for record in read_records() if record["passed"] is True)
