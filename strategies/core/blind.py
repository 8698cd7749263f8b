"""Rules that see no model: a weighted sum that grows as replies arrive."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable
from math import isfinite
from typing import final

from corymb.strategies.core.layout import Model
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.reply import Reply, Report
from corymb.strategies.core.rule import M, Outcome, Rule
from corymb.strategies.core.weighted_sum import WeightedSum


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
