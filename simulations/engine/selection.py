"""The examples of a batch, as rows in the tables of the layer that stands on them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from corymb.simulations.engine.weight_forms import upto


class Tables(NamedTuple):
    """Of K clients with N examples each at most."""

    first: Tensor  # [K, N, out], what a batch with an example begins with
    near: Tensor  # [K, N, N], inner products
    factors: Tensor  # [K, N, out]


class Selection(Protocol):
    """B rows of each client's tables; asked for those of the first A clients."""

    def first(self, clients: int) -> Tensor:
        """`[A, B, out]`, in memory of its own."""

    def near(self, clients: int) -> Tensor:
        """`[A, B, N]`, which may lie in the table itself."""

    def add(self, slopes: Tensor, factor: float, into: Tensor | None = None) -> None:
        """Add `slopes [A, B, out]` times `factor` to the factors, or to a table like them."""


class Run:
    """The same consecutive rows for all, as batches are where nothing is shuffled: nothing has to be gathered."""

    def __init__(self, tables: Tables, first: int, width: int) -> None:
        self._at = slice(first, first + width)
        self._first, self._near, self._factors = (table[:, self._at] for table in tables)

    def first(self, clients: int) -> Tensor:
        return upto(clients, self._first).clone(memory_format=torch.contiguous_format)

    def near(self, clients: int) -> Tensor:
        return upto(clients, self._near)

    def add(self, slopes: Tensor, factor: float, into: Tensor | None = None) -> None:
        table = self._factors if into is None else into[:, self._at]
        upto(slopes.shape[0], table).add_(slopes, alpha=factor)


class Picked:
    """Any rows; `numbers [K * B]` count through the tables of all clients."""

    def __init__(self, tables: Tables, numbers: Tensor) -> None:
        self._first, self._near, self._factors = (table.flatten(0, 1) for table in tables)
        self._numbers, self._width = numbers, len(numbers) // len(tables.first)

    def first(self, clients: int) -> Tensor:
        return self._of(self._first, clients)

    def near(self, clients: int) -> Tensor:
        return self._of(self._near, clients)

    def add(self, slopes: Tensor, factor: float, into: Tensor | None = None) -> None:
        table = self._factors if into is None else into.flatten(0, 1)
        rows = slopes.flatten(0, 1)
        table.index_add_(0, upto(rows.shape[0], self._numbers), rows, alpha=factor)

    def _of(self, table: Tensor, clients: int) -> Tensor:
        numbers = upto(clients * self._width, self._numbers)
        return table.index_select(0, numbers).view(clients, self._width, -1)


def selections(tables: Tables, rows: Tensor) -> list[Selection]:
    """Those of every batch, from `rows [S, K, B]` of each client's own tables."""
    clients, count, _ = tables.first.shape
    size = rows.shape[2]
    firsts = rows[:, :1, :1]
    are_runs = (rows == firsts + torch.arange(size)).flatten(1).all(dim=1).tolist()
    numbers = (rows + torch.arange(clients)[:, None] * count).flatten(1).unbind()
    runs: dict[int, Run] = {}  # which come again in each epoch
    result: list[Selection] = []
    for is_run, first, picked in zip(are_runs, firsts.flatten().tolist(), numbers, strict=True):
        if is_run and first not in runs:
            runs[first] = Run(tables, first, size)
        result.append(runs[first] if is_run else Picked(tables, picked))
    return result
