"""What an experiment leaves behind: read from the journals, written as JSON lines, TOML and safetensors."""

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
    """One finished run."""

    rule: str
    seed: int
    records: list[RoundRecord]
    final_accuracy: float
    wall_seconds: float
    model_sha256: str

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        """The rounds that were tested, and the test accuracy after each."""
        tested = [record for record in self.records if "accuracy" in record.server]
        return [record.round for record in tested], [record.server["accuracy"] for record in tested]


def journal_folder(folder: Path, rule: RuleSettings, seed: int) -> Path:
    """Where a run keeps its journal."""
    return folder / "journals" / f"{rule.slug}-seed{seed}"


def collect(experiment: Experiment, folder: Path) -> list[FinishedRun]:
    """The runs in `folder`, rule by rule."""
    return [collect_run(experiment, folder, rule, seed) for rule in experiment.rules for seed in experiment.seeds]


def collect_run(experiment: Experiment, folder: Path, rule: RuleSettings, seed: int) -> FinishedRun:
    """The run of `rule` with `seed`, from its journal."""
    with closing(Journal(journal_folder(folder, rule, seed), durable=False)) as journal:
        records = list(journal.rounds())
        digest = journal.model_sha256()
    newest = experiment.rounds - experiment.evaluate.last
    tested = [r.server["accuracy"] for r in records if "accuracy" in r.server]
    last = [r.server["accuracy"] for r in records if "accuracy" in r.server and r.round > newest]
    final = float(np.mean(last or tested[-1:]))
    return FinishedRun(rule.title, seed, records, final, sum(r.seconds for r in records), digest)


def require_free(folder: Path) -> None:
    """Raise `ValueError` for a folder that holds other things than results, or is none."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"There is a file at {folder}; give a folder with --out.")
    names = {path.name for path in folder.iterdir()}
    others = names - FILES
    if names and "journals" not in names:  # a run begins with them
        others = names
    if others:
        raise ValueError(f"The folder {folder} holds {min(others)}, which is no result; give another with --out.")


def prepare(folder: Path) -> None:
    """Make `folder`, without the results of an earlier run in it. Raises `ValueError` as `require_free` does."""
    require_free(folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write(experiment: Experiment, runs: list[FinishedRun], folder: Path) -> None:
    """Write everything but the pictures: config, rounds, clients, summary, and the model of the best run."""
    (folder / "config.toml").write_text(_config(experiment))
    _write_lines(folder / "rounds.jsonl", (_round_row(run, record) for run in runs for record in run.records))
    _write_lines(
        folder / "clients.jsonl",
        (
            {"rule": run.rule, "seed": run.seed, "round": record.round} | _without_gaps(vars(verdict))
            for run in runs
            for record in run.records
            for verdict in record.verdicts
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
    """Whether `folder` has the results of this very experiment, whatever is claimed of it."""
    config = folder / "config.toml"
    if not ((folder / SUMMARY).exists() and config.exists()):
        return False
    try:
        before = Experiment.model_validate(tomllib.loads(config.read_text()))
    except ValueError:  # written when experiments had other settings
        return False
    beside = {"claims", "setting", "engine", "ray"}  # what has no effect on results
    return before.model_dump(exclude=beside) == experiment.model_dump(exclude=beside)


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
    return _without_gaps(row)


def _without_gaps(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value not in (None, "", {})}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def scores(runs: list[FinishedRun]) -> dict[str, tuple[float, float]]:
    """Each rule's final accuracy over its seeds: mean, and standard deviation (0 for one seed)."""
    by_rule: dict[str, list[float]] = {}
    for run in runs:
        by_rule.setdefault(run.rule, []).append(run.final_accuracy)
    return {
        rule: (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
        for rule, values in by_rule.items()
    }
