"""The weights of a first layer as low-rank updates over the examples of each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.simulations.engine.low_rank import LowRankWeights
from corymb.simulations.engine.selection import Tables, select_batches
from corymb.simulations.engine.weight_forms import ClientIndex, first_rows, max_abs

WRITTEN = 10  # a weight takes as long to write out as so many examples to multiply by it


@dataclass(frozen=True)
class GramOffset:
    """What is added to the gradient of `GramWeights`: `share * second + F^T X` at each of K clients.

    `share` and the matrix `second [out, in]`, with its bias if the layer has one, are common to all clients; `second`
    may be None. `factors [K, N, out]` are F, over the examples X of each client.
    """

    factors: Tensor
    share: float = 0.0
    second: Tensor | None = None
    second_bias: Tensor | None = None


class _CommonWeight:
    """What the weights of all clients that still train have in common under plain SGD, `W0 + share * second`.

    `pair` holds W0 and `second`, each `[out, in]` with its bias or None; `basis` and `rows` are as in `GramWeights`.
    """

    def __init__(self, pair: Sequence[tuple[Tensor, Tensor | None]], basis: Sequence[Tensor], rows: Tensor) -> None:
        (self._start, self._bias), (self._second, self._second_bias) = pair
        self._basis, self._rows = basis, iter(rows)
        self._weight = torch.empty_like(self._start)
        self._inputs = self._start.new_empty(*rows.shape[1:], self._start.shape[1])

    def outputs(self, clients: int, share: float) -> Tensor:
        """Return the outputs of the next batch at the first A `clients`, `[A, B, out]`."""
        weight = torch.add(self._start, self._second, alpha=share, out=self._weight)
        for examples, rows, inputs in zip(self._basis[:clients], next(self._rows), self._inputs, strict=False):
            torch.index_select(examples, 0, rows, out=inputs)
        result = self._inputs[:clients].flatten(0, 1) @ weight.T
        if self._bias is not None and self._second_bias is not None:
            result += self._bias + share * self._second_bias
        return result.view(clients, -1, len(weight))


class GramWeights(LowRankWeights):
    """The low-rank form over the examples themselves, for the layer that takes the examples as its inputs.

    `basis` holds the examples of each client, `[n_k, in]`. `products [K, N, N]` are their inner products, which hold
    for all rounds. `rows [S, K, B]` are the examples in each batch. So the outputs follow from tables, and the layer
    never reads its inputs.

    With an `offset`, the weight is `alpha * W0 + share * second + A^T X`; the caller adds the offset in each step.
    Where that costs less than a second table, the part which all clients share is written out in each step.
    """

    def __init__(
        self, start: Tensor, bias: Tensor | None, basis: list[Tensor], products: Tensor, rows: Tensor, plain: bool,
        offset: GramOffset | None = None,
    ) -> None:  # fmt: skip
        clients, count, _ = products.shape
        super().__init__(start, bias, clients, count, plain)
        self._basis, self._products = basis, products
        self._input_sum = products.diagonal(dim1=1, dim2=2).amax(dim=1).sqrt() * count
        common: list[tuple[Tensor, Tensor | None]] = [(start, bias)]
        self._written: _CommonWeight | None = None
        if offset is not None and offset.second is not None:
            self.second, self.second_bias = offset.second, offset.second_bias
            self.share = start.new_zeros(clients, 1, 1, dtype=torch.float64)  # a sum of many small steps
            common.append((offset.second, offset.second_bias))
            if plain and len(rows) * (rows[0].numel() + WRITTEN) < 2 * clients * count:
                self._written, common = _CommonWeight(common, basis, rows), []
        tables = [self._outputs_of(*each) for each in common]
        gram = products if bias is None else products + 1  # the bias adds an input that is one
        self._batches = iter(select_batches(Tables(tables, gram, self.factors), rows))
        used = rows.amax(dim=(1, 2)).cummax(dim=0).values + 1
        if offset is not None:
            used.fill_(count)
        self._used = iter([0, *used.tolist()])  # at each step, the rows of the factors that may be non-zero

    def _outputs_of(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the outputs of all examples under one weight `[out, in]`, `[K, N, out]`."""
        result = weight.new_empty(self.factors.shape)
        bias = weight.new_zeros(1) if bias is None else bias
        for examples, outputs in zip(self._basis, result, strict=True):
            torch.addmm(bias, examples, weight.T, out=first_rows(examples.shape[0], outputs))
        return result

    def trainable(self) -> list[tuple[Tensor, Tensor]]:
        """See `BlockParameter`."""
        return super().trainable() + ([] if self.second is None else [(self.share, self.share.clone())])

    def added(self, offset: GramOffset) -> list[Tensor]:
        """Return what `offset` adds to the gradient of each tensor of `trainable`."""
        share = [] if self.second is None else [torch.full_like(self.share, offset.share)]
        return [torch.zeros_like(self.alpha), offset.factors, *share]

    def outputs(self, inputs: Tensor) -> Tensor:
        active, used = inputs.shape[0], next(self._used)
        self._batch = next(self._batches)
        result = self._common_outputs(active, is_first=not used)
        if not used:
            return result
        gram, factors = self._batch.gram(active), first_rows(active, self.factors)
        if used < factors.shape[1]:
            gram, factors = gram[:, :, :used], factors[:, :used]
        return result.baddbmm_(gram, factors)

    def _common_outputs(self, active: int, is_first: bool) -> Tensor:
        """Return the outputs of the batch without the factors' part, `[A, B, out]`."""
        if self._written is not None:
            return self._written.outputs(active, float(self.share[0]))
        result = self.scaled(self._batch.outputs(0, active))
        if self.second is not None and not is_first:
            result.addcmul_(self._batch.outputs(1, active), first_rows(active, self.share).to(result.dtype))
        return result

    def input_gradients(self, gradients: Tensor) -> Tensor:
        raise NotImplementedError("The examples have no gradients: GramWeights belong to the first layer only.")

    def apply_gradients(self, gradients: Tensor, inputs: Tensor, rate: float | None) -> None:
        if rate is None:
            self._batch.add(gradients, 1.0, into=self.zero_gradients())
            self.share.grad = torch.zeros_like(self.share)
        else:
            self._batch.add(gradients, -rate)

    def weighted_update(self, weights: Tensor, selected: ClientIndex) -> Tensor:
        total = self.start * self.weighted_shrinkage(weights, selected)  # clients not in `selected` have weight 0
        if self.second is not None:
            total.add_(self.second, alpha=self.weighted_share(weights))
        for examples, factors, weight in zip(self._basis, self.factors, weights.tolist(), strict=True):
            if weight:
                total.addmm_(first_rows(examples.shape[0], factors).T, examples, alpha=weight)
        return total

    def gram(self) -> Tensor:
        return self._products

    def inner_products_with(self, direction: Tensor) -> Tensor:
        pairs = zip(self._basis, self.factors, strict=True)
        inner = [
            (first_rows(examples.shape[0], factors) * (examples @ direction.T)).sum(dtype=torch.float64)
            for examples, factors in pairs
        ]
        return torch.stack(inner)

    def dense(self) -> Tensor:
        models = self.start * self.alpha
        if self.second is not None:
            models.add_(self.second * self.share.to(models.dtype))
        for examples, factors, model in zip(self._basis, self.factors, models, strict=True):
            model.addmm_(first_rows(examples.shape[0], factors).T, examples)
        return models

    def bound(self) -> Tensor:
        bound = self.bound_from(self._input_sum)
        if self.second is None:
            return bound
        return bound + self.share.flatten().abs().to(bound.dtype) * max_abs(self.second[None])
