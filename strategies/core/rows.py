"""Models that answer for themselves: one arrived reply, a matrix of replies, or a block of clients trained together.

A rule asks rows for sums and distances, so a model is written out only where somebody needs its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from corymb.strategies.core.geometry import norms
from corymb.strategies.core.layout import joined

CHUNK = 1 << 17  # numbers per step: scratch memory stays in the cache, and torch has work for all its threads


class Rows(Protocol):
    """K models of P parameters each; two `Rows` are the same only if they are the same object.

    A method may start work elsewhere and return at once: the result is there when the returned function is called.
    """

    @property
    def count(self) -> int:
        """K."""

    def add_to(self, total: Tensor, weights: Tensor, origin: Tensor) -> Callable[[], None]:
        """Add `sum_k weights[k] * (row_k - origin)` to `total [P]` float64, for `weights [K]` float64.

        A row of weight 0 is not read.
        """

    def squared_distances(self, centre: Tensor) -> Callable[[], Tensor]:
        """The squared distance of each row from `centre [P]`, `[K]` float64, right to 1e-5."""

    def copy_to(self, targets: Sequence[tuple[int, Tensor]]) -> Callable[[], None]:
        """Copy the rows with these numbers, each into its vector `[P]`."""

    def pieces(self, row: int) -> Sequence[Tensor]:
        """One row as flat tensors in the layout's order, P numbers together."""


class SingleRow:
    """The model of one reply that arrived, as flat `parts` of any float dtype in the layout's order."""

    count = 1

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = parts

    def add_to(self, total: Tensor, weights: Tensor, origin: Tensor) -> Callable[[], None]:
        """See `Rows`; differences are taken in the dtype of `origin`."""
        scratch, weight = torch.empty(min(CHUNK, origin.numel()), dtype=origin.dtype), float(weights[0])
        start = 0
        for part in self._parts:
            for piece in part.split(CHUNK):
                stop = start + len(piece)
                difference = torch.sub(piece, origin[start:stop], out=scratch[: stop - start])
                total[start:stop].add_(difference.mul_(weight))
                start = stop
        return _done

    def squared_distances(self, centre: Tensor) -> Callable[[], Tensor]:
        """See `Rows`."""
        squares = norms(joined(self._parts, centre.dtype)[None], centre).square()
        return lambda: squares

    def copy_to(self, targets: Sequence[tuple[int, Tensor]]) -> Callable[[], None]:
        """See `Rows`."""
        for _, target in targets:
            target.copy_(joined(self._parts, target.dtype))
        return _done

    def pieces(self, row: int) -> Sequence[Tensor]:
        """See `Rows`."""
        return self._parts


class Matrix:
    """Models that are written out, as the rows of `models [K, P]`."""

    def __init__(self, models: Tensor) -> None:
        self.models = models
        self.count = len(models)

    def add_to(self, total: Tensor, weights: Tensor, origin: Tensor) -> Callable[[], None]:
        """See `Rows`; differences are taken in float64."""
        kept = weights.nonzero()[:, 0]
        every, weights = len(kept) == self.count, weights[kept]
        width = max(1, CHUNK // max(1, len(kept)))
        for start in range(0, origin.numel(), width):
            block = slice(start, start + width)
            models = self.models[:, block] if every else self.models[kept, block]
            total[block] += weights @ (models.double() - origin[block].double())
        return _done

    def squared_distances(self, centre: Tensor) -> Callable[[], Tensor]:
        """See `Rows`."""
        squares = norms(self.models, centre).square()
        return lambda: squares

    def copy_to(self, targets: Sequence[tuple[int, Tensor]]) -> Callable[[], None]:
        """See `Rows`."""
        for row, target in targets:
            target.copy_(self.models[row])
        return _done

    def pieces(self, row: int) -> Sequence[Tensor]:
        """See `Rows`."""
        return (self.models[row],)


def _done() -> None:
    """All work was done before."""
