"""Clients trained together are those trained one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from corymb.simulations.experiment import Experiment
from corymb.simulations.federation import check, run

SMALL: dict[str, Any] = {
    "name": "small",
    "rounds": 3,
    "rules": ["fedavg"],
    "partition": {"clients": 7, "alpha": 0.3},  # sizes differ, so batches end at different steps
    "participation": {"kind": "bernoulli", "probability": 0.7},
    "model": {"kind": "mlp", "options": {"hidden": 9}},
}
SCHEDULE = {"schedule": "StepLR", "schedule_options": {"step_size": 1}}
CNN = {"model": {"kind": "cnn", "options": {"hidden": 8, "channels": 3}}}


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"epochs": 2, "batch_size": 10}},
        {"train": {"epochs": 1, "batch_size": 16, "optimizer_options": {"momentum": 0.9, "weight_decay": 0.01}}},
        {"train": {"steps": 7, "batch_size": 8, "drop_last": True, **SCHEDULE}},
        {"train": {"epochs": 1, "optimizer": "Adam", "learning_rate": 0.01}},
        {"train": {"steps": 3, "batch_size": 16}, **CNN},
        {"train": {"steps": 3}, "model": {"kind": "mlp", "options": {"hidden": 9}, "own_start": True}},
        {"train": {"steps": 3}, "attack": {"kind": "opposite", "clients": 2}},
        {"train": {"steps": 3}, "rules": [{"name": "run_off", "parameters": {"groups": 3}}]},
    ],
    ids=str,
)
def test_batched_is_serial(changes: dict[str, Any], tmp_path: Path) -> None:
    models, records = {}, {}
    for engine in ("serial", "batched"):
        experiment = Experiment(**{**SMALL, **changes, "engine": engine})
        seen: list[Any] = []
        run(experiment, experiment.rules[0], 0, tmp_path / engine, seen.append)
        models[engine] = load_file(tmp_path / engine / "model-000003.safetensors")
        records[engine] = [[(v.node, v.code, v.examples) for v in record.verdicts] for record in seen]
        losses = [record.train.get("loss") for record in seen]
        assert all(loss is None or 0 < loss < 10 for loss in losses)
    assert records["serial"] == records["batched"]
    for name, tensor in models["serial"].items():
        torch.testing.assert_close(models["batched"][name], tensor, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_train_is_refused() -> None:
    changes = {"engine": "batched", "model": {"kind": "corymb.tests.simulations.test_batched:with_norm"}}
    with pytest.raises(
        ValueError, match="engine = 'batched' cannot train this model: the layer '1' is a BatchNorm1d; use 'serial'"
    ):
        check(Experiment(**{**SMALL, **changes}))


def with_norm(shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    size = torch.Size(shape).numel()
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(size), torch.nn.Linear(size, classes))
