"""Sites that keep sending the same count less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.client_updates import Updates
from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.geometry import cosines, products
from corymb.strategies.core.sighted import Mix, SightedRule


@dataclass(frozen=True)
class FoolsGold(SightedRule[Updates]):
    """Fung et al. 2020, FoolsGold: sybils share a goal, so sites whose past updates look alike count less.

    Remembers the sum of each site's updates, so its memory grows with the federation. All parameters are compared,
    and the weights are made to sum to one; where they are all zero, the model stays. Against sybils only: a single
    hostile site is unlike the others and counts in full.
    """

    unanimous = False  # sites that agree are taken for sybils

    def initial(self) -> Updates:
        """Nobody was heard."""
        return Updates()

    def mix(self, cohort: Cohort, memory: Updates) -> Mix[Updates]:
        """Add the round's updates to the past, compare, and mix."""
        updates = cohort.models - cohort.origin
        past = memory.of(cohort.nodes, updates) + updates
        weights = unlikeness(cosines(products(past, torch.zeros_like(cohort.origin))))
        total = weights.sum()
        weights = weights / total if total > 0 else weights
        return Mix(cohort.mixed(weights), memory.replaced(cohort.nodes, past), weights)


def unlikeness(pairs: Tensor) -> Tensor:
    """Weights in [0, 1], `[K]`, from the cosines of the past updates `[K, K]`: their Algorithm 1, lines 5 to 16."""
    clients = len(pairs)
    if clients == 1:
        return torch.ones(1, dtype=torch.float64)
    likeness = pairs.nan_to_num(nan=0.0).fill_diagonal_(-torch.inf)
    most = likeness.max(dim=1).values
    pardon = torch.where(most[None] > most[:, None], most[:, None] / most[None], 1.0)
    weights = 1 - (likeness * pardon).nan_to_num(neginf=-torch.inf).fill_diagonal_(-torch.inf).max(dim=1).values
    weights = weights.clamp(0, 1)
    weights = weights / weights.max().clamp(min=torch.finfo(torch.float64).tiny)
    weights = weights.clamp(max=0.99)
    return ((weights / (1 - weights)).log() + 0.5).clamp(0, 1)
