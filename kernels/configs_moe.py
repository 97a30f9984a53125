"""configs.py's tables for the mixture of experts: moe and route."""
from __future__ import annotations

import torch

from .configs import INTERPRETER_PRODUCT, Product, architecture, kind
from .primitives import INTERPRET

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


def experts(device: torch.device, dtype: torch.dtype, pass_: str, activation: str = "", kept: bool = False) -> Product:
    """The tile of one of moe's products: a key of EXPERTS; that key and the activation (where z is kept) which has a tile of its own."""
    if INTERPRET:
        return INTERPRETER_PRODUCT
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
