"""torch's optimisers, applied to the weights of all clients of a block at once."""

from __future__ import annotations

import torch
from torch import Tensor

from corymb.client import TrainSettings

# These update every number independently. Any other optimiser would mix the clients of a block.
ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD",
)  # fmt: skip


def is_plain(settings: TrainSettings) -> bool:
    """Return whether a step is plain SGD: the gradient times the learning rate."""
    return settings.optimizer == "SGD" and not settings.proximal and not any(settings.optimizer_options.values())


def is_linear(settings: TrainSettings) -> bool:
    """Return whether a step is linear in the weights and their gradients, as the low-rank forms require."""
    return settings.optimizer == "SGD"


class Optimizer:
    """A torch optimiser for the tensors of all clients, with the proximal term of `settings`.

    `trainable` holds pairs of a tensor `[K, ...]`, whose gradient is in `.grad`, and its value at the start. `offsets`,
    one for each tensor, are added to the gradients.
    """

    def __init__(
        self,
        trainable: list[tuple[Tensor, Tensor]],
        settings: TrainSettings,
        rate: float,
        offsets: list[Tensor] | None = None,
    ) -> None:
        self._trainable, self._proximal, self._offsets = trainable, settings.proximal, offsets
        self._tensors = [tensor for tensor, _ in trainable]
        self._torch = getattr(torch.optim, settings.optimizer)(self._tensors, lr=rate, **settings.optimizer_options)

    def step(self, finished: list[int]) -> None:
        """Take one step for all clients except the `finished` ones, which momentum alone would still change."""
        if self._proximal:
            for tensor, start in self._trainable:
                tensor.grad.add_(tensor - start, alpha=self._proximal)  # type: ignore[union-attr]
        if self._offsets is not None:
            for tensor, offset in zip(self._tensors, self._offsets, strict=True):
                tensor.grad.add_(offset)  # type: ignore[union-attr]
        before = [tensor[finished].clone() for tensor in self._tensors] if finished else []
        self._torch.step()
        for tensor, old in zip(self._tensors, before):  # noqa: B905  # `before` is empty if no client has finished
            tensor[finished] = old
