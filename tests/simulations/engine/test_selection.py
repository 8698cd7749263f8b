"""Rows that batches take are those of plain indexing, whether they follow one another or not."""

from __future__ import annotations

import pytest
import torch

from corymb.simulations.engine.selection import Picked, Run, Tables, selections


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([[2, 3, 4], [2, 3, 4]], Run),
        ([[0, 1, 2], [0, 1, 2]], Run),
        ([[2, 3, 4], [1, 2, 3]], Picked),  # each follow one another, from different first ones
        ([[2, 3, 4], [2, 3, 0]], Picked),  # the last is padding
        ([[4, 3, 2], [4, 3, 2]], Picked),
        ([[2, 2, 2], [2, 2, 2]], Picked),
    ],
)
@pytest.mark.parametrize("clients", [2, 1])
def test_rows_are_taken_and_added_to(rows: list[list[int]], kind: type[object], clients: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tables = Tables(*(torch.randn(2, 6, width, generator=generator, dtype=torch.float64) for width in (5, 6, 5)))
    values = torch.randn(clients, 3, 5, generator=generator, dtype=torch.float64)
    other = [[0, 1, 2], [3, 4, 5]]
    picked, taken, again = selections(tables, torch.tensor([other, rows, rows]))  # each step for itself
    assert (type(picked), type(taken), type(again)) == (Picked, kind, kind)

    def expected(table: torch.Tensor) -> torch.Tensor:
        return torch.stack([table[client, rows[client]] for client in range(clients)])

    assert taken.near(clients).equal(expected(tables.near))
    first = taken.first(clients)
    assert first.equal(expected(tables.first))
    first.zero_()
    assert taken.first(clients).equal(expected(tables.first))  # it has memory of its own
    elsewhere, after = torch.zeros_like(tables.factors), tables.factors.clone()
    for client in range(clients):
        for place, row in enumerate(rows[client]):
            after[client, row] -= 0.5 * values[client, place]
    taken.add(values, -0.5, into=elsewhere)
    torch.testing.assert_close(tables.factors + elsewhere, after, rtol=1e-14, atol=1e-14)
    taken.add(values, -0.5)
    torch.testing.assert_close(tables.factors, after, rtol=1e-14, atol=1e-14)
