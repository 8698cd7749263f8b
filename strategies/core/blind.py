"""Rules that see no model, and the sum that grows as replies arrive, in memory that their number does not change."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable
from math import fsum, isfinite
from typing import final

import torch

from corymb.strategies.core.layout import Model
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.reply import Reply, Report
from corymb.strategies.core.rows import CHUNK, Rows
from corymb.strategies.core.rule import M, Outcome, Rule

STARTED = 3  # sums of whole blocks that may be under way elsewhere while further replies are read
INCOMPLETE = 8  # blocks that wait for the rest of their clients


class BlindRule(Rule[M]):
    """Weighs a reply without seeing any model: it streams in constant memory and can sum under masks.

    The next model is `origin + scale * sum(weight * (reply - origin))`.
    """

    kind = "blind"
    privacy_modes = ("clear", "masked")

    @abstractmethod
    def weight(self, report: Report, memory: M) -> float:
        """How much this reply counts; finite."""

    def scale(self, total: float, reports: Collection[Report], known: Collection[str], memory: M) -> float:
        """What the sum is multiplied by; by default the weights, whose sum is `total`, are made to sum to one."""
        return 1 / total if total else 0.0

    def after(self, reports: Collection[Report], known: Collection[str], memory: M) -> M:
        """The memory after a round in which `reports` took part."""
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
            del reply  # so that the next one may take its memory
        known = known | weights.keys()
        scale = self.scale(total.weight, reports, known, memory)
        model = total.model(scale)
        memory = self.after(reports, known, memory)
        return Outcome(model, memory, {node: weight * scale for node, weight in sorted(weights.items())})


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
        self._weights.append(weight)
        weights = self._incomplete.setdefault(reply.rows, {})
        weights[reply.row] = weights.get(reply.row, 0.0) + weight
        if len(weights) == reply.rows.count:  # a block is summed at once, so that their order leaves no trace
            self._sum(reply.rows)
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
