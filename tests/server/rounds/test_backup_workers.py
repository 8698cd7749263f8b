from __future__ import annotations

from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from corymb.server.rounds.backup_workers import Gradients, gains, replies_to_wait_for, smoothness
from corymb.tests.support import golden

GOLDEN = golden("merging")["dbw"]


@pytest.mark.parametrize("name", ["decision", "large_L", "negative_gain_takes_all"])
def test_worked_decisions(name: str) -> None:
    worked: dict[str, Any] = GOLDEN[name]
    rate, clients = GOLDEN["eta"], GOLDEN["n"]
    rows = torch.tensor(GOLDEN["grads"], dtype=torch.float64)
    found = Gradients.of_rows(rows)
    assert found is not None
    assert_allclose([found.variance, found.length], [worked["V"], worked["grad_norm2"]], rtol=1e-9)
    if name == "decision":
        decrease = GOLDEN["losses"][0] - GOLDEN["losses"][1]
        assert smoothness(found, len(rows), rate, decrease) == pytest.approx(worked["L"], rel=1e-9)
    times = [1.0] * clients if name == "negative_gain_takes_all" else GOLDEN["times"]
    expected = gains(found, worked["L"], rate, clients)
    assert_allclose(expected, worked["gain"], rtol=1e-9)
    assert_allclose([g / t for g, t in zip(expected, times, strict=True)], worked["rate"], rtol=1e-9)
    assert replies_to_wait_for(expected, times) == worked["k"] == clients - worked["b"]


def test_equal_times_take_all() -> None:
    expected = GOLDEN["decision"]["gain"]
    assert replies_to_wait_for(expected, [1.0] * 6) == GOLDEN["equal_times_takes_all"]


def test_one_gradient_says_nothing_of_variance() -> None:
    assert Gradients.of_rows(torch.ones(1, 3)) is None
    assert Gradients.of(3.0, 3.0, 1, variance=1.0) == Gradients(1.0, 2.0)
