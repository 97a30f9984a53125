"""configs.py's tables for the sparse family: top-k, the indexer and its loss, sparse_attention, NSA and MoBA."""
from __future__ import annotations

from typing import NamedTuple

import torch

from .configs import ARCHITECTURES, WIDTHS, Tile, architecture, kind, width
from .primitives import INTERPRET


class Parts(NamedTuple):
    block: int  # scores a program looks at at a time
    warps: int
    part: int  # scores of one program
    parts: int  # programs a row


# sparse_attention, by the padded columns of a key: m heads of one query, n slots. "forward" and "queries": m rows stay, slots pass by;
# "pairs": n slots stay and m heads pass by (m is cut to the group's heads). The forward's n is part of the result's bits.
# "pairs" of 512 + 64 columns on Hopper hold [512, 64] sums in registers and k, q, dout in 216 KiB of shared memory; 64 heads or 16 warps
# do not fit, and with [64, 512] sums Triton gives each warpgroup the whole of them. On Blackwell 64 slots take 608 columns of tensor
# memory, of which there are 512. Float32 sums its [16, ·] upright: transposed, each thread's operands do not fit its registers.
SPARSE_WIDTHS = (64, 128, 192, 256, 384, 640)
SPARSE = {
    "forward": {
        ("sm_80", "half"): {
            64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 3), 192: Tile(16, 32, 4, 3),
            256: Tile(16, 32, 4, 3), 384: Tile(32, 32, 8, 2), 640: Tile(32, 32, 8, 2),
        },
        ("sm_90", "half"): {
            64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 8, 3), 192: Tile(64, 64, 8, 2),
            256: Tile(64, 32, 8, 2), 384: Tile(64, 32, 8, 2), 640: Tile(64, 32, 8, 2),
        },
        ("sm_100", "half"): {
            64: Tile(64, 64, 8, 3), 128: Tile(64, 64, 8, 2), 192: Tile(64, 64, 4, 2),
            256: Tile(64, 32, 8, 2), 384: Tile(64, 32, 8, 2), 640: Tile(64, 32, 8, 2),
        },
        ("sm_80", "fp8"): {640: Tile(16, 32, 8, 2)},
        ("sm_90", "fp8"): {640: Tile(64, 32, 8, 1)},
        ("sm_100", "fp8"): {640: Tile(16, 32, 8, 2)},
        ("sm_80", "float"): {
            64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 8, 2), 192: Tile(16, 32, 8, 2),
            256: Tile(16, 16, 4, 1), 384: Tile(16, 16, 8, 1), 640: Tile(16, 16, 8, 1),
        },
        ("sm_90", "float"): {
            64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 8, 2), 192: Tile(16, 32, 8, 2),
            256: Tile(16, 16, 4, 1), 384: Tile(16, 16, 8, 1), 640: Tile(16, 16, 8, 1),
        },
        ("sm_100", "float"): {
            64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 8, 2), 192: Tile(16, 32, 8, 2),
            256: Tile(16, 16, 8, 1), 384: Tile(16, 16, 8, 1), 640: Tile(16, 16, 8, 1),
        },
    },
    "pairs": {
        ("sm_80", "half"): {
            64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 192: Tile(32, 32, 8, 2),
            256: Tile(32, 32, 8, 2), 384: Tile(16, 16, 8, 2), 640: Tile(16, 16, 8, 2),
        },
        ("sm_90", "half"): {
            64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 2), 192: Tile(64, 64, 8, 2),
            256: Tile(32, 64, 8, 2), 384: Tile(32, 64, 8, 2), 640: Tile(32, 64, 8, 2),
        },
        ("sm_100", "half"): {
            64: Tile(64, 64, 8, 2), 128: Tile(32, 64, 8, 2), 192: Tile(64, 64, 8, 1),
            256: Tile(32, 64, 8, 2), 384: Tile(32, 32, 8, 2), 640: Tile(32, 32, 8, 2),
        },
        ("sm_80", "float"): {
            64: Tile(16, 16, 8, 1), 128: Tile(16, 16, 8, 1), 192: Tile(16, 16, 8, 1),
            256: Tile(16, 16, 8, 1), 384: Tile(16, 16, 4, 1), 640: Tile(16, 16, 8, 1),
        },
        ("sm_90", "float"): {
            64: Tile(16, 16, 8, 1), 128: Tile(16, 16, 8, 1), 192: Tile(16, 16, 8, 1),
            256: Tile(16, 16, 8, 1), 384: Tile(16, 16, 4, 1), 640: Tile(16, 16, 8, 1),
        },
        ("sm_100", "float"): {
            64: Tile(16, 16, 8, 1), 128: Tile(16, 16, 8, 1), 192: Tile(16, 16, 8, 1),
            256: Tile(16, 16, 8, 1), 384: Tile(16, 16, 4, 1), 640: Tile(16, 16, 8, 1),
        },
    },
    "queries": {
        ("sm_80", "half"): {
            64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 3), 192: Tile(16, 64, 4, 3),
            256: Tile(16, 32, 4, 3), 384: Tile(32, 32, 8, 3), 640: Tile(32, 32, 8, 3),
        },
        ("sm_90", "half"): {
            64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 192: Tile(64, 64, 4, 3),
            256: Tile(64, 64, 8, 3), 384: Tile(64, 32, 8, 3), 640: Tile(64, 32, 8, 3),
        },
        ("sm_100", "half"): {
            64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 192: Tile(64, 64, 4, 3),
            256: Tile(64, 64, 8, 3), 384: Tile(64, 32, 8, 3), 640: Tile(64, 32, 8, 3),
        },
        ("sm_80", "float"): {
            64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 192: Tile(16, 16, 4, 2),
            256: Tile(16, 16, 8, 1), 384: Tile(16, 16, 8, 1), 640: Tile(16, 16, 8, 1),
        },
        ("sm_90", "float"): {
            64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 192: Tile(16, 16, 4, 2),
            256: Tile(16, 16, 8, 1), 384: Tile(16, 16, 8, 1), 640: Tile(16, 16, 8, 1),
        },
        ("sm_100", "float"): {
            64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 192: Tile(16, 16, 4, 2),
            256: Tile(16, 16, 8, 1), 384: Tile(16, 16, 8, 1), 640: Tile(16, 16, 8, 1),
        },
    },
}

# The indexer: n keys, m pairs (query, head) of at most 64. In "scores", "key" and "target" the keys are the product's rows, in "query"
# and "lse" the pairs are. "target" and "lse" are of the attention that the indexer's loss follows, whose head dim is walked through
# TARGET_DEPTH columns at a time.
INDEXER = {
    ("sm_80", "half"): {
        "scores": Tile(64, 128, 8, 3), "query": Tile(64, 64, 8, 2), "key": Tile(64, 64, 8, 2),
        "target": Tile(64, 64, 8, 3), "lse": Tile(64, 64, 8, 3),
    },
    ("sm_90", "half"): {
        "scores": Tile(64, 256, 8, 3), "query": Tile(64, 64, 8, 3), "key": Tile(64, 128, 8, 2),
        "target": Tile(64, 128, 8, 3), "lse": Tile(64, 128, 8, 3),
    },
    ("sm_100", "half"): {
        "scores": Tile(64, 128, 8, 3), "query": Tile(64, 64, 4, 2), "key": Tile(64, 128, 8, 2),
        "target": Tile(64, 128, 8, 3), "lse": Tile(64, 128, 8, 3),
    },
    ("sm_80", "float"): {
        "scores": Tile(32, 32, 8, 1), "query": Tile(32, 32, 8, 1), "key": Tile(32, 32, 8, 1),
        "target": Tile(32, 32, 8, 2), "lse": Tile(32, 32, 8, 2),
    },
    ("sm_90", "float"): {
        "scores": Tile(32, 32, 8, 1), "query": Tile(32, 32, 8, 1), "key": Tile(32, 32, 8, 1),
        "target": Tile(32, 32, 8, 2), "lse": Tile(32, 32, 8, 2),
    },
    ("sm_100", "float"): {
        "scores": Tile(32, 32, 8, 1), "query": Tile(32, 32, 8, 1), "key": Tile(32, 32, 8, 1),
        "target": Tile(32, 32, 8, 2), "lse": Tile(32, 32, 8, 2),
    },
}
TARGET_DEPTH = {"half": 64, "float": 32}

# Bytes of scores (and of what else a query has for each key) that the indexer's functions hold at a time: see their docstrings.
INDEXER_WORKSPACE = 128 * 1024 * 1024

# Attention over chosen blocks and the choice (native_sparse*.py). m rows are (query, head that shares the choice), n keys at most those of
# a block (64 in NSA); "blocks_kv": n keys stay. "scores": m rows against n compressed keys, "means": m queries of a head against n blocks.
BLOCK_SPARSE = {
    "blocks": {
        ("sm_80", "half"): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 192: Tile(64, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
        ("sm_90", "half"): {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 8, 2), 192: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        ("sm_100", "half"): {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 2), 192: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        ("sm_80", "float"): {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 192: Tile(16, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
        ("sm_90", "float"): {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 192: Tile(16, 32, 4, 2), 256: Tile(16, 16, 8, 1)},
        ("sm_100", "float"): {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 192: Tile(16, 32, 4, 2), 256: Tile(16, 16, 8, 2)},
    },
    "blocks_q": {
        ("sm_80", "half"): {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 2), 192: Tile(64, 16, 8, 1), 256: Tile(64, 32, 8, 1)},
        ("sm_90", "half"): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 192: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 3)},
        ("sm_100", "half"): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 192: Tile(64, 64, 8, 1), 256: Tile(64, 32, 8, 1)},
        ("sm_80", "float"): {64: Tile(16, 32, 4, 1), 128: Tile(16, 16, 8, 1), 192: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        ("sm_90", "float"): {64: Tile(16, 32, 4, 1), 128: Tile(16, 16, 8, 3), 192: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        ("sm_100", "float"): {64: Tile(16, 32, 4, 1), 128: Tile(16, 16, 8, 3), 192: Tile(16, 16, 8, 3), 256: Tile(16, 16, 8, 1)},
    },
    "blocks_kv": {
        ("sm_80", "half"): {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 192: Tile(32, 32, 8, 1), 256: Tile(32, 32, 8, 1)},
        ("sm_90", "half"): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 192: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 2)},
        ("sm_100", "half"): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 192: Tile(64, 64, 8, 1), 256: Tile(32, 64, 8, 1)},
        ("sm_80", "float"): {64: Tile(16, 32, 8, 1), 128: Tile(16, 16, 8, 1), 192: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        ("sm_90", "float"): {64: Tile(16, 32, 8, 1), 128: Tile(16, 16, 8, 2), 192: Tile(16, 16, 8, 2), 256: Tile(16, 16, 8, 1)},
        ("sm_100", "float"): {64: Tile(16, 32, 8, 1), 128: Tile(16, 16, 8, 3), 192: Tile(16, 16, 8, 3), 256: Tile(16, 16, 8, 1)},
    },
    "scores": {
        ("sm_80", "half"): dict.fromkeys(WIDTHS, Tile(64, 64, 4, 2)),
        ("sm_90", "half"): dict.fromkeys(WIDTHS, Tile(64, 64, 4, 2)),
        ("sm_100", "half"): {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 2), 192: Tile(64, 32, 4, 2), 256: Tile(64, 32, 4, 2)},
        ("sm_80", "float"): {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 4, 1), 192: Tile(16, 32, 4, 1), 256: Tile(16, 32, 8, 2)},
        ("sm_90", "float"): {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 4, 1), 192: Tile(16, 32, 4, 1), 256: Tile(16, 32, 8, 2)},
        ("sm_100", "float"): {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 4, 1), 192: Tile(16, 32, 4, 1), 256: Tile(16, 32, 8, 2)},
    },
    "means": {(arch, kind): dict.fromkeys(WIDTHS, Tile(32, 32, 4, 2)) for arch in ARCHITECTURES for kind in ("half", "float")},
}

# Bytes of block scores that the choice holds at a time, and rows of a segment of a block's list: the latter is part of dK's and dV's bits.
SCORE_BYTES = 128 * 1024 * 1024
SEGMENT = 32768

_INTERPRETER_SPARSE_TILE = Tile(16, 32, 1, 1)


def block_sparse_tile(kernel: str, device: torch.device, dtype: torch.dtype, padded: int, whole: bool = True) -> Tile:
    """The tile of a kernel over chosen blocks of keys, or of their choice, for this padded head dim. whole: the heads that share a
    choice fill it; else masks take registers, and it has half the rows."""
    if INTERPRET:
        return Tile(32, 16, 1, 1)
    tile = BLOCK_SPARSE[kernel][architecture(device), kind(dtype)][width(padded, padded)]
    return tile if whole else tile._replace(m=max(tile.m // 2, 16))


def sparse_tile(kernel: str, device: torch.device, dtype: torch.dtype, padded_d: int, padded_dv: int, fp8: bool = False) -> Tile:
    """The tile of sparse_attention's "forward", "pairs" or "queries" for keys and values of so many padded columns."""
    if INTERPRET:
        return _INTERPRETER_SPARSE_TILE
    wanted = "fp8" if fp8 and dtype != torch.float32 else kind(dtype)
    return SPARSE[kernel][architecture(device), wanted][next(w for w in SPARSE_WIDTHS if w >= max(padded_d, padded_dv))]


def sparse_transposed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether sparse_attention's backward sums keys' gradients transposed (under the interpreter: as on sm_90)."""
    return kind(dtype) == "half" and (INTERPRET or architecture(device) != "sm_80")


def topk(rows: int, length: int) -> Parts:
    """How top-k's rows are cut up: not at all where there are rows enough for the GPU. The result does not depend on it."""
    block, enough, shortest = (256, 4, 512) if INTERPRET else (2048, 256, 16384)
    parts = min(-(-length // shortest), max(1, enough // max(rows, 1)))
    part = -(-length // (parts * block)) * block if parts > 1 else length
    block = min(block, max(64, 1 << max(length - 1, 0).bit_length()))
    return Parts(block, 8 if block >= 2048 else 4, part, -(-length // part) if parts > 1 else 1)


def indexer(kernel: str, device: torch.device, dtype: torch.dtype, dim: int, quantised: bool = False) -> Tile:
    """The tile of the indexer's "scores", "query", "key", "target" or "lse" kernel. Fewer keys where rows are wide, and where their width
    is no power of two (masks and addresses take registers); with both, nothing is fetched ahead, and float16's gradients, which are
    scaled by powers of two, have fewer still. Fewer pairs and keys where float32 queries meet quantised keys."""
    if INTERPRET:
        return Tile(16, 32, 1, 1)
    half = kind(dtype) == "half"
    found = INDEXER[architecture(device), kind(dtype)][kernel]
    least = 16 if not half else 32 if kernel == "query" else 64
    halvings = (dim > 128) + (dim & (dim - 1) > 0)
    if quantised and not half:
        return found._replace(m=found.m // 2, n=max(found.n >> halvings + 1, least))
    if halvings > 1 and dtype == torch.float16 and kernel in ("query", "key"):
        return Tile(64, 16, 8, 1) if kernel == "query" else Tile(32, 64, 8, 1)
    return found._replace(n=max(found.n >> halvings, least), stages=1 if halvings > 1 else found.stages)


def target_depth(dtype: torch.dtype) -> int:
    return 32 if INTERPRET else TARGET_DEPTH[kind(dtype)]


def loss_block() -> int:
    """Keys of a row that the indexer's loss takes at a time: part of the result's bits."""
    return 64 if INTERPRET else 1024


def collect_block() -> int:
    """Keys of one program that adds up what rows give to dk."""
    return 32


def workspace() -> int:
    """Bytes that the indexer's functions hold beside their results."""
    return 1 << 15 if INTERPRET else INDEXER_WORKSPACE


def segment() -> int:
    return 32 if INTERPRET else SEGMENT
