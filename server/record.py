"""What is written down of a round: who was asked, what became of each reply, what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import fsum

from flwr.app import MetricRecord

from corymb.server.door import Rejection
from corymb.strategies import Report


@dataclass(frozen=True)
class Verdict:
    """What became of one node's reply. `code` is "admitted" or a `door.Code`; `weight` is None where unknown."""

    node: str
    code: str
    reason: str = ""
    examples: int = 0
    weight: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class RoundRecord:
    """One round, filled in as it goes. Metrics are means weighed by examples; `rule` is what the rule says of it."""

    round: int
    verdicts: list[Verdict] = field(default_factory=list)
    train: dict[str, float] = field(default_factory=dict)
    evaluate: dict[str, float] = field(default_factory=dict)
    server: dict[str, float] = field(default_factory=dict)
    rule: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def admitted(self) -> list[Verdict]:
        """The verdicts of the replies that counted."""
        return [verdict for verdict in self.verdicts if verdict.code == "admitted"]


def verdicts(
    asked: Iterable[str], heard: Mapping[str, Report | Rejection], weights: Mapping[str, float]
) -> list[Verdict]:
    """One verdict per node, by name: those heard, and those asked who never answered."""
    return [_verdict(node, heard.get(node), weights) for node in sorted({*asked, *heard})]


def _verdict(node: str, heard: Report | Rejection | None, weights: Mapping[str, float]) -> Verdict:
    if heard is None:
        return Verdict(node, "silent", f"{node}: no reply in time, or it could not be sent.")
    if isinstance(heard, Rejection):
        return _turned_away(heard)
    return Verdict(node, "admitted", "", heard.examples, weights.get(node), heard.metrics)


@lru_cache(maxsize=1 << 14)  # who is offline is so round after round
def _turned_away(rejection: Rejection) -> Verdict:
    return Verdict(rejection.node, rejection.code, rejection.reason)


def mean_metrics(reports: Iterable[Report]) -> dict[str, float]:
    """Each metric's mean over the reports that have it, weighed by examples, whatever their order."""
    reports = [report for report in reports if report.examples > 0]
    means = {}
    for name in sorted({name for report in reports for name in report.metrics}):
        having = [report for report in reports if name in report.metrics]
        total = sum(report.examples for report in having)
        means[name] = fsum(report.metrics[name] * (report.examples / total) for report in having)
    return means


def as_metrics(means: Mapping[str, float]) -> MetricRecord | None:
    """As Flower wants them; None for none."""
    return MetricRecord(dict(means)) if means else None
