"""FedAvg with fine-tuning: a client adapts the shared model to its own examples before it evaluates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from corymb.client.algorithms.algorithm import ClientAlgorithm, Local


@dataclass(frozen=True)
class FineTuning(ClientAlgorithm):
    """Train as in FedAvg; before each evaluation, train a copy for `epochs` on the client's training examples.

    This is the baseline of personalised federated learning (Cheng, Chadha & Duchi 2021). Clients that never trained,
    such as new ones, adapt in the same way.
    """

    epochs: int = 1

    def evaluated(self, local: Local) -> nn.Module:
        """See `ClientAlgorithm.evaluated`."""
        local.fit(local.module, settings=local.settings.model_copy(update={"epochs": self.epochs, "steps": None}))
        return local.module
