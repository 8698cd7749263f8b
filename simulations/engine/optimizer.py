"""torch's optimisers, applied to the weights of all clients of a block at once."""

from __future__ import annotations

import torch
from torch import Tensor

from corymb.client import TrainSettings
from corymb.simulations.engine.weight_forms import first_rows

# These update every number independently. Any other optimiser would mix the clients of a block.
ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD",
)  # fmt: skip

MAX_SHARE = 0.5  # of the way to the start in one step; above it, gradients at a higher rate would lose digits


def is_plain(settings: TrainSettings) -> bool:
    """Return whether a step is plain SGD, with a proximal term or without; see `PlainSGD`."""
    return settings.optimizer == "SGD" and not any(settings.optimizer_options.values())


def is_linear(settings: TrainSettings) -> bool:
    """Return whether a step is linear in the weights and their gradients, as the low-rank forms require."""
    return settings.optimizer == "SGD"


class PlainSGD:
    """What plain SGD does in each step beside the gradients, which the layers subtract at `gradient_rate` themselves.

    Each tensor of `trainable` (see `Optimizer`) then moves towards its start by the share `rate * proximal` of the
    difference. The gradients of a step belong to the weights before it, so they are subtracted at a higher rate.
    """

    def __init__(
        self, trainable: list[tuple[Tensor, Tensor]], settings: TrainSettings, rate: float, offsets: list[Tensor] | None
    ) -> None:
        self._share, self._rate = rate * settings.proximal, rate
        self._pulled = trainable if self._share else []
        self._added = [] if offsets is None else list(zip([t for t, _ in trainable], offsets, strict=True))

    @staticmethod
    def gradient_rate(settings: TrainSettings, rate: float) -> float | None:
        """Return the rate; None if a step is not plain SGD, or goes more than `MAX_SHARE` of the way to the start."""
        share = rate * settings.proximal
        return rate / (1 - share) if is_plain(settings) and share <= MAX_SHARE else None

    def active(self, number: int, steps: list[int]) -> int:
        """Return how many clients take step `number`, counted from 0: those that have not finished, which are first."""
        return sum(number < each for each in steps)

    def step(self, number: int, steps: list[int]) -> None:
        """Finish step `number` of the clients, which take so many `steps` each."""
        clients = self.active(number, steps)
        for tensor, start in self._pulled:
            first_rows(clients, tensor).lerp_(first_rows(clients, start), self._share)
        for tensor, added in self._added:
            first_rows(clients, tensor).sub_(first_rows(clients, added), alpha=self._rate)


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

    def active(self, number: int, steps: list[int]) -> int:
        """Return the number of clients: all take part in all steps."""
        return len(steps)

    def step(self, number: int, steps: list[int]) -> None:
        """Take step `number` for all clients except those that have finished, which momentum alone would change."""
        finished = [client for client, each in enumerate(steps) if each <= number]
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
