"""Averaging with known participation probabilities."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from corymb.strategies.core.blind import BlindRule
from corymb.strategies.core.reply import Report
from corymb.strategies.core.validation import positive

METRIC = "participation"


@dataclass(frozen=True)
class KnownParticipation(BlindRule[None]):
    """Wang & Ji 2024, known probabilities: an update counts one over the probability that its site takes part.

    Sites report their probability as the metric "participation"; one that does not counts once.
    """

    unanimous = False

    server_rate: float = 1.0

    def __post_init__(self) -> None:
        positive(server_rate=self.server_rate)

    def weight(self, report: Report, memory: None) -> float:
        """One over its probability, which is taken to be 0.0001 at least."""
        return 1 / min(1.0, max(1e-4, report.metrics.get(METRIC, 1.0)))

    def scale(self, total: float, reports: Collection[Report], known: Collection[str], memory: None) -> float:
        """The server's rate over all sites, absent ones included."""
        return self.server_rate / len(known) if known else 0.0
