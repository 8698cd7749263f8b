"""Which rows of each client's own table a batch takes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from corymb.simulations.engine.forms import upto


class Selection(Protocol):
    """B rows of each of the first A clients of a block."""

    def of(self, table: Tensor, clients: int) -> Tensor:
        """These rows of `table [K, N, M]`, `[A, B, M]`, which may lie in the table itself."""

    def copied(self, table: Tensor, clients: int) -> Tensor:
        """The same in memory of their own."""

    def add(self, table: Tensor, values: Tensor, factor: float) -> None:
        """Add `values [A, B, M]` times `factor` to these rows."""


class Run:
    """The same consecutive rows for all, as batches are where nothing is shuffled: nothing has to be gathered."""

    def __init__(self, first: int, width: int) -> None:
        self._at = slice(first, first + width)

    def of(self, table: Tensor, clients: int) -> Tensor:
        return upto(clients, table)[:, self._at]

    def copied(self, table: Tensor, clients: int) -> Tensor:
        return self.of(table, clients).clone(memory_format=torch.contiguous_format)

    def add(self, table: Tensor, values: Tensor, factor: float) -> None:
        self.of(table, values.shape[0]).add_(values, alpha=factor)


class Picked:
    """Any rows; `numbers [K, B]` count through the tables of all clients."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers

    def of(self, table: Tensor, clients: int) -> Tensor:
        numbers = upto(clients, self._numbers)
        return table.flatten(0, 1).index_select(0, numbers.flatten()).view(*numbers.shape, -1)

    copied = of

    def add(self, table: Tensor, values: Tensor, factor: float) -> None:
        numbers = upto(values.shape[0], self._numbers)
        table.flatten(0, 1).index_add_(0, numbers.flatten(), values.flatten(0, 1), alpha=factor)


def selections(rows: Tensor, width: int) -> list[Selection]:
    """Those of every batch, from `rows [S, K, B]` of tables with `width` rows."""
    _, clients, size = rows.shape
    firsts = rows[:, :1, :1]
    are_runs = (rows == firsts + torch.arange(size)).flatten(1).all(dim=1).tolist()
    numbers = (rows + torch.arange(clients)[:, None] * width).unbind()
    each = zip(are_runs, firsts.flatten().tolist(), numbers, strict=True)
    return [Run(first, size) if is_run else Picked(number) for is_run, first, number in each]
