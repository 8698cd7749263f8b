"""Rules that clip updates to a maximum length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, positive


@dataclass(frozen=True)
class NormClipping(SightedRule[None]):
    """Sun et al. 2019, norm clipping: clips updates longer than `radius` to this length, then averages them.

    The default `radius` is the median length of the round's updates. `by_examples` weighs clients by the number of
    examples that they report.
    """

    buffers = "median"
    preserves_consensus = False  # equal updates are also clipped
    scale_equivariant = False

    radius: float | None = None
    by_examples: bool = False

    def __post_init__(self) -> None:
        if self.radius is not None:
            positive(radius=self.radius)

    def tolerates(self, clients: int) -> int:
        """Return the largest minority, which moves the model by at most half the median length.

        Return 0 for a fixed `radius`, which may be of any length, and with `by_examples`, as clients choose the
        number of examples that they report.
        """
        return 0 if self.by_examples or self.radius else (clients - 1) // 2

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Return the mean of the clipped updates."""
        lengths = cohort.distances(cohort.origin)
        radius = float(lengths.quantile(0.5)) if self.radius is None else self.radius
        shares = cohort.shares if self.by_examples else torch.full_like(cohort.shares, 1 / len(cohort.nodes))
        weights = shares * clip_factors(lengths, radius)
        return Mix(cohort.mixed(weights), weights=weights, notes={"radius": radius})


@dataclass(frozen=True)
class CentredClipping(SightedRule[None]):
    """Karimireddy et al. 2021, centred clipping: moves the old model repeatedly by the mean of clipped differences.

    Each of the `steps` clips the difference of each model from the centre to `radius`, and moves the centre by the
    mean of the clipped differences. The first centre is the old model. The default `radius` is the median length of
    the round's updates.
    """

    buffers = "median"
    preserves_consensus = False
    scale_equivariant = False

    radius: float | None = None
    steps: int = 3

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        if self.radius is not None:
            positive(radius=self.radius)

    def tolerates(self, clients: int) -> int:
        """Return the largest minority, as each step moves the centre by at most one median length.

        Return 0 for a fixed `radius`, which may be of any length.
        """
        return 0 if self.radius else (clients - 1) // 2

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Move the centre `steps` times, and return it as the next model."""
        lengths = cohort.distances(cohort.origin)
        radius = float(lengths.quantile(0.5)) if self.radius is None else self.radius
        centre = cohort.origin
        for step in range(self.steps):
            if step:
                lengths = cohort.distances(centre)
            centre = cohort.mixed(clip_factors(lengths, radius) / len(cohort.nodes), centre)
        return Mix(centre)


def clip_factors(lengths: Tensor, radius: float) -> Tensor:
    """Return the factors `[K]` that scale vectors of these `lengths [K]` down to at most `radius`."""
    return (radius / lengths.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
