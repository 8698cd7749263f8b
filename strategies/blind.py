"""Rules that see no model: a weighted sum, folded as replies arrive."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable
from typing import final

from corymb.strategies.fold import Fold
from corymb.strategies.layout import Model
from corymb.strategies.proxy import Proxy
from corymb.strategies.reply import Reply, Report
from corymb.strategies.rule import M, Outcome, Rule


class BlindRule(Rule[M]):
    """Weighs a reply without seeing any model: it streams in constant memory and can sum under masks.

    The model moves by `scale * sum(weight * (reply - origin))`.
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
    def aggregate(
        self,
        origin: Model,
        replies: Iterable[Reply],
        memory: M,
        known: Collection[str] = (),
        proxy: Proxy | None = None,
    ) -> Outcome[M]:
        """See `Rule.aggregate`."""
        fold = Fold(origin)
        reports, weights = [], {}
        for reply in replies:
            weight = self.weight(reply.report, memory)
            fold.add(reply, weight)
            reports.append(reply.report)
            weights[reply.report.node] = weight
            del reply  # so that the next one may take its memory
        known = {*known, *weights}
        scale = self.scale(fold.total, reports, known, memory)
        model = fold.model(scale)
        memory = self.after(reports, known, memory)
        return Outcome(model, memory, {node: weight * scale for node, weight in sorted(weights.items())})
