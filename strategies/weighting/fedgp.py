"""The target's update projected on the sources'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.weighting.domain_adaptation import Adaptation, TargetRule, Trust, cosine_projections, projections


@dataclass(frozen=True)
class FedGP(TargetRule):
    """Jiang, Zhang & Koyejo 2024, FedGP: the target's update counts where sources point the same way.

    As FedDA, with the part of the target's update that lies along each source instead of the source; a source
    that points away counts nothing. `allow` is the official code's other automatic weight, which allows
    for batches that point away. `by_layer` projects tensor by tensor, with weights of the whole; `cosine` takes
    the official code's term, the source times its cosine with the target, and weighs sources by examples.
    """

    allow: bool = False
    by_layer: bool = False
    cosine: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allow and not self.auto:
            raise ValueError("allow = True is an automatic weight; set auto = True with it.")

    def step(self, adapted: Adaptation, trusted: Trust, cohort: Cohort) -> tuple[Tensor, Tensor]:
        """The mean over sources of `(1 - beta) * target + beta * projection`."""
        betas = trusted.allowed if self.allow else trusted.projected
        examples = cohort.examples[[node != self.target for node in cohort.nodes]]
        even = not self.cosine or not examples.sum() > 0
        weights = torch.full_like(betas, 1 / len(betas)) if even else examples / examples.sum()
        terms = (1 - betas)[:, None] * adapted.target + betas[:, None] * self._projected(cohort, adapted)
        return weights @ terms, betas

    def _projected(self, cohort: Cohort, adapted: Adaptation) -> Tensor:
        project = cosine_projections if self.cosine else projections
        if not self.by_layer:
            return project(adapted.target, adapted.sources)
        pieces = [slice(entry.start, entry.stop) for entry in cohort.layout.parameters]
        return torch.cat([project(adapted.target[piece], adapted.sources[:, piece]) for piece in pieces], dim=1)
