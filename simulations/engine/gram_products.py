"""Inner products of each client's own examples: they hold for all rounds, so they are kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from corymb.simulations.data.population import Population
from corymb.simulations.engine.batches import Batches

ROOM = 1 << 26  # numbers that are kept
LARGEST = 1 << 24  # numbers in a table of a block's factors


class Products:
    """The matrices `X X^T [n, n]` of a population's clients."""

    def __init__(self, population: Population) -> None:
        self._population = population
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._room = ROOM

    def are_cheap(self, clients: Sequence[int], batches: Batches, shape: Sequence[int]) -> bool:
        """Whether a first layer of the `shape` (out, in) costs less in factors over all examples than written out.

        What is kept over rounds counts a tenth. The answer follows from sizes alone, so that it is everybody's.
        """
        out, width = shape
        count = max(self._population.size(client) for client in clients)
        _, steps, batch = batches.rows.shape
        if len(clients) * max(count, steps * batch) * max(count, out) > LARGEST:
            return False
        is_kept = int(self._population.sizes.max()) ** 2 * len(self._population) <= ROOM
        gram = 2 * count * count * width * (0.1 if is_kept else 1.0)
        factored = gram + 4 * count * out * width + 20 * steps * batch * count * out
        stacked = 20 * steps * batch * out * width + 30 * steps * out * width
        return factored < stacked

    def of(self, clients: Sequence[int]) -> Tensor:
        """The matrices of `clients`, padded with zeros to the largest, `[K, N, N]`."""
        found = [self._of(client) for client in clients]
        rows = max(map(len, found))
        if all(len(each) == rows for each in found):
            return torch.stack(found)
        together = found[0].new_zeros(len(found), rows, rows)
        for place, each in zip(together, found, strict=True):
            place[: len(each), : len(each)] = each
        return together

    def _of(self, client: int) -> Tensor:
        if client in self._kept:
            self._kept.move_to_end(client)
            return self._kept[client]
        examples = self._population.examples(client)[0].flatten(1)
        products = examples @ examples.T
        self._kept[client] = products
        self._room -= products.numel()
        while self._room < 0:
            self._room += self._kept.popitem(last=False)[1].numel()
        return products
