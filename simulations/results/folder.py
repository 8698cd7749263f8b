"""The results folder of an experiment: read runs from their journals, write JSON lines, TOML and safetensors."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from corymb.server import Journal, RoundRecord
from corymb.server.settings import RuleSettings
from corymb.simulations.experiments.experiment import Experiment

SUMMARY = "summary.json"
FILES = {
    "config.toml", "rounds.jsonl", "clients.jsonl", SUMMARY, "model.safetensors", "report.html", "journals",
    "accuracy.png", "participation.png", "weights.png", "labels.png",
}  # fmt: skip


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of one rule with one seed.

    `final_accuracy` is the mean test accuracy in the last `evaluate.last` rounds; `wall_seconds` is the total time.
    """

    rule: str
    seed: int
    records: list[RoundRecord]
    final_accuracy: float
    wall_seconds: float
    model_sha256: str

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        """The rounds with a test, and the test accuracy after each."""
        tested = [record for record in self.records if "accuracy" in record.server]
        return [record.round for record in tested], [record.server["accuracy"] for record in tested]


def journal_folder(folder: Path, rule: RuleSettings, seed: int) -> Path:
    """Return the folder of a run's journal."""
    return folder / "journals" / f"{rule.slug}-seed{seed}"


def collect(experiment: Experiment, folder: Path) -> list[FinishedRun]:
    """Read the runs in `folder`, ordered by rule, then by seed."""
    return [collect_run(experiment, folder, rule, seed) for rule in experiment.rules for seed in experiment.seeds]


def collect_run(experiment: Experiment, folder: Path, rule: RuleSettings, seed: int) -> FinishedRun:
    """Read the run of `rule` with `seed` from its journal."""
    with closing(Journal(journal_folder(folder, rule, seed), durable=False)) as journal:
        records = list(journal.rounds())
        digest = journal.model_sha256()
    skipped = experiment.rounds - experiment.evaluate.last
    tested = [r.server["accuracy"] for r in records if "accuracy" in r.server]
    last = [r.server["accuracy"] for r in records if "accuracy" in r.server and r.round > skipped]
    final = float(np.mean(last or tested[-1:]))
    return FinishedRun(rule.title, seed, records, final, sum(r.seconds for r in records), digest)


def check_replaceable(folder: Path) -> None:
    """Raise `ValueError` if `folder` is a file, or has files that are not results of an experiment."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"There is a file at {folder}; give a folder with --out.")
    names = {path.name for path in folder.iterdir()}
    foreign = names - FILES
    if names and "journals" not in names:  # every run creates it first, so these files are not results
        foreign = names
    if foreign:
        raise ValueError(
            f"The folder {folder} contains {min(foreign)}, which is not a result of Corymb; give another with --out."
        )


def prepare(folder: Path) -> None:
    """Create `folder`, empty; results in it are deleted. Raises `ValueError` as `check_replaceable` does."""
    check_replaceable(folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write(experiment: Experiment, runs: list[FinishedRun], folder: Path) -> None:
    """Write all files of `folder` but plots and report: config, rounds, clients, summary and the best model."""
    (folder / "config.toml").write_text(_config(experiment))
    _write_lines(folder / "rounds.jsonl", (_round_row(run, record) for run in runs for record in run.records))
    _write_lines(
        folder / "clients.jsonl",
        (
            {"rule": run.rule, "seed": run.seed, "round": record.round} | phase | _drop_empty(vars(verdict))
            for run in runs
            for record in run.records
            for phase, verdicts in (({}, record.verdicts), ({"phase": "evaluate"}, record.evaluations))
            for verdict in verdicts
            if verdict.code != "offline"
        ),
    )
    best = max(runs, key=lambda run: run.final_accuracy)
    rule = next(rule for rule in experiment.rules if rule.title == best.rule)
    journal = journal_folder(folder, rule, best.seed)
    model = journal / f"model-{experiment.rounds:06d}.safetensors"
    shutil.copyfile(model, folder / "model.safetensors")
    summary = {
        "name": experiment.name,
        "model": {"rule": best.rule, "seed": best.seed},
        "runs": [
            {
                "rule": run.rule,
                "seed": run.seed,
                "rounds": len(run.records),
                "final_accuracy": run.final_accuracy,
                "wall_seconds": run.wall_seconds,
                "model_sha256": run.model_sha256,
            }
            for run in runs
        ],
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


def is_finished(experiment: Experiment, folder: Path) -> bool:
    """Return whether `folder` has results of `experiment`; settings without effect on results are ignored."""
    config = folder / "config.toml"
    if not ((folder / SUMMARY).exists() and config.exists()):
        return False
    try:
        stored = Experiment.model_validate(tomllib.loads(config.read_text()))
    except ValueError:  # written by a version with other settings
        return False
    ignored = {"claims", "setting", "engine", "ray"}  # these have no effect on results
    return stored.model_dump(exclude=ignored) == experiment.model_dump(exclude=ignored)


def _config(experiment: Experiment) -> str:
    return tomli_w.dumps(experiment.model_dump(mode="json", exclude_none=True))


def _round_row(run: FinishedRun, record: RoundRecord) -> dict[str, Any]:
    row = {
        "rule": run.rule,
        "seed": run.seed,
        "round": record.round,
        "seconds": round(record.seconds, 6),
        "replies": Counter(verdict.code for verdict in record.verdicts),
        "train": record.train,
        "evaluate": record.evaluate,
        "server": record.server,
        "notes": record.notes,
    }
    return _drop_empty(row)


def _drop_empty(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value not in (None, "", {})}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def scores(runs: list[FinishedRun]) -> dict[str, tuple[float, float]]:
    """Return each rule's mean final accuracy over seeds, and its standard deviation (0 for one seed)."""
    by_rule: dict[str, list[float]] = {}
    for run in runs:
        by_rule.setdefault(run.rule, []).append(run.final_accuracy)
    return {
        rule: (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
        for rule, values in by_rule.items()
    }
