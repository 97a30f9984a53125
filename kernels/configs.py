"""Block sizes, warps and pipeline stages of every Triton kernel: one plain table, no autotuning at run time.

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


class Parts(NamedTuple):
    block: int  # scores a program looks at at a time
    warps: int
    part: int  # scores of one program
    parts: int  # programs a row


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
            64: Tile(64, 64, 8, 3), 128: Tile(64, 64, 8, 2), 192: Tile(64, 64, 8, 2),
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
            64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 2), 192: Tile(64, 64, 8, 1),
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

_INTERPRETER_TILE = Tile(64, 32, 1, 1)
# moe's experts: "up" and "dz" (dA and what follows of it) count n in inner columns, of which "up" multiplies two (gate and up). "few" is
# for experts with a few rows each: small n and deep k, so that many programs read the weights at once; m as in the others where the
# instruction depends on it. dz's n is part of the bits of dweights; the others are not. Activations
# whose epilogue spills at the plain tile have their own. "dw": m × n of an expert's gradient, k rows.
EXPERTS = {
    ("sm_80", "half"): {
        "up": Product(128, 64, 32, 8, 4, 8), "up few": Product(16, 32, 64, 4, 4, 8), "down": Product(128, 128, 32, 8, 4, 8),
        "down few": Product(16, 64, 64, 4, 4, 8), "dz": Product(128, 64, 32, 8, 3, 8), "dx": Product(128, 128, 32, 8, 4, 8),
        "dx few": Product(16, 64, 64, 4, 4, 8), "dw": Product(128, 128, 32, 8, 3, 1),
    },
    ("sm_90", "half"): {
        "up": Product(128, 128, 64, 8, 3, 8), "up few": Product(64, 32, 128, 4, 4, 8), "down": Product(128, 256, 64, 8, 3, 8),
        "down few": Product(64, 64, 128, 4, 4, 8), "dz": Product(128, 128, 64, 8, 3, 8), "dx": Product(128, 256, 64, 8, 3, 8),
        "dx few": Product(64, 64, 128, 4, 4, 8), "dw": Product(128, 128, 64, 8, 3, 1),
        "up geglu": Product(128, 64, 64, 8, 4, 8), "up geglu_tanh": Product(128, 64, 64, 8, 4, 8),
        "up gpt_oss, kept": Product(128, 64, 64, 8, 4, 8),
    },
    ("sm_100", "half"): {
        "up": Product(128, 128, 64, 8, 3, 8), "up few": Product(64, 32, 128, 4, 4, 8), "down": Product(128, 256, 64, 8, 3, 8),
        "down few": Product(64, 64, 128, 4, 4, 8), "dz": Product(128, 128, 64, 8, 3, 8), "dx": Product(128, 256, 64, 8, 3, 8),
        "dx few": Product(64, 64, 128, 4, 4, 8), "dw": Product(128, 128, 64, 8, 3, 1), "up gpt_oss": Product(128, 64, 64, 8, 4, 8),
        "up geglu, kept": Product(128, 64, 64, 8, 4, 8),
    },
    **{(arch, "float"): {
        "up": Product(64, 32, 16, 8, 3, 8), "up few": Product(16, 16, 32, 4, 3, 8), "down": Product(64, 64, 16, 8, 3, 8),
        "down few": Product(16, 32, 32, 4, 3, 8), "dz": Product(64, 32, 16, 8, 2, 8), "dx": Product(64, 64, 16, 8, 3, 8),
        "dx few": Product(16, 32, 32, 4, 3, 8), "dw": Product(64, 64, 16, 8, 3, 1),
    } for arch in ("sm_80", "sm_90", "sm_100")},
}  # fmt: skip

# Bytes of moe's buffer for the results of slots, of which as many columns at a time are held as fit, a multiple of SLOTS_STEP.
SLOTS_BYTES = 256 * 1024 * 1024
SLOTS_STEP = 64 if INTERPRET else 256

_INTERPRETER_SPARSE_TILE = Tile(16, 32, 1, 1)
_INTERPRETER_PRODUCT = Product(32, 32, 32, 1, 1, 2)
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


def descriptors(device: torch.device) -> bool:
    """Whether attention's forward uses tensor descriptors on this device (under the interpreter: as on sm_90)."""
    return DESCRIPTORS["sm_90" if INTERPRET else architecture(device)]


def product(device: torch.device, dtype: torch.dtype, rows: int, running: bool) -> Product:
    """The tile of a plain matrix product with this many rows, or of one that continues a result."""
    if INTERPRET:
        return _INTERPRETER_PRODUCT
    return PRODUCT[architecture(device), kind(dtype)]["running" if running else "few" if rows <= 64 else "many"]


def logprob(device: torch.device, dtype: torch.dtype, pass_: str) -> Product:
    """The tile of linear_logprob's "forward" or "backward"."""
    return _INTERPRETER_PRODUCT if INTERPRET else LOGPROB[architecture(device), kind(dtype)][pass_]


def logits(dtype: torch.dtype) -> Rows:
    """The tile of logprob from given logits."""
    return Rows(2048, 32, 64, 1, 1) if INTERPRET else LOGITS[kind(dtype)]


def policy_block() -> int:
    """Tokens of one program of policy_loss: part of the result's bits."""
    return 16 if INTERPRET else 1024


def reward_block() -> int:
    """Samples of a group that group_advantages takes at a time."""
    return 4 if INTERPRET else 64


def topk(rows: int, length: int) -> Parts:
    """How top-k's rows are cut up: not at all where there are rows enough for the GPU. The result does not depend on it."""
    block, enough, shortest = (256, 4, 512) if INTERPRET else (2048, 256, 16384)
    parts = min(-(-length // shortest), max(1, enough // max(rows, 1)))
    part = -(-length // (parts * block)) * block if parts > 1 else length
    block = min(block, max(64, 1 << max(length - 1, 0).bit_length()))
    return Parts(block, 8 if block >= 2048 else 4, part, -(-length // part) if parts > 1 else 1)


def indexer(kernel: str, device: torch.device, dtype: torch.dtype, dim: int, quantised: bool = False) -> Tile:
    """The tile of the indexer's "scores", "query", "key", "target" or "lse" kernel. Fewer keys where rows are wide, and where their width
    is no power of two (masks and addresses take registers); with both, nothing is fetched ahead. Fewer pairs and keys where float32
    queries meet quantised keys."""
    if INTERPRET:
        return Tile(16, 32, 1, 1)
    half = kind(dtype) == "half"
    found = INDEXER[architecture(device), kind(dtype)][kernel]
    least = 16 if not half else 32 if kernel == "query" else 64
    halvings = (dim > 128) + (dim & (dim - 1) > 0)
    if quantised and not half:
        return found._replace(m=found.m // 2, n=max(found.n >> halvings + 1, least))
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


def key_split() -> int:
    return 64 if INTERPRET else KEY_SPLIT


def segment() -> int:
    return 32 if INTERPRET else SEGMENT


def vocabulary_split() -> int:
    return 64 if INTERPRET else VOCABULARY_SPLIT


def experts(device: torch.device, dtype: torch.dtype, pass_: str, activation: str = "", kept: bool = False) -> Product:
    """The tile of one of moe's products: a key of EXPERTS; that key and the activation (where z is kept) which has a tile of its own."""
    if INTERPRET:
        return _INTERPRETER_PRODUCT
    table = EXPERTS[architecture(device), kind(dtype)]
    plain = table.get(f"{pass_} {activation}", table[pass_])
    return table.get(f"{pass_} {activation}, kept", plain) if kept else plain


def combine_tile() -> tuple[int, int]:
    """Tokens and columns of one program that adds a token's slots up."""
    return (32, 64) if INTERPRET else (4, 512)


def bias_tile() -> tuple[int, int]:
    """Rows and columns of one step of a bias's gradient: part of its bits."""
    return 32, 64


def dot_tile() -> tuple[int, int]:
    """Slots of one program that multiplies rows, and columns of one step, a divisor of SLOTS_STEP: part of the bits of dweights."""
    return (32, 64) if INTERPRET else (8, 256)


def route_rows(columns: int) -> int:
    """Tokens of one program of route, whose logits take `columns` columns."""
    return max(1, (4096 if INTERPRET else 2048) // columns)


def sort_block() -> int:
    """Slots of one program of route's sort."""
    return 128 if INTERPRET else 256
