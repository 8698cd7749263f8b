"""The coordinate-wise median."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corymb.strategies.cohort import Cohort
from corymb.strategies.ranks import median
from corymb.strategies.sighted import SightedRule


@dataclass(frozen=True)
class Median(SightedRule[None]):
    """Yin et al. 2018, Option I: the median of each coordinate; of an even number, the mean of the middle two."""

    buffers = "median"

    def tolerates(self, clients: int) -> int:
        """A minority."""
        return (clients - 1) // 2

    def mix(self, cohort: Cohort, memory: None) -> tuple[Tensor, None]:
        """The middle of each coordinate."""
        return median(cohort.models), None
