"""Rows that batches take are those of plain indexing, whether they follow one another or not."""

from __future__ import annotations

import pytest
import torch

from corymb.simulations.engine.selection import Picked, Run, selections


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
    table = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    values = torch.randn(clients, 3, 5, generator=generator, dtype=torch.float64)
    other = [[0, 1, 2], [3, 4, 5]]
    picked, taken = selections(torch.tensor([other, rows]), 6)  # each step for itself
    assert (type(picked), type(taken)) == (Picked, kind)
    expected = torch.stack([table[client, rows[client]] for client in range(clients)])
    assert taken.of(table, clients).equal(expected)
    copied = taken.copied(table, clients)
    assert copied.equal(expected)
    copied.zero_()
    assert taken.of(table, clients).equal(expected)  # it has memory of its own
    after = table.clone()
    for client in range(clients):
        for place, row in enumerate(rows[client]):
            after[client, row] -= 0.5 * values[client, place]
    taken.add(table, values, -0.5)
    torch.testing.assert_close(table, after, rtol=1e-15, atol=1e-15)
