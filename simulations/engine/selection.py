"""The examples of a batch, as rows in the tables of `GramWeights`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corymb.simulations.engine.weight_forms import first_rows


class Tables(NamedTuple):
    """One row per example, for K clients with N examples each at most."""

    outputs: list[Tensor]  # each [K, N, out], the layer's outputs under one weight: the common start, or another
    gram: Tensor  # [K, N, N], inner products of the examples
    factors: Tensor  # [K, N, out]


class Selection:
    """The B rows of each client's tables that one batch uses. Each method takes those of the first A clients.

    `numbers [K * B]` are indices into the tables with all clients' rows one after another.
    """

    def __init__(self, tables: Tables, numbers: Tensor) -> None:
        self._outputs = [table.flatten(0, 1) for table in tables.outputs]
        self._gram, self._factors = tables.gram.flatten(0, 1), tables.factors.flatten(0, 1)
        self._numbers, self._width = numbers, len(numbers) // len(tables.gram)

    def outputs(self, weight: int, clients: int) -> Tensor:
        """Return the outputs under the weight of this number, `[A, B, out]`, a copy that the caller may change."""
        return self._select(self._outputs[weight], clients)

    def gram(self, clients: int) -> Tensor:
        """Return `[A, B, N]`."""
        return self._select(self._gram, clients)

    def add(self, gradients: Tensor, factor: float, into: Tensor | None = None) -> None:
        """Add `gradients [A, B, out]` times `factor` to the factors, or to the table `into` of the same shape."""
        table = self._factors if into is None else into.flatten(0, 1)
        rows = gradients.flatten(0, 1)
        table.index_add_(0, first_rows(rows.shape[0], self._numbers), rows, alpha=factor)

    def _select(self, table: Tensor, clients: int) -> Tensor:
        numbers = first_rows(clients * self._width, self._numbers)
        return table.index_select(0, numbers).view(clients, self._width, -1)


def select_batches(tables: Tables, rows: Tensor) -> list[Selection]:
    """Return the selection of every batch; `rows [S, K, B]` are indices into each client's own tables."""
    clients, count, _ = tables.gram.shape
    numbers = rows + torch.arange(clients)[:, None] * count
    return [Selection(tables, each) for each in numbers.flatten(1).unbind()]
