"""What a reply counts for that was begun some versions of the model ago."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from corymb.strategies import Model, Reply
from corymb.strategies.core.rows import SingleRow


@dataclass(frozen=True)
class Start:
    """The `model` that a client began from, `staleness` versions ago."""

    model: Model
    staleness: int = 0


@dataclass(frozen=True)
class Asynchrony:
    """How the model changes without rounds: after `buffer` replies, while `concurrency` clients train at a time.

    The update of a reply, its model minus the one that the client began from, counts with the factor
    `(1 + staleness)^(-exponent)` and is added to the present model, as in FedBuff (Nguyen et al. 2022, Algorithm 1).
    With a buffer of one, the reply's model is mixed with the present one, as in FedAsync (Xie et al. 2019, Algorithm
    1). A reply that is staler than `max_staleness` does not count.
    """

    buffer: int
    concurrency: int
    exponent: float = 0.5
    max_staleness: int = 20

    def factor(self, start: Start) -> float:
        """Return what an update counts for that was begun at `start`."""
        return float((1 + start.staleness) ** -self.exponent)

    def rebased(self, reply: Reply, start: Start, present: Model) -> Reply:
        """Return `reply` as if its client had begun from the `present` model."""
        origin = present if self.buffer == 1 else start.model
        update = reply.vector(present.parameters.dtype) - origin.parameters
        vector = torch.add(present.parameters, update, alpha=self.factor(start))
        return replace(reply, rows=SingleRow((vector,)), row=0)
