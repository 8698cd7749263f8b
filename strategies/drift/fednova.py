"""FedNova: normalised averaging, for clients that take different numbers of local steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import fsum

from corymb.strategies.core.blind import BlindRule
from corymb.strategies.core.reply import Report

STEP_WEIGHT = "step-weight"  # metric: the sum of the weights of a client's gradients in its update, |a_i| in the paper


@dataclass(frozen=True)
class FedNova(BlindRule[None]):
    """Wang et al. 2020, FedNova (eq. 6): each update is divided by its step weight, and their mean is scaled back.

    The scale is the mean step weight over the examples. A client reports its step weight, which depends on its steps,
    momentum and proximal term, as the metric `step-weight`.
    """

    client_algorithm = "fednova"
    preserves_consensus = False  # equal models after different numbers of steps are different directions
    needs_metrics = (STEP_WEIGHT,)

    def weight(self, report: Report, memory: None) -> float:
        """Return the examples over the step weight."""
        return report.examples / report.metrics[STEP_WEIGHT]

    def scale(self, total: float, reports: Collection[Report], known: Collection[str], memory: None) -> float:
        """Return the mean step weight over the number of examples."""
        examples = fsum(report.examples for report in reports)
        mean = fsum(report.examples * report.metrics[STEP_WEIGHT] for report in reports)
        return mean / examples**2 if examples else 0.0
