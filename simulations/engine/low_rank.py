"""Weights of a block of clients as low-rank updates of a common start, written out only on request.

Under an optimiser that is linear in its gradients, a client's weight is `alpha * W0 + A^T X`. W0 is the common start,
and the rows of X are the inputs that the layer has seen. Only alpha and the factor A have to be stored. The outputs
are `alpha * x W0^T + (x X^T) A`. A step of SGD, with momentum, weight decay or a proximal term, changes alpha and A
by the same rule as the weight itself. One matrix product applies W0 for all clients, and one more computes a weighted
sum of updates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.simulations.engine.weight_forms import ClientIndex, first_rows, max_abs, squared_lengths

MIN_REMAINDER = 1e-2  # a sum that is smaller than this share of its terms has lost too many digits to cancellation
MIN_SQUARES = 1e-30  # below this, the terms of a sum of squares lose digits to underflow in float32


class LowRankWeights(ABC):
    """Base class of the low-rank forms: `alpha [K, 1, 1]` and `factors [K, N, out]` over N rows of inputs.

    The bias is the weight of one more input, which is always one. So it follows from the factors and takes no step of
    its own. `plain` says that the optimiser is plain SGD. A form may add a `second` common matrix, of which each client
    has a share: `share [K, 1, 1]`; see `GramOffset`.
    """

    def __init__(self, start: Tensor, bias: Tensor | None, clients: int, rows: int, plain: bool) -> None:
        self.start, self.bias = start, bias
        self.alpha = start.new_ones(clients, 1, 1)
        self._is_scaled = not plain  # plain SGD leaves alpha at one
        self.factors = start.new_zeros(clients, rows, start.shape[0])
        self.share = start.new_zeros(clients, 1, 1)
        self.second: Tensor | None = None
        self.second_bias: Tensor | None = None

    @property
    def size(self) -> int:
        """See `BlockParameter`."""
        return self.start.numel()

    def trainable(self) -> list[tuple[Tensor, Tensor]]:
        return [(tensor, tensor.clone()) for tensor in (self.alpha, self.factors)]

    @abstractmethod
    def gram(self) -> Tensor:
        """Return the inner products of the rows of inputs, `X X^T [K, N, N]`."""

    @abstractmethod
    def inner_products_with(self, direction: Tensor) -> Tensor:
        """Return the inner products of `A^T X` with `direction [out, in]`, `[K]` float64."""

    @abstractmethod
    def dense(self) -> Tensor:
        """See `BlockParameter`."""

    def scaled(self, outputs: Tensor) -> Tensor:
        """Multiply `outputs [K, B, ...]` by alpha, in place."""
        return outputs.mul_(first_rows(outputs.shape[0], self.alpha)) if self._is_scaled else outputs

    def zero_gradients(self) -> Tensor:
        """Set the gradients of alpha and of the factors to zero, and return the latter to be filled in."""
        self.alpha.grad, self.factors.grad = torch.zeros_like(self.alpha), torch.zeros_like(self.factors)
        return self.factors.grad

    def bound_from(self, input_sum: Tensor) -> Tensor:
        """Return `|alpha| max|W0| + max|A| * input_sum`; `input_sum` bounds the sums of inputs over the rows."""
        return self.alpha.flatten().abs() * max_abs(self.start[None]) + max_abs(self.factors) * input_sum

    def squared_distances(self, offset: Tensor | None) -> Tensor:
        """See `BlockParameter`: `|A^T X|^2` is `<A A^T, X X^T>`, and `<A^T X, offset>` is `<A, X offset^T>`.

        Weights are written out instead if alpha or the share has changed, if the terms of the sum nearly cancel, or if
        they are too large or too small for their dtype.
        """
        terms = torch.bmm(self.factors, self.factors.transpose(1, 2)).mul_(self.gram()).flatten(1)
        total, magnitude = (sums.sum(dim=1, dtype=torch.float64) for sums in (terms, terms.abs()))
        if offset is not None:
            length = offset.square().sum(dtype=torch.float64)
            total, magnitude = (
                total - 2 * self.inner_products_with(offset.view_as(self.start)) + length,
                magnitude + length,
            )
        is_accurate = (total > MIN_REMAINDER * magnitude) & (magnitude > MIN_SQUARES)  # False if both are infinite
        if bool(is_accurate.all() and (self.alpha == 1).all() and (self.share == 0).all()):
            return total
        return squared_lengths(self.dense(), self.start, offset)

    def weighted_shrinkage(self, weights: Tensor, selected: ClientIndex) -> float:
        """Return `sum_k weights[k] * (alpha_k - 1)`, the share of W0 in a weighted sum of updates."""
        return float(weights[selected] @ (self.alpha[selected].flatten() - 1))

    def weighted_share(self, weights: Tensor) -> float:
        """Return `sum_k weights[k] * share_k`."""
        return float(weights.double() @ self.share.flatten().double())


@dataclass
class LowRankBias:
    """The bias of a layer whose weight `form` is low rank; `start` is its common start `[out]`."""

    form: LowRankWeights
    start: Tensor

    @property
    def size(self) -> int:
        return self.start.numel()

    def weighted_update(self, weights: Tensor, selected: ClientIndex) -> Tensor:
        updates = self.form.factors[selected].sum(dim=1)
        total: Tensor = weights[selected] @ updates
        if self.form.second_bias is not None:
            total.add_(self.form.second_bias, alpha=self.form.weighted_share(weights))
        return total.add_(self.start, alpha=self.form.weighted_shrinkage(weights, selected))

    def squared_distances(self, offset: Tensor | None) -> Tensor:
        return squared_lengths(self.dense(), self.start, offset)

    def trainable(self) -> list[tuple[Tensor, Tensor]]:
        return []  # it follows from the weight's factors

    def dense(self) -> Tensor:
        result = self.form.factors.sum(dim=1) + self.form.alpha[:, 0] * self.start
        if self.form.second_bias is not None:
            result += self.form.share[:, 0].to(result.dtype) * self.form.second_bias
        return result

    def bound(self) -> Tensor:
        return max_abs(self.dense()[:, None])


class InputHistoryWeights(LowRankWeights):
    """The low-rank form over the inputs that the layer has seen: `basis [K, N, in]`, filled batch by batch."""

    def __init__(self, start: Tensor, bias: Tensor | None, clients: int, rows: int, plain: bool) -> None:
        super().__init__(start, bias, clients, rows, plain)
        self._basis = start.new_zeros(clients, rows, start.shape[1])
        self._filled = 0  # rows of the basis

    def outputs(self, inputs: Tensor) -> Tensor:
        filled, active = slice(self._filled), slice(inputs.shape[0])
        common = torch.mm(inputs.flatten(0, 1), self.start.T)
        if self.bias is not None:
            common += self.bias
        result = self.scaled(common.unflatten(0, inputs.shape[:2]))
        if self._filled:
            products = torch.bmm(inputs, self._basis[active, filled].transpose(1, 2))
            if self.bias is not None:
                products += 1
            result.baddbmm_(products, self.factors[active, filled])
        return result

    def input_gradients(self, gradients: Tensor) -> Tensor:
        filled, active = slice(self._filled), slice(gradients.shape[0])
        common = gradients.flatten(0, 1) @ self.start
        result = self.scaled(common.unflatten(0, gradients.shape[:2]))
        if self._filled:
            products = torch.bmm(gradients, self.factors[active, filled].transpose(1, 2))
            result.baddbmm_(products, self._basis[active, filled])
        return result

    def apply_gradients(self, gradients: Tensor, inputs: Tensor, rate: float | None) -> None:
        fresh, active = slice(self._filled, self._filled + inputs.shape[1]), slice(len(inputs))
        self._basis[active, fresh] = inputs
        self._filled = fresh.stop
        if rate is None:
            self.zero_gradients()[active, fresh] = gradients
        else:
            self.factors[active, fresh] = gradients.mul(-rate)

    def weighted_update(self, weights: Tensor, selected: ClientIndex) -> Tensor:
        weighted = self.factors[selected] * weights[selected][:, None, None]
        total = weighted.flatten(0, 1).T @ self._basis[selected].flatten(0, 1)
        return total.add_(self.start, alpha=self.weighted_shrinkage(weights, selected))

    def gram(self) -> Tensor:
        return torch.bmm(self._basis, self._basis.transpose(1, 2))

    def inner_products_with(self, direction: Tensor) -> Tensor:
        return (self.factors * (self._basis @ direction.T)).sum(dim=(1, 2), dtype=torch.float64)

    def dense(self) -> Tensor:
        return torch.baddbmm(self.start * self.alpha, self.factors.transpose(1, 2), self._basis)

    def bound(self) -> Tensor:
        return self.bound_from(max_abs(self._basis) * self._basis.shape[1])
