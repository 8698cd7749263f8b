"""Blind rules, which weigh replies without seeing any model, and the running weighted sum that they use.

The sum grows as replies arrive. Its memory use does not depend on the number of replies.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable
from math import fsum, isfinite
from typing import final

import torch

from corymb.strategies.core.allocation import vanishing_zeros
from corymb.strategies.core.layout import Model
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.reply import Reply, Report
from corymb.strategies.core.rows import CHUNK, Rows
from corymb.strategies.core.rule import M, Outcome, Rule

MAX_PENDING = 3  # how many sums of whole blocks may run while the next replies are read
MAX_INCOMPLETE = 8  # how many blocks may wait for the replies of their remaining clients


class BlindRule(Rule[M]):
    """A rule that weighs each reply by its report alone, without seeing any model.

    Replies are therefore summed as they arrive, in constant memory, and can be summed under masks (secure
    aggregation). The next model is `origin + scale * sum(weight * (reply - origin))`.
    """

    kind = "blind"
    privacy_modes = ("clear", "masked")

    @abstractmethod
    def weight(self, report: Report, memory: M) -> float:
        """Return the weight of this reply, a finite number."""

    def scale(self, total: float, reports: Collection[Report], known: Collection[str], memory: M) -> float:
        """Return the factor of the weighted sum; `total` is the sum of the weights, `known` names all clients.

        The default is `1 / total`, so that the weights sum to one, and 0 if `total` is 0.
        """
        return 1 / total if total else 0.0

    def after(self, reports: Collection[Report], known: Collection[str], memory: M) -> M:
        """Return the rule's memory after a round with these `reports`; by default `memory` is unchanged."""
        return memory

    @final
    def _aggregate(
        self, origin: Model, replies: Iterable[Reply], memory: M, known: frozenset[str], proxy: Proxy | None
    ) -> Outcome[M]:
        total = WeightedSum(origin)
        reports, weights = [], {}
        for reply in replies:
            weight = self.weight(reply.report, memory)
            if not (isinstance(weight, (int, float)) and isfinite(weight)):
                raise ValueError(f"{self}.weight returned {weight!r} for {reply.report.node}; return a finite number.")
            total.add(reply, weight)
            reports.append(reply.report)
            weights[reply.report.node] = weight
            del reply  # frees its memory before the next reply is read
        known = known | weights.keys()
        scale = self.scale(total.weight, reports, known, memory)
        model = total.model(scale)
        memory = self.after(reports, known, memory)
        return Outcome(model, memory, {node: weight * scale for node, weight in sorted(weights.items())})


class WeightedSum:
    """A running sum of `weight * (reply - origin)` over the replies added so far.

    Differences have the dtype of the origin; the sum is float64. Float32 terms have 24-bit mantissas, and float64
    adds them without rounding as long as they lie within 29 bits of one another. So for float32 models the result
    does not depend on the order of arrival.
    """

    def __init__(self, origin: Model) -> None:
        self._origin = origin
        self._total, self._free = vanishing_zeros(origin.parameters.numel())
        self._buffers = torch.zeros(origin.buffers.numel(), dtype=torch.float64)
        self._weights: list[float] = []
        self._examples = 0.0
        self._incomplete: dict[Rows, dict[int, float]] = {}  # per block: the weights added so far, by row number
        self._pending: deque[Callable[[], None]] = deque()  # each waits for the sum of one block; oldest first

    def add(self, reply: Reply, weight: float) -> None:
        """Add one reply with this `weight`."""
        self._examples += reply.report.examples
        if reply.buffers.numel():
            self._buffers.add_(reply.buffers.double(), alpha=reply.report.examples)
        self._weights.append(weight)
        weights = self._incomplete.setdefault(reply.rows, {})
        weights[reply.row] = weights.get(reply.row, 0.0) + weight
        if len(weights) == reply.rows.count:  # sum a block as a whole: the order of its replies must not matter
            self._add_block(reply.rows)
        elif len(self._incomplete) > MAX_INCOMPLETE:  # the oldest block lacks replies that the door rejected
            self._add_block(next(iter(self._incomplete)))

    def _add_block(self, rows: Rows) -> None:
        weight_of = self._incomplete.pop(rows)
        weights = torch.tensor([weight_of.get(row, 0.0) for row in range(rows.count)], dtype=torch.float64)
        self._pending.append(rows.add_to(self._total, weights, self._origin.parameters))
        if len(self._pending) > MAX_PENDING:
            self._pending.popleft()()

    @property
    def weight(self) -> float:
        """The sum of the weights. `fsum` rounds it correctly, so it does not depend on the order of arrival."""
        return fsum(self._weights)

    def model(self, scale: float) -> Model:
        """Return `origin + scale * sum`, with buffers averaged by examples; the origin if no reply was added.

        To be called once: it uses up the sum.
        """
        if not self._weights:
            return self._origin
        for rows in list(self._incomplete):
            self._add_block(rows)
        while self._pending:
            self._pending.popleft()()
        parameters = torch.empty_like(self._origin.parameters)
        chunks = zip(*(t.split(CHUNK) for t in (parameters, self._origin.parameters, self._total)), strict=True)
        for index, (result, origin, total) in enumerate(chunks):
            result.copy_(total.mul_(scale).add_(origin))
            self._free(index * CHUNK, (index + 1) * CHUNK)
        buffers = self._origin.buffers
        if self._examples:
            buffers = (self._buffers / self._examples).to(buffers.dtype)
        return self._origin.moved(parameters, buffers)
