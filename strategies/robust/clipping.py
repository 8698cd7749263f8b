"""Updates cut to a length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, positive


@dataclass(frozen=True)
class NormClipping(SightedRule[None]):
    """Sun et al. 2019, norm clipping: updates longer than `radius` are cut to it, then averaged.

    Without a `radius` it is the median length of the round's updates. `by_examples` weighs sites by the
    examples that they claim.
    """

    buffers = "median"
    unanimous = False  # cut, too, where all agree on a step longer than the radius
    scale_equivariant = False

    radius: float | None = None
    by_examples: bool = False

    def __post_init__(self) -> None:
        if self.radius is not None:
            positive(radius=self.radius)

    def tolerates(self, clients: int) -> int:
        """A minority: they move the model by half of the radius at most. None for a `radius` of whatever length."""
        return 0 if self.by_examples or self.radius else (clients - 1) // 2

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """The mean of the cut updates."""
        lengths = cohort.distances(cohort.origin)
        radius = float(lengths.quantile(0.5)) if self.radius is None else self.radius
        shares = cohort.shares if self.by_examples else torch.full_like(cohort.shares, 1 / len(cohort.nodes))
        weights = shares * cut(lengths, radius)
        return Mix(cohort.mixed(weights), weights=weights, notes={"radius": radius})


@dataclass(frozen=True)
class CentredClipping(SightedRule[None]):
    """Karimireddy et al. 2021, centred clipping: from the old model, step by step to the mean of cut differences.

    In each of `steps`, a model counts with its difference from the centre, cut to `radius`, and their mean
    moves the centre. Without a `radius` it is the median length of the round's updates.
    """

    buffers = "median"
    unanimous = False
    scale_equivariant = False

    radius: float | None = None
    steps: int = 3

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        if self.radius is not None:
            positive(radius=self.radius)

    def tolerates(self, clients: int) -> int:
        """A minority: each step moves the centre by a radius at most. None for a `radius` of whatever length."""
        return 0 if self.radius else (clients - 1) // 2

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Move the centre."""
        lengths = cohort.distances(cohort.origin)
        radius = float(lengths.quantile(0.5)) if self.radius is None else self.radius
        centre = cohort.origin
        for step in range(self.steps):
            if step:
                lengths = cohort.distances(centre)
            centre = cohort.mixed(cut(lengths, radius) / len(cohort.nodes), centre)
        return Mix(centre)


def cut(lengths: Tensor, radius: float) -> Tensor:
    """What to multiply vectors of these `lengths [K]` by, so that none is longer than `radius`."""
    return (radius / lengths.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
