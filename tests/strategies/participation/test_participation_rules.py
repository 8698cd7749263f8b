"""FedAU and the rules that its paper compares it with, on six worked rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from corymb.strategies import MIFA, FedAU, FedAvg, FedVARP, KnownParticipation, Model, Reply, Rule
from corymb.tests.support import golden, vector

SIX = golden("fedau")["baselines_6_rounds"]
NODES = ["a", "b", "c"]


def six_rounds(rule: Rule[Any], dtype: torch.dtype) -> list[float]:
    memory = rule.initial()
    model, path = Model(torch.zeros(1, dtype=dtype)), []
    for participated, deltas in zip(SIX["history"], SIX["deltas"], strict=True):
        replies = [
            Reply.of(node, model.parameters + delta, 1, {"participation": p})
            for node, took_part, delta, p in zip(NODES, participated, deltas, SIX["p"], strict=True)
            if took_part
        ]
        outcome = rule.aggregate(model, replies, memory, NODES)
        model, memory = outcome.model, outcome.memory
        path.append(float(model.parameters))
    return path


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (FedAvg(by_examples=False), "average_participating"),
        (FedAU(cutoff=1), "average_all"),
        (KnownParticipation(), "known_prob"),
        (FedAU(cutoff=None), "fedau"),
        (MIFA(), "mifa"),
        (FedVARP(), "fedvarp"),
    ],
)
def test_six_rounds(rule: Rule[Any], name: str, dtype: torch.dtype, tolerance: float) -> None:
    assert_allclose(six_rounds(rule, dtype), SIX["x_after_each_round"][name], rtol=0, atol=tolerance)


def test_mifa_changes_the_model_without_replies() -> None:
    rule, origin = MIFA(), Model(vector(0.0))
    assert rule.aggregate(origin, [], rule.initial(), ["a", "b"]).model.parameters.tolist() == [0.0]
    memory = rule.aggregate(origin, [Reply.of("a", vector(2.0))], rule.initial(), ["a", "b"]).memory
    assert rule.aggregate(origin, [], memory, ["a", "b"]).model.parameters.tolist() == [1.0]


def test_a_client_without_a_reported_probability_has_weight_one() -> None:
    rule = KnownParticipation()
    replies = [Reply.of("a", vector(1.0)), Reply.of("b", vector(1.0), 1, {"participation": 0.5})]
    assert rule.aggregate(Model(vector(0.0)), replies, None).weights == {"a": 0.5, "b": 1.0}
