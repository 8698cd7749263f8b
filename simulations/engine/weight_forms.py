"""The forms in which a block of clients keeps a layer's weights: here, written out for each."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Piece(Protocol):
    """One parameter at K clients, after their training."""

    @property
    def size(self) -> int:
        """How many numbers it has at each."""

    def moved(self, weights: Tensor, kept: Kept) -> Tensor:
        """`sum_k weights[k] * (W_k - W0)` over the clients `kept`."""

    def squares(self, offset: Tensor | None) -> Tensor:
        """`|W_k - W0 - offset|^2`, `[K]` float64, for the numbers of an `offset` if there is one; right to 1e-5."""

    def written(self) -> Tensor:
        """Every client's own, `[K, ...]`."""

    def bound(self) -> Tensor:
        """What no number of a client's exceeds, `[K]`; NaN or infinite where one may be."""


class WeightForm(Piece, Protocol):
    """The weights `[out, in]` of one layer at K clients, and for factors the bias too."""

    def outputs(self, inputs: Tensor) -> Tensor:
        """`inputs [K, B, in]` times each client's weight, `[K, B, out]`."""

    def inward(self, slopes: Tensor) -> Tensor:
        """The slopes `[K, B, in]` of the inputs, asked for before `learn`."""

    def learn(self, slopes: Tensor, inputs: Tensor, rate: float | None) -> None:
        """Take the slopes `[K, B, out]` of the outputs: a step of plain SGD at `rate`, or gradients if that is None."""

    def coordinates(self) -> list[tuple[Tensor, Tensor]]:
        """What an optimiser moves, clients first, with gradients in `.grad`; and where each began."""


Kept = slice | Tensor  # all clients, or the numbers of some


def upto(count: int, tensor: Tensor) -> Tensor:
    """The first `count` rows: the tensor itself where there are no more, which takes no time."""
    return tensor if tensor.shape[0] == count else tensor[:count]


def as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this precision: the tensor itself where that is its own, which takes no time."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class DenseWeights:
    """Each client's weight in full, `[K, ...]`; a step of plain SGD is fused with the product that is its slope.

    `start` is what all begin with or, where it is their `own`, one for each.
    """

    def __init__(self, start: Tensor, clients: int, own: bool = False) -> None:
        self._start = start
        self.weight = start.clone() if own else start.expand(clients, *start.shape).clone()

    @property
    def size(self) -> int:
        return self.weight[0].numel()

    def like(self, clients: Tensor) -> Tensor:
        """The weights of as many clients as `clients [K, ...]` has, in its precision."""
        return as_type(upto(clients.shape[0], self.weight), clients.dtype)

    def outputs(self, inputs: Tensor) -> Tensor:
        weight, width = self.like(inputs), inputs.shape[1]
        if weight.shape[1] < width < weight.shape[2]:  # few rows are faster than few columns
            return torch.bmm(weight, inputs.transpose(1, 2)).transpose(1, 2)
        return torch.bmm(inputs, weight.transpose(1, 2))

    def inward(self, slopes: Tensor) -> Tensor:
        return torch.bmm(slopes, self.like(slopes))

    def learn(self, slopes: Tensor, inputs: Tensor, rate: float | None) -> None:
        if rate is None or slopes.dtype != self.weight.dtype:
            self.take(torch.bmm(slopes.transpose(1, 2), inputs), rate)
        else:
            upto(slopes.shape[0], self.weight).baddbmm_(slopes.transpose(1, 2), inputs, alpha=-rate)

    def take(self, gradient: Tensor, rate: float | None) -> None:
        """A gradient `[K, ...]` that is there already."""
        if rate is None:
            self.weight.grad = gradient.to(self.weight.dtype)
        else:
            upto(gradient.shape[0], self.weight).sub_(gradient, alpha=rate)

    def coordinates(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.weight, self._start.expand_as(self.weight))]

    def moved(self, weights: Tensor, kept: Kept) -> Tensor:
        moves = self.weight[kept] - (self._start if self._start.dim() < self.weight.dim() else self._start[kept])
        return (weights[kept] @ moves.flatten(1)).view(self.weight.shape[1:])

    def squares(self, offset: Tensor | None) -> Tensor:
        return squared_lengths(self.weight, self._start, offset)

    def written(self) -> Tensor:
        return self.weight

    def bound(self) -> Tensor:
        return largest(self.weight)


def squared_lengths(models: Tensor, start: Tensor, offset: Tensor | None) -> Tensor:
    """`|models[k] - start - offset|^2`, `[K]` float64, for `models [K, ...]` and a `start` of all or of each."""
    result = torch.zeros(models.shape[0], dtype=torch.float64, device=models.device)
    for k, (model, first) in enumerate(zip(models, start.expand_as(models), strict=True)):
        move = model - first
        if offset is not None:
            move -= offset.view_as(move)
        result[k] = torch.linalg.vector_norm(move, dtype=torch.float64).square()
    return result


def largest(tensors: Tensor) -> Tensor:
    """The largest absolute number of each `[K, ...]`; NaN where one is."""
    flat = tensors.flatten(1)
    return torch.maximum(-flat.amin(dim=1), flat.amax(dim=1))  # `aminmax` along rows takes ten times as long
