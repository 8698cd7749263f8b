"""FedRep: a client first trains its own layers, then those that it shares."""

from __future__ import annotations

from dataclasses import dataclass

from corymb.client.algorithms.algorithm import ClientAlgorithm, Local
from corymb.protocol.train_settings import TrainSettings


@dataclass(frozen=True)
class FedRep(ClientAlgorithm):
    """Collins et al. 2021, FedRep (Algorithm 1): the personal layers are trained for `head_epochs`, then the others.

    The personal layers are those of `train.personal`, by default the last one. The others are trained as `[train]`
    says.
    """

    head_epochs: int = 1

    def examples_trained(self, settings: TrainSettings, size: int) -> int:
        """See `ClientAlgorithm.examples_trained`."""
        return self.head_epochs * size + super().examples_trained(settings, size)

    def train(self, local: Local) -> dict[str, float]:
        """See `ClientAlgorithm.train`."""
        parameters = {name: p for name, p in local.module.named_parameters() if p.requires_grad}
        own = [p for name, p in parameters.items() if name not in local.start]
        shared = [p for name, p in parameters.items() if name in local.start]
        settings = local.settings.model_copy(update={"epochs": self.head_epochs, "steps": None})
        for parameter in shared:
            parameter.requires_grad_(False)
        local.fit(local.module, settings=settings)
        for parameter in shared:
            parameter.requires_grad_(True)
        for parameter in own:
            parameter.requires_grad_(False)
        metrics = local.fit(local.module)
        for parameter in own:
            parameter.requires_grad_(True)
        return metrics
