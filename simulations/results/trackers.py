"""Copy the results of experiments into an experiment tracker: TensorBoard, MLflow, Trackio or Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from corymb.protocol.run_config import flatten
from corymb.simulations.results.folder import FinishedRun, finished_runs

Metrics = Mapping[str, float]


class Log(Protocol):
    """Takes the metrics of one round of a run."""

    def __call__(self, server_round: int, metrics: Metrics) -> None:
        """Record `metrics` of round `server_round`."""


def export(folders: list[Path], tracker: str, place: Path) -> int:
    """Copy each run of the finished experiments in `folders` into `tracker`; return the number of runs.

    `tracker` is "tensorboard", whose event files go into `place`, "mlflow", whose SQLite store is `place`/mlflow.db, or
    "trackio" or "wandb", which have places of their own. A run has the experiment's settings, and per round all metrics
    in the journal. Raises `ValueError` for an unknown tracker and for a folder without results, `ImportError` for a
    tracker that is not installed.
    """
    if tracker not in TRACKERS:
        raise ValueError(f"The tracker {tracker!r} is unknown; use one of {', '.join(TRACKERS)}.")
    place.mkdir(parents=True, exist_ok=True)
    number = 0
    for folder in folders:
        experiment, runs = finished_runs(folder)
        settings = flatten(experiment.model_dump(mode="json", exclude_none=True, exclude={"rules", "seeds", "claims"}))
        for run, rule in zip(runs, (rule for rule in experiment.rules for _ in experiment.seeds), strict=True):
            own = {**settings, "rule": run.rule, "seed": run.seed, "rule_settings": rule.model_dump_json()}
            name = f"{rule.slug}-seed{run.seed}"
            if len(folders) > 1:  # those of a sweep have one name
                name = f"{folder.name}-{name}"
            try:
                with TRACKERS[tracker](place, experiment.name, name, own) as log:
                    for server_round, metrics in _metrics_of(run):
                        log(server_round, metrics)
            except ImportError as error:
                raise ImportError(f"{tracker} is not installed ({error}); run pip install {tracker}.") from None
            number += 1
    return number


def _metrics_of(run: FinishedRun) -> Iterator[tuple[int, Metrics]]:
    """Yield the number and the metrics of each round of a run."""
    for record in run.records:
        own = {"participants": len(record.admitted), "bytes-up": record.bytes_up, "bytes-down": record.bytes_down}
        train = {f"train-{name}": value for name, value in record.train.items()}
        notes = {name: value for name, value in record.notes.items() if isinstance(value, (int, float))}
        yield record.round, {**own, **train, **record.server, **notes}


@contextmanager
def _tensorboard(place: Path, experiment: str, name: str, settings: dict[str, Any]) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(place / experiment / name))
    writer.add_text("settings", "\n".join(f"    {key} = {value}" for key, value in settings.items()))

    def log(server_round: int, metrics: Metrics) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, server_round)

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _mlflow(place: Path, experiment: str, name: str, settings: dict[str, Any]) -> Iterator[Log]:
    mlflow: Any = import_module("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{(place / 'mlflow.db').resolve()}")
    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name=name):
        mlflow.log_params(settings)
        yield lambda server_round, metrics: mlflow.log_metrics(metrics, step=server_round)


@contextmanager
def _like_wandb(module: str, experiment: str, name: str, settings: dict[str, Any]) -> Iterator[Log]:
    tracker: Any = import_module(module)
    tracker.init(project=experiment, name=name, config=settings)
    try:
        yield lambda server_round, metrics: tracker.log(dict(metrics), step=server_round)
    finally:
        tracker.finish()


TRACKERS: dict[str, Any] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "trackio": lambda place, *run: _like_wandb("trackio", *run),
    "wandb": lambda place, *run: _like_wandb("wandb", *run),
}
