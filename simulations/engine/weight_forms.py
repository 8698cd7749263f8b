"""Weight forms, the ways to store a layer's weights for a block of clients: their interface, and the dense form."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class BlockParameter(Protocol):
    """One parameter of the model (a weight or a bias) at the K clients of a trained block."""

    @property
    def size(self) -> int:
        """The number of elements at each client."""

    def weighted_update(self, weights: Tensor, selected: ClientIndex) -> Tensor:
        """Return `sum_k weights[k] * (W_k - W0)` over the clients `selected`."""

    def squared_distances(self, offset: Tensor | None) -> Tensor:
        """Return `|W_k - W0 - offset|^2`, `[K]` float64, to a relative 1e-5; `offset` is zero if None."""

    def dense(self) -> Tensor:
        """Return every client's parameter in full, `[K, ...]`."""

    def bound(self) -> Tensor:
        """Return an upper bound on the absolute values of each client, `[K]`; NaN or infinite if one may be."""

    def trainable(self) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of a tensor that an optimiser updates, with clients first, and its value at the start."""


class WeightForm(BlockParameter, Protocol):
    """The weights `[out, in]` of one layer at K clients; a low-rank form holds the bias as well."""

    def outputs(self, inputs: Tensor) -> Tensor:
        """Return `inputs [K, B, in]` times each client's weight, `[K, B, out]`."""

    def input_gradients(self, gradients: Tensor) -> Tensor:
        """Return the gradients `[K, B, in]` of the inputs; to be called before `apply_gradients`."""

    def apply_gradients(self, gradients: Tensor, inputs: Tensor, rate: float | None) -> None:
        """Take a step of plain SGD at `rate`, given the gradients `[K, B, out]` of the outputs.

        If `rate` is None, store the gradients in `.grad` for an optimiser instead.
        """


ClientIndex = slice | Tensor  # selects all clients, or some by number


def first_rows(count: int, tensor: Tensor) -> Tensor:
    """Return the first `count` rows; the tensor itself if it has no more, which is faster than slicing it."""
    return tensor if tensor.shape[0] == count else tensor[:count]


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to `dtype`; return the tensor itself if it has that dtype, which is faster than `Tensor.to`."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class DenseWeights:
    """The dense form: each client's parameter in full, `weight [K, ...]`.

    `start` is the value that all clients start from or, with `own_starts`, the value of each client, `[K, ...]`. A
    step of plain SGD is fused with the matrix product that computes the gradient.
    """

    def __init__(self, start: Tensor, clients: int, own_starts: bool = False) -> None:
        self._start = start
        self.weight = start.clone() if own_starts else start.expand(clients, *start.shape).clone()

    @property
    def size(self) -> int:
        return self.weight[0].numel()

    def like(self, tensor: Tensor) -> Tensor:
        """Return the weights of the first A clients, in the dtype of `tensor [A, ...]`."""
        return as_dtype(first_rows(tensor.shape[0], self.weight), tensor.dtype)

    def outputs(self, inputs: Tensor) -> Tensor:
        weight, batch = self.like(inputs), inputs.shape[1]
        if weight.shape[1] < batch < weight.shape[2]:  # a result with few rows is faster than one with few columns
            return torch.bmm(weight, inputs.transpose(1, 2)).transpose(1, 2)
        return torch.bmm(inputs, weight.transpose(1, 2))

    def input_gradients(self, gradients: Tensor) -> Tensor:
        return torch.bmm(gradients, self.like(gradients))

    def apply_gradients(self, gradients: Tensor, inputs: Tensor, rate: float | None) -> None:
        if rate is None or gradients.dtype != self.weight.dtype:
            self.apply_weight_gradient(torch.bmm(gradients.transpose(1, 2), inputs), rate)
        else:
            first_rows(gradients.shape[0], self.weight).baddbmm_(gradients.transpose(1, 2), inputs, alpha=-rate)

    def apply_weight_gradient(self, gradient: Tensor, rate: float | None) -> None:
        """Take a step with the gradient `[K, ...]` of the weights, or store it if `rate` is None."""
        if rate is None:
            self.weight.grad = gradient.to(self.weight.dtype)
        else:
            first_rows(gradient.shape[0], self.weight).sub_(gradient, alpha=rate)

    def trainable(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.weight, self._start.expand_as(self.weight))]

    def weighted_update(self, weights: Tensor, selected: ClientIndex) -> Tensor:
        updates = self.weight[selected] - (
            self._start if self._start.dim() < self.weight.dim() else self._start[selected]
        )
        return (weights[selected] @ updates.flatten(1)).view(self.weight.shape[1:])

    def squared_distances(self, offset: Tensor | None) -> Tensor:
        return squared_lengths(self.weight, self._start, offset)

    def dense(self) -> Tensor:
        return self.weight

    def bound(self) -> Tensor:
        return max_abs(self.weight)


def squared_lengths(models: Tensor, start: Tensor, offset: Tensor | None) -> Tensor:
    """Return `|models[k] - start - offset|^2`, `[K]` float64, for `models [K, ...]`.

    `start` is common to all clients, `[...]`, or of each client, `[K, ...]`; `offset` is zero if None.
    """
    result = torch.zeros(models.shape[0], dtype=torch.float64, device=models.device)
    for k, (model, model_start) in enumerate(zip(models, start.expand_as(models), strict=True)):
        update = model - model_start
        if offset is not None:
            update -= offset.view_as(update)
        result[k] = torch.linalg.vector_norm(update, dtype=torch.float64).square()
    return result


def max_abs(tensors: Tensor) -> Tensor:
    """Return the largest absolute value of each `tensors[k]`, `[K]`; NaN if one is NaN."""
    flat = tensors.flatten(1)
    return torch.maximum(-flat.amin(dim=1), flat.amax(dim=1))  # `aminmax` along rows takes ten times as long
