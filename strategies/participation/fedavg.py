"""Federated averaging."""

from __future__ import annotations

from dataclasses import dataclass

from corymb.strategies.core.blind import BlindRule
from corymb.strategies.core.reply import Report


@dataclass(frozen=True)
class FedAvg(BlindRule[None]):
    """McMahan et al. 2017, FederatedAveraging: the mean of the models, weighted by examples.

    With `by_examples=False` all participants have equal weights ("average participating" in Wang & Ji 2024).
    """

    by_examples: bool = True

    def weight(self, report: Report, memory: None) -> float:
        """Return the client's number of examples, or 1 if `by_examples` is False."""
        return float(report.examples) if self.by_examples else 1.0
