"""Inner products of each client's own examples. They hold for all rounds, so they are cached up to a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from corymb.simulations.data.population import Population
from corymb.simulations.engine.batches import Batches

MAX_CACHED = 1 << 26  # numbers in the cache
MAX_TABLE = 1 << 24  # numbers in one table of a block


class GramMatrices:
    """The matrices `X X^T [n, n]` of the clients of a population, where the rows of X are a client's examples."""

    def __init__(self, population: Population) -> None:
        self._population = population
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        self._free = MAX_CACHED  # numbers that still fit into the cache

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
