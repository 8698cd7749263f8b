"""The weights of a first layer as low-rank updates over the examples of each client."""

from __future__ import annotations

import torch
from torch import Tensor

from corymb.simulations.engine.low_rank import LowRankWeights
from corymb.simulations.engine.selection import Tables, select_batches
from corymb.simulations.engine.weight_forms import ClientIndex, first_rows


class GramWeights(LowRankWeights):
    """The low-rank form over the examples themselves, for the layer that takes the examples as its inputs.

    `basis` holds the examples of each client, `[n_k, in]`. `products [K, N, N]` are their inner products, which hold
    for all rounds. `rows [S, K, B]` are the examples in each batch. So the outputs follow from tables, and the layer
    never reads its inputs.
    """

    def __init__(
        self, start: Tensor, bias: Tensor | None, basis: list[Tensor], products: Tensor, rows: Tensor, plain: bool
    ) -> None:
        clients, count, _ = products.shape
        super().__init__(start, bias, clients, count, plain)
        self._basis, self._products = basis, products
        self._input_sum = products.diagonal(dim1=1, dim2=2).amax(dim=1).sqrt() * count
        start_outputs = start.new_empty(clients, count, start.shape[0])
        offset = start.new_zeros(1) if bias is None else bias
        for examples, outputs in zip(basis, start_outputs, strict=True):
            torch.addmm(offset, examples, start.T, out=first_rows(examples.shape[0], outputs))
        gram = products if bias is None else products + 1  # the bias adds an input that is one
        self._batches = iter(select_batches(Tables(start_outputs, gram, self.factors), rows))
        used = rows.amax(dim=(1, 2)).cummax(dim=0).values + 1
        self._used = iter([0, *used.tolist()])  # at each step, the rows of the factors that may be non-zero

    def outputs(self, inputs: Tensor) -> Tensor:
        active, used = inputs.shape[0], next(self._used)
        self._batch = next(self._batches)
        result = self.scaled(self._batch.start_outputs(active))
        if not used:
            return result
        gram, factors = self._batch.gram(active), first_rows(active, self.factors)
        if used < factors.shape[1]:
            gram, factors = gram[:, :, :used], factors[:, :used]
        return result.baddbmm_(gram, factors)

    def input_gradients(self, gradients: Tensor) -> Tensor:
        raise NotImplementedError("The examples have no gradients: GramWeights belong to the first layer only.")

    def apply_gradients(self, gradients: Tensor, inputs: Tensor, rate: float | None) -> None:
        if rate is None:
            self._batch.add(gradients, 1.0, into=self.zero_gradients())
        else:
            self._batch.add(gradients, -rate)

    def weighted_update(self, weights: Tensor, selected: ClientIndex) -> Tensor:
        total = self.start * self.weighted_shrinkage(weights, selected)  # clients not in `selected` have weight 0
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
        for examples, factors, model in zip(self._basis, self.factors, models, strict=True):
            model.addmm_(first_rows(examples.shape[0], factors).T, examples)
        return models

    def bound(self) -> Tensor:
        return self.bound_from(self._input_sum)
