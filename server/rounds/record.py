"""The record of a round: a verdict on each node's reply, and the metrics."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count, takewhile
from math import fsum

from flwr.app import MetricRecord

from corymb.server.rounds.codes import ADMITTED, SILENT
from corymb.server.rounds.rejections import Code, Rejection
from corymb.strategies import Report
from corymb.strategies.core.reply import CLASS_COUNT_PREFIX

log = logging.getLogger("flwr.corymb")
LIST_ENTRY = re.compile(r"(?P<name>.+)\[\d+\]")  # the name of an entry of a metric that is a list


@dataclass(frozen=True)
class Verdict:
    """The server's verdict on one node's reply.

    `code` is "admitted", "silent" if there was no reply, or a `rejections.Code`. `reason` is empty for admitted
    replies, unless metrics were left out. `weight` is the reply's factor in the next model (see
    `strategies.Outcome`); None if the rule has no weights. `bytes_down` and `bytes_up` are the bytes of the arrays that
    were sent to the node and that came from it, 0 if that is not known.
    """

    node: str
    code: str
    reason: str = ""
    examples: float = 0
    weight: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class RoundRecord:
    """The record of one round.

    `verdicts` are on the replies to training messages, `evaluations` on those to evaluation messages. `train` and
    `evaluate` are means of the clients' metrics, weighted by examples; see `mean_metrics`. `server` holds the metrics
    of the server's own evaluation. `notes` are named numbers from the rule and from the round itself.
    """

    round: int
    verdicts: tuple[Verdict, ...] = ()
    evaluations: tuple[Verdict, ...] = ()
    train: Mapping[str, float] = field(default_factory=dict)
    evaluate: Mapping[str, float] = field(default_factory=dict)
    server: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def bytes_down(self) -> int:
        """The bytes that were sent to all nodes for training."""
        return sum(verdict.bytes_down for verdict in self.verdicts)

    @property
    def bytes_up(self) -> int:
        """The bytes that came from all nodes after training."""
        return sum(verdict.bytes_up for verdict in self.verdicts)

    @property
    def admitted(self) -> list[Verdict]:
        """The verdicts on the admitted replies."""
        return [verdict for verdict in self.verdicts if verdict.code == ADMITTED]


def verdicts(
    nodes: Iterable[str],
    replies: Mapping[str, Report | Rejection],
    weights: Mapping[str, float],
    down: Mapping[str, int] | None = None,
    up: Mapping[str, int] | None = None,
) -> list[Verdict]:
    """Return a verdict for each of `replies` and for each of `nodes` without a reply, ordered by name.

    `down` and `up` are the bytes to and from each node.
    """
    judged = [_verdict(node, replies.get(node), weights) for node in sorted({*nodes, *replies})]
    if down is None or up is None:
        return judged
    return [
        verdict
        if verdict.code == Code.OFFLINE  # nothing was sent
        else replace(verdict, bytes_down=down.get(verdict.node, 0), bytes_up=up.get(verdict.node, 0))
        for verdict in judged
    ]


def _verdict(node: str, reply: Report | Rejection | None, weights: Mapping[str, float]) -> Verdict:
    if reply is None:
        return Verdict(node, SILENT, f"{node}: no reply before the round ended, or the message could not be sent.")
    if isinstance(reply, Rejection):
        return _rejected(reply)
    reason = ""
    if reply.left_out:
        names = ", ".join(reply.left_out)
        reason = f"{node}: metrics left out, as each is not one finite number or there are too many: {names}."
    return Verdict(node, ADMITTED, reason, reply.examples, weights.get(node), reply.metrics)


@lru_cache(maxsize=1 << 14)  # the same nodes are offline in many rounds
def _rejected(rejection: Rejection) -> Verdict:
    return Verdict(rejection.node, rejection.code, rejection.reason)


def mean_metrics(reports: Iterable[Report]) -> dict[str, float]:
    """Return the mean of each metric over the reports that have it, weighted by examples.

    If some reports lack the metric `name`, `name-clients` is the number of reports in its mean. The order of the
    reports does not change the result.
    """
    reports = [report for report in reports if report.examples > 0]
    means = {}
    for name in sorted({name for report in reports for name in report.metrics}):
        reporting = [report for report in reports if name in report.metrics]
        total = sum(report.examples for report in reporting)
        means[name] = fsum(report.metrics[name] * (report.examples / total) for report in reporting)
        if len(reporting) < len(reports) and not name.startswith(CLASS_COUNT_PREFIX):
            means[f"{name}-clients"] = float(len(reporting))
    return means


def as_metrics(means: Mapping[str, float]) -> MetricRecord | None:
    """Return `means` as a Flower MetricRecord, with `name[0]`, `name[1]` as a list again; None if there are none."""
    if not means:
        return None
    record: dict[str, int | float | list[int] | list[float]] = {}
    for name, mean in means.items():
        listed = LIST_ENTRY.fullmatch(name)
        if listed is None:
            record[name] = mean
        elif listed["name"] not in record:
            names = takewhile(means.__contains__, (f"{listed['name']}[{index}]" for index in count()))
            record[listed["name"]] = [means[entry] for entry in names]
    return MetricRecord(record)


def log_reasons(judged: Iterable[Verdict], prefix: str) -> None:
    """Log the reason of each verdict that has one, except those on nodes that are not there."""
    for verdict in judged:
        if verdict.reason and verdict.code != Code.OFFLINE:
            log.info("\t│ %s (%s%s)", verdict.reason, prefix, verdict.code)


def score_of(record: RoundRecord) -> float | None:
    """Return a round's score, higher is better: accuracy if it was measured, else minus the loss; None without both."""
    measured = record.server or record.evaluate
    loss = measured.get("loss")
    return measured.get("accuracy", None if loss is None else -loss)
