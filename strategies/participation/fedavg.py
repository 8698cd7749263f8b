"""Federated averaging."""

from __future__ import annotations

from dataclasses import dataclass

from corymb.strategies.core.blind import BlindRule
from corymb.strategies.core.reply import Report


@dataclass(frozen=True)
class FedAvg(BlindRule[None]):
    """McMahan et al. 2017, FederatedAveraging: the mean of the models, weighed by their examples.

    `by_examples=False` weighs all participants alike (the "average participating" of Wang & Ji 2024).
    """

    by_examples: bool = True

    def weight(self, report: Report, memory: None) -> float:
        """Its number of examples, or one."""
        return float(report.examples) if self.by_examples else 1.0
