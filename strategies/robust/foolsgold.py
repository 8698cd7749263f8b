"""FoolsGold: clients that keep sending similar updates count less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.client_updates import Updates
from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.geometry import cosines, inner_products
from corymb.strategies.core.sighted import Mix, SightedRule


@dataclass(frozen=True)
class FoolsGold(SightedRule[Updates]):
    """Fung et al. 2020, FoolsGold: sybils share a goal, so clients with similar past updates count less.

    The rule stores the sum of each client's updates, so its memory grows with the federation. It compares all
    parameters and normalises the weights to sum to one; if all weights are zero, the model stays unchanged. It
    protects against sybils only: a single hostile client is unlike the others and has full weight.
    """

    preserves_consensus = False  # clients with equal updates are treated as sybils

    def initial(self) -> Updates:
        """Return an empty store of updates."""
        return Updates()

    def mix(self, cohort: Cohort, memory: Updates) -> Mix[Updates]:
        """Add the round's updates to each client's sum, compare the sums, and mix the models."""
        updates = cohort.models - cohort.origin
        sums = memory.of(cohort.nodes, updates) + updates
        weights = dissimilarity_weights(cosines(inner_products(sums, torch.zeros_like(cohort.origin))))
        total = weights.sum()
        weights = weights / total if total > 0 else weights
        return Mix(cohort.mixed(weights), memory.replaced(cohort.nodes, sums), weights)


def dissimilarity_weights(pairs: Tensor) -> Tensor:
    """Return weights in [0, 1], `[K]`, from the clients' cosines `pairs [K, K]` (Algorithm 1, lines 5 to 16)."""
    clients = len(pairs)
    if clients == 1:
        return torch.ones(1, dtype=torch.float64)
    similarity = pairs.nan_to_num(nan=0.0).fill_diagonal_(0)  # so that the largest similarity is at least 0
    highest = similarity.max(dim=1).values
    pardon = torch.where(highest > highest[:, None], highest[:, None] / highest, 1.0)
    weights = 1 - (similarity * pardon).max(dim=1).values.clamp(max=1)
    weights = weights / weights.max().clamp(min=torch.finfo(torch.float64).tiny)
    weights = weights.clamp(max=0.99)
    return ((weights / (1 - weights)).log() + 0.5).clamp(0, 1)
