"""Argument checks, shared by all families. Each error names the argument, what it got and what it takes.

Shape, dtype and device checks run in the public functions (they trace under torch.compile); what index tensors contain
is checked inside the ops: always on the CPU, on a GPU only with THINKERNEL_CHECK=1, since a check synchronises.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
FEW = 64  # elements that are looked at one by one
FLOAT32_MAX, FLOAT32_TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def tensor(name: str, x: Any, dims: int | Sequence[int], shape: str, dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
    """x is a tensor of one of `dims` dimensions and one of `dtypes`; `shape` describes it, "[B, S, H, D]"."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, takes a tensor {shape}")
    if x.dim() not in ((dims,) if isinstance(dims, int) else dims):
        raise ValueError(f"{name}: got shape {list(x.shape)}, takes {shape}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got layout {x.layout}, takes a dense tensor {shape}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: got {x.dtype}, takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}")
    return x


def size(name: str, x: Tensor, dim: int, want: int, what: str) -> None:
    """x.shape[dim] == want, where `what` says what the size is, "B of q"."""
    if x.shape[dim] != want:
        raise ValueError(f"{name}: got size {x.shape[dim]} in dimension {dim}, takes {want} ({what}); its shape is {list(x.shape)}")


def shape(name: str, x: Tensor, want: Sequence[int], what: str) -> None:
    """x.shape == want, where `what` names the sizes, "[B, T, Hkv, D]"."""
    if tuple(x.shape) != tuple(want):
        raise ValueError(f"{name}: got shape {list(x.shape)}, takes {what} = {list(want)}")


def same_dtype(name: str, x: Tensor, first: str, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{name}: got {x.dtype}, takes the dtype of {first}, {y.dtype}")


def cast_together(name: str, x: Tensor, first: str, y: Tensor) -> None:
    """x has y's dtype, or under autocast one that is cast with it: all but float64."""
    if not torch.is_autocast_enabled(y.device.type) or torch.float64 in (x.dtype, y.dtype):
        same_dtype(name, x, first, y)


def same_device(first: str, x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: got device {other.device}, takes the device of {first}, {x.device}")


def process_group(name: str, group: Any) -> None:
    """A torch.distributed group that this process is a member of, or None."""
    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name}: got {type(group).__name__}, takes a torch.distributed group (dist.group.WORLD, dist.new_group(…))")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{name}: this process is not a member of it")


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(repr(c) for c in choices)}")


def number(name: str, value: Any, what: str = "a finite number") -> float:
    """A number that float32 can hold: kernels compute in it."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, takes {what}")
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        raise ValueError(f"{name}: got {value}, takes {what} (at most {FLOAT32_MAX:.2g}, what float32 holds)")
    return float(value)


def positive(name: str, value: float | None, *, none_is_fine: bool = True) -> None:
    if value is None and none_is_fine:
        return
    if number(name, value, "a positive number") < FLOAT32_TINY:
        raise ValueError(f"{name}: got {value}, takes a positive number (at least {FLOAT32_TINY:.2g}, what float32 holds)")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, takes True or False")


def integer(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, takes an integer of at least {minimum}")
    if value < minimum:
        raise ValueError(f"{name}: got {value}, takes an integer of at least {minimum}")


def checks_contents(x: Tensor) -> bool:
    """Whether to look at what index tensors contain."""
    return x.device.type == "cpu" or os.environ.get("THINKERNEL_CHECK") == "1"


def within(name: str, x: Tensor | None, low: int, high: int, what: str) -> None:
    """Every element of x lies in low..high inclusive; for use inside ops."""
    if x is None or x.numel() == 0 or not checks_contents(x):
        return
    if x.numel() <= FEW and x.is_cpu:  # 1 µs where two reductions and their comparisons take 12
        values = x.flatten().tolist()
        least, most = min(values), max(values)
    else:
        least, most = (bound.item() for bound in torch.aminmax(x))
    if least < low or most > high:
        wrong = int(least if least < low else most)
        raise ValueError(f"{name}: got {wrong}, takes values in {low}..{high} ({what})")


def packed(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> Tensor | None:
    """Offsets of packed sequences, of queries and of keys, or neither -> cu_seqlens_k, by default cu_seqlens_q."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k: it needs cu_seqlens_q")
        return None
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        tensor(name, cu, 1, "[B + 1]", INTEGERS)
    shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, "cu_seqlens_q's shape")
    return cu_seqlens_k


def cache_rows(name: str, cache: Tensor, seqlens: Tensor, block_table: Tensor | None, batch: int, rows: str) -> None:
    """seqlens [B] and a cache [B, T, ...], or pages [P, page, ...] with block_table [B, max_pages]. rows: what B is called."""
    tensor("seqlens", seqlens, 1, "[B]", INTEGERS)
    shape("seqlens", seqlens, (batch,), "[B]")
    if block_table is None:
        return size(name, cache, 0, batch, rows)
    tensor("block_table", block_table, 2, "[B, max_pages]", INTEGERS)
    size("block_table", block_table, 0, batch, rows)
    if cache.shape[1] == 0:
        raise ValueError(f"{name}: got pages of 0 positions, takes at least 1")


def lengths_and_pages(seqlens: Tensor, block_table: Tensor | None, cache: Tensor, name: str) -> None:
    """seqlens fit the cache, and every page that they use exists; entries past the end may hold anything."""
    if not checks_contents(seqlens):
        return
    if block_table is None:
        within("seqlens", seqlens, 0, cache.shape[1], f"the {name} holds {cache.shape[1]} positions")
        return
    page_size = cache.shape[1]
    within("seqlens", seqlens, 0, block_table.shape[1] * page_size, "block_table's pages × page size")
    first = torch.arange(block_table.shape[1], device=seqlens.device) * page_size  # [max_pages]
    used = block_table[first < seqlens[:, None]]
    within("block_table", used, 0, cache.shape[0] - 1, f"the {name} has {cache.shape[0]} pages")


def writable(name: str, x: Tensor) -> None:
    """No two elements of x share memory, as those of an expanded tensor do."""
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride())):
        raise ValueError(f"{name}: got an expanded tensor (strides {list(x.stride())}), takes one with memory for every element")


def cumulative(name: str, cu_seqlens: Tensor | None, total: int) -> None:
    """cu_seqlens rises from 0 to `total`; for use inside ops."""
    if cu_seqlens is None or not checks_contents(cu_seqlens):
        return
    values = cu_seqlens.tolist()
    if not values or values[0] != 0 or values[-1] != total or any(a > b for a, b in zip(values, values[1:])):
        raise ValueError(f"{name}: got {values[:4]}…{values[-1:]}, takes offsets rising from 0 to {total}")
