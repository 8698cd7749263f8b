"""Sources and target averaged for the target's sake."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.weighting.domain_adaptation import Adaptation, TargetRule, Trust


@dataclass(frozen=True)
class FedDA(TargetRule):
    """Jiang, Zhang & Koyejo 2024, FedDA: for each source, a mixture of its update and the target site's."""

    def step(self, adapted: Adaptation, trusted: Trust, cohort: Cohort) -> tuple[Tensor, Tensor]:
        """The mean over sources of `(1 - beta) * target + beta * source`."""
        betas = trusted.added
        terms = (1 - betas)[:, None] * adapted.target + betas[:, None] * adapted.sources
        return terms.mean(dim=0), betas
