"""Weights of a block of clients as factors, which are never written out unless somebody looks at them.

Under an optimiser that is linear in its gradients a client's weight is `alpha * W0 + A^T X`, where W0 is what all
began with and the rows of X are the inputs that its layer has seen. Then alpha and A are all that has to be kept: an
output is `alpha * x W0^T + (x X^T) A`, and what a step of SGD does to the weight, with momentum, decay or a pull to W0,
it does to alpha and A alike. W0 is met by all clients in one product of matrices, and a weighted sum of updates is
another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.simulations.engine.weight_forms import Kept, largest, squared_lengths, upto

LEFT = 1e-2  # of the size of its terms, what has to be left of a sum for their rounding not to matter
SMALLEST = 1e-30  # sum of squares whose terms float32 still has with all digits


class LowRankWeights(ABC):
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
        return self.alpha.flatten().abs() * largest(self.start[None]) + largest(self.factors) * reach

    def squares(self, offset: Tensor | None) -> Tensor:
        """See `Piece`: `|A^T X|^2` is `<A A^T, X X^T>`, and `<A^T X, offset>` is `<A, X offset^T>`.

        Written out where alpha has moved, where terms of both signs leave too little of each other, and where they are
        too large or too small for their precision.
        """
        terms = torch.bmm(self.factors, self.factors.transpose(1, 2)).mul_(self.gram()).flatten(1)
        total, size = (sums.sum(dim=1, dtype=torch.float64) for sums in (terms, terms.abs()))
        if offset is not None:
            length = offset.square().sum(dtype=torch.float64)
            total, size = total - 2 * self.along(offset.view_as(self.start)) + length, size + length
        sound = (total > LEFT * size) & (size > SMALLEST)  # infinity is not above itself
        if bool(sound.all() and (self.alpha == 1).all()):
            return total
        return squared_lengths(self.written(), self.start, offset)

    def shrunk(self, weights: Tensor, kept: Kept) -> float:
        """`sum_k weights[k] * (alpha_k - 1)`."""
        return float(weights[kept] @ (self.alpha[kept].flatten() - 1))


@dataclass
class LowRankBias:
    """The bias of a layer whose weight is in factors."""

    factors: LowRankWeights
    start: Tensor

    @property
    def size(self) -> int:
        return self.start.numel()

    def moved(self, weights: Tensor, kept: Kept) -> Tensor:
        moves = self.factors.factors[kept].sum(dim=1)
        total: Tensor = weights[kept] @ moves
        return total.add_(self.start, alpha=self.factors.shrunk(weights, kept))

    def squares(self, offset: Tensor | None) -> Tensor:
        return squared_lengths(self.written(), self.start, offset)

    def written(self) -> Tensor:
        return self.factors.factors.sum(dim=1) + self.factors.alpha[:, 0] * self.start

    def bound(self) -> Tensor:
        return largest(self.written()[:, None])


class LowRank(LowRankWeights):
    """LowRankWeights over the rows that each client's layer has seen: `basis [K, N, in]`, filled as batches come."""

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
        return self.bound_with(largest(self._basis) * self._basis.shape[1])
