"""The replies that have the most neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.geometry import squared_distances
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least


@dataclass(frozen=True)
class Krum(SightedRule[None]):
    """Blanchard et al. 2017, Krum: the model that is closest to its K - f - 2 nearest, where `hostile` is f.

    `selected` above 1 is Multi-Krum: the mean of so many of the best. Sound for `hostile` of 2 `hostile` + 3
    replies or more.
    """

    buffers = "median"

    hostile: int = 1
    selected: int = 1

    def __post_init__(self) -> None:
        at_least(0, hostile=self.hostile)
        at_least(1, selected=self.selected)

    def tolerates(self, clients: int) -> int:
        """`hostile`, as long as there are enough others."""
        enough = clients >= 2 * self.hostile + 3 and self.selected <= clients - self.hostile - 2
        return self.hostile if enough else 0

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """The mean of those with the least scores; of equals, those first by name."""
        best = krum_scores(squared_distances(cohort.models), self.hostile).argsort(stable=True)[: self.selected]
        weights = torch.zeros(len(cohort.nodes), dtype=torch.float64)
        weights[best] = 1 / len(best)
        return Mix(cohort.mixed(weights), weights=weights)


def krum_scores(distances: Tensor, hostile: int) -> Tensor:
    """The sum of squared distances to the K - f - 2 nearest others, at least one, `[K]`, from all `[K, K]`."""
    neighbours = max(1, len(distances) - hostile - 2)
    others = distances.clone().fill_diagonal_(torch.inf).sort(dim=1).values[:, :neighbours]
    return torch.where(others.isfinite(), others, 0.0).sum(dim=1)
