"""FedDyn: a dynamic regulariser aligns the optima of the clients with that of the federation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, positive


@dataclass(frozen=True)
class FedDyn(SightedRule["Tensor | None"]):
    """Acar et al. 2021, FedDyn (Algorithm 1); the clients run the algorithm of the same name with the same `alpha`.

    The memory is the server's `h [P]`. `population` is the paper's number of devices m (default: the clients that the
    server knows).
    """

    client_algorithm = "feddyn"
    preserves_consensus = False  # the next model is moved by `h`

    alpha: float = 0.1
    population: int | None = None

    def __post_init__(self) -> None:
        positive(alpha=self.alpha)
        if self.population is not None:
            at_least(1, population=self.population)

    def client_options(self) -> dict[str, Any]:
        """See `Rule.client_options`."""
        return {"alpha": self.alpha}

    def initial(self) -> Tensor | None:
        """Return None, which stands for zeros."""
        return None

    def mix(self, cohort: Cohort, memory: Tensor | None) -> Mix[Tensor | None]:
        """Take the mean of the models and subtract `h / alpha`, after `h` has moved against the mean update."""
        clients = len(cohort.nodes)
        weights = torch.full_like(cohort.examples, 1 / clients)
        mean = cohort.mixed(weights)
        before = torch.zeros_like(mean, dtype=torch.float64) if memory is None else memory
        share = clients / (self.population or len(cohort.known))
        h = before.sub(mean - cohort.origin, alpha=self.alpha * share)
        return Mix(mean.sub(h, alpha=1 / self.alpha), h, weights * (1 + share))
