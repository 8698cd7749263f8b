"""The point whose distances to all models sum to the least."""

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

    Begins at the coordinate-wise median, which a hostile minority cannot carry away, where the paper begins at the
    mean. `by_examples` weighs sites by the examples that they claim.
    """

    buffers = "median"
    scale_equivariant = False  # the smoothing is a length

    steps: int = 8
    smoothing: float = 1e-6
    by_examples: bool = False

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        positive(smoothing=self.smoothing)

    def tolerates(self, clients: int) -> int:
        """A minority, if nobody counts more than others."""
        return 0 if self.by_examples else (clients - 1) // 2

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Mean after mean, with weights of one over the distance to the last."""
        prior = cohort.shares if self.by_examples else torch.full_like(cohort.shares, 1 / len(cohort.nodes))
        centre = median(cohort.models).to(cohort.origin.dtype)
        weights = prior
        for _ in range(self.steps):
            near = prior / cohort.distances(centre).clamp(min=self.smoothing)
            weights = near / near.sum()
            centre = cohort.mixed(weights)
        return Mix(centre, weights=weights)
