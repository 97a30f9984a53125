"""Hugging Face models on thinkernel's kernels. Not implemented yet."""

from __future__ import annotations

import torch


def patch(model: torch.nn.Module) -> torch.nn.Module:
    """Replace the attention, experts and head of a Hugging Face model by thinkernel's. Not implemented yet."""
    raise NotImplementedError("patch is not implemented yet")


def unpatch(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `patch`. Not implemented yet."""
    raise NotImplementedError("unpatch is not implemented yet")
