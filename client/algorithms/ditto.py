"""Ditto: beside the shared model, each client trains a model of its own near it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from corymb.client.algorithms.algorithm import ClientAlgorithm, Correction, Local
from corymb.protocol.train_settings import TrainSettings


@dataclass(frozen=True)
class Ditto(ClientAlgorithm):
    """Li et al. 2021, Ditto (Algorithm 1): the personal model is trained with a pull of `pull` (lambda).

    The shared model is trained as in FedAvg, and the client's own model is evaluated. With a pull of 0 the client's own
    model is that of local training.
    """

    pull: float = 0.1

    def examples_trained(self, settings: TrainSettings, size: int) -> int:
        """See `ClientAlgorithm.examples_trained`: two models train on each."""
        return 2 * super().examples_trained(settings, size)

    def train(self, local: Local) -> dict[str, float]:
        """See `ClientAlgorithm.train`."""
        own = local.copy_with("own")
        local.fit(own, Correction(pull=self.pull, centre=local.start) if self.pull else None)
        local.keep_model("own", own)
        return local.fit(local.module)

    def evaluated(self, local: Local) -> nn.Module:
        """See `ClientAlgorithm.evaluated`."""
        return local.copy_with("own")
