"""Inner products of each client's own examples. They hold for all rounds, so they are cached up to a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from corymb.client import TrainSettings
from corymb.simulations.data.population import Population
from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.blocks import MAX_CLIENTS
from corymb.simulations.engine.gram_weights import GramOffset, GramWeights

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
        count = max(self._population.size(client) for client in clients)
        if not self._are_cheaper(len(clients), count, batches.rows.shape[1:], weight.shape):
            return None
        return self._made(weight, bias, clients, batches, plain)

    def form_with(
        self, offset: GramOffset, weight: Tensor, bias: Tensor | None, clients: Sequence[int], batches: Batches,
        plain: bool,
    ) -> GramWeights:  # fmt: skip
        """Return the first layer's weights for an `offset`. Raises `ValueError` if an example is not finite."""
        form = self._made(weight, bias, clients, batches, plain, offset)
        if form is None:
            raise ValueError("an example of a client is not finite")
        return form

    def are_cheaper_for_all(self, settings: TrainSettings, shape: Sequence[int]) -> bool:
        """Return whether `GramWeights` cost less for the largest client, and so for any block of any round."""
        count = int(self._population.sizes.max())
        batch = min(settings.batch_size, count)
        steps = settings.steps or (settings.epochs or 1) * -(-count // batch)
        return self._are_cheaper(min(MAX_CLIENTS, len(self._population)), count, (steps, batch), shape)

    def _made(
        self, weight: Tensor, bias: Tensor | None, clients: Sequence[int], batches: Batches, plain: bool,
        offset: GramOffset | None = None,
    ) -> GramWeights | None:  # fmt: skip
        products = self.of(clients)
        if not products.diagonal(dim1=1, dim2=2).isfinite().all():
            return None
        basis = [self._population.flat_inputs(client) for client in clients]
        return GramWeights(weight, bias, basis, products, batches.rows.transpose(0, 1), plain, offset)

    def _are_cheaper(self, clients: int, count: int, batches: Sequence[int], shape: Sequence[int]) -> bool:
        """Return whether `GramWeights` cost less than dense weights for a first layer of this `shape` (out, in).

        `count` are the examples of the largest of the `clients`, `batches` the steps and the examples of each. Matrices
        that stay cached over the rounds count a tenth. The result depends on sizes alone, so it is the same in every
        process.
        """
        if self._use is UseGram.ALWAYS:
            return True
        (out, width), (steps, batch) = shape, batches
        if clients * max(count, steps * batch) * max(count, out) > MAX_TABLE:
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
        examples = self._population.flat_inputs(client)
        products = examples @ examples.T
        self._cache[client] = products
        self._free -= products.numel()
        while self._free < 0:
            self._free += self._cache.popitem(last=False)[1].numel()
        return products
