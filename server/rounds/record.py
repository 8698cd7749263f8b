"""The record of a round: a verdict for each node, and the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import fsum

from flwr.app import MetricRecord

from corymb.server.rounds.rejections import Rejection
from corymb.strategies import Report

ADMITTED = "admitted"
SILENT = "silent"


@dataclass(frozen=True)
class Verdict:
    """What became of one node's reply. `code` is "admitted", "silent" or a `door.Code`.

    `weight` is the reply's factor in the next model (see `strategies.Outcome`), None where the rule has none.
    """

    node: str
    code: str
    reason: str = ""
    examples: int = 0
    weight: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundRecord:
    """One round. Metrics are means weighed by examples; `notes` are numbers that the rule and the round tell of it."""

    round: int
    verdicts: tuple[Verdict, ...] = ()
    train: Mapping[str, float] = field(default_factory=dict)
    evaluate: Mapping[str, float] = field(default_factory=dict)
    server: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def admitted(self) -> list[Verdict]:
        """The verdicts of the replies that counted."""
        return [verdict for verdict in self.verdicts if verdict.code == ADMITTED]


def verdicts(
    nodes: Iterable[str], replies: Mapping[str, Report | Rejection], weights: Mapping[str, float]
) -> list[Verdict]:
    """One verdict per node, ordered by name: for each of `replies`, and for each of `nodes` that sent none."""
    return [_verdict(node, replies.get(node), weights) for node in sorted({*nodes, *replies})]


def _verdict(node: str, reply: Report | Rejection | None, weights: Mapping[str, float]) -> Verdict:
    if reply is None:
        return Verdict(node, SILENT, f"{node}: no reply before the timeout, or the message could not be sent.")
    if isinstance(reply, Rejection):
        return _rejected(reply)
    return Verdict(node, ADMITTED, "", reply.examples, weights.get(node), reply.metrics)


@lru_cache(maxsize=1 << 14)  # the same nodes are offline round after round
def _rejected(rejection: Rejection) -> Verdict:
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
