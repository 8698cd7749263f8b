from __future__ import annotations

from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from corymb.server.rounds.backup_workers import Gradients, gains, replies_to_wait_for, smoothness
from corymb.tests.support import golden

GOLDEN = golden("merging")["dbw"]


@pytest.mark.parametrize("name", ["decision", "large_L", "negative_gain_takes_all"])
def test_decisions_equal_the_reference_values(name: str) -> None:
    reference: dict[str, Any] = GOLDEN[name]
    rate, clients = GOLDEN["eta"], GOLDEN["n"]
    rows = torch.tensor(GOLDEN["grads"], dtype=torch.float64)
    gradients = Gradients.of_rows(rows)
    assert gradients is not None
    assert_allclose([gradients.variance, gradients.squared_norm], [reference["V"], reference["grad_norm2"]], rtol=1e-9)
    if name == "decision":
        decrease = GOLDEN["losses"][0] - GOLDEN["losses"][1]
        assert smoothness(gradients, len(rows), rate, decrease) == pytest.approx(reference["L"], rel=1e-9)
    times = [1.0] * clients if name == "negative_gain_takes_all" else GOLDEN["times"]
    expected = gains(gradients, reference["L"], rate, clients)
    assert_allclose(expected, reference["gain"], rtol=1e-9)
    assert_allclose([g / t for g, t in zip(expected, times, strict=True)], reference["rate"], rtol=1e-9)
    assert replies_to_wait_for(expected, times) == reference["k"] == clients - reference["b"]


def test_equal_times_wait_for_all() -> None:
    expected = GOLDEN["decision"]["gain"]
    assert replies_to_wait_for(expected, [1.0] * 6) == GOLDEN["equal_times_takes_all"]


def test_one_gradient_gives_no_variance() -> None:
    assert Gradients.of_rows(torch.ones(1, 3)) is None
    assert Gradients.of(3.0, 3.0, 1, variance=1.0) == Gradients(1.0, 2.0)
