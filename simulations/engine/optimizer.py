"""Optimisers of torch on the models of many clients at once."""

from __future__ import annotations

import torch
from torch import Tensor

from corymb.client import TrainSettings

# Those that treat each number by itself; a step of another on stacked models would not be each client's own.
ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD",
)  # fmt: skip


def is_plain(settings: TrainSettings) -> bool:
    """Whether a step is the gradient times the rate."""
    return settings.optimizer == "SGD" and not settings.proximal and not any(settings.optimizer_options.values())


def is_linear(settings: TrainSettings) -> bool:
    """Whether what a step does to a weighted sum is the weighted sum of what it does."""
    return settings.optimizer == "SGD"


class Optimizer:
    """torch's, on pairs of a tensor of all clients and where it began; gradients are in `.grad`."""

    def __init__(self, coordinates: list[tuple[Tensor, Tensor]], settings: TrainSettings, rate: float) -> None:
        self._coordinates, self._pull = coordinates, settings.proximal
        self._tensors = [tensor for tensor, _ in coordinates]
        self._torch = getattr(torch.optim, settings.optimizer)(self._tensors, lr=rate, **settings.optimizer_options)

    def step(self, finished: list[int]) -> None:
        """One step of all but the clients that have no batches left, whom momentum would carry on."""
        if self._pull:
            for tensor, anchor in self._coordinates:
                tensor.grad.add_(tensor - anchor, alpha=self._pull)  # type: ignore[union-attr]
        before = [tensor[finished].clone() for tensor in self._tensors] if finished else []
        self._torch.step()
        for tensor, old in zip(self._tensors, before):  # noqa: B905  # nothing where nobody has finished
            tensor[finished] = old
