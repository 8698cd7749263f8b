"""Isotropic merging (Marczak et al. 2025): all directions of a merged update get the same singular value.

The rules apply this to matrices only. Other tensors take the mean update.
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
    """Marczak et al. 2025, Iso-C: adds up the updates of each matrix and sets all singular values to their mean.

    `scale` multiplies the step; tune it on validation data (0.1 to 3). The rule is meant for models of many tasks.
    """

    preserves_consensus = False

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive(scale=self.scale)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Flatten the spectrum of each matrix."""
        return Mix(cohort.by_layer(lambda layer: stepped(layer, iso_c(layer_updates(layer).sum(dim=0)), self.scale)))


@dataclass(frozen=True)
class IsoCTS(SightedRule[None]):
    """Marczak et al. 2025, Iso-CTS: Iso-C, with a part of the rank reserved for the directions of single tasks.

    The leading directions of the sum get about the share `common` of the rank. The tasks get equal parts of the rest,
    each for the leading directions of its own update.
    """

    preserves_consensus = False

    scale: float = 1.0
    common: float = 0.8

    def __post_init__(self) -> None:
        positive(scale=self.scale)
        share(common=self.common)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Flatten the common and the task-specific directions of each matrix."""
        return Mix(
            cohort.by_layer(lambda layer: stepped(layer, iso_cts(layer_updates(layer), self.common), self.scale))
        )


def layer_updates(layer: Cohort) -> Tensor:
    """Return the updates of one layer, `[K, *shape]` float64, where `shape` is the shape of the layer's tensor."""
    (entry,) = layer.layout.parameters
    return (layer.models.double() - layer.origin.double()).reshape((-1, *entry.shape))


def stepped(layer: Cohort, step: Tensor | None, scale: float) -> Tensor:
    """Return the layer's parameters after the step `scale * step`, or after the mean update if `step` is None."""
    step = layer_updates(layer).mean(dim=0) if step is None else scale * step
    return (layer.origin.double() + step.reshape(-1)).to(layer.origin.dtype)


def iso_c(total: Tensor) -> Tensor | None:
    """Return `total [m, n]` with every singular value replaced by their mean; None if `total` is not a matrix."""
    if total.dim() != 2:
        return None
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    flat: Tensor = values.mean() * left @ right
    return flat


def iso_cts(tasks: Tensor, common: float) -> Tensor | None:
    """Return the Iso-CTS step for the updates `tasks [T, m, n]`; None if they are not matrices."""
    if tasks.dim() != 3:
        return None
    shared, own = ranks(min(tasks.shape[1:]), len(tasks), common)
    left, values, right = torch.linalg.svd(tasks.sum(dim=0), full_matrices=False)
    left, values, right = left[:, :shared], values[:shared], right[:shared]
    parts = []
    for task in tasks:
        u, s, v = torch.linalg.svd(task - left @ (left.T @ task), full_matrices=False)
        parts.append((u[:, :own], s[:own], v[:own]))
    lefts = torch.cat([*(u for u, _, _ in parts), left], dim=1)
    rights = torch.cat([*(v for _, _, v in parts), right])
    mean_value = torch.cat([*(s for _, s, _ in parts), values]).mean()
    return mean_value * _orthogonal(lefts) @ _orthogonal(rights)


def ranks(rank: int, tasks: int, common: float) -> tuple[int, int]:
    """Return the number of common directions and the number of each task's own directions; their total is `rank`."""
    least = int(common * rank)
    own = min(round((rank - least) / tasks), rank // tasks)
    return rank - own * tasks, own


def _orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal polar factor of `matrix`."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    polar: Tensor = left @ right
    return polar
