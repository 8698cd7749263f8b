"""The forms in which a block of clients keeps a layer's weights: written out for each, or as factors that never are.

Under an optimiser that is linear in its gradients a client's weight is `alpha * W0 + A^T X`, where W0 is what all
began with and the rows of X are the inputs that its layer has seen. Then alpha and A are all that has to be kept: an
output is `alpha * x W0^T + (x X^T) A`, and what a step of SGD does to the weight, with momentum, decay or a pull to W0,
it does to alpha and A alike. W0 is met by all clients in one product of matrices, and a weighted sum of updates is
another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
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


class Form(Piece, Protocol):
    """The weights `[out, in]` of one layer at K clients, and for factors the bias too."""

    def outputs(self, inputs: Tensor) -> Tensor:
        """`inputs [K, B, in]` times each client's weight, `[K, B, out]`."""

    def inward(self, slopes: Tensor) -> Tensor:
        """The slopes `[K, B, in]` of the inputs, asked for before `learn`."""

    def learn(self, slopes: Tensor, inputs: Tensor, rate: float | None) -> None:
        """Take the slopes `[K, B, out]` of the outputs: a step of plain SGD at `rate`, or gradients if that is None."""

    def coordinates(self) -> list[tuple[Tensor, Tensor]]:
        """What an optimiser moves, clients first, with gradients in `.grad`; and where each began."""


LEFT = 3e-3  # of the size of its terms, what has to be left of a sum for their rounding not to matter
Kept = slice | Tensor  # all clients, or the numbers of some


def upto(count: int, tensor: Tensor) -> Tensor:
    """The first `count` rows: the tensor itself where there are no more, which takes no time."""
    return tensor if tensor.shape[0] == count else tensor[:count]


class Stacked:
    """Each client's weight in full, `[K, ...]`; a step of plain SGD is fused with the product that is its slope.

    `start` is what all begin with or, where it is their `own`, one for each.
    """

    def __init__(self, start: Tensor, clients: int, own: bool = False) -> None:
        self._start = start
        self.weight = start.clone() if own else start.expand(clients, *start.shape).clone()

    @property
    def size(self) -> int:
        return self.weight[0].numel()

    def outputs(self, inputs: Tensor) -> Tensor:
        clients, width, _ = inputs.shape
        weight = upto(clients, self.weight)
        if weight.shape[1] < width < weight.shape[2]:  # few rows are faster than few columns
            return torch.bmm(weight, inputs.transpose(1, 2)).transpose(1, 2)
        return torch.bmm(inputs, weight.transpose(1, 2))

    def inward(self, slopes: Tensor) -> Tensor:
        return torch.bmm(slopes, upto(slopes.shape[0], self.weight))

    def learn(self, slopes: Tensor, inputs: Tensor, rate: float | None) -> None:
        if rate is None:
            self.weight.grad = torch.bmm(slopes.transpose(1, 2), inputs)
        else:
            upto(slopes.shape[0], self.weight).baddbmm_(slopes.transpose(1, 2), inputs, alpha=-rate)

    def take(self, gradient: Tensor, rate: float | None) -> None:
        """A gradient `[K, ...]` that is there already."""
        if rate is None:
            self.weight.grad = gradient
        else:
            upto(gradient.shape[0], self.weight).sub_(gradient, alpha=rate)

    def coordinates(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.weight, self._start.expand_as(self.weight))]

    def moved(self, weights: Tensor, kept: Kept) -> Tensor:
        moves = self.weight[kept] - (self._start if self._start.dim() < self.weight.dim() else self._start[kept])
        return (weights[kept] @ moves.flatten(1)).view(self.weight.shape[1:])

    def squares(self, offset: Tensor | None) -> Tensor:
        return _squares(self.weight - self._start, offset)

    def written(self) -> Tensor:
        return self.weight

    def bound(self) -> Tensor:
        return _size(self.weight)


class Factors(ABC):
    """What the two factored forms share: `alpha [K, 1, 1]` and `factors [K, N, out]` over N rows of inputs.

    A bias is the weight of one more input that is always one, so it moves with the factors and takes no step of its
    own.
    """

    def __init__(self, start: Tensor, bias: Tensor | None, clients: int, rows: int, plain: bool) -> None:
        self.start, self.bias = start, bias
        self.alpha = start.new_ones(clients, 1, 1)
        self._is_scaled = not plain  # a plain step leaves alpha alone
        self.factors = start.new_zeros(clients, rows, start.shape[0])

    @property
    def size(self) -> int:
        """See `Piece`."""
        return self.start.numel()

    def coordinates(self) -> list[tuple[Tensor, Tensor]]:
        return [(tensor, tensor.clone()) for tensor in (self.alpha, self.factors)]

    @abstractmethod
    def gram(self) -> Tensor:
        """The inner products of the rows of inputs, `[K, N, N]`."""

    @abstractmethod
    def along(self, direction: Tensor) -> Tensor:
        """The inner products of `A^T X` with `direction [out, in]`, `[K]` float64."""

    @abstractmethod
    def written(self) -> Tensor:
        """See `Piece`."""

    def scaled(self, outputs: Tensor) -> Tensor:
        """`outputs [K, B, ...]` times alpha, in place."""
        return outputs.mul_(upto(outputs.shape[0], self.alpha)) if self._is_scaled else outputs

    def gradients(self) -> Tensor:
        """Zeros to write the factors' gradient into; alpha's is zero."""
        self.alpha.grad, self.factors.grad = torch.zeros_like(self.alpha), torch.zeros_like(self.factors)
        return self.factors.grad

    def bound_with(self, reach: Tensor) -> Tensor:
        """`|alpha| max|W0| + max|A| * reach`, where no sum of inputs over the rows exceeds `reach`."""
        return self.alpha.flatten().abs() * _size(self.start[None]) + _size(self.factors) * reach

    def squares(self, offset: Tensor | None) -> Tensor:
        """See `Piece`: `|A^T X|^2` is `<A A^T, X X^T>`, and `<A^T X, offset>` is `<A, X offset^T>`.

        Written out where alpha has moved, or where terms of both signs leave too little of each other.
        """
        terms = torch.bmm(self.factors, self.factors.transpose(1, 2)).mul_(self.gram()).flatten(1)
        total, size = (sums.sum(dim=1, dtype=torch.float64) for sums in (terms, terms.abs()))
        if offset is not None:
            length = offset.square().sum(dtype=torch.float64)
            total, size = total - 2 * self.along(offset.view_as(self.start)) + length, size + length
        if bool((self.alpha == 1).all() and (total >= LEFT * size).all()):
            return total
        return _squares(self.written() - self.start, offset)

    def shrunk(self, weights: Tensor, kept: Kept) -> float:
        """`sum_k weights[k] * (alpha_k - 1)`."""
        return float(weights[kept] @ (self.alpha[kept].flatten() - 1))


@dataclass
class FactoredBias:
    """The bias of a layer whose weight is in factors."""

    factors: Factors
    start: Tensor

    @property
    def size(self) -> int:
        return self.start.numel()

    def moved(self, weights: Tensor, kept: Kept) -> Tensor:
        moves = self.factors.factors[kept].sum(dim=1)
        total: Tensor = weights[kept] @ moves
        return total.add_(self.start, alpha=self.factors.shrunk(weights, kept))

    def squares(self, offset: Tensor | None) -> Tensor:
        return _squares(self.written() - self.start, offset)

    def written(self) -> Tensor:
        return self.factors.factors.sum(dim=1) + self.factors.alpha[:, 0] * self.start

    def bound(self) -> Tensor:
        return _size(self.written()[:, None])


class Factored(Factors):
    """Factors over the rows that each client's layer has seen: `basis [K, N, in]`, filled as batches come."""

    def __init__(self, start: Tensor, bias: Tensor | None, clients: int, rows: int, plain: bool) -> None:
        super().__init__(start, bias, clients, rows, plain)
        self._basis = start.new_zeros(clients, rows, start.shape[1])
        self._seen = 0

    def outputs(self, inputs: Tensor) -> Tensor:
        seen, active = slice(self._seen), slice(inputs.shape[0])
        shared = torch.mm(inputs.flatten(0, 1), self.start.T)
        if self.bias is not None:
            shared += self.bias
        result = self.scaled(shared.unflatten(0, inputs.shape[:2]))
        if self._seen:
            near = torch.bmm(inputs, self._basis[active, seen].transpose(1, 2))
            if self.bias is not None:
                near += 1
            result.baddbmm_(near, self.factors[active, seen])
        return result

    def inward(self, slopes: Tensor) -> Tensor:
        seen, active = slice(self._seen), slice(slopes.shape[0])
        shared = slopes.flatten(0, 1) @ self.start
        result = self.scaled(shared.unflatten(0, slopes.shape[:2]))
        if self._seen:
            near = torch.bmm(slopes, self.factors[active, seen].transpose(1, 2))
            result.baddbmm_(near, self._basis[active, seen])
        return result

    def learn(self, slopes: Tensor, inputs: Tensor, rate: float | None) -> None:
        fresh, active = slice(self._seen, self._seen + inputs.shape[1]), slice(len(inputs))
        self._basis[active, fresh] = inputs
        self._seen = fresh.stop
        if rate is None:
            self.gradients()[active, fresh] = slopes
        else:
            self.factors[active, fresh] = slopes.mul(-rate)

    def moved(self, weights: Tensor, kept: Kept) -> Tensor:
        weighed = self.factors[kept] * weights[kept][:, None, None]
        total = weighed.flatten(0, 1).T @ self._basis[kept].flatten(0, 1)
        return total.add_(self.start, alpha=self.shrunk(weights, kept))

    def gram(self) -> Tensor:
        return torch.bmm(self._basis, self._basis.transpose(1, 2))

    def along(self, direction: Tensor) -> Tensor:
        return (self.factors * (self._basis @ direction.T)).sum(dim=(1, 2), dtype=torch.float64)

    def written(self) -> Tensor:
        return torch.baddbmm(self.start * self.alpha, self.factors.transpose(1, 2), self._basis)

    def bound(self) -> Tensor:
        return self.bound_with(_size(self._basis) * self._basis.shape[1])


class OnExamples(Factors):
    """Factors over the examples themselves, for the layer that the examples enter first.

    `basis` are the examples of each client, `[n_k, in]`, `products [K, N, N]` their inner products, which hold for all
    rounds, and `rows [S, K, B]` which of them each batch takes, so no input is ever looked at again.
    """

    def __init__(
        self, start: Tensor, bias: Tensor | None, basis: list[Tensor], products: Tensor, rows: Tensor, plain: bool
    ) -> None:
        clients, width, _ = products.shape
        super().__init__(start, bias, clients, width, plain)
        self._basis, self._products = basis, products
        self._reach = products.diagonal(dim1=1, dim2=2).amax(dim=1).sqrt() * width
        first = start.new_empty(clients, width, start.shape[0])
        offset = start.new_zeros(1) if bias is None else bias
        for mine, outputs in zip(basis, first, strict=True):
            torch.addmm(offset, mine, start.T, out=upto(mine.shape[0], outputs))
        # Of each example: what a batch with it begins with, its products with all others, and its row in the factors.
        self._first = first.flatten(0, 1)
        self._near = (products if bias is None else products + 1).flatten(0, 1)
        self._flat = self.factors.flatten(0, 1)
        reach = rows.amax(dim=(1, 2)).cummax(dim=0).values + 1
        self._learnt = iter([0, *reach.tolist()])  # rows of the factors that may not be zero, at each step
        self._steps = iter((rows + torch.arange(clients, device=rows.device)[:, None] * width).flatten(1).unbind())

    def outputs(self, inputs: Tensor) -> Tensor:
        shape = inputs.shape[:2]
        learnt = next(self._learnt)
        self._rows = upto(shape.numel(), next(self._steps))
        first = self.scaled(self._first.index_select(0, self._rows).view(*shape, -1))
        if not learnt:
            return first
        near = self._near.index_select(0, self._rows).view(*shape, -1)[:, :, :learnt]
        return first.baddbmm_(near, self.factors[: shape[0], :learnt])

    def inward(self, slopes: Tensor) -> Tensor:
        raise NotImplementedError("Nothing lies before the examples.")

    def learn(self, slopes: Tensor, inputs: Tensor, rate: float | None) -> None:
        into = self._flat if rate is not None else self.gradients().flatten(0, 1)
        into.index_add_(0, self._rows, slopes.flatten(0, 1), alpha=1.0 if rate is None else -rate)

    def moved(self, weights: Tensor, kept: Kept) -> Tensor:
        total = self.start * self.shrunk(weights, kept)  # who is not kept has weight 0
        for mine, factors, weight in zip(self._basis, self.factors, weights.tolist(), strict=True):
            if weight:
                total.addmm_(upto(mine.shape[0], factors).T, mine, alpha=weight)
        return total

    def gram(self) -> Tensor:
        return self._products

    def along(self, direction: Tensor) -> Tensor:
        pairs = zip(self._basis, self.factors, strict=True)
        inner = [
            (upto(mine.shape[0], factors) * (mine @ direction.T)).sum(dtype=torch.float64) for mine, factors in pairs
        ]
        return torch.stack(inner)

    def written(self) -> Tensor:
        models = self.start * self.alpha
        for mine, factors, model in zip(self._basis, self.factors, models, strict=True):
            model.addmm_(upto(mine.shape[0], factors).T, mine)
        return models

    def bound(self) -> Tensor:
        return self.bound_with(self._reach)


def _squares(moves: Tensor, offset: Tensor | None) -> Tensor:
    """`|moves[k] - offset|^2`, `[K]` float64, for `moves [K, ...]`."""
    flat = moves.flatten(1) if offset is None else moves.flatten(1) - offset
    return flat.square().sum(dim=1).double()


def _size(tensors: Tensor) -> Tensor:
    """The largest absolute number of each `[K, ...]`; NaN where one is."""
    flat = tensors.flatten(1)
    return torch.maximum(-flat.amin(dim=1), flat.amax(dim=1))  # `aminmax` along rows takes ten times as long
