"""SCAFFOLD: control variates correct the drift of local steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, positive

RATE_SUM = "rate-sum"  # metric: the sum of the learning rates of a client's steps, K times eta_l in the paper
LEAST = 1e-12  # of `rate-sum`, so that hostile numbers stay finite


@dataclass(frozen=True)
class Scaffold(SightedRule["Tensor | None"]):
    """Karimireddy et al. 2020, SCAFFOLD (Algorithm 1, option II); the clients run the algorithm of the same name.

    The memory is the server's control variate `c [P]`. A client's new control variate follows from its model, its
    metric `rate-sum` and `c`, so no second vector travels back. `server_rate` is the paper's global step size;
    `population` is the number of clients that changes of `c` are divided by (default: the clients that the server
    knows).
    """

    client_algorithm = "scaffold"
    needs_metrics = (RATE_SUM,)
    preserves_consensus = True

    server_rate: float = 1.0
    population: int | None = None

    def __post_init__(self) -> None:
        positive(server_rate=self.server_rate)
        if self.population is not None:
            at_least(1, population=self.population)

    def initial(self) -> Tensor | None:
        """Return None, which stands for zeros."""
        return None

    def second_vector(self, origin: Tensor, memory: Tensor | None) -> Tensor:
        """Return the server's control variate."""
        return torch.zeros_like(origin) if memory is None else memory.to(origin.dtype)

    def mix(self, cohort: Cohort, memory: Tensor | None) -> Mix[Tensor | None]:
        """Step by the mean update, and move `c` by the sum of the clients' changes over the population."""
        clients = len(cohort.nodes)
        rates = cohort.metrics[RATE_SUM].clamp(min=LEAST)
        population = self.population or len(cohort.known)
        weights = torch.full_like(cohort.examples, self.server_rate / clients)
        vector = cohort.mixed(weights)
        drift, factor = vector, clients / (self.server_rate * float(rates[0]))
        if bool((rates != rates[0]).any()):
            drift, factor = cohort.mixed(1 / rates), 1.0
        control = self.second_vector(cohort.origin, memory).double() * (1 - clients / population)
        # The sum of (origin - model) / rate-sum, over the population.
        return Mix(vector, control.add_(cohort.origin - drift, alpha=factor / population), weights)
