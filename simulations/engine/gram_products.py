"""Inner products of each client's own examples. They hold for all rounds, so they are cached up to a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from corymb.simulations.data.population import Population
from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.gram_weights import GramWeights

MAX_CACHED = 1 << 26  # numbers in the cache
MAX_TABLE = 1 << 24  # numbers in one table of a block


class UseGram(Enum):
    """When the first layer stores its weights as `GramWeights`, over the examples of each client."""

    NEVER = "never"
    IF_CHEAPER = "if cheaper"
    ALWAYS = "always"


class GramMatrices:
    """The matrices `X X^T [n, n]` of the clients of a population, where the rows of X are a client's examples."""

    def __init__(self, population: Population, use: UseGram) -> None:
        self._population, self._use = population, use
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        self._free = MAX_CACHED  # numbers that still fit into the cache

    def form(
        self, weight: Tensor, bias: Tensor | None, clients: Sequence[int], batches: Batches, plain: bool
    ) -> GramWeights | None:
        """Return the first layer's weights over the examples, or None if another form is cheaper.

        Also None if an example is not finite, because its inner products would make a client's weights NaN even if no
        batch contains it.
        """
        if self._use is not UseGram.ALWAYS and not self.are_cheaper(clients, batches, weight.shape):
            return None
        products = self.of(clients)
        if not products.diagonal(dim1=1, dim2=2).isfinite().all():
            return None
        basis = [self._population.examples(client)[0].flatten(1) for client in clients]
        return GramWeights(weight, bias, basis, products, batches.rows.transpose(0, 1), plain)

    def are_cheaper(self, clients: Sequence[int], batches: Batches, shape: Sequence[int]) -> bool:
        """Return whether `GramWeights` cost less than dense weights for a first layer of this `shape` (out, in).

        Matrices that stay cached over the rounds count a tenth. The result depends on sizes alone, so it is the same
        in every process.
        """
        out, width = shape
        count = max(self._population.size(client) for client in clients)
        _, steps, batch = batches.rows.shape
        if len(clients) * max(count, steps * batch) * max(count, out) > MAX_TABLE:
            return False
        is_cached = int(self._population.sizes.max()) ** 2 * len(self._population) <= MAX_CACHED
        gram = 2 * count * count * width * (0.1 if is_cached else 1.0)
        low_rank = gram + 4 * count * out * width + 20 * steps * batch * count * out
        dense = 20 * steps * batch * out * width + 30 * steps * out * width
        return low_rank < dense

    def of(self, clients: Sequence[int]) -> Tensor:
        """Return the matrices of `clients`, padded with zeros to the largest, `[K, N, N]`."""
        matrices = [self._of(client) for client in clients]
        rows = max(map(len, matrices))
        if all(len(matrix) == rows for matrix in matrices):
            return torch.stack(matrices)
        padded = matrices[0].new_zeros(len(matrices), rows, rows)
        for target, matrix in zip(padded, matrices, strict=True):
            target[: len(matrix), : len(matrix)] = matrix
        return padded

    def _of(self, client: int) -> Tensor:
        if client in self._cache:
            self._cache.move_to_end(client)
            return self._cache[client]
        examples = self._population.examples(client)[0].flatten(1)
        products = examples @ examples.T
        self._cache[client] = products
        self._free -= products.numel()
        while self._free < 0:
            self._free += self._cache.popitem(last=False)[1].numel()
        return products
