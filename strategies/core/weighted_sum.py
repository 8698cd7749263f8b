"""A weighted sum of models that grows as replies arrive, in memory that does not grow with their number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import fsum

import torch

from corymb.strategies.core.layout import Model
from corymb.strategies.core.reply import Reply
from corymb.strategies.core.rows import CHUNK, Rows

STARTED = 3  # sums of whole blocks that may be under way elsewhere while further replies are read
INCOMPLETE = 8  # blocks that wait for the rest of their clients


class WeightedSum:
    """Sums `weight * (reply - origin)` over the replies that are added.

    Differences take the dtype of the origin and the sum is float64. Terms of 24 bits add up without rounding as long as
    they lie within 29 bits of one another, so float32 models come out the same in any order of arrival.
    """

    def __init__(self, origin: Model) -> None:
        self._origin = origin
        self._total = torch.zeros(origin.parameters.numel(), dtype=torch.float64)
        self._buffers = torch.zeros(origin.buffers.numel(), dtype=torch.float64)
        self._weights: list[float] = []
        self._examples = 0
        self._incomplete: dict[Rows, dict[int, float]] = {}  # the weights of the rows that came, by row
        self._started: deque[Callable[[], None]] = deque()  # sums in the order of the blocks

    def add(self, reply: Reply, weight: float) -> None:
        """Add one reply with `weight`."""
        self._examples += reply.report.examples
        if reply.buffers.numel():
            self._buffers.add_(reply.buffers.double(), alpha=reply.report.examples)
        self.add_row(reply.rows, reply.row, weight)

    def add_row(self, rows: Rows, row: int, weight: float) -> None:
        """Add one model. `rows` are summed at once when all of them are here, so that their order leaves no trace."""
        self._weights.append(weight)
        weights = self._incomplete.setdefault(rows, {})
        weights[row] = weights.get(row, 0.0) + weight
        if len(weights) == rows.count:
            self._sum(rows)
        elif len(self._incomplete) > INCOMPLETE:  # some of their clients were turned away
            self._sum(next(iter(self._incomplete)))

    def _sum(self, rows: Rows) -> None:
        came = self._incomplete.pop(rows)
        weights = torch.tensor([came.get(row, 0.0) for row in range(rows.count)], dtype=torch.float64)
        self._started.append(rows.add_to(self._total, weights, self._origin.parameters))
        if len(self._started) > STARTED:
            self._started.popleft()()

    @property
    def weight(self) -> float:
        """The sum of the weights, exactly rounded, so that the order of arrival does not matter."""
        return fsum(self._weights)

    def model(self, scale: float) -> Model:
        """`origin + scale * sum`, with buffers averaged by size; the origin itself when nothing came."""
        if not self._weights:
            return self._origin
        for rows in list(self._incomplete):
            self._sum(rows)
        while self._started:
            self._started.popleft()()
        moved = torch.empty_like(self._origin.parameters)
        pieces = zip(*(t.split(CHUNK) for t in (moved, self._origin.parameters, self._total)), strict=True)
        for result, origin, total in pieces:
            result.copy_(total.mul_(scale).add_(origin))
        buffers = self._origin.buffers
        if self._examples:
            buffers = (self._buffers / self._examples).to(buffers.dtype)
        return self._origin.moved(moved, buffers)
