"""Bulyan: a trimmed mean, coordinate by coordinate, of the models that Krum selects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.geometry import squared_distances
from corymb.strategies.core.order_statistics import median
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least
from corymb.strategies.robust.krum import krum_scores


@dataclass(frozen=True)
class Bulyan(SightedRule[None]):
    """El Mhamdi et al. 2018, Bulyan: selects K - 2f models by Krum, averages the K - 4f values nearest each median.

    `hostile` is f. A round with fewer than 4f + 3 replies keeps the model. Krum selects one model after another, each
    time among the remaining ones; with `one_pass`, the best models of one ranking.
    """

    buffers = "median"

    hostile: int = 1
    one_pass: bool = False

    def __post_init__(self) -> None:
        at_least(0, hostile=self.hostile)

    def tolerates(self, clients: int) -> int:
        """Return `hostile` if there are at least 4 `hostile` + 3 replies, else 0."""
        return self.hostile if clients >= self.min_replies() else 0

    def min_replies(self) -> int:
        """Return 4 `hostile` + 3, the number that the guarantee needs; 1 if no client is expected to be hostile."""
        return 4 * self.hostile + 3 if self.hostile else 1

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Select models, then average each coordinate near its median."""
        rows = self._selected(squared_distances(cohort.models), len(cohort.nodes) - 2 * self.hostile)
        count = len(rows) - 2 * self.hostile

        def near_median(models: Tensor) -> Tensor:
            values = models[rows].double()
            nearest = (values - median(values)).abs().argsort(dim=0, stable=True)[:count]
            return values.gather(0, nearest).mean(dim=0)

        return Mix(cohort.by_columns(near_median))

    def _selected(self, distances: Tensor, count: int) -> Tensor:
        if self.one_pass:
            return krum_scores(distances, self.hostile).argsort(stable=True)[:count]
        nearest, order = distances.clone().fill_diagonal_(torch.inf).sort(dim=1)  # once, not for each selection
        remaining = torch.ones(len(distances), dtype=torch.bool)
        selected = []
        for left in range(len(distances), len(distances) - count, -1):
            is_left = remaining[order] & nearest.isfinite()
            counts = is_left & (is_left.cumsum(dim=1) <= max(1, left - self.hostile - 2))
            scores = torch.where(counts, nearest, 0.0).sum(dim=1)
            best = int(torch.where(remaining, scores, torch.inf).argmin())
            remaining[best] = False
            selected.append(best)
        return torch.tensor(selected)
