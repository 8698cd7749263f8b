"""The coordinate-wise median."""

from __future__ import annotations

from dataclasses import dataclass

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.order_statistics import median
from corymb.strategies.core.sighted import Mix, SightedRule


@dataclass(frozen=True)
class Median(SightedRule[None]):
    """Yin et al. 2018, Option I: the median of each coordinate; of an even number, the mean of the middle two."""

    buffers = "median"

    def tolerates(self, clients: int) -> int:
        """Return the largest minority, the largest number below half of the replies."""
        return (clients - 1) // 2

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Return the median of each coordinate."""
        return Mix(median(cohort.models))
