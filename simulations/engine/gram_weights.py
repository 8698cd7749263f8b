"""The weights of a first layer as factors over the examples that enter it."""

from __future__ import annotations

import torch
from torch import Tensor

from corymb.simulations.engine.low_rank import LowRankWeights
from corymb.simulations.engine.selection import Tables, selections
from corymb.simulations.engine.weight_forms import Kept, upto


class GramWeights(LowRankWeights):
    """LowRankWeights over the examples themselves, for the layer that the examples enter first.

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
        near = products if bias is None else products + 1  # a bias meets an input of one
        self._batches = iter(selections(Tables(first, near, self.factors), rows))
        reach = rows.amax(dim=(1, 2)).cummax(dim=0).values + 1
        self._learnt = iter([0, *reach.tolist()])  # rows of the factors that may not be zero, at each step

    def outputs(self, inputs: Tensor) -> Tensor:
        active, learnt = inputs.shape[0], next(self._learnt)
        self._batch = next(self._batches)
        first = self.scaled(self._batch.first(active))
        if not learnt:
            return first
        near, factors = self._batch.near(active), upto(active, self.factors)
        if learnt < factors.shape[1]:
            near, factors = near[:, :, :learnt], factors[:, :learnt]
        return first.baddbmm_(near, factors)

    def inward(self, slopes: Tensor) -> Tensor:
        raise NotImplementedError("Nothing lies before the examples.")

    def learn(self, slopes: Tensor, inputs: Tensor, rate: float | None) -> None:
        if rate is None:
            self._batch.add(slopes, 1.0, into=self.gradients())
        else:
            self._batch.add(slopes, -rate)

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
