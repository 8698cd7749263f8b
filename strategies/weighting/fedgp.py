"""FedGP: the projection of the target's update on the sources' updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.weighting.domain_adaptation import (
    RoundUpdates,
    SourceWeights,
    TargetRule,
    cosine_projections,
    projections,
)


@dataclass(frozen=True)
class FedGP(TargetRule):
    """Jiang, Zhang & Koyejo 2024, FedGP: averages the target's update with its projection on each source's update.

    FedGP is FedDA with this projection in place of the source's update. The projection is zero if the source points
    away from the target. `allow_opposed_batches` selects the other automatic weight of the official code, which
    allows for single batches that point away. `by_layer` projects each tensor separately, with one beta per source.
    `cosine` uses the term of the official code, the source's update times its cosine with the target's, and weighs
    sources by examples.
    """

    allow_opposed_batches: bool = False
    by_layer: bool = False
    cosine: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allow_opposed_batches and not self.auto:
            raise ValueError("allow_opposed_batches is True but auto is False; set auto = True as well.")

    def step(self, updates: RoundUpdates, weights: SourceWeights, cohort: Cohort) -> tuple[Tensor, Tensor]:
        """Return the mean over sources of `(1 - beta) * target + beta * projection`, and the betas."""
        betas = weights.tolerant_projection if self.allow_opposed_batches else weights.projection
        examples = cohort.examples[[node != self.target for node in cohort.nodes]]
        uniform = not self.cosine or not examples.sum() > 0
        shares = torch.full_like(betas, 1 / len(betas)) if uniform else examples / examples.sum()
        terms = (1 - betas)[:, None] * updates.target + betas[:, None] * self._projections(cohort, updates)
        return shares @ terms, betas

    def _projections(self, cohort: Cohort, updates: RoundUpdates) -> Tensor:
        project = cosine_projections if self.cosine else projections
        if not self.by_layer:
            return project(updates.target, updates.sources)
        layers = [slice(entry.start, entry.stop) for entry in cohort.layout.parameters]
        return torch.cat([project(updates.target[layer], updates.sources[:, layer]) for layer in layers], dim=1)
