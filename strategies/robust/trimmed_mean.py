"""The coordinate-wise trimmed mean."""

from __future__ import annotations

from dataclasses import dataclass

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.order_statistics import rank_mean
from corymb.strategies.core.sighted import Mix, SightedRule


@dataclass(frozen=True)
class TrimmedMean(SightedRule[None]):
    """Yin et al. 2018, Option II: drops the largest and the smallest values of each coordinate and averages the rest.

    The rule drops `floor(trim * K)` values at each end, so it withstands up to that many hostile clients; the note
    "trimmed" has this number, which is 0 in a round with few replies. `trim` is a share in [0, 0.5).
    """

    buffers = "median"
    trim: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise ValueError(
                f"trim is {self.trim}; use a number in [0, 0.5), for example 0.2 to drop a fifth at each end."
            )

    def tolerates(self, clients: int) -> int:
        """Return the number of values that are dropped at each end."""
        return int(self.trim * clients + 1e-9)  # 0.29 * 100 is a little below 29

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Return the mean of the remaining values of each coordinate, summed in float64."""
        clients = len(cohort.nodes)
        dropped = self.tolerates(clients)
        return Mix(rank_mean(cohort.models, dropped, clients - dropped - 1), notes={"trimmed": float(dropped)})
