"""A decoder's cache of past tokens: preallocated tensors and one length per row.

Shapes: B rows, T_max capacity. Every layer's tensors are [B, T_max, ...] (see the modules' `new_cache`).
Rows are independent: each is written at its own length, so rows of different lengths need no padding between them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from thinkernel.nn.cache import CacheStep
from thinkernel.ops.memory import empty


class Cache:
    """layers: one tuple of tensors per layer; lengths [B] int32: how many tokens each row holds."""

    def __init__(self, layers: Sequence[tuple[Tensor, ...]], lengths: Tensor, *, extent: int = 0) -> None:
        self.layers = list(layers)
        self.lengths = lengths
        self.extent = extent  # host side, at least max(lengths)
        self.capacity = self.layers[0][0].shape[1]

    def begin(self, size: int) -> CacheStep:
        """The place of `size` new tokens per row."""
        if self.extent + size > self.capacity:
            raise ValueError(f"cache: holds {self.capacity} tokens a row, got {self.extent} + {size}")
        return CacheStep(self.lengths + size, self.extent + size, fresh=self.extent == 0)

    def commit(self, step: CacheStep, added: Tensor | None = None) -> None:
        """Count the new tokens, of which only added [B] are real where the rest was right padding: the padding's
        entries are overwritten by the tokens that follow."""
        self.lengths = step.seqlens if added is None else self.lengths + added.to(self.lengths.dtype)
        self.extent = step.extent

    def repeat(self, times: int) -> Cache:
        """Every row `times` times, side by side: the samples of one prompt."""
        if times == 1:
            return self
        return self._map(lambda t: t.repeat_interleave(times, dim=0))

    def select(self, rows: Tensor) -> Cache:
        """Only these rows [B'] (int64)."""
        return self._map(lambda t: t.index_select(0, rows))

    def _map(self, change) -> Cache:
        # Only the used part is moved; what follows is never read before it is written.
        layers = []
        for tensors in self.layers:
            moved = []
            for t in tensors:
                used = change(t[:, : self.extent])
                grown = empty((used.shape[0], *t.shape[1:]), t)
                grown[:, : self.extent] = used
                moved.append(grown)
            layers.append(tuple(moved))
        return Cache(layers, change(self.lengths), extent=self.extent)
