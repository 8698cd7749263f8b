"""The target's update projected on the sources'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.checks import positive, share
from corymb.strategies.cohort import Cohort
from corymb.strategies.sighted import SightedRule
from corymb.strategies.target import Adaptation, adapted, cosine_projections, projections, trust


@dataclass(frozen=True)
class FedGP(SightedRule[None]):
    """Jiang, Zhang & Koyejo 2024, FedGP: the target's update counts where sources point the same way.

    As FedDA, with the part of the target's update that lies along each source instead of the source; a source
    that points away counts nothing. `allow` is the official code's other automatic weight, which allows
    for batches that point away. `by_layer` projects tensor by tensor, with weights of the whole; `cosine` takes
    the official code's term, the source times its cosine with the target, and weighs sources by examples.
    """

    target: str
    beta: float = 0.5
    auto: bool = False
    allow: bool = False
    rate_ratio: float = 1.0
    align: bool = True
    by_layer: bool = False
    cosine: bool = False

    def __post_init__(self) -> None:
        share(beta=self.beta)
        positive(rate_ratio=self.rate_ratio)

    def mix(self, cohort: Cohort, memory: None) -> tuple[Tensor, None]:
        """The mean over sources of `(1 - beta) * target + beta * projection`."""

        def step(found: Adaptation, notes: dict[str, float]) -> Tensor:
            betas = found.target.new_full((len(found.sources),), self.beta)
            if self.auto:
                found_trust = trust(found)
                betas = found_trust.allowed if self.allow else found_trust.projected
            notes["beta"] = float(betas.mean())
            counts = torch.tensor([n != self.target for n in cohort.nodes])
            examples = cohort.examples[counts]
            even = not self.cosine or not examples.sum() > 0
            weights = torch.full_like(betas, 1 / len(betas)) if even else examples / examples.sum()
            terms = (1 - betas)[:, None] * found.target + betas[:, None] * self._projected(cohort, found)
            return weights @ terms

        return adapted(cohort, self.target, self.rate_ratio, self.align, step), None

    def _projected(self, cohort: Cohort, found: Adaptation) -> Tensor:
        project = cosine_projections if self.cosine else projections
        if not self.by_layer:
            return project(found.target, found.sources)
        pieces = [slice(entry.start, entry.stop) for entry in cohort.layout.parameters]
        return torch.cat([project(found.target[piece], found.sources[:, piece]) for piece in pieces], dim=1)
