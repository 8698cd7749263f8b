"""Averaging with known participation probabilities."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from corymb.strategies.core.blind import BlindRule
from corymb.strategies.core.reply import Report
from corymb.strategies.core.validation import positive

PROBABILITY_METRIC = "participation"


@dataclass(frozen=True)
class KnownParticipation(BlindRule[None]):
    """Wang & Ji 2024, known probabilities: weighs an update by one over its client's participation probability.

    Clients report their probability as the metric "participation". A client that does not report it has weight 1.
    """

    preserves_consensus = False

    server_rate: float = 1.0

    def __post_init__(self) -> None:
        positive(server_rate=self.server_rate)

    def weight(self, report: Report, memory: None) -> float:
        """Return one over the client's probability, after clamping the probability to [0.0001, 1]."""
        return 1 / min(1.0, max(1e-4, report.metrics.get(PROBABILITY_METRIC, 1.0)))

    def scale(self, total: float, reports: Collection[Report], known: Collection[str], memory: None) -> float:
        """Return `server_rate` divided by the number of all clients, absent ones included."""
        return self.server_rate / len(known) if known else 0.0
