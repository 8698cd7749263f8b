"""Experiment trackers and figures, read back with the trackers' own readers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from corymb.simulations import Experiment, Results, run
from corymb.simulations.results.commands import draw_figures
from corymb.simulations.results.trackers import export


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    experiment = Experiment(name="small", rounds=3, rules=["fedavg", "fedau"], seeds=2, partition={"clients": 4})
    return run(experiment, folder=tmp_path_factory.mktemp("results") / "small", progress=False)


def test_tensorboard_has_every_metric_of_every_round(results: Results, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "corymb.cli", "export", str(results.folder), "--place", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"Copied 4 runs to tensorboard, into {tmp_path}.\n"
    for each in results.runs:
        events = EventAccumulator(str(tmp_path / "small" / f"{each.rule}-seed{each.seed}"))
        events.Reload()
        found = {event.step: event.value for event in events.Scalars("accuracy")}
        assert found == pytest.approx({r.round: r.server["accuracy"] for r in each.records}, rel=1e-6)
        assert {"train-loss", "loss", "participants", "bytes-up"} <= set(events.Tags()["scalars"])


@pytest.mark.nightly  # it needs MLflow, which brings many packages and is not in the developers' environment
@pytest.mark.filterwarnings("ignore")  # of SQLAlchemy, about MLflow
def test_mlflow_has_every_metric_of_every_round(results: Results, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    assert export([results.folder], "mlflow", tmp_path) == 4
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert {(r.data.params["rule"], r.data.params["seed"]) for r in runs} == {
        (rule, seed) for rule in ("fedavg", "fedau") for seed in "01"
    }
    assert len(client.get_metric_history(runs[0].info.run_id, "accuracy")) == 3


def test_mistakes_of_use(results: Results, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The tracker 'excel' is unknown; use one of tensorboard, mlflow"):
        export([results.folder], "excel", tmp_path)
    with pytest.raises(ValueError, match="has no finished experiment"):
        export([tmp_path], "tensorboard", tmp_path / "out")
    with pytest.raises(ValueError, match="The format 'gif' is unknown"):
        draw_figures(results.folder, "gif")


def test_figures_for_a_paper(results: Results) -> None:
    drawn = draw_figures(results.folder, "pdf")
    assert {path.name for path in drawn} == {"accuracy.pdf", "participation.pdf", "weights.pdf", "labels.pdf"}
    assert all(path.read_bytes().startswith(b"%PDF") for path in drawn)
