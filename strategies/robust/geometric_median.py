"""The geometric median: the point with the smallest sum of distances to all models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.order_statistics import median
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, positive


@dataclass(frozen=True)
class GeometricMedian(SightedRule[None]):
    """Pillutla et al. 2022, RFA: smoothed Weiszfeld iterations towards the geometric median.

    The first of the `steps` starts at the coordinate-wise median, which a hostile minority cannot move arbitrarily
    far; the paper starts at the mean. `smoothing` is the least distance that the iterations divide by. `by_examples`
    weighs clients by the number of examples that they report.
    """

    buffers = "median"
    scale_equivariant = False  # `smoothing` is an absolute length

    steps: int = 8
    smoothing: float = 1e-6
    by_examples: bool = False

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        positive(smoothing=self.smoothing)

    def tolerates(self, clients: int) -> int:
        """Return the largest minority; 0 with `by_examples`, as clients choose the number of examples they report."""
        return 0 if self.by_examples else (clients - 1) // 2

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Take `steps` weighted means, with weights of one over the distance from the previous mean."""
        prior = cohort.shares if self.by_examples else torch.full_like(cohort.shares, 1 / len(cohort.nodes))
        centre = median(cohort.models).to(cohort.origin.dtype)
        weights = prior
        for _ in range(self.steps):
            inverse_distances = prior / cohort.distances(centre).clamp(min=self.smoothing)
            weights = inverse_distances / inverse_distances.sum()
            centre = cohort.mixed(weights)
        return Mix(centre, weights=weights)
