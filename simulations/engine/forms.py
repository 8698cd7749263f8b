"""The forms in which a block of clients keeps a layer's weights: written out for each, or as factors that never are.

Under an optimiser that is linear in its gradients a client's weight is `alpha * W0 + A^T X`, where W0 is what all
began with and the rows of X are the inputs that its layer has seen. Then alpha and A are all that has to be kept: an
output is `alpha * x W0^T + (x X^T) A`, and what a step of SGD does to the weight, with momentum, decay or a pull to W0,
it does to alpha and A alike. W0 is met by all clients in one product of matrices, and a weighted sum of updates is
another.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Form(Protocol):
    """The weights `[out, in]` of one layer at K clients."""

    def outputs(self, inputs: Tensor) -> Tensor:
        """`inputs [K, B, in]` times each client's weight, `[K, B, out]`."""

    def inward(self, slopes: Tensor) -> Tensor:
        """The slopes `[K, B, in]` of the inputs, asked for before `learn`."""

    def learn(self, slopes: Tensor, inputs: Tensor, rate: float | None) -> None:
        """Take the slopes `[K, B, out]` of the outputs: a step of plain SGD at `rate`, or gradients if that is None."""

    def coordinates(self) -> list[tuple[Tensor, Tensor]]:
        """What an optimiser moves, clients first, with gradients in `.grad`; and where each began."""

    def moved(self, weights: Tensor, kept: Kept) -> Tensor:
        """`sum_k weights[k] * (W_k - W0)` over the clients `kept`, `[out, in]`."""

    def written(self) -> Tensor:
        """Every client's weight `[K, out, in]`."""

    def bound(self) -> Tensor:
        """What no number of a client's weight exceeds, `[K]`; NaN or infinite where one may be."""


Kept = slice | Tensor  # all clients, or the numbers of some


class Stacked:
    """Each client's weight in full, `[K, ...]`; a step of plain SGD is fused with the product that is its gradient.

    `start` is what all begin with or, where it is their `own`, one for each.
    """

    def __init__(self, start: Tensor, clients: int, own: bool = False) -> None:
        self._start = start
        self.weight = start.clone() if own else start.expand(clients, *start.shape).clone()

    def outputs(self, inputs: Tensor) -> Tensor:
        return torch.bmm(inputs, self.weight[: len(inputs)].transpose(1, 2))

    def inward(self, slopes: Tensor) -> Tensor:
        return torch.bmm(slopes, self.weight[: len(slopes)])

    def learn(self, slopes: Tensor, inputs: Tensor, rate: float | None) -> None:
        if rate is None:
            self.weight.grad = torch.bmm(slopes.transpose(1, 2), inputs)
        else:
            self.weight[: len(slopes)].baddbmm_(slopes.transpose(1, 2), inputs, alpha=-rate)

    def take(self, gradient: Tensor, rate: float | None) -> None:
        """A gradient `[K, ...]` that is there already."""
        if rate is None:
            self.weight.grad = gradient
        else:
            self.weight[: len(gradient)].sub_(gradient, alpha=rate)

    def coordinates(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.weight, self._start.expand_as(self.weight))]

    def moved(self, weights: Tensor, kept: Kept) -> Tensor:
        moves = self.weight[kept] - (self._start if self._start.dim() < self.weight.dim() else self._start[kept])
        return (weights[kept] @ moves.flatten(1)).view(self.weight.shape[1:])

    def written(self) -> Tensor:
        return self.weight

    def bound(self) -> Tensor:
        least, most = self.weight.flatten(1).aminmax(dim=1)
        return torch.maximum(-least, most)


class Factored:
    """Factors over rows that each client's layer sees: `basis [K, N, in]`, filled as batches come.

    `alpha [K]` and `factors [K, N, out]`; the weight is `alpha * start + factors^T basis`.
    """

    def __init__(self, start: Tensor, clients: int, rows: int) -> None:
        self._start = start
        self._basis = start.new_zeros(clients, rows, start.shape[1])
        self._alpha = start.new_ones(clients, 1, 1)
        self._factors = start.new_zeros(clients, rows, start.shape[0])
        self._seen = 0

    def outputs(self, inputs: Tensor) -> Tensor:
        return self._through(inputs, self._start.T, self._basis, self._factors)

    def inward(self, slopes: Tensor) -> Tensor:
        return self._through(slopes, self._start, self._factors, self._basis)

    def _through(self, rows: Tensor, shared: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """`rows [A, B, ...]` of the first A clients times `alpha * shared + left^T right`."""
        seen, active = slice(self._seen), slice(len(rows))
        result = (rows.flatten(0, 1) @ shared).unflatten(0, rows.shape[:2]).mul_(self._alpha[active])
        if self._seen:
            result.baddbmm_(torch.bmm(rows, left[active, seen].transpose(1, 2)), right[active, seen])
        return result

    def learn(self, slopes: Tensor, inputs: Tensor, rate: float | None) -> None:
        fresh, active = slice(self._seen, self._seen + inputs.shape[1]), slice(len(inputs))
        self._basis[active, fresh] = inputs
        self._seen = fresh.stop
        if rate is None:
            gradient = torch.zeros_like(self._factors)
            gradient[active, fresh] = slopes
            self._factors.grad, self._alpha.grad = gradient, torch.zeros_like(self._alpha)
        else:
            self._factors[active, fresh] = slopes.mul(-rate)

    def coordinates(self) -> list[tuple[Tensor, Tensor]]:
        return _factor_coordinates(self._alpha, self._factors)

    def moved(self, weights: Tensor, kept: Kept) -> Tensor:
        weighed = self._factors[kept] * weights[kept][:, None, None]
        total = weighed.flatten(0, 1).T @ self._basis[kept].flatten(0, 1)
        return total.add_(self._start, alpha=float(weights[kept] @ (self._alpha[kept].flatten() - 1)))

    def written(self) -> Tensor:
        return torch.baddbmm(self._start * self._alpha, self._factors.transpose(1, 2), self._basis)

    def bound(self) -> Tensor:
        reach = self._basis.abs().amax(dim=(1, 2)) * len(self._basis[0])
        return _factor_bound(self._start, self._alpha, self._factors, reach)


class Static:
    """Factors over the examples themselves, for the layer that the examples enter first.

    `basis` are the examples of each client, `[n_k, in]`, `products [K, N, N]` their inner products, which hold for all
    rounds. A batch is `rows [K, B]` of them, so no input is ever looked at again.
    """

    def __init__(self, start: Tensor, basis: list[Tensor], products: Tensor) -> None:
        clients, rows, _ = products.shape
        self.width = rows
        self._start, self._basis = start, basis
        self._reach = products.diagonal(dim1=1, dim2=2).amax(dim=1).sqrt() * rows
        self._products = products.view(clients * rows, rows)
        self._first = start.new_zeros(clients, rows, start.shape[0])
        for mine, outputs in zip(basis, self._first, strict=True):
            torch.mm(mine, start.T, out=outputs[: len(mine)])
        self._alpha = start.new_ones(clients, 1, 1)
        self._factors = start.new_zeros(clients, rows, start.shape[0])
        self.rows = torch.zeros(0, dtype=torch.int64)  # of this step's batch, `[K * B]`, counted over all clients

    def outputs(self, inputs: Tensor) -> Tensor:
        active = slice(len(inputs))
        first = self._first.flatten(0, 1).index_select(0, self.rows).view(len(inputs), -1, self._first.shape[2])
        near = self._products.index_select(0, self.rows).view(len(inputs), -1, self.width)
        return first.mul_(self._alpha[active]).baddbmm_(near, self._factors[active])

    def inward(self, slopes: Tensor) -> Tensor:
        raise NotImplementedError("Nothing lies before the examples.")

    def learn(self, slopes: Tensor, inputs: Tensor, rate: float | None) -> None:
        into = self._factors if rate is not None else torch.zeros_like(self._factors)
        into.view(-1, into.shape[2]).index_add_(0, self.rows, slopes.flatten(0, 1), alpha=-rate if rate else 1.0)
        if rate is None:
            self._factors.grad, self._alpha.grad = into, torch.zeros_like(self._alpha)

    def coordinates(self) -> list[tuple[Tensor, Tensor]]:
        return _factor_coordinates(self._alpha, self._factors)

    def moved(self, weights: Tensor, kept: Kept) -> Tensor:
        total = self._start * float(weights[kept] @ (self._alpha[kept].flatten() - 1))
        clients = range(len(weights)) if isinstance(kept, slice) else kept.tolist()
        weighed = self._factors * weights[:, None, None]
        for client in clients:
            mine = self._basis[client]
            total.addmm_(weighed[client, : len(mine)].T, mine)
        return total

    def written(self) -> Tensor:
        models = self._start * self._alpha
        for mine, factors, model in zip(self._basis, self._factors, models, strict=True):
            model.addmm_(factors[: len(mine)].T, mine)
        return models

    def bound(self) -> Tensor:
        return _factor_bound(self._start, self._alpha, self._factors, self._reach)


def _factor_coordinates(alpha: Tensor, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(alpha, torch.ones_like(alpha)), (factors, torch.zeros_like(factors))]


def _factor_bound(start: Tensor, alpha: Tensor, factors: Tensor, reach: Tensor) -> Tensor:
    """`|alpha| max|W0| + max|A| * reach`, where no sum of `|X|` over the rows exceeds `reach`."""
    return alpha.flatten().abs() * start.abs().max() + factors.abs().amax(dim=(1, 2)) * reach
