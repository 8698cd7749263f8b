"""`Rows`, the common interface of a single reply, a matrix of models, and a block of clients trained together.

Rules use it to compute weighted sums and distances without copying the models. A model is copied only if a rule needs
its values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from corymb.strategies.core.geometry import norms
from corymb.strategies.core.layout import joined

CHUNK = 1 << 17  # numbers per step: the scratch buffer fits the cache, and torch can still use all of its threads


class Rows(Protocol):
    """K models of P parameters each, one per row. Two `Rows` are equal only if they are the same object.

    Some methods return a function. Their work may still run in another process or thread then, and the function waits
    until it is complete.
    """

    @property
    def count(self) -> int:
        """K, the number of models."""

    def add_to(self, total: Tensor, weights: Tensor, origin: Tensor) -> Callable[[], None]:
        """Start to add `sum_k weights[k] * (row_k - origin)` to `total [P]` float64, for `weights [K]` float64.

        Rows of weight 0 are not read.
        """

    def squared_distances(self, centre: Tensor) -> Callable[[], Tensor]:
        """Start to compute the squared distance of each row from `centre [P]`, `[K]` float64.

        The returned function returns the distances; their relative error is below 1e-5.
        """

    def copy_to(self, targets: Sequence[tuple[int, Tensor]]) -> Callable[[], None]:
        """Start to copy rows: each of `targets` is a row number and the vector `[P]` that receives the row."""

    def pieces(self, row: int) -> Sequence[Tensor]:
        """Return one row as flat tensors in the layout's order, P numbers in total."""


class SingleRow:
    """The model of one reply, as flat `parts` of any float dtype in the layout's order."""

    count = 1

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = parts

    def add_to(self, total: Tensor, weights: Tensor, origin: Tensor) -> Callable[[], None]:
        """See `Rows`. Differences have the dtype of `origin`."""
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
    """Models in memory, as the rows of `models [K, P]`."""

    def __init__(self, models: Tensor) -> None:
        self.models = models
        self.count = len(models)

    def add_to(self, total: Tensor, weights: Tensor, origin: Tensor) -> Callable[[], None]:
        """See `Rows`. Differences are float64."""
        used = weights.nonzero()[:, 0]
        uses_all, weights = len(used) == self.count, weights[used]
        width = max(1, CHUNK // max(1, len(used)))
        for start in range(0, origin.numel(), width):
            columns = slice(start, start + width)
            models = self.models[:, columns] if uses_all else self.models[used, columns]
            total[columns] += weights @ (models.double() - origin[columns].double())
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
    """Do nothing: the work is already complete."""
