"""Fisher merging: parameters weighted by how much the outputs of their model depend on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, positive

MAX_JACOBIAN_NUMBERS = 1 << 24  # numbers in the Jacobians that are computed at once


@dataclass(frozen=True)
class FisherMerging(SightedRule[None]):
    """Matena & Raffel 2022, Fisher merging: averages each parameter, weighted by its Fisher information per model.

    The diagonal Fisher information is computed on the first `examples` of the server's proxy inputs. It uses the
    model's own class probabilities, so the proxy data need no labels. Clients are weighted by examples; `normalise`
    divides this weight by the norm of the client's Fisher information. `floor` is the least Fisher information of a
    parameter, so that a parameter without effect in any model is averaged; it does not scale with the model. A model
    whose Fisher information overflows is left out, and the note "dropped" counts such models.
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
        """Merge the models, weighted by their Fisher information."""
        rows = torch.arange(min(self.examples, len(cohort.proxy.inputs)))
        clients = zip(cohort.models, cohort.client_buffers, strict=True)
        fishers = torch.stack([diagonal_fisher(cohort.proxy, *client, rows) for client in clients])
        usable = fishers.isfinite().all(dim=1)
        notes = {} if usable.all() else {"dropped": float((~usable).sum())}
        if not usable.any():
            return Mix(cohort.origin, notes=notes)
        shares = cohort.shares[usable]
        shares = shares if shares.sum() > 0 else torch.ones_like(shares)
        return Mix(fisher_mean(cohort.models[usable], fishers[usable], shares, self.floor, self.normalise), notes=notes)


def diagonal_fisher(proxy: Proxy, parameters: Tensor, buffers: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the diagonal Fisher information of a model on the examples at `rows` (default: all), `[P]` float64.

    It is the squared gradient of the log-probability of a class, averaged over the examples and over the classes, by
    the model's own class probabilities.
    """
    rows = torch.arange(len(proxy.inputs)) if rows is None else rows

    def log_probabilities(vector: Tensor, row: Tensor) -> Tensor:
        return proxy.outputs(vector, buffers, row[None])[0].log_softmax(dim=0)

    jacobians = vmap(jacrev(log_probabilities), in_dims=(None, 0))
    total = torch.zeros_like(parameters, dtype=torch.float64)
    probabilities = proxy.class_scores(parameters, buffers)[rows].softmax(dim=1)
    size = max(1, MAX_JACOBIAN_NUMBERS // (parameters.numel() * probabilities.shape[1]))
    for part, class_weights in zip(rows.split(size), probabilities.split(size), strict=True):
        total += torch.einsum("nc,ncp->p", class_weights.double(), jacobians(parameters, part).double().square())
    return total / len(rows)


def fisher_mean(
    models: Tensor,
    fishers: Tensor,
    weights: Tensor,
    floor: float = 1e-6,
    normalise: bool = True,
    floor_first_only: bool = False,
) -> Tensor:
    """Return `sum(weight * fisher * model) / sum(weight * fisher)`, `[P]` float64.

    The sums run over `models [K, P]` with `fishers [K, P]` and `weights [K]`. With `floor_first_only` the floor
    applies to the first model only, and a parameter without effect in any model keeps the first model's value.
    """
    weights = weights.double()
    if normalise:  # the floor keeps a model with a vanishing Fisher information from taking all of the weight
        weights = weights / fishers.double().clamp(min=floor).norm(dim=1)
    floored = fishers.double().clone()
    floored_rows = slice(1) if floor_first_only else slice(None)
    floored[floored_rows] = floored[floored_rows].clamp(min=floor)
    shares = weights[:, None] * floored
    return (shares * models.double()).sum(dim=0) / shares.sum(dim=0)
