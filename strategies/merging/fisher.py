"""Parameters weighed by how much a model's outputs depend on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, positive

ENTRIES = 1 << 24  # of Jacobians at a time


@dataclass(frozen=True)
class FisherMerging(SightedRule[None]):
    """Matena & Raffel 2022, Fisher merging: each parameter is averaged by its Fisher information in each model.

    The diagonal Fishers are taken on the first `examples` of the server's proxy inputs, with the model's own
    probabilities for labels, so none are needed. Sites are weighed by examples, over the length of their Fisher where
    `normalise`. `floor` bounds the Fishers from below, so that a parameter that matters to no model is averaged.
    """

    needs_proxy = True
    shift_equivariant = False
    scale_equivariant = False
    buffers = "proxy"

    examples: int = 256
    normalise: bool = True
    floor: float = 1e-6

    def __post_init__(self) -> None:
        at_least(1, examples=self.examples)
        positive(floor=self.floor)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Merge by the Fishers of the round's models."""
        rows = torch.arange(min(self.examples, len(cohort.proxy.inputs)))
        sites = zip(cohort.models, cohort.site_buffers, strict=True)
        fishers = torch.stack([diagonal_fisher(cohort.proxy, *site, rows) for site in sites])
        merged = fisher_mean(cohort.models, fishers, cohort.shares, self.floor, self.normalise)
        return Mix(merged)


def diagonal_fisher(proxy: Proxy, parameters: Tensor, buffers: Tensor, rows: Tensor | None = None) -> Tensor:
    """The mean over examples and over the model's own classes of the squared gradient of the log-probability, `[P]`."""
    rows = torch.arange(len(proxy.inputs)) if rows is None else rows

    def log_probabilities(vector: Tensor, row: Tensor) -> Tensor:
        return proxy.outputs(vector, buffers, row[None])[0].log_softmax(dim=0)

    jacobians = vmap(jacrev(log_probabilities), in_dims=(None, 0))
    total = torch.zeros_like(parameters, dtype=torch.float64)
    probabilities = torch.cat([proxy.outputs(parameters, buffers, part).softmax(dim=1) for part in rows.split(1024)])
    size = max(1, ENTRIES // (parameters.numel() * probabilities.shape[1]))
    for part, chances in zip(rows.split(size), probabilities.split(size), strict=True):
        total += torch.einsum("nc,ncp->p", chances, jacobians(parameters, part).square()).double()
    return total / len(rows)


def fisher_mean(
    models: Tensor,
    fishers: Tensor,
    weights: Tensor,
    floor: float = 1e-6,
    normalise: bool = True,
    floor_first_only: bool = False,
) -> Tensor:
    """`sum(weight * fisher * model) / sum(weight * fisher)` over `models [K, P]` with `fishers [K, P]`, `[P]` float64.

    With `floor_first_only` a parameter that matters to no model keeps the first model's value.
    """
    weights = weights.double()
    if normalise:  # with the floor, or a model that is sure of everything would take all of the weight
        weights = weights / fishers.double().clamp(min=floor).norm(dim=1)
    floored = fishers.double().clone()
    chosen = slice(1) if floor_first_only else slice(None)
    floored[chosen] = floored[chosen].clamp(min=floor)
    shares = weights[:, None] * floored
    return (shares * models.double()).sum(dim=0) / shares.sum(dim=0)
