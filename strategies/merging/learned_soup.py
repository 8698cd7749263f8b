"""Learned soup: mixing weights learned on the server's proxy data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, positive


@dataclass(frozen=True)
class LearnedSoup(SightedRule[None]):
    """Wortsman et al. 2022, learned soup: learns softmax weights of the models on the server's proxy data.

    AdamW learns the weights together with a temperature of the outputs; the weights start uniform. `by_layer` learns
    separate weights for each tensor of the model.
    """

    needs_proxy = True
    shift_equivariant = False
    scale_equivariant = False
    buffers = "proxy"

    by_layer: bool = False
    learning_rate: float = 0.05
    epochs: int = 5
    batch_size: int = 128

    def __post_init__(self) -> None:
        positive(learning_rate=self.learning_rate)
        at_least(1, epochs=self.epochs, batch_size=self.batch_size)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Minimise the proxy loss over the weights and the temperature, then mix the models."""
        entries = cohort.layout.parameters if self.by_layer else ()
        logits = torch.zeros(max(1, len(entries)), len(cohort.nodes), dtype=torch.float64, requires_grad=True)
        temperature = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([logits, temperature], lr=self.learning_rate, weight_decay=0.0)
        session = cohort.proxy.session(cohort.buffers)

        def soup() -> Tensor:
            weights = logits.softmax(dim=1).to(cohort.models.dtype)
            if not self.by_layer:
                return weights[0] @ cohort.models
            pieces = [w @ cohort.models[:, e.start : e.stop] for w, e in zip(weights, entries, strict=True)]
            return torch.cat(pieces)

        for _ in range(self.epochs):
            for rows in cohort.proxy.batches(self.batch_size):
                optimizer.zero_grad()
                session.loss(soup(), rows, temperature=temperature).backward()
                optimizer.step()
        with torch.no_grad():
            if self.by_layer:
                return Mix(soup())
            weights = logits[0].softmax(dim=0)
            return Mix(cohort.mixed(weights), weights=weights)
