"""Averaging over every site's newest update."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from corymb.strategies.core.client_updates import Updates
from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import positive


@dataclass(frozen=True)
class MIFA(SightedRule[Updates]):
    """Gu et al. 2021, MIFA: absent sites count with the update that they sent last.

    Keeps one update per site, so its memory grows with the federation. It moves the model in a round without
    replies, too.
    """

    acts_alone = True
    unanimous = False

    server_rate: float = 1.0

    def __post_init__(self) -> None:
        positive(server_rate=self.server_rate)

    def initial(self) -> Updates:
        """Nobody was heard."""
        return Updates()

    def mix(self, cohort: Cohort, memory: Updates) -> Mix[Updates]:
        """The mean of all newest updates; a site never heard has none yet."""
        memory = memory.replaced(cohort.nodes, cohort.models - cohort.origin)
        rate = self.server_rate / max(1, len(cohort.known))
        weights = torch.full_like(cohort.examples, rate)
        return Mix(cohort.origin + rate * memory.total(cohort.origin), memory, weights)
