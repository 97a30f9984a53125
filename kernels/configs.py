"""Block sizes, warps and pipeline stages of every Triton kernel: plain tables, no autotuning at run time. Here what families share and
those of attention, mla, linear and grpo; configs_sparse.py and configs_moe.py have the others.

Keys: (architecture, kind) with architecture one of ARCHITECTURES and kind "half" (float16, bfloat16) or "float"
(float32), and for attention the width bucket that holds max(padded D, padded Dv): 64, 128, 192 or 256.
Legend: Tile(m query rows, n keys, warps, stages); Product(m rows, n columns, k depth, warps, stages, group).
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .primitives import INTERPRET

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes one program may use
WIDTHS = (64, 128, 192, 256)


class Tile(NamedTuple):
    m: int
    n: int
    warps: int
    stages: int


class Product(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int  # row blocks that share one sweep over the columns, so that both operands stay in L2


class Rows(NamedTuple):
    elements: int  # of a tile: rows × columns
    columns: int  # at most; a shorter row leaves room for more rows
    split: int  # columns of one program
    warps: int
    stages: int


# Keys per split: decode works on splits in parallel, prefill walks them in order; both merge them the same way,
# so the size is part of the result's bits and is not a tuning knob per architecture.
KEY_SPLIT = 1024

# The key block `n` is shared by forward and decode (same bits): only m, warps and stages differ.
ATTENTION_FORWARD = {
    ("sm_80", "half"): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 192: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("sm_90", "half"): {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 192: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 3)},
    ("sm_100", "half"): {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 8, 2), 192: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
    ("sm_80", "float"): {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 8, 2), 192: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("sm_90", "float"): {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 8, 2), 192: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 2)},
    ("sm_100", "float"): {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 8, 1), 192: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}

# m rows hold (query, head of the group) pairs; 64 rows make Hopper use wgmma, as in the forward kernel.
ATTENTION_DECODE = {
    ("sm_80", "half"): {64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 3), 192: Tile(16, 32, 4, 3), 256: Tile(16, 32, 4, 3)},
    ("sm_90", "half"): {64: Tile(64, 128, 4, 3), 128: Tile(64, 64, 8, 3), 192: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("sm_100", "half"): {64: Tile(64, 64, 8, 3), 128: Tile(64, 64, 8, 2), 192: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("sm_80", "float"): {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 192: Tile(16, 32, 8, 2), 256: Tile(16, 16, 4, 1)},
    ("sm_90", "float"): {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 192: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 1)},
    ("sm_100", "float"): {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 192: Tile(16, 32, 4, 2), 256: Tile(16, 16, 8, 2)},
}

# dK and dV: n keys stay, m query rows pass by.
ATTENTION_BACKWARD_KV = {
    ("sm_80", "half"): {64: Tile(32, 128, 8, 2), 128: Tile(32, 64, 8, 2), 192: Tile(32, 32, 8, 2), 256: Tile(32, 64, 8, 1)},
    ("sm_90", "half"): {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 2), 192: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 2)},
    ("sm_100", "half"): {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 2), 192: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 2)},
    ("sm_80", "float"): {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 192: Tile(16, 16, 8, 3), 256: Tile(16, 16, 8, 1)},
    ("sm_90", "float"): {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 192: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("sm_100", "float"): {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 192: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
}

# dQ: m query rows stay, n keys pass by.
ATTENTION_BACKWARD_Q = {
    ("sm_80", "half"): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 192: Tile(64, 32, 4, 1), 256: Tile(64, 32, 8, 1)},
    ("sm_90", "half"): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 192: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    ("sm_100", "half"): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 192: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    ("sm_80", "float"): {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 192: Tile(16, 16, 8, 2), 256: Tile(16, 16, 8, 1)},
    ("sm_90", "float"): {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 192: Tile(16, 16, 8, 2), 256: Tile(16, 16, 8, 1)},
    ("sm_100", "float"): {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 192: Tile(16, 16, 8, 2), 256: Tile(16, 16, 8, 1)},
}

ATTENTION = {
    "forward": ATTENTION_FORWARD, "decode": ATTENTION_DECODE, "backward_kv": ATTENTION_BACKWARD_KV, "backward_q": ATTENTION_BACKWARD_Q,
}

# Calls with key_start, window, chunk, softcap or sinks hold more values at once: these tiles, where the plain one would spill
# in some combination of them. In forward and decode `n` is the plain one.
OPTIONS = {
    "forward": {
        ("sm_80", "half"): {128: Tile(64, 64, 8, 3)},
        ("sm_80", "float"): {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 1)},
        ("sm_90", "float"): {64: Tile(32, 32, 8, 2), 128: Tile(16, 32, 4, 2)},
        ("sm_100", "float"): {128: Tile(16, 32, 8, 2)},
    },
    "decode": {
        ("sm_90", "half"): {64: Tile(64, 128, 4, 2)},
        ("sm_90", "float"): {128: Tile(16, 32, 8, 2)},
        ("sm_100", "float"): {128: Tile(16, 32, 8, 2)},
    },
    "backward_kv": {
        ("sm_80", "half"): {256: Tile(16, 64, 8, 1)},
        ("sm_80", "float"): {192: Tile(16, 16, 8, 2)},
        ("sm_90", "half"): {64: Tile(32, 128, 8, 3), 128: Tile(16, 128, 8, 2), 192: Tile(32, 64, 8, 1), 256: Tile(16, 64, 8, 2)},
        ("sm_90", "float"): {128: Tile(16, 16, 8, 2), 192: Tile(16, 16, 8, 2)},
        ("sm_100", "float"): {128: Tile(16, 16, 8, 2), 192: Tile(16, 16, 8, 2)},
    },
    "backward_q": {
        ("sm_80", "half"): {192: Tile(64, 16, 4, 1)},
        ("sm_80", "float"): {192: Tile(16, 16, 8, 1)},
        ("sm_90", "half"): {192: Tile(64, 32, 4, 2)},
        ("sm_100", "float"): {192: Tile(16, 16, 8, 3)},
    },
}

# Packed sequences hold a few values more again; these come before both other tables.
PACKED = {
    "forward": {
        ("sm_80", "float"): {128: Tile(32, 32, 8, 1)},
        ("sm_90", "float"): {128: Tile(16, 32, 4, 2)},
        ("sm_100", "float"): {128: Tile(16, 32, 8, 2), 192: Tile(32, 32, 8, 2)},
    },
    "decode": {},
    "backward_kv": {
        ("sm_90", "half"): {192: Tile(32, 64, 8, 1)},
        ("sm_90", "float"): {192: Tile(16, 16, 8, 2)},
    },
    "backward_q": {("sm_90", "float"): {128: Tile(16, 16, 8, 2)}, ("sm_100", "float"): {128: Tile(16, 16, 8, 2)}},
}

# Matrix products. "few" is for at most 64 rows (decode), where the weight is read once and the grid must be wide;
# "running" continues a float32 result, whose tile is held beside the new one while loading. A row's bits are those of one
# chain of fused multiply-adds over k and do not depend on the choice.
PRODUCT = {
    ("sm_80", "half"): {
        "many": Product(128, 128, 32, 8, 4, 8),
        "running": Product(128, 128, 32, 8, 3, 8), "few": Product(16, 64, 64, 4, 4, 1),
    },
    ("sm_90", "half"): {
        "many": Product(128, 256, 64, 8, 3, 16),
        "running": Product(128, 128, 64, 8, 4, 16), "few": Product(64, 32, 128, 4, 4, 1),
    },
    ("sm_100", "half"): {
        "many": Product(128, 256, 64, 8, 3, 16),
        "running": Product(128, 128, 64, 8, 4, 16), "few": Product(64, 32, 128, 4, 4, 1),
    },
    ("sm_80", "float"): {
        "many": Product(64, 64, 16, 8, 3, 8),
        "running": Product(64, 64, 16, 8, 3, 8), "few": Product(16, 32, 32, 4, 3, 1),
    },
    ("sm_90", "float"): {
        "many": Product(64, 64, 16, 8, 3, 8),
        "running": Product(64, 64, 16, 8, 3, 8), "few": Product(16, 32, 32, 4, 3, 1),
    },
    ("sm_100", "float"): {
        "many": Product(64, 64, 16, 8, 3, 8),
        "running": Product(64, 64, 16, 8, 3, 8), "few": Product(16, 32, 32, 4, 3, 1),
    },
}

# linear_logprob: the same products with a log-sum-exp ("forward") or the logits' gradient ("backward") as epilogue.
LOGPROB = {
    ("sm_80", "half"): {"forward": Product(128, 128, 32, 8, 4, 16), "backward": Product(128, 128, 32, 8, 4, 16)},
    ("sm_90", "half"): {"forward": Product(128, 256, 64, 8, 3, 16), "backward": Product(128, 128, 64, 8, 4, 16)},
    ("sm_100", "half"): {"forward": Product(128, 128, 64, 8, 4, 16), "backward": Product(128, 128, 64, 8, 4, 16)},
    ("sm_80", "float"): {"forward": Product(64, 64, 16, 8, 3, 16), "backward": Product(64, 64, 16, 8, 3, 16)},
    ("sm_90", "float"): {"forward": Product(64, 64, 16, 8, 3, 16), "backward": Product(64, 64, 16, 8, 3, 16)},
    ("sm_100", "float"): {"forward": Product(64, 64, 16, 8, 3, 16), "backward": Product(64, 64, 16, 8, 3, 16)},
}

# Vocabulary columns per program of linear_logprob's forward, and bytes of the backward's d(logits) buffer.
VOCABULARY_SPLIT = 2048
DLOGITS_BYTES = 128 * 1024 * 1024

# logprob from given logits, on every architecture: bound by memory, so enough bytes in flight (16 a thread and load) and no more.
# columns and split are part of the result's bits.
LOGITS = {"half": Rows(2048, 2048, 16384, 8, 3), "float": Rows(2048, 2048, 16384, 8, 3)}

# Whether the forward fetches keys and values through tensor descriptors (TMA on Hopper and later) where strides allow it. Off: it
# compiles without spills, and its numbers are checked by the interpreter, but its speed has not been measured on a GPU.
DESCRIPTORS = {"sm_80": False, "sm_90": False, "sm_100": False}

# mla's decode: the padded value dim (512 for DeepSeek's latents) beside the kind of cache, "fp8" where it is dequantised. m rows hold
# (query, head) pairs of one sequence; the key block `n` is read once, as keys and as values. An accumulator of [64, 512] takes half
# of a Hopper program's registers: 64 keys spill, and so does prefetching FP8 (values pass through registers on their way).
MLA_DECODE = {
    ("sm_80", "half"): {256: Tile(32, 32, 8, 3), 512: Tile(32, 32, 8, 2)},
    ("sm_90", "half"): {256: Tile(64, 64, 8, 2), 512: Tile(64, 32, 8, 2)},
    ("sm_90", "half, prefix"): {512: Tile(64, 32, 8, 3)},  # m, n and warps as without a prefix: the same bits
    ("sm_100", "half"): {256: Tile(64, 64, 8, 2), 512: Tile(64, 32, 8, 2)},
    ("sm_80", "fp8"): {512: Tile(16, 32, 8, 2)},
    ("sm_90", "fp8"): {512: Tile(64, 32, 8, 1)},
    ("sm_100", "fp8"): {512: Tile(16, 32, 8, 2)},
    ("sm_80", "float"): {256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    ("sm_90", "float"): {256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    ("sm_100", "float"): {256: Tile(16, 16, 8, 2), 512: Tile(16, 16, 8, 1)},
}

_INTERPRETER_TILE = Tile(64, 32, 1, 1)
INTERPRETER_PRODUCT = Product(32, 32, 32, 1, 1, 2)
_forced: list[str] = []


@contextmanager
def force_architecture(name: str) -> Iterator[None]:
    """Look configurations up for `name` whatever the device: compiling ahead of time for a GPU that is not here."""
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture: got {name!r}, takes one of {ARCHITECTURES}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def architecture(device: torch.device) -> str:
    """The table's key for `device`: the newest known architecture that is not newer than it."""
    if _forced:
        return _forced[-1]
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100" if major >= 10 else "sm_80")


def kind(dtype: torch.dtype) -> str:
    return "float" if dtype == torch.float32 else "half"


def width(padded_d: int, padded_dv: int) -> int:
    return next(w for w in WIDTHS if w >= max(padded_d, padded_dv))


def tile(kernel: str, device: torch.device, dtype: torch.dtype, padded_d: int, padded_dv: int, options: bool,
         packed: bool = False) -> Tile:
    """The tile of the attention kernel ("forward", "decode", "backward_kv", "backward_q") for these padded head dims.

    options: whether the call has any of key_start, window, chunk, softcap and sinks; packed: whether it has cu_seqlens.
    """
    if INTERPRET:
        return _INTERPRETER_TILE
    key, w = (architecture(device), kind(dtype)), width(padded_d, padded_dv)
    found = ATTENTION[kernel][key][w]
    for table, applies in ((OPTIONS, options), (PACKED, packed)):
        found = table[kernel].get(key, {}).get(w, found) if applies else found
    return found


def mla_tile(device: torch.device, dtype: torch.dtype, padded_dv: int, fp8: bool, prefix: bool) -> Tile:
    """The tile of mla_decode for queries of `dtype` and a padded value dim of at most 512."""
    if INTERPRET:
        return _INTERPRETER_TILE
    arch, wanted = architecture(device), "fp8" if fp8 and dtype != torch.float32 else kind(dtype)
    width = 256 if padded_dv <= 256 else 512
    found = MLA_DECODE[arch, wanted][width]
    return MLA_DECODE.get((arch, f"{wanted}, prefix"), {}).get(width, found) if prefix else found


def descriptors(device: torch.device) -> bool:
    """Whether attention's forward uses tensor descriptors on this device (under the interpreter: as on sm_90)."""
    return DESCRIPTORS["sm_90" if INTERPRET else architecture(device)]


def product(device: torch.device, dtype: torch.dtype, rows: int, running: bool) -> Product:
    """The tile of a plain matrix product with this many rows, or of one that continues a result."""
    if INTERPRET:
        return INTERPRETER_PRODUCT
    return PRODUCT[architecture(device), kind(dtype)]["running" if running else "few" if rows <= 64 else "many"]


def logprob(device: torch.device, dtype: torch.dtype, pass_: str) -> Product:
    """The tile of linear_logprob's "forward" or "backward"."""
    return INTERPRETER_PRODUCT if INTERPRET else LOGPROB[architecture(device), kind(dtype)][pass_]


def logits(dtype: torch.dtype) -> Rows:
    """The tile of logprob from given logits."""
    return Rows(2048, 32, 64, 1, 1) if INTERPRET else LOGITS[kind(dtype)]


def policy_block() -> int:
    """Tokens of one program of policy_loss: part of the result's bits."""
    return 16 if INTERPRET else 1024


def reward_block() -> int:
    """Samples of a group that group_advantages takes at a time."""
    return 4 if INTERPRET else 64


def key_split() -> int:
    return 64 if INTERPRET else KEY_SPLIT


def vocabulary_split() -> int:
    return 64 if INTERPRET else VOCABULARY_SPLIT
