"""The results folder of an experiment: read runs from their journals, write JSON lines, TOML and safetensors."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from safetensors import safe_open

from corymb.client.algorithms.algorithm import ClientAlgorithm
from corymb.client.local_work import algorithm_of
from corymb.server import Journal, RoundRecord
from corymb.server.journal.rows import committed
from corymb.server.rule_settings import RuleSettings
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.results.score import ACCURACY, Score
from corymb.simulations.results.stored import CONFIG, SUMMARY, read_stored, settings_of, stored_settings

FILES = {
    CONFIG, "rounds.jsonl", "clients.jsonl", SUMMARY, "model.safetensors", "report.html", "journals",
    "accuracy.png", "participation.png", "weights.png", "labels.png", "clients.png", "time.png", "bytes.png",
    "figures",
}  # fmt: skip


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of one rule with one seed.

    `score` ranks rules, and `final` is its mean over the tests in the last `evaluate.last` rounds. `others` are such
    means of the task's further metrics. `wall_seconds` is the total time. `tests_another_model` says that clients test
    another model than the one whose training loss they report.
    """

    rule: str
    seed: int
    records: list[RoundRecord]
    final: float
    wall_seconds: float
    model_sha256: str
    score: Score = ACCURACY
    others: Mapping[Score, float] = field(default_factory=dict)
    tests_another_model: bool = False

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        """The rounds with a test, and the score after each; NaN where a model that has diverged has no score."""
        tested = [record for record in self.records if record.server]
        return [record.round for record in tested], [record.server.get(self.score.key, nan) for record in tested]


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
    score, *others = Score.all_of(experiment)
    final = final_score(records, score.key, skipped)
    if final is None:
        raise ValueError(
            f"No test of {rule.title!r} measured {score.name!r}: it is not defined for these examples. Choose another "
            "first metric with task.metrics."
        )
    finals = {other: final_score(records, other.key, skipped) for other in others}
    known = {other: value for other, value in finals.items() if value is not None}
    seconds = sum(record.seconds for record in records)
    algorithm = type(algorithm_of(rule.train_under(experiment.train)))
    another = algorithm.evaluated is not ClientAlgorithm.evaluated
    return FinishedRun(rule.title, seed, records, final, seconds, digest, score, known, another)


def final_score(records: Iterable[RoundRecord], key: str, skipped: int) -> float | None:
    """Return the mean of a metric over the tests after the first `skipped` rounds, or the last test before.

    NaN if one of these tests lacks the metric, as that of a model that has diverged; None if no test has it.
    """
    tested = [(record.round, record.server.get(key, nan)) for record in records if record.server]
    last = [value for server_round, value in tested if server_round > skipped]
    if all(isnan(value) for _, value in tested):
        return None
    return float(np.mean(last or [value for _, value in tested[-1:]]))


def rounds_in(journal: Path) -> int:
    """Return the number of finished rounds in a run's journal; 0 if there is none."""
    return max((record.round for record in committed(journal, 0)), default=0)


def check_results(folder: Path) -> None:
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


def prepare(experiment: Experiment, folder: Path, resume: bool) -> Path | None:
    """Create `folder` for the results of `experiment`. With `resume`, results of the same experiment stay in it.

    Other results in it move to a new folder beside it, which is returned. Raises `ValueError` as `check_results` does,
    and if there is a run to resume but not of this experiment.
    """
    check_results(folder)
    if resume and (folder / CONFIG).exists():
        if stored_settings(folder) != settings_of(experiment):
            raise ValueError(f"The results in {folder} have other settings; leave out --resume, or give another --out.")
        return None
    moved = None
    if folder.exists() and any(folder.iterdir()):
        moved = next(p for p in (folder.with_name(f"{folder.name}.{n}") for n in count(1)) if not p.exists())
        folder.rename(moved)
    (folder / "journals").mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(tomli_w.dumps(experiment.model_dump(mode="json", exclude_none=True)))
    return moved


def write(experiment: Experiment, runs: list[FinishedRun], folder: Path) -> None:
    """Write all files of `folder` but config, plots and report: rounds, clients, summary and the best model."""
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
    models = {(run.rule, run.seed): _last_model(experiment, run, folder) for run in runs}
    shared = [run for run in runs if _has_entries(models[run.rule, run.seed])]  # under "local" there is no such model
    best = max(shared or runs, key=lambda run: run.score.rank(run.final))
    shutil.copyfile(models[best.rule, best.seed], folder / "model.safetensors")
    summary = {
        "name": experiment.name,
        "model": {"rule": best.rule, "seed": best.seed},
        "runs": [
            {
                "rule": run.rule,
                "seed": run.seed,
                "rounds": len(run.records),
                f"final_{run.score.key.replace('-', '_')}": run.final,
                "wall_seconds": run.wall_seconds,
                "model_sha256": run.model_sha256,
            }
            for run in runs
        ],
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


def _last_model(experiment: Experiment, run: FinishedRun, folder: Path) -> Path:
    rule = next(rule for rule in experiment.rules if rule.title == run.rule)
    return journal_folder(folder, rule, run.seed) / f"model-{experiment.rounds:06d}.safetensors"


def _has_entries(model: Path) -> bool:
    with safe_open(model, "np") as file:
        return bool(list(file.keys()))


def finished_runs(folder: Path) -> tuple[Experiment, list[FinishedRun]]:
    """Return the finished experiment in `folder` and its runs. Raises `ValueError` if it has none that can be read."""
    if not ((folder / SUMMARY).exists() and (folder / CONFIG).exists()):
        raise ValueError(f"The folder {folder} has no finished experiment; give a folder such as runs/demo.")
    try:
        experiment = read_stored(folder)
    except ValueError as error:
        problem = str(error).removesuffix(".")
        raise ValueError(
            f"The results in {folder} cannot be read: {problem}; work in the folder that has the modules of the "
            "experiment, or leave out results of another version of Corymb."
        ) from None
    return experiment, collect(experiment, folder)


def _round_row(run: FinishedRun, record: RoundRecord) -> dict[str, Any]:
    row = {
        "rule": run.rule,
        "seed": run.seed,
        "round": record.round,
        "seconds": round(record.seconds, 6),
        "replies": Counter(verdict.code for verdict in record.verdicts),
        "bytes_down": record.bytes_down,
        "bytes_up": record.bytes_up,
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
