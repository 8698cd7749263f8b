from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from corymb.strategies.core.order_statistics import median, rank_mean


@given(st.integers(1, 20), st.integers(1, 30), st.data())
def test_ranks_are_those_of_a_sort(clients: int, width: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, clients - 1))
    last = data.draw(st.integers(first, clients - 1))
    models = torch.randn(clients, width, generator=torch.Generator().manual_seed(clients * width))
    expected = np.sort(models.numpy(), axis=0)[first : last + 1].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(rank_mean(models, first, last).numpy(), expected, rtol=1e-12)


def test_values_outside_the_ranks_have_no_effect() -> None:
    rows = [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3], [0.4, 0.4], [float("inf"), float("nan")]]
    models = torch.tensor(rows, dtype=torch.float64)
    assert median(models).tolist() == [0.3, 0.3]
