"""The coordinate-wise trimmed mean."""

from __future__ import annotations

from dataclasses import dataclass

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.order_statistics import middle
from corymb.strategies.core.sighted import Mix, SightedRule


@dataclass(frozen=True)
class TrimmedMean(SightedRule[None]):
    """Yin et al. 2018, Option II: per coordinate, drop the `trim` share at either end and average the rest.

    `trim` is in [0, 0.5); `floor(trim * K)` values go at each end, so up to that many hostile sites do no harm.
    """

    buffers = "median"
    trim: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"trim = {self.trim} must lie in [0, 0.5); 0.2 drops a fifth at either end.")

    def tolerates(self, clients: int) -> int:
        """As many as are dropped at either end."""
        return int(self.trim * clients)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """The mean of the middle of each coordinate, summed in float64."""
        clients = len(cohort.nodes)
        cut = int(self.trim * clients)
        return Mix(middle(cohort.models, cut, clients - cut - 1))
