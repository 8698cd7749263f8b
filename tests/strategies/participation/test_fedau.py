from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from corymb.strategies import FedAU, FedAvg, Model, Reply, Report, Rule
from corymb.strategies.participation.fedau import Attendance
from corymb.tests.support import after, golden, vector

GOLDEN = golden("fedau")


@pytest.mark.parametrize("case", GOLDEN["trajectories"] + GOLDEN["late_joiner"])
def test_weights_follow_the_worked_histories(case: dict[str, Any]) -> None:
    rule = FedAU(cutoff=case["K"])
    memory = rule.initial()
    nodes = [f"node-{i}" for i in range(len(case["history"][0]))]
    for participated, expected in zip(case["history"], case["weights_used_at_round"], strict=True):
        assert_allclose([rule.weight(Report(node, 1), memory) for node in nodes], expected, rtol=1e-12)
        replies = [
            Reply.of(node, vector(1.0)) for node, took_part in zip(nodes, participated, strict=True) if took_part
        ]
        memory = rule.aggregate(Model(vector(0.0)), replies, memory, nodes).memory
    assert_allclose(memory.mean_interval, case["weights_after_last_round"], rtol=1e-12)
    assert memory.closed_intervals.tolist() == case["M"]
    assert memory.current_interval.tolist() == case["S"]


def one_step() -> tuple[torch.Tensor, list[Reply], Attendance, list[str]]:
    step = GOLDEN["one_step"]
    sizes = GOLDEN["one_step_size_weighted"]["sizes"]
    nodes = sorted(step["omega"])
    replies = [Reply.of(node, vector(*model), sizes[node]) for node, model in step["local_models"].items()]
    attendance = Attendance(
        tuple(nodes),
        torch.ones(len(nodes), dtype=torch.int64),
        torch.zeros(len(nodes), dtype=torch.int64),
        vector(*(step["omega"][node] for node in nodes)),
        vector(*(sizes[node] for node in nodes)),
    )
    return vector(*step["x"]), replies, attendance, nodes


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (FedAU(), GOLDEN["one_step"]["fedau_eta1"]),
        (FedAU(population=4), GOLDEN["one_step"]["fedau_eta1"]),
        (FedAU(server_rate=0.5), GOLDEN["one_step"]["fedau_eta0.5"]),
        (FedAU(by_examples=True), GOLDEN["one_step_size_weighted"]["result_eta1"]),
    ],
)
def test_one_step(rule: FedAU, expected: list[float]) -> None:
    origin, replies, attendance, nodes = one_step()
    assert_allclose(after(rule, origin, replies, attendance, nodes), expected, rtol=0, atol=1e-9)
    assert_allclose(after(rule, origin, [], attendance, nodes), GOLDEN["one_step"]["no_participant"], atol=0)


def test_one_step_of_the_baselines() -> None:
    origin, replies, _, nodes = one_step()
    equal_weights = after(FedAvg(by_examples=False), origin, replies)
    assert_allclose(equal_weights, GOLDEN["one_step"]["average_participating"], rtol=0, atol=1e-9)
    all_clients = after(FedAU(cutoff=1), origin, replies, known=nodes)
    assert_allclose(all_clients, GOLDEN["one_step"]["average_all"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (FedAvg(by_examples=False), "average_participating"),
        (FedAU(cutoff=1), "average_all"),
        (FedAU(cutoff=None), "fedau"),
    ],
)
def test_six_rounds(rule: Any, name: str) -> None:
    rounds = GOLDEN["baselines_6_rounds"]
    origin, memory = vector(0.0), rule.initial()
    nodes = ["a", "b", "c"]
    for participated, deltas, expected in zip(
        rounds["history"], rounds["deltas"], rounds["x_after_each_round"][name], strict=True
    ):
        replies = [
            Reply.of(node, origin + delta)
            for node, took_part, delta in zip(nodes, participated, deltas, strict=True)
            if took_part
        ]
        outcome = rule.aggregate(Model(origin), replies, memory, nodes)
        origin, memory = outcome.model.parameters, outcome.memory
        assert_allclose(origin, [expected], rtol=0, atol=1e-9)


def test_quadratic_federation_finds_the_optimum_that_averaging_misses() -> None:
    """F_n(x) = (x - c_n)^2 / 2. The optimum is 0, but clients with c_n near 1 participate far more often."""
    centres, probabilities = np.linspace(-1, 1, 10), np.linspace(0.05, 0.95, 10)
    nodes = [f"site-{i}" for i in range(10)]
    rounds, rng = 3000, np.random.default_rng(0)
    participation = rng.random((rounds, 10)) < probabilities
    found: dict[type, Any] = {}
    rules: list[Rule[Any]] = [FedAU(cutoff=50, server_rate=0.1), FedAvg(by_examples=False)]
    for rule in rules:
        origin, memory = vector(0.0), rule.initial()
        trail = []
        for present in participation:
            shift = (1 - 0.02) ** 5  # five steps of gradient descent at rate .02
            local = [centres[i] + shift * (float(origin) - centres[i]) for i in range(10)]
            replies = [Reply.of(nodes[i], vector(local[i])) for i in np.flatnonzero(present)]
            outcome = rule.aggregate(Model(origin), replies, memory, nodes)
            # The global learning rate of 0.1 is applied to FedAvg here, so that only the weights differ.
            rate = 1.0 if isinstance(rule, FedAU) else 0.1
            origin, memory = origin + rate * (outcome.model.parameters - origin), outcome.memory
            trail.append(float(origin))
        found[type(rule)] = np.mean(trail[rounds // 2 :])
    assert abs(found[FedAU]) < 0.05
    assert found[FedAvg] > 0.3


def test_a_new_client_has_weight_one_and_increases_the_population() -> None:
    rule = FedAU()
    memory = rule.aggregate(Model(vector(0.0)), [Reply.of("a", vector(1.0))], rule.initial(), ["a"]).memory
    outcome = rule.aggregate(Model(vector(0.0)), [Reply.of("b", vector(1.0))], memory, ["a", "b"])
    assert outcome.weights == {"b": 0.5}


@pytest.mark.parametrize(
    "wrong", [{"cutoff": -1}, {"population": 0}, {"server_rate": 0.0}, {"server_rate": float("nan")}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FedAU(**wrong)
