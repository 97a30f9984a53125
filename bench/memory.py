"""How fast this machine reads memory: the ceiling of everything that reads a cache once.

A plain read loop in C, compiled here, in the forms that were fastest on the machines tried: every thread reads a mebibyte at a
time, from 4 or 8 places of it in turn, since a core gets more from four streams than from one (pages of 4 KiB: 27 against
30 GB/s on two cores, and 33 from huge pages, which is the most that can be had). `readers` reads huge pages of its own;
`readers_of` reads tensors where they lie, on the pages they have.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

_SOURCE = """
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
typedef int64_t line __attribute__((vector_size(64)));

void* huge(int64_t bytes) {
  void* p = aligned_alloc(2 << 20, (bytes + (2 << 20) - 1) >> 21 << 21);
  if (!p) return p;
  madvise(p, bytes, MADV_HUGEPAGE);
  memset(p, 1, bytes);
  return p;
}
int64_t read_all(const char* p, int64_t bytes, int threads, int streams) {
  const int64_t block = 1 << 20, part = block / streams;
  int64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(+ : total)
  for (int64_t i = 0; i < bytes / block; ++i) {
    line sum[8] = {0};
    for (int64_t at = 0; at < part; at += 512)
      for (int s = 0; s < streams; ++s) {
        const char* from = p + i * block + s * part + at;
        for (int u = 0; u < 8; ++u) {
          __builtin_prefetch(from + u * 64 + 1024, 0, 3);
          sum[u] ^= *(const line*)(from + u * 64);
        }
      }
    for (int u = 0; u < 8; ++u) total += sum[u][0];
  }
  return total;
}
"""


STREAMS = (4, 8)


@functools.cache
def _library() -> ctypes.CDLL | None:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "read.c"), Path(folder, "read.so")
        source.write_text(_SOURCE)
        command = ["cc", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        loaded = ctypes.CDLL(str(library))
    loaded.huge.restype, loaded.huge.argtypes = ctypes.c_void_p, [ctypes.c_int64]
    loaded.read_all.restype = ctypes.c_int64
    loaded.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return loaded


def readers(bytes_read: int, threads: int) -> dict[str, Callable[[], object]]:
    """Read loops over `bytes_read` bytes (whole mebibytes) of memory of their own; {} where there is no C compiler."""
    loaded = _library()
    if loaded is None:
        return {}
    memory = loaded.huge(bytes_read)
    if not memory:
        raise MemoryError(f"{bytes_read} bytes to read")
    return {f"read {n} streams": lambda n=n: loaded.read_all(memory, bytes_read, threads, n) for n in STREAMS}


def readers_of(tensors: list[Tensor], threads: int) -> dict[str, Callable[[], object]]:
    """The same over the memory of contiguous tensors (whole mebibytes each)."""
    loaded = _library()
    if loaded is None:
        return {}
    return {
        f"read in place {n} streams": lambda n=n: [loaded.read_all(x.data_ptr(), x.nbytes, threads, n) for x in tensors] for n in STREAMS
    }
