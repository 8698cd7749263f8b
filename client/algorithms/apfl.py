"""APFL: each client uses a mixture of the shared model and a model of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from corymb.client.algorithms.algorithm import ClientAlgorithm, Local
from corymb.client.batches import Batch
from corymb.protocol.train_settings import TrainSettings


@dataclass(frozen=True)
class APFL(ClientAlgorithm):
    """Deng et al. 2020, APFL (Algorithm 1): the client's model is `mix * own + (1 - mix) * shared`.

    After each step of the shared model, the own model takes a step of plain SGD along the gradient of the mixture on
    the same batch. With `adapts`, so does `mix` (eq. 10), from the client's last value, and stays from 0 to 1.
    """

    mix: float = 0.5
    adapts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix is {self.mix}; use a share from 0 to 1.")

    def examples_trained(self, settings: TrainSettings, size: int) -> int:
        """See `ClientAlgorithm.examples_trained`: two models train on each."""
        return 2 * super().examples_trained(settings, size)

    def train(self, local: Local) -> dict[str, float]:
        """See `ClientAlgorithm.train`."""
        own, mixture = local.copy_with("own"), local.copy_with("own").train()
        mix, rate = _mix(local, self.mix), local.settings.rate(local.server_round)
        shared = _vector(local.module)  # before the step that has just been taken

        def step_of_own(batch: Batch) -> None:
            nonlocal mix, shared
            before = _vector(own)
            _set(mixture, mix * before + (1 - mix) * shared)
            gradients = torch.autograd.grad(local.loss(mixture, batch), list(mixture.parameters()))
            gradient = nn.utils.parameters_to_vector(gradients)
            _set(own, before - rate * mix * gradient)
            if self.adapts:
                mix = min(1.0, max(0.0, mix - rate * float((before - shared) @ gradient)))
            shared = _vector(local.module)

        metrics = local.fit(local.module, after_step=step_of_own)
        local.keep_model("own", own)
        local.kept["mix"] = torch.tensor(mix)
        return metrics

    def evaluated(self, local: Local) -> nn.Module:
        """See `ClientAlgorithm.evaluated`."""
        mix, mixture = _mix(local, 0.0), local.copy_with("own")
        _set(mixture, mix * _vector(mixture) + (1 - mix) * _vector(local.module))
        return mixture


def _mix(local: Local, default: float) -> float:
    return float(local.memory["mix"]) if "mix" in local.memory else default


def _vector(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def _set(module: nn.Module, vector: Tensor) -> None:
    with torch.no_grad():
        nn.utils.vector_to_parameters(vector.clone(), module.parameters())
