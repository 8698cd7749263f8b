"""The drift of clients: from vectors, from replies in messages, and from clients trained in blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corymb.server.rounds.drift import COSINE, NORM, with_drift
from corymb.simulations import Experiment, run
from corymb.strategies import Layout, Model, Reply, Report
from corymb.strategies.core.rows import Matrix, SingleRow

ORIGIN = torch.tensor([1.0, 2.0, -1.0])
STEP = torch.tensor([3.0, 0.0, 4.0])


def model(parameters: torch.Tensor) -> Model:
    return Layout.of({"w": parameters}).flatten({"w": parameters})


def test_length_and_cosine_of_known_updates() -> None:
    updates = torch.stack([STEP, -2 * STEP, torch.tensor([4.0, 5.0, -3.0]), torch.zeros(3)])
    rows = Matrix(ORIGIN + updates[:3])
    replies = [Reply(Report(f"c{row}", 1), rows, row) for row in range(3)]
    replies.append(Reply(Report("c3", 1, {"loss": 0.5, COSINE: 7.0}), SingleRow((ORIGIN + updates[3],)), 0))
    found = with_drift(replies, model(ORIGIN), model(ORIGIN + STEP), {})
    assert {node: report.metrics.get(NORM) for node, report in found.items()} == pytest.approx(
        {"c0": 5.0, "c1": 10.0, "c2": 50**0.5, "c3": 0.0}
    )
    cosines = [found[f"c{row}"].metrics[COSINE] for row in range(3)]
    assert cosines == pytest.approx([1.0, -1.0, 0.0], abs=1e-6)
    assert found["c3"].metrics == {"loss": 0.5, NORM: 0.0}  # no direction, and not what the client claims


def drift_of(folder: Path, engine: str) -> dict[str, list[float]]:
    experiment = Experiment(
        name="drift", rounds=2, rules=["fedavg", "median"], engine=engine, partition={"clients": 6},
        evaluate={"drift": True},
    )  # fmt: skip
    result = run(experiment, folder=folder / engine, progress=False)
    verdicts = [(f"{each.rule}{r.round}{v.node}", v) for each in result.runs for r in each.records for v in r.verdicts]
    return {key: [v.metrics[NORM], v.metrics[COSINE], v.weight or 0] for key, v in verdicts}


def test_blocks_measure_what_single_clients_measure(tmp_path: Path) -> None:
    serial, blocks = drift_of(tmp_path, "serial"), drift_of(tmp_path, "auto")
    assert len(serial) == 2 * 2 * 6
    assert blocks.keys() == serial.keys()
    for key, values in serial.items():
        assert blocks[key] == pytest.approx(values, rel=1e-3), key
    # FedAvg's step is the weighted sum of the updates, so their shadows on it add up to its length.
    first = [values for key, values in serial.items() if key.startswith("fedavg1")]
    step = sum(weight * norm * cosine for norm, cosine, weight in first)
    assert step > 0
    assert all(norm >= norm * cosine for norm, cosine, _ in first)
