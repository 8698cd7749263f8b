"""Averaging with the absent sites' variance taken out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from corymb.strategies.core.client_updates import Updates
from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import positive


@dataclass(frozen=True)
class FedVARP(SightedRule[Updates]):
    """Jhunjhunwala et al. 2022, FedVARP: participants correct the mean of every site's last update.

    Keeps one update per site, so its memory grows with the federation.
    """

    unanimous = False

    server_rate: float = 1.0

    def __post_init__(self) -> None:
        positive(server_rate=self.server_rate)

    def initial(self) -> Updates:
        """Nobody was heard."""
        return Updates()

    def mix(self, cohort: Cohort, memory: Updates) -> Mix[Updates]:
        """The participants' mean change since their last update, on top of the mean of all last updates."""
        updates = cohort.models - cohort.origin
        changes = (updates - memory.of(cohort.nodes, updates)).mean(dim=0, dtype=torch.float64)
        before = memory.total(cohort.origin) / len(cohort.known)
        vector = cohort.origin + self.server_rate * (changes + before)
        weights = torch.full_like(cohort.examples, self.server_rate / len(cohort.nodes))
        return Mix(vector, memory.replaced(cohort.nodes, updates), weights)
