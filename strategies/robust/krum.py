"""Krum: the models that are closest to their neighbours."""

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
    """Blanchard et al. 2017, Krum: selects the model closest to its K - f - 2 nearest neighbours; `hostile` is f.

    With `selected` above 1 the rule is Multi-Krum, the mean of this number of best models. A round with fewer than
    2 `hostile` + 3 or `selected` + `hostile` + 2 replies keeps the model.
    """

    buffers = "median"

    hostile: int = 1
    selected: int = 1

    def __post_init__(self) -> None:
        at_least(0, hostile=self.hostile)
        at_least(1, selected=self.selected)

    def tolerates(self, clients: int) -> int:
        """Return `hostile` if there are enough replies for it and for `selected`, else 0."""
        return self.hostile if clients >= self.min_replies() else 0

    def min_replies(self) -> int:
        """Return the number of replies that the guarantee needs; 1 if no client is expected to be hostile."""
        return max(2 * self.hostile + 3, self.selected + self.hostile + 2) if self.hostile else 1

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Return the mean of the `selected` models with the lowest scores; ties go to the first by name."""
        best = krum_scores(squared_distances(cohort.models), self.hostile).argsort(stable=True)[: self.selected]
        weights = torch.zeros(len(cohort.nodes), dtype=torch.float64)
        weights[best] = 1 / len(best)
        return Mix(cohort.mixed(weights), weights=weights)


def krum_scores(distances: Tensor, hostile: int) -> Tensor:
    """Return each model's sum of squared distances to its K - f - 2 (at least one) nearest others, `[K]`.

    `distances [K, K]` are the squared distances, and `hostile` is f.
    """
    neighbours = max(1, len(distances) - hostile - 2)
    others = distances.clone().fill_diagonal_(torch.inf).sort(dim=1).values[:, :neighbours]
    return torch.where(others.isfinite(), others, 0.0).sum(dim=1)
