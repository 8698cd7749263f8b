"""Krum's choices, trimmed coordinate by coordinate."""

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
    """El Mhamdi et al. 2018, Bulyan: choose K - 2f by Krum, then average the K - 4f values around each median.

    `hostile` is f; it is lowered where there are fewer than 4f + 3 replies (the note "hostile" tells). Krum
    chooses one model after another, each time among those left; with `one_pass`, the best of one ranking.
    """

    buffers = "median"

    hostile: int = 1
    one_pass: bool = False

    def __post_init__(self) -> None:
        at_least(0, hostile=self.hostile)

    def tolerates(self, clients: int) -> int:
        """`hostile`, as long as there are enough others."""
        return self.hostile if clients >= 4 * self.hostile + 3 else 0

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Choose, then average near the median."""
        clients = len(cohort.nodes)
        hostile = max(0, min(self.hostile, (clients - 3) // 4))
        rows = self._chosen(squared_distances(cohort.models), clients - 2 * hostile, hostile)
        count = len(rows) - 2 * hostile

        def near_median(models: Tensor) -> Tensor:
            values = models[rows].double()
            nearest = (values - median(values)).abs().argsort(dim=0, stable=True)[:count]
            return values.gather(0, nearest).mean(dim=0)

        return Mix(cohort.by_columns(near_median), notes={"hostile": hostile})

    def _chosen(self, distances: Tensor, count: int, hostile: int) -> Tensor:
        if self.one_pass:
            return krum_scores(distances, hostile).argsort(stable=True)[:count]
        left = list(range(len(distances)))
        chosen = []
        for _ in range(count):
            scores = krum_scores(distances[left][:, left], hostile)
            chosen.append(left.pop(int(scores.argmin())))
        return torch.tensor(chosen)
