from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import trim_mean

from corymb.strategies import Median, Reply, TrimmedMean
from corymb.tests.support import after, vector

columns = st.integers(1, 9).flatmap(
    lambda clients: st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=clients, max_size=clients
    )
)


def replies(rows: list[list[float]]) -> list[Reply]:
    return [Reply.of(f"site-{i}", torch.tensor(row)) for i, row in enumerate(rows)]


@given(columns)
def test_median_equals_numpy(rows: list[list[float]]) -> None:
    expected = np.median(np.array(rows, dtype=np.float64), axis=0)
    assert_allclose(after(Median(), torch.zeros(3), replies(rows)), expected, rtol=1e-6, atol=1e-30)


@given(columns, st.sampled_from((0.0, 0.1, 0.2, 0.3, 0.49)))
def test_trimmed_mean_equals_scipy(rows: list[list[float]], trim: float) -> None:
    expected = trim_mean(np.array(rows, dtype=np.float64), trim, axis=0)
    assert_allclose(after(TrimmedMean(trim), torch.zeros(3), replies(rows)), expected, rtol=1e-6, atol=1e-6)


@given(columns, st.floats(-1e6, 1e6, width=32))
def test_a_tolerated_number_of_hostile_clients_cannot_leave_the_honest_range(
    rows: list[list[float]], attack: float
) -> None:
    honest = np.array(rows)
    hostile = (len(rows) - 1) // 2
    sent = replies([*rows, *[[attack] * 3] * hostile])
    for rule in (Median(), TrimmedMean(0.49)):
        result = after(rule, torch.zeros(3), sent).numpy()
        if isinstance(rule, TrimmedMean) and int(0.49 * len(sent)) < hostile:
            continue
        assert (result >= honest.min(axis=0) - 1e-3).all()
        assert (result <= honest.max(axis=0) + 1e-3).all()


def test_worked_values() -> None:
    sent = [Reply.of(str(i), vector(x)) for i, x in enumerate((1.0, 2.0, 90.0, 3.0, -70.0))]
    assert after(TrimmedMean(0.2), vector(0.0), sent).tolist() == [2.0]
    assert after(Median(), vector(0.0), sent[:4]).tolist() == [2.5]


@pytest.mark.parametrize("trim", [-0.1, 0.5, float("nan")])
def test_trim_out_of_range_is_refused(trim: float) -> None:
    with pytest.raises(ValueError, match=r"use a number in \[0, 0.5\)"):
        TrimmedMean(trim)
