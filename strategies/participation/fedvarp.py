"""FedVARP: averaging without the variance that partial participation causes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from corymb.strategies.core.client_updates import Updates
from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import positive


@dataclass(frozen=True)
class FedVARP(SightedRule[Updates]):
    """Jhunjhunwala et al. 2022, FedVARP: the mean of all clients' last updates, corrected by the new updates.

    The rule stores one update per known client, so its memory grows with the federation.
    """

    preserves_consensus = False

    server_rate: float = 1.0

    def __post_init__(self) -> None:
        positive(server_rate=self.server_rate)

    def initial(self) -> Updates:
        """Return an empty store of updates."""
        return Updates()

    def mix(self, cohort: Cohort, memory: Updates) -> Mix[Updates]:
        """Step by the mean of all last updates plus the participants' mean change since their own last update."""
        updates = cohort.models - cohort.origin
        memory = memory.kept(cohort.known)
        mean_change = (updates - memory.of(cohort.nodes, updates)).mean(dim=0, dtype=torch.float64)
        mean_last = memory.total(cohort.origin) / len(cohort.known)
        vector = cohort.origin + self.server_rate * (mean_change + mean_last)
        weights = torch.full_like(cohort.examples, self.server_rate / len(cohort.nodes))
        return Mix(vector, memory.replaced(cohort.nodes, updates), weights)
