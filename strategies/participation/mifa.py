"""MIFA: averaging over the latest update of every client."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from corymb.strategies.core.client_updates import Updates
from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import positive


@dataclass(frozen=True)
class MIFA(SightedRule[Updates]):
    """Gu et al. 2021, MIFA: absent clients count with the last update that they sent.

    The rule stores one update per known client, so its memory grows with the federation. It also changes the model in
    a round without replies.
    """

    runs_without_replies = True
    preserves_consensus = False

    server_rate: float = 1.0

    def __post_init__(self) -> None:
        positive(server_rate=self.server_rate)

    def initial(self) -> Updates:
        """Return an empty store of updates."""
        return Updates()

    def mix(self, cohort: Cohort, memory: Updates) -> Mix[Updates]:
        """Step by the mean of all clients' latest updates, which is zero for a client that has never replied."""
        memory = memory.kept(cohort.known).replaced(cohort.nodes, cohort.models - cohort.origin)
        rate = self.server_rate / max(1, len(cohort.known))
        weights = torch.full_like(cohort.examples, rate)
        return Mix(cohort.origin + rate * memory.total(cohort.origin), memory, weights)
