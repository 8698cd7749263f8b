"""FedDA: the average of the target's and the sources' updates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.weighting.domain_adaptation import RoundUpdates, SourceWeights, TargetRule


@dataclass(frozen=True)
class FedDA(TargetRule):
    """Jiang, Zhang & Koyejo 2024, FedDA: averages the target's update with the update of each source."""

    def step(self, updates: RoundUpdates, weights: SourceWeights, cohort: Cohort) -> tuple[Tensor, Tensor]:
        """Return the mean over sources of `(1 - beta) * target + beta * source`, and the betas."""
        betas = weights.update
        terms = (1 - betas)[:, None] * updates.target + betas[:, None] * updates.sources
        return terms.mean(dim=0), betas
