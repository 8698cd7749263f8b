"""FedNova: clients report how much each of their gradients weighs in their update."""

from __future__ import annotations

from dataclasses import dataclass

from corymb.client.algorithms.algorithm import ClientAlgorithm
from corymb.protocol.train_settings import TrainSettings
from corymb.strategies.drift.fednova import STEP_WEIGHT


@dataclass(frozen=True)
class FedNova(ClientAlgorithm):
    """Wang et al. 2020, FedNova (section 4.1), for the rule `fednova`: plain training, and the metric `step-weight`."""

    trains_in_blocks = True

    def reports(self, settings: TrainSettings, server_round: int, steps: int) -> dict[str, float]:
        """See `ClientAlgorithm.reports`. Raises `ValueError` for another optimiser than SGD."""
        if settings.optimizer != "SGD":
            raise ValueError(f"FedNova is defined for SGD with momentum, not for {settings.optimizer}.")
        momentum = float(settings.optimizer_options.get("momentum", 0.0))
        kept = 1 - settings.rate(server_round) * settings.proximal  # of earlier gradients, in each step
        velocity = total = 0.0
        for _ in range(steps):
            velocity = momentum * velocity + 1
            total = total * kept + velocity
        return {STEP_WEIGHT: total}
