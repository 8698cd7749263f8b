"""The rows of a batch equal those of plain indexing."""

from __future__ import annotations

import pytest
import torch

from corymb.simulations.engine.selection import Tables, select_batches


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 1, 2], [0, 1, 2]],
        [[2, 3, 4], [1, 2, 3]],
        [[2, 3, 4], [2, 3, 0]],  # the last is padding
        [[4, 3, 2], [4, 3, 2]],
        [[2, 2, 2], [2, 2, 2]],
    ],
)
@pytest.mark.parametrize("clients", [2, 1])
def test_rows_are_selected_and_added_to(rows: list[list[int]], clients: int) -> None:
    generator = torch.Generator().manual_seed(1)
    one, two, gram, factors = (torch.randn(2, 6, n, generator=generator, dtype=torch.float64) for n in (5, 5, 6, 5))
    tables = Tables([one, two], gram, factors)
    values = torch.randn(clients, 3, 5, generator=generator, dtype=torch.float64)
    other = [[0, 1, 2], [3, 4, 5]]
    _, selection = select_batches(tables, torch.tensor([other, rows]))  # one per step

    def expected(table: torch.Tensor) -> torch.Tensor:
        return torch.stack([table[client, rows[client]] for client in range(clients)])

    assert selection.gram(clients).equal(expected(tables.gram))
    for number, table in enumerate(tables.outputs):
        outputs = selection.outputs(number, clients)
        assert outputs.equal(expected(table))
        outputs.zero_()
        assert selection.outputs(number, clients).equal(expected(table))  # `outputs` was a copy
    other_table, after = torch.zeros_like(tables.factors), tables.factors.clone()
    for client in range(clients):
        for place, row in enumerate(rows[client]):
            after[client, row] -= 0.5 * values[client, place]
    selection.add(values, -0.5, into=other_table)
    torch.testing.assert_close(tables.factors + other_table, after, rtol=1e-14, atol=1e-14)
    selection.add(values, -0.5)
    torch.testing.assert_close(tables.factors, after, rtol=1e-14, atol=1e-14)
