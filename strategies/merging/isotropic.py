"""Merging with all directions of the update made equally strong.

Marczak et al. 2025. Matrices only: other tensors take the mean update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import positive, share


@dataclass(frozen=True)
class IsoC(SightedRule[None]):
    """Marczak et al. 2025, Iso-C: the sum of the updates, matrix by matrix, with its mean singular value for all.

    `scale` multiplies the step and is tuned on validation data (0.1 to 3). Meant for merging many tasks.
    """

    unanimous = False

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive(scale=self.scale)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Flatten the spectrum of each matrix."""
        return Mix(cohort.by_layer(lambda layer: moved(layer, iso_c(updates(layer).sum(dim=0)), self.scale)))


@dataclass(frozen=True)
class IsoCTS(SightedRule[None]):
    """Marczak et al. 2025, Iso-CTS: as Iso-C, with room kept for directions that only one task has.

    About `common` of the rank goes to the sum's leading directions, the rest evenly to the tasks' own.
    """

    unanimous = False

    scale: float = 1.0
    common: float = 0.8

    def __post_init__(self) -> None:
        positive(scale=self.scale)
        share(common=self.common)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Flatten the common and the own directions of each matrix."""
        return Mix(cohort.by_layer(lambda layer: moved(layer, iso_cts(updates(layer), self.common), self.scale)))


def updates(layer: Cohort) -> Tensor:
    """One layer's updates, `[K, *shape]` float64; two-dimensional for matrices only."""
    (entry,) = layer.layout.parameters
    return (layer.models.double() - layer.origin.double()).reshape(-1, *entry.shape)


def moved(layer: Cohort, step: Tensor | None, scale: float) -> Tensor:
    """The layer moved by `scale * step`; by the mean update where there is none."""
    step = updates(layer).mean(dim=0) if step is None else scale * step
    return (layer.origin.double() + step.reshape(-1)).to(layer.origin.dtype)


def iso_c(total: Tensor) -> Tensor | None:
    """`total [m, n]` with every singular value their mean; None for what is no matrix."""
    if total.dim() != 2:
        return None
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    flat: Tensor = values.mean() * left @ right
    return flat


def iso_cts(tasks: Tensor, common: float) -> Tensor | None:
    """From the updates of tasks `[T, m, n]`; None for what are no matrices."""
    if tasks.dim() != 3:
        return None
    kept, own = ranks(min(tasks.shape[1:]), len(tasks), common)
    left, values, right = torch.linalg.svd(tasks.sum(dim=0), full_matrices=False)
    left, values, right = left[:, :kept], values[:kept], right[:kept]
    parts = []
    for task in tasks:
        u, s, v = torch.linalg.svd(task - left @ (left.T @ task), full_matrices=False)
        parts.append((u[:, :own], s[:own], v[:own]))
    lefts = torch.cat([*(u for u, _, _ in parts), left], dim=1)
    rights = torch.cat([*(v for _, _, v in parts), right])
    strength = torch.cat([*(s for _, s, _ in parts), values]).mean()
    return strength * _orthogonal(lefts) @ _orthogonal(rights)


def ranks(rank: int, tasks: int, common: float) -> tuple[int, int]:
    """How many directions are common, and how many each task's own; together all of `rank`."""
    least = int(common * rank)
    own = min(round((rank - least) / tasks), rank // tasks)
    return rank - own * tasks, own


def _orthogonal(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    polar: Tensor = left @ right
    return polar
